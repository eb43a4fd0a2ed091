"""The picture of a bench: how fast each decoder is beside plain decoding, and why, prompt by prompt."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seriatim.evaluation.pictures import ACCENT, INK, write_beside

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LOOPING_COLOUR = "#c9ced6"
COLOURS = (INK, ACCENT, "#5b8e7d", "#e0a030", "#7a5c99", "#6b6b6b")


def save_bench(result: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Draw what `bench` returns as a PNG: bars of the rates beside plain decoding, of outputs that loop apart, and for
    each prompt tokens per forward against that ratio."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(result["decoders"])
    figure = Figure(figsize=(11, max(3.6, 1.6 + 0.75 * len(names))), layout="constrained")
    FigureCanvasAgg(figure)
    bars, points = figure.subplots(1, 2, width_ratios=(1.35, 1))
    _bars(bars, names, result["decoders"])
    _points(points, names, result["by_prompt"])
    said = "greedy" if result["temperature"] == 0 else f"temperature {result['temperature']:g}"
    kind = " ".join(filter(None, (result["dtype"], result["weights"], "compiled" if result["compiled"] else "")))
    disturbed = " · DISTURBED by other processes" if result["disturbed"] else ""
    model = Path(str(result["model"])).name
    figure.suptitle(f"{model} · {kind} · {said} · {result['new_tokens']} new tokens{disturbed}", fontsize=11)
    return write_beside(path, lambda file: figure.savefig(file, format="png", dpi=150))


def _bars(axes: Axes, names: Sequence[str], decoders: Mapping[str, Any]) -> None:
    """A bar a decoder and kind of output."""
    most = 1.0
    for place, name in enumerate(names):
        own = decoders[name]
        parts = [own, own["looping"]] if own["outputs"] == "varied" and own["looping"] else [own]
        for n, part in enumerate(parts):
            loops = part is own["looping"] or own["outputs"] == "looping"
            height = 0.72 / len(parts)
            y = place - 0.36 + height * (n + 0.5)
            axes.barh(y, part["ratio"], 0.9 * height, color=LOOPING_COLOUR if loops else COLOURS[place % len(COLOURS)])
            text = f"  {part['ratio']:.2f}   {part['tokens_per_second']:,.1f} tokens/s"
            text += f", {part['mean_accepted_length']:.2f} a forward" + (", looping" if loops else "")
            axes.text(part["ratio"], y, text, va="center", fontsize=8)
            most = max(most, part["ratio"])
    axes.axvline(1.0, color="#808080", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.9 * most)  # room for what stands behind the bars
    axes.set_xlabel("tokens per second, plain decoding is 1")
    axes.spines[["top", "right"]].set_visible(False)


def _points(axes: Axes, names: Sequence[str], prompts: Sequence[Mapping[str, Any]]) -> None:
    """A mark a prompt and decoder, hollow where the output loops."""
    for place, name in enumerate(names):
        if name == "ancestral" and len(names) > 1:
            continue
        colour = COLOURS[place % len(COLOURS)]
        for loops in (False, True):
            some = [p["decoders"][name] for p in prompts if p["looping"] == loops]
            label = name + (", looping" if loops else "")
            if some:
                x, y = ([d[k] for d in some] for k in ("mean_accepted_length", "ratio"))
                axes.scatter(x, y, s=22, facecolors="none" if loops else colour, edgecolors=colour, label=label)
    axes.axhline(1.0, color="#808080", linewidth=0.8, linestyle=":")
    axes.set(xlabel="tokens a forward", ylabel="tokens per second, plain decoding is 1")
    axes.set_title("each prompt", fontsize=10)
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
