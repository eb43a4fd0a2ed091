"""The page of the survey of diffusion language models: one HTML file in the style of all reports."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from seriatim.evaluation.charts import scatter
from seriatim.evaluation.metrics import Bits
from seriatim.evaluation.report import Result, cards, grid, write_report

CELLS = {
    "nats_per_token": 3, "entropy": 2, "distinct_3": 3, "excess": 3, "exact": 3, "tokens_per_forward": 2,
    "forwards": 1, "slots": 0,
}  # fmt: skip
STEP = "tokens a forward"
CURSE = {
    "excess": "nats a token less entropy", "nats_per_token": "nats a token under the judge",
    "entropy": "entropy of tokens, bits", "distinct_3": "distinct trigrams",
}  # fmt: skip
ORDERS = ("random", "confidence", "left to right")


def save_survey(
    result: Mapping[str, Any],
    taxonomy: Sequence[Any],
    estimates: Mapping[str, Sequence[Mapping[str, float]]],
    path: str | os.PathLike[str],
) -> Path:
    """Write the page of a finished claim (`verbs.claim.measure`), of the rows of `systems.taxonomy` and of
    `studies.survey_estimates.side_by_side`. Arms that a claim has not are left out. Raises ValueError where none of its
    arms is an objective on texts."""
    arms = {name: runs[0] for name, runs in result["arms"].items()}
    on_text = {name.removeprefix("text, "): arm for name, arm in arms.items() if name.startswith("text, ")}
    on_lists = {name.removeprefix("lists, "): arm for name, arm in arms.items() if name.startswith("lists, ")}
    sections = {
        "The curse: one model, several orders": _orders(arms),
        "Quality by tokens a forward, objective by objective": cards(
            {name: _curves(arm["cells"], "excess", CURSE["excess"]) for name, arm in on_text.items()}
        ),
        "List tasks answered exactly, by tokens a forward": cards(
            {name: _curves(arm["cells"], "exact", "exact answers") for name, arm in on_lists.items()}
        ),
        "Estimates of log-probabilities, as reinforcement takes them": _estimates(estimates),
        "Every cell": _every(arms),
        "Systems and decoders by what they do": _taxonomy(taxonomy),
    }
    notes = [
        f"{result['claim']} {result['rule'].capitalize()}: {result['verdict']} ({result['ours']:.3f} against "
        f"{result['baseline']:.3f}).",
        "One seed of training each. Bits per byte of next-token prediction and of any subset are exact, the others are "
        "bounds. At this size next-token prediction is expected to have the fewest.",
        "All draw as many windows; insertion and edit flows cut theirs to random lengths, half the tokens on the mean.",
        "A gap is filled from both sides where a system sees them, else from the left alone.",
        "Low nats a token alone praise dull text: the entropy of all tokens is taken off, and stands beside.",
        f"Made by {result['command']} ({result['machine']}).",
    ]
    rows = [_row(name, arm, on_lists.get(name), result["command"]) for name, arm in on_text.items()]
    return write_report(
        path, "Diffusion language models side by side", rows, notes, sections={k: v for k, v in sections.items() if v}
    )


def _row(name: str, arm: Mapping[str, Any], lists: Mapping[str, Any] | None, command: str) -> Result:
    """An objective: its figures one token at a time, and what it writes by each way at the ends of its curves."""
    first, cells = arm["cells"][0], arm["cells"]
    figures: dict[str, Any] = {
        "bits_per_byte": Bits(arm["bits_per_byte"], "byte", arm["likelihood"], arm["bytes"]),
        "infilled": arm["infilled"],
        "infilled from both sides": arm["both_sides"], "nats a token, one by one": first["nats_per_token"],
        "list tasks, one by one": None if lists is None else lists["cells"][0]["exact"],
        "forwards": first["forwards"], "slots": first["slots"], "parameters": arm["parameters"],
        "training_seconds": arm["train_seconds"],
    }  # fmt: skip
    ways = dict.fromkeys(cell["way"] for cell in cells)
    ends = [[c for c in cells if c["way"] == way] for way in ways]
    shown = [some[i] for some in ends for i in dict.fromkeys((0, len(some) - 1))]
    return Result(
        name, figures=figures, losses={"training": arm["losses"]}, command=command,
        texts=[f"[{c['way']}, {c['k']} a step]\n{c['sample']}" for c in shown],
    )  # fmt: skip


def _curves(cells: Iterable[Mapping[str, Any]], metric: str, label: str) -> str:
    """A metric over tokens a forward, a curve a way."""
    series: dict[str, list[tuple[float, float]]] = {}
    for cell in cells:
        series.setdefault(cell["way"], []).append((cell["tokens_per_forward"], cell[metric]))
    return scatter({way: sorted(points) for way, points in series.items()}, STEP, label)


def _orders(arms: Mapping[str, Mapping[str, Any]]) -> str:
    """The arms of the claim: each metric by order."""
    cells = [cell for name in ORDERS if name in arms for cell in arms[name]["cells"]]
    return cards({label: _curves(cells, metric, label) for metric, label in CURSE.items()}) if cells else ""


def _estimates(found: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """By how much each misses chains of coins that depend on each other more and more."""
    charts = {}
    for metric, label in (("bias", "mean over draws: nats missed"), ("error", "one draw: nats missed")):
        series = {name: [(x["tie"], x[metric]) for x in points] for name, points in found.items()}
        charts[label] = scatter(series, "how much each coin says of the next", "nats")
    return cards(charts)


def _every(arms: Mapping[str, Mapping[str, Any]]) -> str:
    """All cells as a table."""
    rows = [
        (f"{name}: {cell['way']}", cell["k"], *(_shown(cell.get(metric), digits) for metric, digits in CELLS.items()))
        for name, arm in arms.items()
        for cell in arm.get("cells", ())
    ]
    head = ("cell", "asked: tokens a step", *(name.replace("_", " ") for name in CELLS))
    return grid(head, rows, "Forwards and slots: of a text of 64 tokens behind 48, or of an answer. – not of this arm.")


def _shown(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _taxonomy(rows: Sequence[Any]) -> str:
    """A line a system or decoder, as it was found."""
    if not rows:
        return ""
    names = [f.name for f in fields(rows[0]) if f.name != "title"]
    said = [[_said(getattr(row, name)) for name in names] for row in rows]
    caption = (
        "Found by watching each at toy size, and from what its parts declare. Orders: in how many its elements are "
        "decided, of all; commits: least and most tokens of a forward."
    )
    return grid(names, said, caption)


def _said(value: Any) -> str:
    if isinstance(value, tuple):
        words = list(dict.fromkeys(map(str, value)))
        return " to ".join(words) if all(isinstance(x, int) for x in value) and value else ", ".join(words)
    return str(value)
