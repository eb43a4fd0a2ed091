"""Autoregressive models in vision: a map of the image systems, and what is said of them, checked (Xiong et al. 2024).

The survey sorts models by what their sequence is made of: pixels, tokens of a map or a line, scales. Here every
registered image system has a row of `systems.image_taxonomy`, none of it typed in: it is built, and watched while it
draws. So the table cannot say what the code does not do, and a new system has a row as soon as it is there.

The survey makes no experiments. What it says of families is read off these columns, statement by statement, and one
that does not hold here is printed as failed. How good pictures are after equal training is measured by
`benchmarks/image_comparison.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from seriatim.systems.claim import Claim, Trial
from seriatim.systems.image_orders import watched
from seriatim.systems.image_taxonomy import PLACE, SIDES, Row, row, toy
from seriatim.systems.meta import Meta

META = Meta(
    key="ar-vision-survey",
    title="Autoregressive models in vision: a map of the image systems",
    family="study",
    modality="image",
    paper="Autoregressive Models in Vision: A Survey (2024), arXiv 2411.05902",
    likelihood="none",
    summary="Image systems by level, order and cost, as they were watched; the survey's statements, checked.",
)

REPRESENTATIVES: Mapping[str, str] = {  # one system for each kind that the survey tells apart
    "pixels": "axial-transformer",
    "tokens in raster order": "raster-ar",
    "tokens, masked": "mar",
    "neighbours": "nar",
    "scales": "var",
    "scales of vectors": "flowar",
    "diffusion block by block": "acdit",
}
LEVELS = ("pixel", "token", "scale")
ELEMENTS = ("ids", "vectors")
WAYS = ("one by one", "several a step", "all at once")
TASKS = ("unconditional", "class", "text", "in-painting", "any size", "video", "3D", "text and pictures", "actions")


# ---- reading the map -------------------------------------------------------------------------------------------------


def select(rows: Sequence[Row], **wanted: Any) -> list[Row]:
    """The rows whose fields are as wanted; of a field of several words (tasks), those that have it among them. Raises
    ValueError for a field that rows do not have."""
    names = {f.name for f in fields(Row)}
    unknown = sorted(wanted.keys() - names)
    if unknown:
        raise ValueError(f"rows have no {', '.join(unknown)}; they have {', '.join(sorted(names))}")

    def fits(value: Any, asked: Any) -> bool:
        return value == asked or (isinstance(value, tuple) and not isinstance(asked, tuple) and asked in value)

    return [r for r in rows if all(fits(getattr(r, name), asked) for name, asked in wanted.items())]


def way(r: Row) -> str:
    """How many elements a step decides, in words."""
    return WAYS[0] if r.groups == (1, 1) else WAYS[2] if r.order == "all at once" else WAYS[1]


@dataclass(frozen=True)
class Coverage:
    """Which systems stand in each cell of level, element and way, and which tasks of the survey any of them does."""

    cells: Mapping[tuple[str, str, str], tuple[str, ...]]
    tasks: Mapping[str, tuple[str, ...]]

    @property
    def empty(self) -> list[tuple[str, str, str]]:
        """Cells without a system."""
        return [cell for cell, keys in self.cells.items() if not keys]


def coverage(rows: Sequence[Row]) -> Coverage:
    """Every cell of the map with its systems; each row stands in one."""
    cells = {
        cell: tuple(r.key for r in rows if (r.level, r.element, way(r)) == cell)
        for cell in itertools.product(LEVELS, ELEMENTS, WAYS)
    }
    return Coverage(cells, {task: tuple(r.key for r in select(rows, tasks=task)) for task in TASKS})


# ---- what the survey says --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Statement:
    """Something that is said of a family. holds: None where nothing was measured that could say so; found: the columns
    by which it was decided."""

    said: str
    holds: bool | None
    found: str


def statements(rows: Sequence[Row], measured: Mapping[str, Mapping[str, Any]] | None = None) -> list[Statement]:
    """The survey's statements, read off the columns of all systems; measured: the figures of trained ones, by key, for
    what only these can say."""
    return [
        _most_steps(rows), _exact(rows), _squares(rows), _logarithmic(rows), _trade(rows, measured or {}),
    ]  # fmt: skip


def _most_steps(rows: Sequence[Row]) -> Statement:
    most = max(rows, key=lambda r: r.forwards[-1])
    by = {level: max((r.forwards[-1] for r in rows if r.level == level), default=0) for level in LEVELS}
    return Statement(
        "Models of pixels need the most forwards, one after another.",
        most.level == "pixel",
        f"the most for {SIDES[-1]} x {SIDES[-1]} pixels, by level: " + ", ".join(f"{k} {n:,}" for k, n in by.items()),
    )


def _exact(rows: Sequence[Row]) -> Statement:
    pixels = select(rows, level="pixel")
    return Statement(
        "Models of pixels have an exact likelihood.",
        bool(pixels) and all(r.likelihood == "exact" for r in pixels),
        ", ".join(f"{r.key}: {r.likelihood}" for r in pixels),
    )


def _squares(rows: Sequence[Row]) -> Statement:
    """Of the two that decide one element after another, in raster order."""
    single = [r for r in rows if r.order == "one by one, row by row"]
    pixel, token = (next((r for r in single if r.level == level), None) for level in ("pixel", "token"))
    if pixel is None or token is None:
        return Statement(f"Tokens of {PLACE} x {PLACE} pixels cut the forwards by {PLACE**2}.", None, "no such pair")
    ratios = [a / b for a, b in zip(pixel.forwards, token.forwards, strict=True)]
    return Statement(
        f"Tokens of {PLACE} x {PLACE} pixels cut the forwards by {PLACE**2}.",
        all(ratio == PLACE**2 for ratio in ratios),
        f"{pixel.key} over {token.key}: " + ", ".join(f"{ratio:g}" for ratio in ratios),
    )


def _logarithmic(rows: Sequence[Row]) -> Statement:
    scales = select(rows, level="scale")
    return Statement(
        "With scales that double, the forwards of scale models grow with the logarithm of the side.",
        bool(scales) and all(r.growth in ("log n", "1") for r in scales),
        ", ".join(f"{r.key}: {r.growth} {r.forwards}" for r in scales),
    )


def _trade(rows: Sequence[Row], measured: Mapping[str, Mapping[str, Any]]) -> Statement:
    """Among systems over the ids of one tokenizer, whose likelihood is exact."""
    said = "Of systems over the same ids, those of fewer forwards have more bits."
    found = [
        (measured[r.key]["forwards"], measured[r.key]["bits_per_code"], r.key)
        for r in rows
        if r.key in measured and measured[r.key].get("likelihood") == "exact"
        and r.order != "one by one along a line" and measured[r.key].get("tokenizer") == "image-vq"
        and r.groups[1] <= measured[r.key]["forwards"]
    ]  # fmt: skip
    if len(found) < 2:
        return Statement(said, None, "fewer than two of these were trained")
    found.sort()
    steady = all(a[1] >= b[1] for a, b in itertools.pairwise(found) if a[0] < b[0])
    return Statement(said, steady, ", ".join(f"{key}: {n} forwards, {bits:.3f} bits" for n, bits, key in found))


# ---- the claim -------------------------------------------------------------------------------------------------------


def growing(key: str) -> Callable[[Any, int], Mapping[str, Any]]:
    """A trial: by which factor the forwards of a picture grow from the smallest of `SIDES` to the largest, as they are
    counted while pictures are drawn; a seed draws others."""

    def measure(nothing: Any, seed: int) -> Mapping[str, Any]:
        forwards = [watched(key, toy(key, side), seed).forwards for side in SIDES]
        return {"growth": forwards[-1] / forwards[0], "forwards": forwards, "sides": list(SIDES)}

    return measure


CLAIM = Claim(
    text="From pictures of 8 x 8 to 32 x 32 pixels the forwards of next-scale prediction, with scales that double, "
    "grow at most a quarter as much as those of raster order over ids of as many places.",
    paper="scales: a number of steps that grows with the logarithm of the side; raster order: with its square",
    metric="growth",
    arms={name: Trial(None, growing(key)) for name, key in REPRESENTATIVES.items()},
    ours="scales",
    baseline="tokens in raster order",
    better="lower",
    margin=4.0,
    seeds=(0, 1),
    spread_seeds=(0, 1),
    other_seeds=(0,),
)


def measure(key: str) -> dict[str, Any]:
    """The row of a system as numbers and words that JSON takes."""
    found = row(key)
    return {f.name: getattr(found, f.name) for f in fields(found)}


# ---- the page --------------------------------------------------------------------------------------------------------


def report(result: Mapping[str, Any], folder: str | Path) -> tuple[Path, Path]:
    """Page and picture of a comparison (`studies.image_comparison`) from what is stored of it alone, so that they are
    the same whenever they are made: FOLDER/image_comparison.html and .png."""
    from seriatim.evaluation.image_survey_page import save_image_survey, save_quality

    rows = [restored(stored) for stored in result["taxonomy"]]
    found = coverage(rows)
    cells = [(*cell, ", ".join(keys) or "–") for cell, keys in found.cells.items()]
    cells += [("task", task, "", ", ".join(keys) or "–") for task, keys in found.tasks.items()]
    said = [
        (s.said, "not measured" if s.holds is None else "holds" if s.holds else "fails", s.found)
        for s in statements(rows, result["systems"])
    ]
    page = save_image_survey(result, cells, said, Path(folder) / "image_comparison.html")
    return page, save_quality(result, Path(folder) / "image_comparison.png")


def restored(stored: Mapping[str, Any]) -> Row:
    """A row from JSON, which knows no tuples."""
    values: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in stored.items()}
    return Row(**values)
