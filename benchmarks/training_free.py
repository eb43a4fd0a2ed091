"""Decoders for which nothing is trained, side by side: how many tokens a forward gives, and what a draft costs.

    python benchmarks/training_free.py [MODEL] [--prompts 24] [--new-tokens 128] [--temperature 0.7] [--arms A,B]
        [--table FILE] [--out results/training_free.json]

Prompts are stretches of held-out files of the standard library. Each is given to every arm once, in turn: an arm that
keeps what it learned ("hot") has seen other prompts, never the same. Outputs that repeat themselves are averaged apart.
Accepted lengths do not depend on the machine or on what else it does; seconds do, and are marked where it was busy.

Beside the figures pictures: tokens a forward over the first 2,000 tokens, while matrix and table fill; one draft tree
of each kind; tokens a forward along one long file of the library, with a table that adapts to it and one that does not
(the file stands for what a model writes); and one search, with its visits. And the time of a search beside that of a
forward, of which it must not take more than a tenth.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from seriatim.canvas import Canvas
from seriatim.data.base import load_data
from seriatim.decoding.guess import Guess
from seriatim.decoding.loop import Decider, Step
from seriatim.decoding.tree_search import MonteCarlo, accepted_along, beam, best_first, drafting_seconds
from seriatim.decoding.trigrams import Adapted, no_trigrams
from seriatim.evaluation.bench import Prompt, apart, loops, take_turns
from seriatim.evaluation.cost import DISTURBED, Others, load_average
from seriatim.evaluation.draft_trees import Drafted, Watched, save_trees
from seriatim.evaluation.searches import save_rates, searched
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
ALONG = 6000  # tokens of one long file
WINDOW = 16  # tokens whose tri-grams are raised before each draft, as in `SearchedDraft`


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


def along(system: LanguageModel, table: Path, text: Sequence[int]) -> dict[str, list[int]]:
    """Tokens a forward while a model writes this very text, with a table that adapts to it and with one that does not;
    and with a table of this text alone."""
    counted = read_table(system, table)
    tables = {
        "the library's, adapting": Adapted(counted), "the library's as it is": Adapted(counted, bonus=0.0),
        "none, adapting": Adapted(no_trigrams(counted.vocab)),
    }  # fmt: skip
    return {name: accepted_along(own, MonteCarlo(), text) for name, own in tables.items()}


def draw_search(system: LanguageModel, table: Path, text: Sequence[int], given: Sequence[int], path: Path) -> None:
    """Of the searches along a text whose draft gave four tokens or more one that is neither a chain nor a page long."""
    adapted, n, found = Adapted(read_table(system, table)), 2, list[tuple[Drafted, int]]()
    for step in given:
        adapted.reinforce(text[max(n - WINDOW, 0) : n])
        if step >= 4:
            found.append((searched(MonteCarlo(), adapted, text[:n]), step))
        n += step
    if found:
        chosen, step = min(found, key=lambda pair: abs(len(pair[0].token) - 24))
        title = f"a search with its visits; dark: drafted, {step - 1} stood"
        save_trees([chosen], lambda i: system.tokenizer.decode([i]), path, title)


@dataclass
class Noted:
    """A decider whose steps are noted: how many tokens each gave, and where each of them comes from."""

    inner: Decider
    given: list[int] = field(default_factory=list)
    origin: list[str] = field(default_factory=list)

    @property
    def needs(self) -> frozenset[str]:
        return getattr(self.inner, "needs", frozenset())

    def decide(self, canvas: Canvas, guess: Guess | None, rows: Rows, random: Random) -> Step:
        step = self.inner.decide(canvas, guess, rows, random)
        drafted, accepted, count = int(step.drafted), int(step.accepted), step.edits[0].value.shape[1]
        own = "plain" if not drafted else "corrected" if accepted < drafted else "bonus"
        self.given.append(count)
        self.origin += ["accepted"] * accepted + [own] * (count - accepted)
        return step


class Text(NamedTuple):
    """What was noted while texts were written: steps, drafts, and the ids of the last text."""

    steps: Noted
    drafts: list[Drafted]
    ids: list[int]


def written(system: LanguageModel, spec: str, prompts: Sequence[Prompt], way: Way, most: int | None = None) -> Text:
    """Texts one after another by an arm that begins with nothing; as many as make so many tokens."""
    forget(system)
    steps, drafts, ids = Noted(None), list[Drafted](), list[int]()  # type: ignore[arg-type]
    for prompt in prompts:
        decoding = decoder_of(system, spec, Sampling(temperature=way.temperature))
        steps.inner, watched = decoding.decider, Watched(decoding.proposer)  # type: ignore[arg-type]
        made: Any = system.generate(
            list(prompt.ids), replace(decoding, decider=steps, proposer=watched), max_new_tokens=way.new_tokens,
            temperature=way.temperature, seed=way.seed,
        )  # fmt: skip
        ids = made.ids
        drafts += watched.drafts
        if most is not None and sum(steps.given) >= most:
            break
    return Text(steps, drafts, ids)


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


def draw_trees(system: LanguageModel, texts: Mapping[str, Text], path: Path) -> None:
    """Of each arm the draft of which most stood."""
    best = {name: max(text.drafts, key=lambda d: len(d.stood)) for name, text in texts.items() if text.drafts}
    title = " · ".join(f"{name}: {len(draft.stood) + 1} tokens by one forward" for name, draft in best.items())
    save_trees(list(best.values()), lambda i: system.tokenizer.decode([i]), path, title)


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
    longest = max(load_data("stdlib", "text").test.documents, key=len)
    file = system.prompt_ids(longest)[:ALONG]
    result["along"] = along(system, table, file)
    texts = {key: written(system, arms[key], prompts, way, FIRST) for key in FILLING if key in arms}
    result["filling"] = {key: own.steps.given for key, own in texts.items()}
    about = {"model": name, "dtype": o.dtype, "prompts": o.prompts, "prompt_tokens": o.prompt_tokens,
             "new_tokens": o.new_tokens, "temperature": o.temperature, "seed": o.seed, "threads": o.threads,
             "table_bytes": table.stat().st_size, "machine": machine(), "commit": commit()}  # fmt: skip
    o.out.parent.mkdir(parents=True, exist_ok=True)
    save_json({**about, **result}, o.out)
    show(result)
    save_rates(
        result["along"], o.out.with_name(f"{o.out.stem}_along.png"), title="one long file, by tables of tri-grams"
    )
    draw_search(system, table, file, next(iter(result["along"].values())), o.out.with_name(f"{o.out.stem}_search.png"))
    if texts:
        save_rates(result["filling"], o.out.with_name(f"{o.out.stem}_filling.png"), FIRST)
        draw_trees(system, {k: v for k, v in texts.items() if k in ("recycling 12 hot", "aded mcts")},
                   o.out.with_name(f"{o.out.stem}_trees.png"))  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
