"""Films of orders: every element is lit by the forward that decides it, and everything lies in the drawing."""

from __future__ import annotations

import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest
import torch

from seriatim.evaluation.order_film import BLANK, CELL, LATE, NOISY, NOW, draw_order, places
from seriatim.layout import grid, line, pyramid

SVG = "{http://www.w3.org/2000/svg}"


def films(svg: str) -> list[tuple[list[tuple[int, int]], list[str], list[float], str]]:
    """Of each part: corners, colours, the shares of the film at which they begin; the colour where nothing moves."""
    found = []
    for path in ElementTree.fromstring(svg).iter(f"{SVG}path"):
        for moves in path.iter(f"{SVG}animate"):
            corners = [(int(x), int(y)) for x, y in re.findall(r"M(\d+) (\d+)", path.attrib["d"])]
            times = [float(t) for t in moves.attrib["keyTimes"].split(";")]
            found.append((corners, moves.attrib["values"].split(";"), times, path.attrib["fill"]))
    return found


def test_each_element_is_lit_when_its_turn_comes_and_not_before() -> None:
    row, column = grid(3, 3).coord.unbind(1)
    turn = row + column + 1
    parts = films(draw_order(grid(3, 3).coord, turn))
    assert len(parts) == 5 and sum(len(corners) for corners, *_ in parts) == 9
    starts = []
    for n, (corners, colours, times, still) in enumerate(parts, 1):
        assert {x // CELL + y // CELL + 1 for x, y in corners} == {n}
        assert colours[-2:] == [NOW, still] and times[0] == 0 and all(a < b <= 1 for a, b in pairwise(times))
        assert (colours[0] == BLANK) == (n > 1)
        starts.append(times[colours.index(NOW)])
    assert starts == sorted(starts) and len({round(b - a, 3) for a, b in pairwise(starts)}) == 1, "forwards last alike"
    assert parts[-1][3] == LATE


def test_noise_grows_warmer_until_it_is_decided() -> None:
    (_, colours, times, _), (_, later, _, _) = films(
        draw_order(grid(1, 2).coord, torch.tensor([10, 20]), torch.tensor([1, 11]))
    )
    assert colours[0] == NOISY and later[:2] == [BLANK, NOISY] and NOW in later
    assert len(colours) > 5 and times == sorted(times)


def test_maps_stand_side_by_side_lines_are_folded_and_nothing_overlaps() -> None:
    for coord in (grid(4, 4).coord, pyramid([1, 2, 4]).coord, line(12).coord, grid(2, 3, 3).coord):
        corners = places(coord)
        assert len(set(corners)) == len(coord) and min(min(c) for c in corners) == 0
    scales = places(pyramid([1, 2, 4]).coord)
    assert scales[0][0] < scales[1][0] < scales[5][0] and scales[0][1] == scales[-1][1] == 3 * CELL
    assert max(y for _, y in places(line(12).coord)) == 2 * CELL


def test_what_is_given_is_not_shown_and_titles_are_text() -> None:
    svg = draw_order(line(4).coord, torch.tensor([0, 0, 1, 2]), title="<b>&")
    assert sum(len(corners) for corners, *_ in films(svg)) == 2 and "<title>&lt;b&gt;&amp;</title>" in svg
    assert "script" not in svg and "href" not in svg


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="4 elements have as many turns, got 2"):
        draw_order(line(4).coord, torch.ones(2).long())
    with pytest.raises(ValueError, match="at least one element"):
        draw_order(line(4).coord, torch.zeros(4).long())
