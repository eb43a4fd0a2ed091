"""An order as a small film: SVG that moves by itself, each element lit by the forward that decides it.

No script and no fonts: `<animate>` alone, so that a page may show it as a picture. Where nothing moves, every element
has the colour of its step, early ones pale. Maps of a pyramid stand beside each other; lines are folded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import torch
from jaxtyping import Int
from torch import Tensor

CELL, GAP = 10, 8  # units of a drawing: an element with its margin, and what stands between maps
SHORTEST, LONGEST, HOLD = 2.5, 9.0, 1.5  # seconds: of the steps together, and of rest behind them
EACH = 0.25  # seconds of a forward, where these allow it
BLANK, NOISY, NOW = "#e3e6ec", "#f3d3a5", "#e07b39"
EARLY, LATE = "#a9c1de", "#1f3a5f"  # what is decided, first and last
SHADES = 6  # between noise and what is decided


def draw_order(
    coord: Int[Tensor, "E axes"], turn: Int[Tensor, "E"], begun: Int[Tensor, "E"] | None = None, title: str = ""
) -> str:
    """A film of elements at their coordinates: (place), (row, column) or (map, row, column).

    turn: the forward that decides each element, from 1 (0: given, which are not shown); begun: the forward that first
    puts something, noise, on its place. Raises ValueError where no element is decided, or numbers do not fit.
    """
    if len(turn) != len(coord) or (begun is not None and len(begun) != len(coord)):
        raise ValueError(f"{len(coord)} elements have as many turns, got {len(turn)}")
    due = turn > 0
    if not bool(due.any()):
        raise ValueError("an order decides at least one element")
    boxes = places(coord[due])
    turns = turn[due].tolist()
    starts = (
        turns if begun is None else [b if 0 < b < t else t for b, t in zip(begun[due].tolist(), turns, strict=True)]
    )
    width, height = max(x for x, _ in boxes) + CELL, max(y for _, y in boxes) + CELL
    last = max(turns)
    moving = min(max(EACH * last, SHORTEST), LONGEST)
    whole = moving + HOLD
    parts: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for box, first, end in zip(boxes, starts, turns, strict=True):
        parts.setdefault((first, end), []).append(box)
    ordered = sorted(parts.items(), key=lambda part: part[0][::-1])
    body = [_part(some, first, end, last, moving, whole) for (first, end), some in ordered]
    times, line, long = f'keyTimes="0;{_short(moving / whole)};1"', height + 3, width - 1
    body.append(
        f'<path d="M0 {line}h{long}v2h-{long}z" fill="{BLANK}"/>'
        f'<rect y="{line}" width="{long}" height="2" fill="{NOW}">'
        f'<animate attributeName="width" values="0;{long};{long}" {times} dur="{_short(whole)}s" '
        'repeatCount="indefinite"/></rect>'
    )
    said = f"<title>{escape(title)}</title>" if title else ""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-2 -2 {width + 3} {height + 9}" width="{2 * width + 6}" '
        f'height="{2 * height + 18}" role="img">{said}{"".join(body)}</svg>\n'
    )


def places(coord: Int[Tensor, "e axes"]) -> list[tuple[int, int]]:
    """Where elements stand in a drawing, their upper left corners."""
    if coord.shape[1] == 1:
        length = int(coord.max()) - int(coord.min()) + 1
        fold = 2 ** math.ceil(math.log2(max(length, 1)) / 2)
        number = coord[:, 0] - coord.min()
        coord = torch.stack([number // fold, number % fold], 1)
    row, column = coord[:, -2], coord[:, -1]
    level = coord[:, 0] if coord.shape[1] == 3 else torch.zeros_like(row)
    left, start = {}, 0
    tall = int(row.max()) + 1
    for k in level.unique().tolist():
        left[k] = start
        start += (int(column[level == k].max()) + 1) * CELL + GAP
    lower = {k: (tall - int(row[level == k].max()) - 1) * CELL for k in left}
    cells = zip(level.tolist(), row.tolist(), column.tolist(), strict=True)
    return [(left[k] + j * CELL, lower[k] + i * CELL) for k, i, j in cells]


def _part(boxes: Sequence[tuple[int, int]], first: int, end: int, last: int, moving: float, whole: float) -> str:
    """Elements that begin and end together: blank, then ever less noisy, lit while they are decided, then the colour
    of that."""
    settled = _between(EARLY, LATE, (end - 1) / max(last - 1, 1))
    shades = [(first + (end - first) * k / SHADES, _between(NOISY, NOW, k / SHADES)) for k in range(SHADES)]
    said = [(1, BLANK), *(shades if first < end else []), (end, NOW), (end + 1, settled)]
    said = [(moving * (n - 1) / last / whole, colour) for n, colour in said]
    kept = [pair for n, pair in enumerate(said) if n + 1 == len(said) or _short(said[n + 1][0]) != _short(pair[0])]
    shape = "".join(f"M{x} {y}h{CELL - 1}v{CELL - 1}h-{CELL - 1}z" for x, y in boxes)
    values, times = ";".join(c for _, c in kept), ";".join(_short(t) for t, _ in kept)
    return (
        f'<path d="{shape}" fill="{settled}"><animate attributeName="fill" values="{values}" keyTimes="{times}" '
        f'calcMode="discrete" dur="{_short(whole)}s" repeatCount="indefinite"/></path>'
    )


def _between(one: str, other: str, share: float) -> str:
    """A colour between two, by their hexadecimal names."""
    pairs = zip(bytes.fromhex(one[1:]), bytes.fromhex(other[1:]), strict=True)
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in pairs)


def _short(value: float) -> str:
    return f"{value:.4f}".rstrip("0").rstrip(".")
