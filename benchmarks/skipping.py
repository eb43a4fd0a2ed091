"""Decoders that leave out layers, on one model: what they cost in quality, what they save in time, and what the same
savings cost when they are taken elsewhere.

    python benchmarks/skipping.py MODEL [--tune STEPS] [--routers DIR ...] [--out results]

Quality: nats per token of held-out text behind a prompt, against the share of the weights that is read. `skipdecode` is
beside leaving at the top with as many layers a token; `ffn-skipllm` beside networks and whole layers left out at
random, the latter with as many weights; fixed layers, the best and some at random, beside routers if any were trained.
`--tune` trains an adapter under each plan of whole layers first. Speed: tokens per second beside plain decoding of the
same prompts, in turns; nothing else should run meanwhile. Writes skipping.json, skipping.png and, of routers, which
layers the prompts of several tasks keep, skipping_first.png.
"""

from __future__ import annotations

import argparse
import math
import os
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from seriatim.data.base import load_data
from seriatim.decoding.layers import LayerPlan, Saturation, Staircase
from seriatim.decoding.loop import decode
from seriatim.decoding.sample import SampleAll
from seriatim.evaluation.bench import Arm, Prompt, Written, figures, loops, take_turns
from seriatim.evaluation.cost import DISTURBED, Others, load_average
from seriatim.evaluation.pictures import ACCENT, INK, PALE, write_beside
from seriatim.evaluation.questions import builtin_questions
from seriatim.evaluation.skipping import AtRandom, TopExit, always, best_layers, network_share, text_windows
from seriatim.posttraining.drafting import Base, load_part
from seriatim.posttraining.lora import LoRA
from seriatim.posttraining.routers import Routers
from seriatim.posttraining.skipping import Judged, feedforward_cosines, fitted, judged
from seriatim.random import Keyed
from seriatim.systems.decoders import Decoding
from seriatim.systems.layer_trials import FIT, PROMPT, TUNING, WINDOW, trained
from seriatim.systems.system import Sampling
from seriatim.training.checkpoint import save_json
from seriatim.verbs.claim import commit, machine
from seriatim.verbs.load import load

COLOURS = {"plain": INK, "skipdecode": ACCENT, "top exit": "#7a5c99", "ffn-skipllm": "#5b8e7d"}
COLOURS |= {"random networks": "#a9c9bd", "random layers": "#6b6b6b", "fixed best": "#e0a030", "first": "#2f7fb8"}


def plans(system: Any, ids: torch.Tensor, held_out: torch.Tensor) -> dict[str, dict[str, LayerPlan]]:
    """By family: of each setting its plan. What is chosen, is chosen by `ids`; what is left out at random is as much as
    on the held-out text."""
    model, depth = system.model, system.model.backbone.config.depth
    steps = held_out.shape[1] - PROMPT - 1  # tokens behind the prompt that are carried
    counts = sorted({round(depth * share) for share in (0.85, 0.7, 0.5, 1 / 3)} - {depth}, reverse=True)
    stairs = {f"to {n}": Staircase.linear(depth, n, steps) for n in counts}
    made: dict[str, dict[str, LayerPlan]] = {
        "plain": {"": Staircase((depth,))},
        "skipdecode": dict(stairs),
        "top exit": {name: TopExit(plan.counts, plan.warmup) for name, plan in stairs.items()},
        "ffn-skipllm": {}, "random networks": {}, "random layers": {}, "fixed best": {}, "fixed random": {},
    }  # fmt: skip
    ends, of_network = (1, 1), network_share(system.model)
    for share in (0.9, 0.8, 0.7):
        try:
            plan = fitted(Saturation(0.0, run=2), model, ids, share, PROMPT)
        except ValueError as error:
            print(f"ffn-skipllm at {share}: {error}")
            continue
        gone, name = 1 - judged(model, held_out, PROMPT, plan).share, f"{share:.0%}"
        gone *= steps / (steps - plan.warmup)
        made["ffn-skipllm"][name] = plan
        made["random networks"][name] = AtRandom(1 - gone, "feedforward", *ends, plan.warmup)
        made["random layers"][name] = AtRandom(1 - gone * of_network, "layer", *ends, plan.warmup)
    order = random.Random(0)
    for gone in (1, 2, 3):
        if depth - gone >= 3:
            kept = best_layers(model, ids, PROMPT, depth - gone, (0, depth - 1))
            made["fixed best"][f"{depth - gone}"] = always(kept, model)
            out = order.sample(range(1, depth - 1), gone)
            made["fixed random"][f"{depth - gone}"] = always([i for i in range(depth) if i not in out], model)
    return made


def read_share(system: Any, plan: LayerPlan, computed: float) -> float:
    """Of the weights that a plain step reads (layers and head), those that are read when so many layers, or networks,
    are computed."""
    layers = sum(p.numel() for p in system.model.backbone.layers.parameters())
    head = system.model.heads["token"].weight.numel()
    saved = (1 - computed) * layers * (1.0 if plan.blocks == "layer" else network_share(system.model))
    return (layers + head - saved) / (layers + head)


# ---- measuring -------------------------------------------------------------------------------------------------------


def quality(
    source: str,
    system: Any,
    given: Mapping[str, dict[str, LayerPlan]],
    ids: torch.Tensor,
    tune: int,
    text: torch.Tensor,
) -> dict[str, dict[str, Judged]]:
    """Every plan on held-out text; with `tune` steps, plans of whole layers by a model of their own."""
    found: dict[str, dict[str, Judged]] = {}
    for family, settings in given.items():
        for name, plan in settings.items():
            model = system
            if tune and plan.blocks == "layer" and not isinstance(plan, AtRandom):
                model = trained(load(source), plan, text, replace(TUNING, steps=tune), LoRA(8))
            own = judged(model.model, ids, PROMPT, plan)
            found.setdefault(family, {})[name] = own
            print(f"{family} {name}: {own.share:.3f} computed, {own.loss:.4f} nats", flush=True)
    return found


def speed(system: Any, given: Mapping[str, LayerPlan], prompts: list[Prompt], new: int, runs: int) -> dict[str, Any]:
    """Tokens per second of each plan, beside plain decoding, in turns."""

    def arm(plan: LayerPlan | None) -> Arm:
        def write(prompt: Prompt) -> Written:
            way = Decoding(SampleAll(), target={} if plan is None else {"layers": plan})
            made = system.generate(list(prompt.ids), way, max_new_tokens=new, temperature=0.7, stop=())
            return Written(tuple(made.ids), made.forwards, 0, 0, made.seconds, made.first)

        return write

    arms = {"plain": arm(None)} | {name: arm(plan) for name, plan in given.items()}
    for write in arms.values():
        write(prompts[0])  # warms up
    others = Others()
    written = take_turns(arms, prompts, runs, 0, lambda done, total: None)
    used, load_ = others.share(), load_average()
    told = {name: figures(own, written["plain"]) for name, own in written.items()}
    disturbed = None if used is None else used > DISTURBED
    return {"arms": told, "load_average": load_, "disturbed": disturbed, "looping": loops(written["plain"])}


def pattern(system: Any, plan: LayerPlan, prompt: Prompt, new: int) -> tuple[torch.Tensor, str]:
    """Which blocks each token went through, (layers, tokens), while a text was written; and the text."""
    canvas = system._begun([list(prompt.ids)], new)
    target, rows = system.target(None, Sampling(temperature=0.7), layers=plan), []
    with torch.inference_mode():
        for _ in decode(target, canvas, SampleAll(), None, Keyed(0)):
            route = target.skipping.last
            rows.append([True] * target.skipping.depth if route is None else [bool(run) for run in route.ran])
    return torch.tensor(rows[1:]).T, system.tokenizer.decode(canvas.value["token"][0, len(prompt.ids) :].tolist())


def barcode(system: Any, plan: LayerPlan) -> dict[str, list[list[float]]]:
    """By kind of text, how much each prompt wants each layer (rho)."""
    found: dict[str, list[list[float]]] = {}
    for question in builtin_questions(False):
        canvas = system._begun([system.prompt_ids(question.turns[0])[:LOOKED_AT]], 1)
        target = system.target(None, Sampling(), layers=plan)
        with torch.inference_mode():
            for _ in decode(target, canvas, SampleAll(), None, Keyed(0)):
                pass
        found.setdefault(question.group, []).append(target.skipping.rho[:, 0].tolist())
    return dict(sorted(found.items()))


LOOKED_AT = 256  # tokens of a prompt

# ---- the pictures ----------------------------------------------------------------------------------------------------


def draw(result: Mapping[str, Any], found: Mapping[str, Any], maps: Mapping[str, torch.Tensor], path: Path) -> None:
    """Layers by place, networks by token, cosines by layer, loss by place, loss and speed by what is computed."""
    figure = Figure(figsize=(15, 8.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3)
    for place, (name, rows) in zip(axes[0, :2], maps.items(), strict=False):
        place.imshow(rows.float(), aspect="auto", origin="lower", cmap=_two(), interpolation="nearest", vmin=0, vmax=1)
        place.set(title=name, xlabel="token behind the prompt", ylabel="layer")
    cosines = torch.tensor(result["cosines"])
    axes[0, 2].fill_between(range(cosines.shape[1]), cosines[1], cosines[2], color=PALE)
    axes[0, 2].plot(cosines[0], color=INK, marker=".")
    axes[0, 2].set(title="what a network leaves as it was", xlabel="layer", ylabel="cosine (mean, 10 to 90 %)")
    plain = found["plain"][""]
    for name, own in found["skipdecode"].items():
        over = (own.nats - plain.nats).mean(0)
        smooth = over.unfold(0, SMOOTH, 1).mean(-1) if len(over) >= SMOOTH else over
        axes[1, 0].plot(smooth, label=f"skipdecode {name}", linewidth=1)
    axes[1, 0].axhline(0, color="#808080", linewidth=0.8, linestyle=":")
    axes[1, 0].set(
        title="loss by place", xlabel="token behind the prompt", ylabel=f"nats over plain, {SMOOTH} together"
    )
    axes[1, 0].legend(fontsize=7)
    for family, settings in result["quality"].items():
        points = sorted((own["read"], own["over_plain"]) for own in settings.values())
        axes[1, 1].plot(*zip(*points, strict=True), marker="o", label=family, color=COLOURS.get(family, "#b0b0b0"))
    axes[1, 1].set(title="what it costs", xlabel="share of weights that is read", ylabel="nats per token over plain")
    axes[1, 1].legend(fontsize=7)
    for name, own in result["speed"]["arms"].items():
        if name in result["read"]:
            colour = COLOURS[name.split(" ")[0]]
            axes[1, 2].scatter(1 / result["read"][name], own["ratio"], color=colour)
            axes[1, 2].annotate(name, (1 / result["read"][name], own["ratio"]), fontsize=7, ha="right", va="bottom")
    limits = [1, max(1 / min(result["read"].values(), default=1.0), 1.05)]
    axes[1, 2].plot(limits, limits, color="#808080", linewidth=0.8, linestyle=":")
    axes[1, 2].set(title="what it saves", xlabel="weights: plain over read", ylabel="tokens per second over plain")
    disturbed = " · DISTURBED by other processes" if result["speed"]["disturbed"] else ""
    tuned = f" · tuned {result['tune']} steps" if result["tune"] else " · not tuned"
    figure.suptitle(f"{Path(result['model']).name}{tuned}{disturbed}", fontsize=11)
    write_beside(path, lambda file: figure.savefig(file, format="png", dpi=130))


SMOOTH = 16


def draw_barcodes(wanted: Mapping[str, Mapping[str, list[list[float]]]], path: Path) -> None:
    """For each folder of routers, a row a prompt and a column a layer: light where it is skipped."""
    figure = Figure(figsize=(4.5 * len(wanted) + 1.5, 6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, groups) in zip(figure.subplots(1, len(wanted), squeeze=False)[0], wanted.items(), strict=True):
        rows = torch.tensor([row for group in groups.values() for row in group])
        axes.imshow(rows >= 0.5, aspect="auto", cmap=_two(), interpolation="nearest", vmin=0, vmax=1)
        ends = torch.tensor([len(group) for group in groups.values()]).cumsum(0)
        for end in ends[:-1].tolist():
            axes.axhline(end - 0.5, color=ACCENT, linewidth=1)
        middles = [end - len(group) / 2 - 0.5 for end, group in zip(ends.tolist(), groups.values(), strict=True)]
        axes.set_yticks(middles, list(groups), fontsize=8)
        axes.set(title=f"{name}: layers that prompts keep", xlabel="layer")
    write_beside(path, lambda file: figure.savefig(file, format="png", dpi=130))


def _two() -> Any:
    from matplotlib.colors import ListedColormap

    return ListedColormap([PALE, INK])


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("model")
    parser.add_argument("--tune", type=int, default=0, help="steps of an adapter under each plan of whole layers")
    parser.add_argument("--routers", nargs="*", default=[], help="folders that `seriatim train first` wrote")
    parser.add_argument("--windows", type=int, default=24, help="of held-out text")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path, default=Path("results"))
    return parser.parse_args()


def told(system: Any, given: Any, found: Mapping[str, dict[str, Judged]]) -> dict[str, dict[str, dict[str, float]]]:
    """Quality in numbers."""
    plain = found["plain"][""].loss
    return {
        family: {
            name: {
                "computed": own.share, "read": read_share(system, given[family][name], own.share), "loss": own.loss,
                "perplexity": math.exp(own.loss), "over_plain": own.loss - plain,
            }
            for name, own in settings.items()
        }
        for family, settings in found.items()
    }  # fmt: skip


def main() -> None:
    o = options()
    system, data = load(o.model), load_data("stdlib", "text")
    fit = text_windows(system, data.train.documents, FIT, WINDOW)
    text = text_windows(system, data.train.documents, 800, WINDOW) if o.tune else fit
    held_out = text_windows(system, data.test.documents, o.windows, WINDOW)
    cosines = feedforward_cosines(system.model, fit).flatten(1).float()
    given = plans(system, fit, held_out)
    for folder in o.routers:
        given.setdefault("first", {})[Path(folder).name] = load_part(folder, Base(system), Routers).plan()
    found = quality(o.model, system, given, held_out, o.tune, text)
    system.model.to(getattr(torch, o.dtype))
    prompts = [Prompt(tuple(row[:PROMPT].tolist()), "code") for row in held_out[: o.prompts]]
    depth = system.model.backbone.config.depth
    timed: dict[str, LayerPlan] = {
        f"skipdecode {name}": Staircase.linear(depth, plan.counts[-1], o.new_tokens)
        for name, plan in given["skipdecode"].items()
        if isinstance(plan, Staircase)
    }
    timed |= {f"{family} {name}": p for family in ("ffn-skipllm", "first") for name, p in given.get(family, {}).items()}
    written = {name: pattern(system, plan, prompts[0], o.new_tokens) for name, plan in timed.items()}
    maps = {name: rows for name, (rows, _) in written.items()}
    result = {
        "model": str(o.model), "tune": o.tune, "windows": len(held_out), "prompt": PROMPT, "window": WINDOW,
        "quality": told(system, given, found), "network_share": network_share(system.model),
        "cosines": [cosines.mean(1).tolist(), *(cosines.quantile(q, 1).tolist() for q in (0.1, 0.9))],
        "thresholds": {n: p.threshold for n, p in given["ffn-skipllm"].items() if isinstance(p, Saturation)},
        "fixed_best": {n: p.bias.gt(0).tolist() for n, p in given["fixed best"].items()},  # type: ignore[attr-defined]
        "wanted": {name: barcode(system, plan) for name, plan in given.get("first", {}).items()},
        "read": {name: read_share(system, timed[name], float(maps[name].float().mean())) for name in timed},
        "texts": {name: text for name, (_, text) in written.items()},
        "speed": speed(system, timed, prompts, o.new_tokens, o.runs), "new_tokens": o.new_tokens, "dtype": o.dtype,
        "threads": torch.get_num_threads(), "torch": torch.__version__, "machine": machine(), "commit": commit(),
    }  # fmt: skip
    save_json(result, o.out / "skipping.json")
    shown = [n for n in maps if n.startswith("skipdecode")][-1:] + [n for n in maps if n.startswith("ffn")][-1:]
    draw(result, found, {name: maps[name] for name in shown}, o.out / "skipping.png")
    if result["wanted"]:
        draw_barcodes(result["wanted"], o.out / "skipping_first.png")
    for name, own in result["speed"]["arms"].items():
        print(f"{name}: {own['tokens_per_second']:.1f} tokens/s, {own['ratio']:.2f} of plain")


if __name__ == "__main__":
    main()
