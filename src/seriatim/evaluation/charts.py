"""Line charts and scatters as inline SVG: colours from the page's style sheet, so that they follow light and dark.

Series are told apart by colour and by the shape of their marks. Drawn for a width of 420: readable on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 420, 260
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 10, 40
SMALL = 8  # letters of names beside marks
SERIES = 6  # colours c0 to c5 of the style sheet; further series begin again, with other marks
MARKS = ("circle", "square", "diamond", "triangle")
MOST_POINTS = 400

Points = Sequence[tuple[float, float]]


def lines(series: Mapping[str, Points], x_label: str, y_label: str) -> str:
    """One curve for each name. Points that are not finite part a curve; long curves are thinned by means."""
    thin = {name: _thin(points) for name, points in series.items()}
    axes = _axes([p for points in thin.values() for p in points if _finite(p)], logarithmic=False)
    body = []
    for i, points in enumerate(thin.values()):
        for run in _runs(points):
            path = " ".join(f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in run)
            body.append(f'<polyline class="c{i % SERIES}" points="{path}"/>')
            body.append(mark(i, axes.x(run[-1][0]), axes.y(run[-1][1])))
    return _chart(axes, body, list(series), x_label, y_label)


def scatter(series: Mapping[str, Points], x_label: str, y_label: str) -> str:
    """Marks for each name, joined in the order given where there are several. A wide range of x is drawn in logs."""
    finite = {name: [p for p in points if _finite(p)] for name, points in series.items()}
    every = [p for points in finite.values() for p in points]
    low, high = min((x for x, _ in every), default=1), max((x for x, _ in every), default=1)
    axes = _axes(every, logarithmic=low > 0 and high / low >= 8)
    body = []
    for i, (name, points) in enumerate(finite.items()):
        places = [(axes.x(x), axes.y(y)) for x, y in points]
        if len(places) > 1:
            joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            body.append(f'<polyline class="c{i % SERIES} thin" points="{joined}"/>')
        for (x, y), (a, b) in zip(places, points, strict=True):
            body.append(mark(i, x, y, f"{name}: {a:.4g}, {b:.4g}"))
    return _chart(axes, body, list(series), x_label, y_label)


def by_kind(series: Mapping[str, Mapping[str, tuple[float, float]]], x_label: str, y_label: str) -> str:
    """Named marks, coloured by kind: kind -> name -> point. A name stands beside its mark where there is room, and
    shows in full where one points at it. A wide range of x is drawn in logs."""
    named = [(i, name, p) for i, some in enumerate(series.values()) for name, p in some.items() if _finite(p)]
    low, high = (f((p[0] for _, _, p in named), default=1) for f in (min, max))
    axes = _axes([p for _, _, p in named], logarithmic=low > 0 and high / low >= 8)
    places = [(axes.x(x), axes.y(y)) for _, _, (x, y) in named]
    body = [
        mark(i, x, y, f"{name}: {p[0]:.4g}, {p[1]:.4g}") for (i, name, p), (x, y) in zip(named, places, strict=True)
    ]
    beside = free_places(places, [SMALL * 0.56 * len(name) for _, name, _ in named], SMALL)
    for (_, name, _), corner in zip(named, beside, strict=True):
        if corner is not None:
            at = f'x="{corner[0]:.1f}" y="{corner[1] + SMALL - 1:.1f}" font-size="{SMALL}"'
            body.append(f"<text {at}>{escape(name)}</text>")
    return _chart(axes, body, list(series), x_label, y_label)


def free_places(
    marks: Sequence[tuple[float, float]], widths: Sequence[float], height: float, reach: float = 6.0
) -> list[tuple[float, float] | None]:
    """Upper left corners of labels beside their marks, each where it covers no mark and no other label, and stays in
    the drawing; None where there is no such place."""
    taken = [(x - reach + 1, y - reach + 1, x + reach - 1, y + reach - 1) for x, y in marks]
    out: list[tuple[float, float] | None] = []
    for (x, y), width in zip(marks, widths, strict=True):
        rows = [y - height / 2 + k * height * 0.6 for k in (0, 1, -1, 2, -2)]
        corners = [(left, top) for top in rows for left in (x + reach, x - reach - width)]
        corners += [(x - width / 2, y + reach), (x - width / 2, y - reach - height)]
        free = (c for c in corners if _is_free((c[0], c[1], c[0] + width, c[1] + height), taken))
        found = next(free, None)
        out.append(found)
        if found is not None:
            taken.append((found[0], found[1], found[0] + width, found[1] + height))
    return out


def _is_free(box: tuple[float, float, float, float], taken: Sequence[tuple[float, float, float, float]]) -> bool:
    left, top, right, bottom = box
    inside = left >= LEFT and right <= WIDTH - 2 and top >= 0 and bottom <= HEIGHT - BOTTOM
    return inside and not any(left < r and right > a and top < b and bottom > t for a, t, r, b in taken)


def mark(series: int, x: float, y: float, title: str = "") -> str:
    """The mark of a series, an SVG element."""
    shape = MARKS[(series + series // SERIES) % len(MARKS)]
    attributes = f'class="m{series % SERIES}"'
    inside = f"<title>{escape(title)}</title>" if title else ""
    if shape == "circle":
        return f'<circle {attributes} cx="{x:.1f}" cy="{y:.1f}" r="4.5">{inside}</circle>'
    corners = {
        "square": ((-4, -4), (4, -4), (4, 4), (-4, 4)),
        "diamond": ((0, -5.5), (5.5, 0), (0, 5.5), (-5.5, 0)),
        "triangle": ((0, -5), (5, 4), (-5, 4)),
    }[shape]
    points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return f'<polygon {attributes} points="{points}">{inside}</polygon>'


# ---- axes ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Axes:
    """From values to places; `ticks` are in values."""

    low: tuple[float, float]
    high: tuple[float, float]
    ticks: tuple[list[float], list[float]]
    logarithmic: bool  # of x

    def x(self, value: float) -> float:
        low, high = self.low[0], self.high[0]
        if self.logarithmic:
            value, low, high = math.log(value), math.log(low), math.log(high)
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.low[1]) / (self.high[1] - self.low[1]) * (HEIGHT - TOP - BOTTOM)


def _axes(points: Sequence[tuple[float, float]], logarithmic: bool) -> Axes:
    if not points:
        points = [(0.0, 0.0), (1.0, 1.0)]
    (x_low, x_high), (y_low, y_high) = (_range([p[i] for p in points]) for i in (0, 1))
    y_ticks = nice_ticks(y_low, y_high)
    y_low, y_high = min(y_low, y_ticks[0]), max(y_high, y_ticks[-1])
    if logarithmic:
        x_low, x_high = min(x for x, _ in points) / 1.3, max(x for x, _ in points) * 1.3
        exponents = range(math.floor(math.log10(x_low)), math.ceil(math.log10(x_high)) + 1)
        steps = (1, 2, 5) if x_high / x_low < 300 else (1,)
        x_ticks = [m * 10.0**e for e in exponents for m in steps if x_low <= m * 10.0**e <= x_high]
    else:
        x_ticks = [t for t in nice_ticks(x_low, x_high) if x_low <= t <= x_high]
    return Axes((x_low, y_low), (x_high, y_high), (x_ticks, y_ticks), logarithmic)


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Low and high with some room, never equal."""
    low, high = min(values), max(values)
    room = 0.04 * (high - low) or 0.1 * abs(high) or 1.0
    return (low if low == 0 < high else low - room), high + room


def nice_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) that span low to high."""
    rough = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(i * step, 12) for i in range(first, last + 1)] if last - first < 2 * most else [low, high]


def _chart(axes: Axes, body: Sequence[str], names: Sequence[str], x_label: str, y_label: str) -> str:
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(f"{y_label} against {x_label}")}">']
    floor = HEIGHT - BOTTOM
    for t in axes.ticks[1]:
        y = axes.y(t)
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick_text(t)}</text>')
    for t in axes.ticks[0]:
        x = axes.x(t)
        parts.append(f'<line class="rule" x1="{x:.1f}" x2="{x:.1f}" y1="{floor}" y2="{floor + 4}"/>')
        parts.append(f'<text x="{x:.1f}" y="{floor + 16}" text-anchor="middle">{tick_text(t)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 5}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(
        f'<text transform="translate(12 {(TOP + floor) / 2}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>'
    )
    legend = "".join(
        f'<li><svg viewBox="0 0 14 14" aria-hidden="true">{mark(i, 7, 7)}</svg>{escape(name)}</li>'
        for i, name in enumerate(names)
    )
    return "".join([*parts, *body, "</svg>", f'<ul class="legend">{legend}</ul>'])


def tick_text(value: float) -> str:
    """Short: 0.002, 1.5, 20k, 3M."""
    size = abs(value)
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (1e3 if letter == 'k' else limit):g}{letter}"
    return f"{value:g}" if size == 0 or size >= 1e-3 else f"{value:.0e}"


# ---- points ----------------------------------------------------------------------------------------------------------
def _finite(point: tuple[float, float]) -> bool:
    return math.isfinite(point[0]) and math.isfinite(point[1])


def _runs(points: Points) -> list[list[tuple[float, float]]]:
    """The stretches of finite points."""
    runs: list[list[tuple[float, float]]] = [[]]
    for point in points:
        if _finite(point):
            runs[-1].append(point)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _thin(points: Points) -> list[tuple[float, float]]:
    """Means of neighbours, so that at most MOST_POINTS are left."""
    every = -(-len(points) // MOST_POINTS)
    if every <= 1:
        return list(points)
    parts = [points[i : i + every] for i in range(0, len(points), every)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]
