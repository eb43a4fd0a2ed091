"""The picture of ParallelBench: accuracy against tokens a step beside what is possible, and the order of decoding."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seriatim.evaluation.pictures import ACCENT, INK, write_beside

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = (INK, ACCENT, "#5b8e7d", "#e0a030", "#7a5c99", "#2f7fb8", "#a05a2c", "#6b6b6b", "#b8a9c9", "#8aa06b")
COLUMNS = 5


def save_parallel(result: Mapping[str, Any], path: str | os.PathLike[str], length: str | None = None) -> Path:
    """Draw what the study's `measure` returns as a PNG, for lists of one length (None: the longest): a panel a task
    with a curve a decoder, the ceiling of random places dashed; below each the mean turn of each token, one at a
    time."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shapes = {task: by[length] if length in by else by[max(by, key=int)] for task, by in result["tasks"].items()}
    names = list(dict.fromkeys(run["decoder"] for shape in shapes.values() for run in shape["runs"]))
    colour = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    columns = min(COLUMNS, len(shapes))
    rows = -(-len(shapes) // columns)
    figure = Figure(figsize=(3.1 * columns, 4.6 * rows + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2 * rows, columns, squeeze=False, height_ratios=(1.7, 1) * rows)
    for axes in grid.flat[:]:
        axes.set_visible(False)
    for place, (task, shape) in enumerate(shapes.items()):
        row, column = divmod(place, columns)
        _curves(grid[2 * row][column], f"{task}, {shape['tokens']} tokens", shape["runs"], colour)
        _orders(grid[2 * row + 1][column], shape["order"])
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)), fontsize=8, frameon=False)
    figure.suptitle(f"{result['system']} · {result['problems']} problems · temperature {result['temperature']:g}")
    return write_beside(path, lambda file: figure.savefig(file, format="png", dpi=130))


def _curves(axes: Axes, title: str, runs: Sequence[Mapping[str, Any]], colour: Mapping[str, str]) -> None:
    axes.set_visible(True)
    bound = sorted((r["tokens_per_step"], r["ceiling"]) for r in runs if r.get("ceiling") is not None)
    if bound:
        axes.plot(*zip(*bound, strict=True), color="#808080", linestyle="--", linewidth=1.4, label="ceiling (random)")
    for name in dict.fromkeys(run["decoder"] for run in runs):
        points = sorted((r["tokens_per_step"], r["accuracy"]) for r in runs if r["decoder"] == name)
        axes.plot(*zip(*points, strict=True), color=colour[name], marker="o", markersize=3, linewidth=1, label=name)
    axes.set(ylim=(-0.03, 1.05), xlabel="tokens a step", ylabel="right answers")
    axes.set_title(title, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def _orders(axes: Axes, order: Mapping[str, Sequence[float]]) -> None:
    """Pale: early; dark: late."""
    if not order:
        return
    axes.set_visible(True)
    axes.imshow(list(order.values()), aspect="auto", cmap="Blues", vmin=0, vmax=1)
    axes.set_yticks(range(len(order)), list(order), fontsize=6)
    axes.set_xticks(range(len(next(iter(order.values())))))
    axes.tick_params(labelsize=6, length=2)
    axes.set_xlabel("token (pale: early)", fontsize=7)
