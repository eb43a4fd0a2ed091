"""Decoders for which nothing is trained, side by side: how many tokens a forward gives, and what a draft costs.

    python benchmarks/training_free.py [MODEL] [--prompts 24] [--new-tokens 128] [--temperature 0.7] [--arms A,B]
        [--table FILE] [--out results/training_free.json]

Prompts are stretches of held-out files of the standard library. Each is given to every arm once, in turn: an arm that
keeps what it learned ("hot") has seen other prompts, never the same. Outputs that repeat themselves are averaged apart.
Accepted lengths do not depend on the machine or on what else it does; seconds do, and are marked where it was busy.

Beside the figures two pictures: tokens a forward over the first 2,000 tokens, while matrix and table fill, and one
draft tree of each kind. And the time of a search beside that of a forward, which it must not exceed by a tenth.
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from seriatim.canvas import Canvas
from seriatim.data.base import load_data
from seriatim.decoding.guess import Guess
from seriatim.decoding.loop import Decider, Step
from seriatim.decoding.tree_search import MonteCarlo, beam, best_first, drafting_seconds
from seriatim.decoding.trigrams import Adapted
from seriatim.evaluation.bench import Prompt, apart, loops, take_turns
from seriatim.evaluation.cost import DISTURBED, Others, load_average
from seriatim.evaluation.pictures import ACCENT, INK, PALE, write_beside
from seriatim.model import Rows
from seriatim.random import Random
from seriatim.systems.decoder.aded import library_table, read_table
from seriatim.systems.decoders import decoder_of, forget
from seriatim.systems.language_model import LanguageModel
from seriatim.systems.system import Sampling
from seriatim.systems.trials import held_out
from seriatim.training.checkpoint import save_json
from seriatim.verbs.bench import PLAIN, Way, arm, opened
from seriatim.verbs.claim import commit, machine

ARMS = {  # {table}: the file of tri-grams
    PLAIN: PLAIN,
    "prompt-lookup": "prompt-lookup",
    "recycling 12 cold": "token-recycling+hot=false",
    "recycling 12 prompt": "token-recycling+hot=false+prompt=true",
    "recycling 12 hot": "token-recycling",
    "recycling 80 cold": "token-recycling+hot=false+nodes=80",
    "recycling 80 hot": "token-recycling+nodes=80",
    "aded static beam": "aded:{table}+search=beam+bonus=0",
    "aded static best-first": "aded:{table}+search=best-first+bonus=0",
    "aded beam": "aded:{table}+search=beam",
    "aded best-first": "aded:{table}+search=best-first",
    "aded mcts": "aded:{table}",
    "aded mcts hot": "aded:{table}+hot=true",
    "aded no table": "aded",
    "aded no table hot": "aded+hot=true",
}
SEARCHES = {"beam": beam, "best-first": best_first, "mcts": MonteCarlo()}
FILLING = ("recycling 12 hot", "recycling 12 cold", "aded mcts", "aded no table hot")  # drawn over the first tokens
FIRST = 2000  # tokens
SHARE = 0.1  # of a forward, which a search may take
MOVING = 250  # tokens over which the drawn rate is averaged


# ---- what it takes ---------------------------------------------------------------------------------------------------


def measure(system: LanguageModel, arms: Mapping[str, str], prompts: Sequence[Prompt], way: Way) -> dict[str, Any]:
    """Figures of each arm, and how much others used the machine meanwhile."""
    forget(system)
    others = Others()
    total = len(arms) * len(prompts)
    made = {name: arm(system, spec, way) for name, spec in arms.items()}
    written = take_turns(made, prompts, 1, way.seed, lambda done, _: _tell(done, total))
    used = others.share()
    figures = {name: apart(own, written[PLAIN], prompts) for name, own in written.items()}
    told: dict[str, Any] = {"arms": figures, "looping": sum(loops(written[PLAIN]))}
    return told | {"others": used, "load_average": load_average(), "disturbed": used is None or used > DISTURBED}


def _tell(done: int, total: int) -> None:
    print(f"\r{done} of {total} texts", end="" if done < total else "\n", flush=True)


def searching(system: LanguageModel, table: Path, text: Sequence[int], forward: float) -> dict[str, Any]:
    """The median time of a draft by each search while a text is written, in seconds, beside that of a forward."""
    out = {}
    for name, search in SEARCHES.items():
        seconds = statistics.median(drafting_seconds(Adapted(read_table(system, table)), search, text))
        out[name] = {"seconds": seconds, "share_of_forward": seconds / forward, "holds": seconds <= SHARE * forward}
    return out


@dataclass
class Watched:
    """A decider whose steps are noted: how many tokens each gave, and the draft of which most was accepted."""

    inner: Decider
    given: list[int]
    best: tuple[Guess, list[int], int] | None = None  # draft, tokens that were written, the last known token

    @property
    def needs(self) -> frozenset[str]:
        return getattr(self.inner, "needs", frozenset())

    def decide(self, canvas: Canvas, guess: Guess | None, rows: Rows, random: Random) -> Step:
        step = self.inner.decide(canvas, guess, rows, random)
        tokens = step.edits[0].value[0].tolist()
        self.given.append(len(tokens))
        if guess is not None and (self.best is None or len(tokens) > len(self.best[1])):
            assert canvas.length is not None
            self.best = guess, tokens, int(canvas.value["token"][0, canvas.length - 1])
        return step


def filling(system: LanguageModel, spec: str, prompts: Sequence[Prompt], way: Way) -> Watched:
    """The steps of an arm that begins with nothing, over the first tokens."""
    forget(system)
    sampling, noted = Sampling(temperature=way.temperature), Watched(None, [])  # type: ignore[arg-type]
    for prompt in prompts:
        decoding = decoder_of(system, spec, sampling)
        noted.inner = decoding.decider
        watched = replace(decoding, decider=noted)
        system.generate(
            list(prompt.ids), watched, max_new_tokens=way.new_tokens, temperature=way.temperature, seed=way.seed
        )
        if sum(noted.given) >= FIRST:
            break
    return noted


# ---- telling ---------------------------------------------------------------------------------------------------------


def show(result: Mapping[str, Any]) -> None:
    print(f"\n{'':>24} {'tokens a forward':>17} {'looping':>8} {'drafted':>8} {'accepted':>9} {'speed':>7}")
    for name, own in result["arms"].items():
        looping = own["looping"]["mean_accepted_length"] if own["outputs"] == "varied" and own["looping"] else None
        share = own["accepted"] / own["drafted"] if own["drafted"] else 0.0
        print(
            f"{name:>24} {own['mean_accepted_length']:>17.3f} {'' if looping is None else f'{looping:.3f}':>8} "
            f"{own['drafted'] / own['forwards']:>8.1f} {share:>9.1%} {own['ratio']:>7.2f}"
        )
    print("DISTURBED: the speed means nothing" if result["disturbed"] else "")
    for name, own in result.get("searches", {}).items():
        kept = "holds" if own["holds"] else "FAILS"
        print(f"{kept}  a draft by {name}: {own['seconds'] * 1e3:.2f} ms, {own['share_of_forward']:.1%} of a forward")


def draw_filling(steps: Mapping[str, Sequence[int]], path: Path) -> None:
    """Tokens a forward while matrix and table fill: the rate of the last few hundred tokens."""
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for (name, given), colour in zip(steps.items(), (INK, "#8fa3bf", ACCENT, "#e0a030"), strict=False):
        place, rate, written = [], [], 0
        window: list[int] = []
        for n in given:
            window.append(n)
            written += n
            while sum(window) - window[0] >= MOVING:
                window.pop(0)
            if written >= MOVING // 5:  # of fewer it says nothing
                place.append(written)
                rate.append(sum(window) / len(window))
        axes.plot(place, rate, color=colour, label=f"{name}: {sum(given) / len(given):.2f} in all")
    longest = min(max(sum(given) for given in steps.values()), FIRST)
    axes.set(xlabel="tokens written", ylabel=f"tokens a forward, over the last {MOVING}", xlim=(0, longest))
    axes.axhline(1.0, color="#808080", linewidth=0.8, linestyle=":")
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    write_beside(path, lambda file: figure.savefig(file, format="png", dpi=150))


def draw_trees(system: LanguageModel, steps: Mapping[str, Watched], path: Path) -> None:
    """Of each arm the draft of which most was accepted."""
    shown = {name: own.best for name, own in steps.items() if own.best is not None}
    figure = Figure(figsize=(6.2 * len(shown), 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, (guess, tokens, root)) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown.items(),
                                                   strict=True):  # fmt: skip
        _draw_tree(axes, system, guess, tokens, root)
        axes.set_title(f"{name}: {len(tokens)} tokens by one forward", fontsize=11)
    write_beside(path, lambda file: figure.savefig(file, format="png", dpi=150))


def _draw_tree(axes: Any, system: LanguageModel, guess: Guess, tokens: Sequence[int], root: int) -> None:
    value, parent, below, depth = guess.value[0].tolist(), guess.parents(), guess.children(), guess.depths()
    kept, node = {-1}, -1
    for token in tokens:
        node = next((c for c in below[node] if value[c] == token), None)  # type: ignore[assignment]
        if node is None:
            break
        kept.add(node)
    height: dict[int, float] = {}
    leaves = 0

    def place(node: int) -> float:
        nonlocal leaves
        children = [c for c in below[node] if value[c] >= 0]
        if children:
            height[node] = statistics.fmean(place(c) for c in children)
        else:
            height[node], leaves = -leaves, leaves + 1
        return height[node]

    place(-1)
    where = {n: (0 if n < 0 else depth[n], y) for n, y in height.items()}
    for n, (x, y) in where.items():
        colour = ACCENT if n in kept else "#8a93a0"
        if n >= 0:
            above = where[parent[n]]
            axes.plot((above[0], x), (above[1], y), color=colour, linewidth=1.8 if n in kept else 0.7, zorder=1)
        word = _shown(system.tokenizer.decode([root if n < 0 else value[n]]))
        box = {"boxstyle": "round,pad=0.3", "facecolor": "#fbe9e4" if n in kept else PALE, "edgecolor": colour}
        axes.text(x, y, word, ha="center", va="center", fontsize=9, family="monospace", bbox=box)
    axes.set_xlim(-0.5, max(x for x, _ in where.values()) + 0.5)
    axes.set_ylim(min(height.values()) - 0.7, 0.7)
    axes.axis("off")


def _shown(text: str) -> str:
    """A token as one short word: spaces are marked, many of them counted."""
    text = re.sub(" {4,}", lambda run: f"\u2423{len(run[0])}", repr(text)[1:-1] or " ")
    return text.replace(" ", "\u2423")


# ---- the whole -------------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="zoo:text-base")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--prompt-tokens", type=int, default=200)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--arms", help="which, between commas (default: all)")
    parser.add_argument(
        "--table", type=Path, help="of tri-grams (default: those of the standard library, counted once)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/training_free.json"))
    o = parser.parse_args()
    torch.set_num_threads(o.threads)
    chosen = {PLAIN, *(o.arms.split(",") if o.arms else ARMS)}
    if wrong := chosen - ARMS.keys():
        parser.error(f"there is no arm {', '.join(sorted(wrong))}; there are {', '.join(ARMS)}")
    way = Way(o.new_tokens, o.temperature, o.seed, None, o.dtype, False)
    system = opened(o.model, way)
    name = Path(o.model.replace(":", "-")).name
    table = o.table or library_table(system)
    prompts = [Prompt(tuple(ids), "held-out files") for ids in held_out(system, o.prompts, o.prompt_tokens)]
    arms = {key: spec.format(table=table) for key, spec in ARMS.items() if key in chosen}
    result = measure(system, arms, prompts, way)
    plain = result["arms"][PLAIN]
    text = system.prompt_ids(load_data("stdlib", "text").test.documents[0])[:FIRST]
    result["searches"] = searching(system, table, text, plain["seconds"] / plain["forwards"])
    steps = {key: filling(system, arms[key], prompts, way) for key in FILLING if key in arms}
    result["filling"] = {key: own.given for key, own in steps.items()}
    about = {"model": name, "dtype": o.dtype, "prompts": o.prompts, "prompt_tokens": o.prompt_tokens,
             "new_tokens": o.new_tokens, "temperature": o.temperature, "seed": o.seed, "threads": o.threads,
             "table_bytes": table.stat().st_size, "machine": machine(), "commit": commit()}  # fmt: skip
    o.out.parent.mkdir(parents=True, exist_ok=True)
    save_json({**about, **result}, o.out)
    show(result)
    if steps:
        draw_filling({key: own.given for key, own in steps.items()}, o.out.with_name(f"{o.out.stem}_filling.png"))
        draw_trees(system, {k: v for k, v in steps.items() if k in ("recycling 12 hot", "aded mcts")},
                   o.out.with_name(f"{o.out.stem}_trees.png"))  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
