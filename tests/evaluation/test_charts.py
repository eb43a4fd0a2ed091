"""Charts: everything drawn lies in the picture, ticks are round, curves part where they are not finite."""

from __future__ import annotations

import math
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from seriatim.evaluation.charts import (
    HEIGHT,
    MARKS,
    MOST_POINTS,
    SERIES,
    WIDTH,
    by_kind,
    free_places,
    lines,
    mark,
    nice_ticks,
    scatter,
)


def drawn(chart: str) -> tuple[list[ElementTree.Element], list[tuple[float, float]]]:
    """The elements of the chart, and all points of its curves and marks."""
    root = ElementTree.fromstring(f"<div>{chart}</div>")
    svg = root[0]
    points = []
    for element in svg.iter():
        for pair in element.get("points", "").split():
            x, y = map(float, pair.split(","))
            points.append((x, y))
        if element.tag == "circle":
            points.append((float(element.get("cx", "")), float(element.get("cy", ""))))
    return list(root.iter()), points


@pytest.mark.parametrize("span", [(0, 1), (-3, 4e9), (1e-9, 2e-9), (5, 5.0001), (-2e4, -1.9e4)])
def test_ticks_are_round_even_and_span_the_values(span: tuple[float, float]) -> None:
    ticks = nice_ticks(*span)
    steps = {round((b - a) / (ticks[1] - ticks[0]), 3) for a, b in pairwise(ticks)}
    assert 3 <= len(ticks) <= 8 and steps == {1.0}
    assert ticks[0] <= span[0] + 1e-9 * abs(span[0]) and ticks[-1] >= span[1] - 1e-9 * abs(span[1])
    assert f"{ticks[1] - ticks[0]:.0e}"[0] in "125"


CASES = {
    "one point": [(3.0, 2.0)],
    "constant": [(0.0, 7.0), (1.0, 7.0), (2.0, 7.0)],
    "zero": [(0.0, 0.0)],
    "wide": [(1.0, 1e-6), (4096.0, 1e6)],
    "negative": [(1.0, -5.0), (2.0, -3.0)],
    "tiny differences": [(1.0, 1.0), (2.0, 1.0 + 1e-13)],
    "nothing": [],
    "nothing finite": [(1.0, math.nan), (2.0, math.inf)],
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("chart", [lines, scatter])
def test_all_points_lie_inside_the_picture(case: str, chart: object) -> None:
    svg = chart({"a": CASES[case], "b": CASES[case]}, "step", "loss")  # type: ignore[operator]
    _, points = drawn(svg)
    finite = [p for p in CASES[case] if all(map(math.isfinite, p))]
    assert len(points) >= 2 * len(finite)
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in points) and "nan" not in svg


def test_higher_values_are_higher_up_and_later_steps_further_right() -> None:
    elements, _ = drawn(lines({"a": [(0.0, 3.0), (10.0, 1.0), (20.0, 2.0)]}, "step", "loss"))
    (curve,) = [e for e in elements if e.tag == "polyline"]
    (x0, y0), (x1, y1), (x2, y2) = [tuple(map(float, p.split(","))) for p in curve.get("points", "").split()]
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11) and x1 > x0
    assert y1 - y0 == pytest.approx(2 * (y1 - y2), abs=0.3) and y0 < y2 < y1


def test_a_wide_range_of_forwards_is_drawn_in_logarithms() -> None:
    points = [(x, 1.0) for x in (4.0, 16.0, 64.0, 256.0)]
    elements, _ = drawn(scatter({"a": points}, "forwards", "FD-s"))
    places = [float(e.get("cx", "")) for e in elements if e.tag == "circle"][:4]
    gaps = [b - a for a, b in pairwise(places)]
    assert gaps == pytest.approx([gaps[0]] * 3, abs=0.2) and gaps[0] > 50


def test_a_curve_parts_where_it_is_not_finite_and_long_ones_keep_their_mean() -> None:
    broken = [(float(i), math.nan if i == 5 else 1.0) for i in range(10)]
    assert lines({"a": broken}, "x", "y").count("<polyline") == 2
    long = [(float(i), float(i % 2)) for i in range(100_000)]
    elements, _ = drawn(lines({"a": long}, "x", "y"))
    (curve,) = [e for e in elements if e.tag == "polyline"]
    heights = [float(p.split(",")[1]) for p in curve.get("points", "").split()]
    assert len(heights) <= MOST_POINTS and max(heights) - min(heights) < 1


def test_series_differ_in_colour_or_mark_and_hostile_names_are_text() -> None:
    looks = [mark(i, 7, 7) for i in range(SERIES * len(MARKS))]
    assert len(set(looks)) == len(looks)
    elements, _ = drawn(scatter({'<script>"&': [(1.0, 1.0)]}, "<x>", '"y'))
    assert not [e for e in elements if e.tag == "script"]
    assert [e.text for e in elements if e.tag == "title"] == ['<script>"&: 1, 1']


def test_kinds_share_a_colour_and_every_mark_says_its_name() -> None:
    chart = by_kind(
        {"a": {"one": (1, 2.0), "two": (2, 3.0)}, "b": {"<three>": (64, math.nan), "four": (100, 1.0)}}, "x", "y"
    )
    elements, _ = drawn(chart)
    marks = [e for e in elements if e.find("title") is not None]
    assert [m.get("class") for m in marks] == ["m0", "m0", "m1"]
    assert [m.find("title").text.split(":")[0] for m in marks] == ["one", "two", "four"]  # type: ignore[union-attr]
    assert {"one", "two", "four"} <= {e.text for e in elements if e.tag == "text"}


def test_names_beside_marks_cover_neither_each_other_nor_marks() -> None:
    marks = [(80.0 + 3 * (i % 7), 60.0 + 9 * (i // 7)) for i in range(28)]
    corners = free_places(marks, [40.0] * 28, 8.0)
    boxes = [(c[0], c[1], c[0] + 40, c[1] + 8) for c in corners if c is not None]
    assert 4 <= len(boxes) < 28, "there is no room for all"
    for i, (left, top, right, bottom) in enumerate(boxes):
        assert left >= 0 and right <= WIDTH and top >= 0 and bottom <= HEIGHT
        assert not any(left < x < right and top < y < bottom for x, y in marks)
        assert not any(left < r and right > a and top < b and bottom > t for a, t, r, b in boxes[:i])
