"""The page of image systems after equal training: figures, map, statements and orders, from what was stored alone."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from seriatim.evaluation.charts import MARKS, by_kind
from seriatim.evaluation.pictures import ACCENT, INK, write_beside
from seriatim.evaluation.report import Result, cards, count_text, grid, seconds_text, write_report

LEVELS = {"pixel": ACCENT, "token": INK, "scale": "#5b8e7d"}
SHAPES = dict(zip(("circle", "square", "diamond", "triangle"), "osD^", strict=True))
JUDGED = ("fd_s", "accuracy", "precision", "recall", "density", "coverage", "spread", "nearest")
MAP = (
    "key", "level", "element", "order", "groups", "visibility", "feed", "head", "likelihood", "steps", "forwards",
    "growth", "cache", "tasks",
)  # fmt: skip


def save_image_survey(
    result: Mapping[str, Any], coverage: Sequence[Sequence[object]], statements: Sequence[Sequence[object]],
    path: str | os.PathLike[str],
) -> Path:  # fmt: skip
    """Write the page. result: what `studies.image_comparison` stores; coverage: (level, element, way, systems) of each
    cell; statements: (what is said, whether it holds, by which figures)."""
    levels = level_of(result)
    keys = sorted(result["systems"], key=lambda k: (list(LEVELS).index(levels[k]), k))
    rows = [_row(key, result["systems"][key], levels[key], result["command"]) for key in keys]
    rows += [_reference(name, found) for name, found in result["references"].items()]
    sections = {
        "Quality against forwards": cards({"FD-s (lower is better), by what the sequence is made of": _chart(result)}),
        "What the survey says, read off the columns": grid(("statement", "holds", "by"), statements),
        "The map: every image system, as it was watched": _map(result["taxonomy"]),
        "Cells of the map": grid(("level", "element", "a step decides", "systems"), coverage),
        "Orders, each at the size of its defaults": cards(dict(result["films"])),
    }
    return write_report(path, f"Image systems on {result['budget']['data']}", rows, _notes(result), sections=sections)


def level_of(result: Mapping[str, Any]) -> dict[str, str]:
    """The level of each system."""
    return {row["key"]: row["level"] for row in result["taxonomy"]}


def _row(key: str, found: Mapping[str, Any], level: str, command: str) -> Result:
    bits = found.get("bits_per_code")
    figures: dict[str, Any] = {
        "level": level,
        **{name: found.get(name) for name in JUDGED},
        "bits an id": None if bits is None else f"{'≤ ' if found['likelihood'] == 'bound' else ''}{bits:.3f}",
        "of the ids of": found["tokenizer"], "forwards": found["forwards"], "seconds": found["seconds"],
        "alone": seconds_text(found["seconds_alone"]),
        "memory": found["memory"], "parameters": found["parameters"], "training_seconds": found["training_seconds"],
        "steps reached": f"{found['steps']:,} of {found['batch']}",
    }  # fmt: skip
    shape = {name: found[name] for name in ("size", "width", "tokenizer", "tokenizer_from") if name in found}
    return Result(
        key, found["title"], figures, grid=base64.b64decode(found["strip"]), settings=shape,
        command=f"{command} --systems {key}",
    )  # fmt: skip


def _reference(name: str, found: Mapping[str, Any]) -> Result:
    return Result(
        name, "no system", {k: found.get(k) for k in JUDGED} | {"level": "–"}, grid=base64.b64decode(found["strip"])
    )


def _notes(result: Mapping[str, Any]) -> list[str]:
    budget, (train, test, classes) = result["budget"], result["pictures"]
    minutes, systems = budget["minutes"], result["systems"].values()
    used = sorted(found["parameters"] for found in systems)
    loads = sorted(found["load"] for found in systems)
    first: Mapping[str, Any] = next(iter(systems))
    return [
        f"{minutes:g} minutes of training each, one seed ({budget['seed']}): a small budget. It says which systems "
        "learn fast on small pictures, not which are best; small differences mean nothing.",
        f"{budget['data']}: {train:,} pictures for training, {test:,} held out, {classes} classes. Figures are on "
        f"{budget['samples']} samples by each system's own way to sample, guidance included, against all held-out "
        f"pictures. Features: {first.get('feature_model', '–')}.",
        f"Parameters: each width is chosen so that they are nearest to {budget['parameters']:,}: "
        f"{count_text(used[0])} to {count_text(used[-1])}. Tokenizers are apart, and were trained before.",
        "Steps reached: of so many pictures each, the recipe's batch, or fewer where pictures have many elements. "
        "Bits an id compare only systems over the ids of the same tokenizer.",
        "Trained in this order, drawn by the seed: " + ", ".join(result["order"]) + ".",
        f"Load average after pictures were drawn: {loads[0]:.1f} to {loads[-1]:.1f}; times a sample are in batches of "
        "up to 100, and alone.",
        "Below the systems: held-out pictures drawn anew (where data are augmented, else themselves) are the best that "
        "can be hoped for; copies of training pictures show what memorising scores, and a distance to the nearest "
        "training picture far below that of held-out ones is a sign of it.",
        f"Made by {result['command']} ({result['machine']}, {str(result['commit'])[:12]}); "
        f"{seconds_text(sum(f['training_seconds'] for f in systems))} of training in all.",
    ]  # fmt: skip


def _points(result: Mapping[str, Any]) -> dict[str, dict[str, tuple[float, float]]]:
    levels = level_of(result)
    points: dict[str, dict[str, tuple[float, float]]] = {level: {} for level in LEVELS}
    for key, found in sorted(result["systems"].items()):
        if found.get("fd_s") is not None:
            points[levels[key]][key] = (found["forwards"], found["fd_s"])
    return {level: some for level, some in points.items() if some}


def _chart(result: Mapping[str, Any]) -> str:
    return by_kind(_points(result), "forwards a picture", "FD-s")


def _map(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line a system."""
    caption = (
        "Each was built at toy size and watched while it drew a picture of 8, 16 and 32 pixels (steps, forwards), of "
        "which a place is 4 x 4, except where the level is pixels. n: places in a row. Cache: how what is remembered "
        "between forwards grows. Groups: least and most elements of a step, at 32 pixels."
    )
    said = [[said_of(row, name) for name in MAP] for row in rows]
    return grid(MAP, said, caption)


def said_of(row: Mapping[str, Any], name: str) -> str:
    """A column of the map in words."""
    value = row[name]
    if name == "groups":
        return " to ".join(map(str, dict.fromkeys(value)))
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def save_quality(result: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """The one figure as a picture: FD-s against forwards, coloured by level. Raises ValueError where nothing was
    judged."""
    points = _points(result)
    if not points:
        raise ValueError("no system was judged yet")
    figure = Figure(figsize=(9, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for level, shape in zip(points, (SHAPES[m] for m in MARKS), strict=False):
        xs, ys = zip(*points[level].values(), strict=True)
        axes.plot(xs, ys, shape, color=LEVELS[level], markersize=7, markeredgewidth=0, label=level)
    real = result["references"].get("held-out pictures, drawn anew", {}).get("fd_s")
    if real is not None:
        axes.axhline(real, color="#8a93a3", linewidth=1, linestyle="--", label="held-out pictures, drawn anew")
    axes.set(xscale="log", yscale="log", xlabel="forwards a picture", ylabel="FD-s (lower is better)")
    axes.grid(alpha=0.25)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(NullLocator())
    axes.spines[["top", "right"]].set_visible(False)
    budget = result["budget"]
    axes.set_title(
        f"{budget['data']}: {budget['minutes']:g} minutes each, one seed", fontsize=11, color=INK, loc="left"
    )
    axes.legend(frameon=False, fontsize=9)
    named = [(key, level, p) for level, some in points.items() for key, p in some.items()]
    shifts = _spread([axes.transData.transform(p)[1] for _, _, p in named], [p[0] for _, _, p in named])
    for (key, level, p), shift in zip(named, shifts, strict=True):
        axes.annotate(key, p, (7, shift - 3), textcoords="offset points", fontsize=8, color=LEVELS[level])
    return write_beside(path, lambda file: figure.savefig(file, format="png", dpi=110))


def _spread(heights: Sequence[float], columns: Sequence[float], least: float = 9.0) -> list[float]:
    """How far each label is moved so that those of one column of marks (equal x) stand apart."""
    out = [0.0] * len(heights)
    for column in set(columns):
        order = sorted((i for i, x in enumerate(columns) if x == column), key=lambda i: heights[i])
        below = -1e9
        for i in order:
            out[i] = max(0.0, below + least - heights[i])
            below = heights[i] + out[i]
    return out
