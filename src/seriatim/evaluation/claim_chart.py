"""What a claim's arms came to, seed by seed: one look says whether the difference is larger than the noise."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from seriatim.evaluation.pictures import ACCENT, INK, PALE, write_beside

GREY = "#8a93a3"


def save_claim(result: Mapping[str, Any], path: str | Path) -> Path:
    """One line an arm: a dot a seed, a bar at their mean; behind them the noise, three standard deviations to either
    side of the baseline's mean. result: what `seriatim claim` writes, its baseline the first of `arms`. Raises
    ValueError where no arm has the claim's metric."""
    metric = result["metric"]
    arms = {name: [run[metric] for run in runs if _is_number(run.get(metric))] for name, runs in result["arms"].items()}
    arms = {name: values for name, values in arms.items() if values}
    if not arms:
        raise ValueError(f"no arm of {result['key']} has a {metric}")
    baseline = next(iter(arms))
    ours = next((n for n, v in arms.items() if n != baseline and statistics.fmean(v) == result["ours"]), None)
    figure = Figure(figsize=(7.2, 1.1 + 0.34 * len(arms)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    if len(arms[baseline]) > 1:
        middle, noise = statistics.fmean(arms[baseline]), 3 * statistics.stdev(arms[baseline])
        axes.axvspan(middle - noise, middle + noise, color=PALE, zorder=0)
    for i, (name, values) in enumerate(arms.items()):
        colour = ACCENT if name == ours else INK if name == baseline else GREY
        axes.plot(values, [i] * len(values), "o", color=colour, alpha=0.6, markersize=6, markeredgewidth=0)
        axes.plot([statistics.fmean(values)] * 2, [i - 0.3, i + 0.3], color=colour, linewidth=2)
    axes.set_yticks(range(len(arms)), [f"{n} (baseline)" if n == baseline else n for n in arms], fontsize=9)
    for label, name in zip(axes.get_yticklabels(), arms, strict=True):
        label.set_color(ACCENT if name == ours else INK if name == baseline else "#4a5160")
    axes.invert_yaxis()
    axes.set_xlabel(str(metric).replace("_", " "), fontsize=9)
    axes.set_title(f"{result['key']}: {result['verdict']}", fontsize=10, color=INK, loc="left")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.25)
    return write_beside(path, lambda file: figure.savefig(file, format="png", dpi=120))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and value == value
