"""An order as an animation that any browser shows: squares that take on colour when they are decided."""

from __future__ import annotations

from collections.abc import Sequence

from seriatim.evaluation.pictures import PALE

CELL, GAP, SECONDS, REST = 11, 12, 5.0, 0.25  # points, points, of a round, share of it in which all is shown
FIRST, LAST = (31, 58, 95), (216, 120, 84)  # colours of the first element and of the last


def order_svg(maps: Sequence[Sequence[tuple[int, int, int]]], steps: int) -> str:
    """Maps side by side, finest last, each a list of (row, column, step from 0). Elements of one step take on colour
    together; the colour tells how late. Raises ValueError where nothing is decided."""
    if steps < 1 or not any(maps):
        raise ValueError("an order that decides nothing cannot be drawn")
    parts, left, height = [], 0, 0
    for cells in maps:
        rows, columns = (1 + max(cell[axis] for cell in cells) for axis in (0, 1))
        for row, column, step in cells:
            parts.append(_cell(left + column * CELL, row * CELL, step, steps))
        left, height = left + columns * CELL + GAP, max(height, rows * CELL)
    width = left - GAP
    size = f'viewBox="0 0 {width} {height}" width="{width * 2}" height="{height * 2}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{"".join(parts)}</svg>'


def _cell(x: int, y: int, step: int, steps: int) -> str:
    share = step / max(steps - 1, 1)
    colour = "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(FIRST, LAST, strict=True))
    at = (1 - REST) * (step + 0.5) / steps
    box = f'<rect x="{x}" y="{y}" width="{CELL - 1}" height="{CELL - 1}" rx="1.5" fill="{colour}">'
    return (
        f'{box}<animate attributeName="fill" values="{PALE};{colour}" keyTimes="0;{at:.4f}" calcMode="discrete" '
        f'dur="{SECONDS}s" repeatCount="indefinite"/></rect>'
    )
