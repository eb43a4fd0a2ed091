"""A small model drafts for a large one: chains, trees of growing size, several drafts; and windows on pictures.

    python benchmarks/speculative.py [MODEL] [DRAFT] [--prompts 24] [--new-tokens 128] [--temperature 1.0]
        [--pictures zoo:raster-ar] [--out results/speculative.json]

Prompts are stretches of held-out files of the standard library; outputs that repeat themselves are averaged apart.
Tokens a forward do not depend on the machine; seconds do, and are marked where it was busy. The cost of a forward over
n rows is measured in the same run, and says what each arm should gain.

Pictures beside the figures: tokens, cost and their ratio against the nodes of a tree; one round as a tree; a text with
its tokens coloured by where they come from; pictures drawn plainly and by windows, and when each element was decided.
"""

from __future__ import annotations

import argparse
import html
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor
from training_free import Text, draw_trees, written

from seriatim.evaluation.acceptance import best_acceptance, kseq_acceptance, recursive_acceptance
from seriatim.evaluation.bench import Prompt, apart, loops, take_turns
from seriatim.evaluation.cost import DISTURBED, Others, load_average
from seriatim.evaluation.forward_cost import ForwardCost, measured
from seriatim.evaluation.pictures import ACCENT, INK, save_grid, write_beside
from seriatim.systems.draft_model import draft_model
from seriatim.systems.language_model import LanguageModel
from seriatim.systems.system import Sampling
from seriatim.systems.trials import held_out
from seriatim.training.checkpoint import save_json
from seriatim.verbs.bench import PLAIN, Way, arm, opened
from seriatim.verbs.claim import commit, machine
from seriatim.verbs.load import load

NODES = (1, 2, 4, 8, 12, 16, 24, 32)
ARMS = {  # {draft}: the small model, {more}: how its tokens are exchanged
    PLAIN: PLAIN,
    **{f"chain of {n}": f"spec-sampling:{{draft}}+draft_length={n}{{more}}" for n in (2, 4, 6)},
    **{f"tree of {n}": f"tree-verify:{{draft}}+nodes={n}+depth=6{{more}}" for n in NODES},
    "tree of 12, distinct": "tree-verify:{draft}+nodes=12+siblings=distinct{more}",
    "tree of 12, independent": "tree-verify:{draft}+nodes=12+siblings=independent{more}",
    **{f"{k} drafts of 4": f"spectr:{{draft}}+drafts={k}{{more}}" for k in (1, 2, 4)},
}
WINDOWS = {
    "plain": PLAIN, "window 8": "sjd+window=8", "window 16": "sjd+window=16",
    "window 8, vertical": "sjd+window=8+initialiser=vertical", "window 8, random": "sjd+window=8+initialiser=random",
}  # fmt: skip
COLOURS = {"accepted": "#cfe3d6", "corrected": "#f4cfc6", "bonus": "#cdd9ee", "plain": "#ffffff"}
LETTERS = 2000  # of the coloured text
PLACES = 400  # laws that rules of acceptance are compared on


# ---- texts -----------------------------------------------------------------------------------------------------------


def texts(system: LanguageModel, arms: Mapping[str, str], prompts: Sequence[Prompt], way: Way) -> dict[str, Any]:
    """Figures of each arm, beside what the cost of forwards predicts, and whether others used the machine."""
    others = Others()
    total = len(arms) * len(prompts)
    made = {name: arm(system, spec, way) for name, spec in arms.items()}
    written = take_turns(made, prompts, 1, way.seed, lambda done, _: _tell(done, total))
    context = round(statistics.median(len(p.ids) for p in prompts)) + way.new_tokens // 2
    cost, used = measured(system, context), others.share()
    figures = {name: apart(own, written[PLAIN], prompts, cost) for name, own in written.items()}
    told: dict[str, Any] = {"arms": figures, "looping": sum(loops(written[PLAIN])), "forward_cost": asdict(cost)}
    return told | {"others": used, "load_average": load_average(), "disturbed": used is None or used > DISTURBED}


def _tell(done: int, total: int) -> None:
    print(f"\r{done} of {total} texts", end="" if done < total else "\n", flush=True)


def acceptances(system: LanguageModel, small: LanguageModel, prompts: Sequence[Prompt], way: Way) -> dict[str, Any]:
    """How often one of k drafts is accepted where both models read held-out texts: each rule, and the best there is."""
    warp, laws = Sampling(temperature=way.temperature).warp, []
    for model in (system, small):
        said = [model.logits(torch.tensor([list(p.ids)]))[0, 50::10] for p in prompts]
        rows = torch.cat(said)[:PLACES].double()
        laws.append(torch.softmax(rows / max(warp.temperature, 1e-3), -1))
    rules = {"best": best_acceptance, "K-SEQ": kseq_acceptance, "recursive": recursive_acceptance}
    return {
        str(k): {name: float(rule(*laws, k).mean()) for name, rule in rules.items()} for k in (1, 2, 4, 8)
    }  # fmt: skip


def colour(system: LanguageModel, prompt: Prompt, text: Text, path: Path) -> None:
    """A page: accepted, corrected and bonus tokens, and tokens a forward."""
    marks = [f'<span style="background:{c}">{name}</span>' for name, c in COLOURS.items()]
    body = "".join(
        f'<span style="background:{COLOURS[kind]}">{html.escape(system.tokenizer.decode([i]))}</span>'
        for i, kind in zip(text.ids, text.steps.origin, strict=False)
    )
    before = html.escape(system.tokenizer.decode(list(prompt.ids))[-LETTERS:])
    rate = len(text.ids) / len(text.steps.given)
    page = (
        f"<meta charset=utf-8><title>drafted</title><p>{' '.join(marks)} · {rate:.2f} tokens a forward</p>"
        f'<pre style="line-height:1.5"><span style="color:#8a93a0">{before}</span>{body}</pre>'
    )
    write_beside(path, lambda file: file.write(page.encode()))


def draw_budget(result: Mapping[str, Any], path: Path) -> None:
    """Tokens a forward E(N), its cost t(N), and what the two leave, against the nodes of a tree."""
    cost = ForwardCost(**{k: tuple(v) if isinstance(v, list) else v for k, v in result["forward_cost"].items()})
    arms = [(n, result["arms"][f"tree of {n}"]) for n in NODES if f"tree of {n}" in result["arms"]]
    nodes = [n for n, _ in arms]
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(
        nodes, [own["mean_accepted_length"] for _, own in arms], color=INK, marker="o", label="E: tokens a forward"
    )
    axes.plot(nodes, [cost.t(n + 1) for n in nodes], color="#8fa3bf", marker="o", label="t: cost of a forward")
    axes.plot(nodes, [own["predicted_ratio"] for _, own in arms], color=ACCENT, marker="o", label="E / (t + draft)")
    axes.plot(nodes, [own["decode_ratio"] for _, own in arms], color=ACCENT, linestyle=":", label="measured")
    axes.axhline(1.0, color="#808080", linewidth=0.8, linestyle=":")
    axes.set(xlabel="nodes of the tree", xscale="log", xticks=nodes, xticklabels=map(str, nodes))
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    write_beside(path, lambda file: figure.savefig(file, format="png", dpi=150))


def show(result: Mapping[str, Any]) -> None:
    print(f"\n{'':>24} {'tokens a forward':>17} {'rows':>6} {'predicted':>10} {'measured':>9} {'looping':>8}")
    for name, own in result["arms"].items():
        looping = own["looping"]["mean_accepted_length"] if own["outputs"] == "varied" and own["looping"] else None
        print(
            f"{name:>24} {own['mean_accepted_length']:>17.3f} {own['mean_rows']:>6.1f} {own['predicted_ratio']:>10.2f} "
            f"{own['decode_ratio']:>9.2f} {'' if looping is None else f'{looping:.3f}':>8}"
        )
    print("DISTURBED: predicted and measured mean nothing" if result["disturbed"] else "")
    for k, rules in result["acceptance"].items():
        print(f"one of {k} drafts is accepted: " + ", ".join(f"{name} {x:.3f}" for name, x in rules.items()))


# ---- pictures --------------------------------------------------------------------------------------------------------


def windows(source: str, count: int, out: Path) -> dict[str, Any]:
    """Forwards of a picture by each arm, one picture at a time; grids, and when each element was decided."""
    system: Any = load(source)
    labels = torch.linspace(0, system.config.classes - 1, count).long()
    told, grids, orders = {}, [], []
    for name, spec in WINDOWS.items():
        made = [system.draw(label[None], seed=n, film=True, decoder=spec) for n, label in enumerate(labels)]
        forwards = [p.forwards for p in made]
        told[name] = {"forwards": statistics.fmean(forwards), "seconds": statistics.median(p.seconds for p in made)}
        grids.append(torch.cat([p.images for p in made]))
        orders.append(torch.cat([_fixed(p.decided) for p in made]))
        print(f"{name:>24} {told[name]['forwards']:>8.1f} forwards a picture")
    look = {"columns": count, "row_labels": list(WINDOWS), "invert": True}
    save_grid(torch.cat(grids), out.with_name(f"{out.stem}_pictures.png"), upscale=2, **look)
    save_grid(torch.cat(orders), out.with_name(f"{out.stem}_windows.png"), upscale=8, **look)
    return told


def _fixed(decided: Tensor | None) -> Tensor:
    """How many elements were decided by the forward that decided each: pale alone, dark among many."""
    assert decided is not None
    flat = decided.flatten(1)
    many = (flat[:, :, None] == flat[:, None]).sum(-1).clamp(max=8)
    return (2 * (many - 1) / 7 - 1).view(len(decided), 1, *decided.shape[1:])


# ---- the whole -------------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="zoo:text-base")
    parser.add_argument("draft", nargs="?", default="zoo:text-draft")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--prompt-tokens", type=int, default=200)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--translate", action="store_true", help="exchange ids whose texts agree")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--arms", help="which, between commas (default: all)")
    parser.add_argument("--pictures", default="zoo:raster-ar", help="a raster generator; none: no pictures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/speculative.json"))
    o = parser.parse_args()
    torch.set_num_threads(o.threads)
    if wrong := set(o.arms.split(",") if o.arms else ()) - ARMS.keys():
        parser.error(f"there is no arm {', '.join(sorted(wrong))}; there are {', '.join(ARMS)}")
    way = Way(o.new_tokens, o.temperature, o.seed, None, o.dtype, False)
    system = opened(o.model, way)
    chosen = {PLAIN, *(o.arms.split(",") if o.arms else ARMS)}
    more = "+translate=true" if o.translate else ""
    arms = {name: spec.format(draft=o.draft, more=more) for name, spec in ARMS.items() if name in chosen}
    prompts = [Prompt(tuple(ids), "held-out files") for ids in held_out(system, o.prompts, o.prompt_tokens)]
    result = texts(system, arms, prompts, way)
    result["acceptance"] = acceptances(system, draft_model(o.draft, system, o.translate), prompts, way)
    o.out.parent.mkdir(parents=True, exist_ok=True)
    draw_budget(result, o.out.with_name(f"{o.out.stem}_budget.png"))
    name = next(n for n in ("tree of 12", *arms) if n in arms and n != PLAIN)
    text = written(system, arms[name], prompts[:1], way)
    colour(system, prompts[0], text, o.out.with_name(f"{o.out.stem}_text.html"))
    draw_trees(system, {name: text}, o.out.with_name(f"{o.out.stem}_tree.png"))
    show(result)
    if o.pictures != "none":
        result["windows"] = windows(o.pictures, 12, o.out)
    about = {"model": o.model, "draft": o.draft, "translated": o.translate, "dtype": o.dtype, "prompts": o.prompts,
             "prompt_tokens": o.prompt_tokens, "new_tokens": o.new_tokens, "temperature": o.temperature,
             "seed": o.seed, "threads": o.threads, "machine": machine(), "commit": commit()}  # fmt: skip
    save_json({**about, **result}, o.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
