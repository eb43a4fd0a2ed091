"""Rows of image systems follow what they do: forwards are counted beside them, another part is another row."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from seriatim.decoding.sample import Select
from seriatim.factorization.static import AnyOrder, Scales
from seriatim.layout import grid, line, pyramid
from seriatim.systems.image_orders import ImageOrder, watched
from seriatim.systems.image_taxonomy import (
    SIDES,
    first_plan,
    growth_of,
    order_of,
    row,
    row_of,
    taxonomy,
    toy,
)
from seriatim.systems.meta import catalogue, load
from seriatim.view import own_rank

PICTURED = [key for key, (meta, _) in catalogue().items() if meta.family == "image"]
QUICK = ("raster-ar", "var", "hmar", "nar", "token-shuffle", "vf-prompt", "detailflow", "m-var")
KNOWN = {
    "raster-ar": ("token", "ids", "one by one, row by row", "all before", (4, 16, 64), "n²", "n²"),
    "var": ("scale", "ids", "map by map", "its step and all before", (2, 3, 4), "log n", "n²"),
    "hmar": ("scale", "ids", "map by map", "its step", (2, 3, 4), "log n", "none"),
    "m-var": ("scale", "ids", "map by map", "own: its step; all: all before", (2, 3, 4), "log n", "1"),
    "nar": ("token", "ids", "anti-diagonals", "its step and all before", (3, 7, 15), "n", "n²"),
    "token-shuffle": ("token", "ids", "cells of 2 x 2", "all before", (1, 4, 16), "n²", "n²"),
    "detailflow": ("token", "ids", "runs of 1 and 4 along a line", "its step and all before", (7, 7, 7), "1", "1"),
}


@pytest.mark.parametrize("key", KNOWN)
def test_what_is_known_of_a_system_is_found(key):
    found = row(key)
    assert (
        found.level, found.element, found.order, found.visibility, found.forwards, found.growth, found.cache
    ) == KNOWN[key]  # fmt: skip
    assert found.likelihood == "exact" == load(key).META.likelihood


def test_vectors_that_are_denoised_have_no_likelihood_and_take_forwards_for_each_cell():
    found = row_of([toy("xar", 16)] * 2, [watched("xar", toy("xar", 16))] * 2)
    assert (found.element, found.head, found.likelihood, found.level) == ("vectors", "in place", "none", "token")
    assert found.steps[0] == 4 and found.forwards[0] == 4 * 25 and found.groups == (4, 4)


@pytest.mark.parametrize(
    "key", [*QUICK, *(pytest.param(k, marks=pytest.mark.slow) for k in PICTURED if k not in QUICK)]
)
def test_forwards_are_what_the_backbone_was_asked_for_at_three_sizes(key):
    for side in SIDES:
        system, calls = toy(key, side), []
        counted = system.model.backbone.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        drawn = watched(key, system)
        counted.remove()
        assert drawn.forwards == len(calls) > 0
        assert int(drawn.turn.max()) == drawn.forwards - 1
        order = system.model.factorization
        if order.packed(system.blank(None, 1, system.sampling, 0)) is None or order.free:
            continue
        cost = first_plan(system).cost()
        assert drawn.steps == cost.forwards, "the steps that follow from the packed plan"
        if drawn.steps == drawn.forwards:  # what is denoised may remember its own way
            assert (drawn.held > 0) == (cost.kept > 0), "and whether anything is remembered"


@pytest.mark.slow
def test_every_image_system_has_one_complete_row():
    rows = taxonomy()
    assert [r.key for r in rows] == PICTURED
    for r in rows:
        assert all(getattr(r, f.name) not in ("", (), None) for f in dataclasses.fields(r)), r
        assert r.likelihood == load(r.key).META.likelihood and 0 < r.groups[0] <= r.groups[1], r
        assert all(s <= f for s, f in zip(r.steps, r.forwards, strict=True)), r


def test_only_systems_of_pictures_have_rows():
    with pytest.raises(KeyError, match="no system is called"):
        taxonomy(["not-there"])


def test_another_part_is_another_row():
    """The same systems with another view, order or decider: nothing else was told."""
    systems = [toy("var", side) for side in SIDES]
    for system in systems:
        system.model.factorization = Scales(own_rank)
    changed = row_of(systems, [watched("var", s) for s in systems])
    assert (changed.key, changed.visibility, changed.cache) == ("var", "its step", "none")

    fast = [toy("mar", side) for side in SIDES]
    assert isinstance(fast[0].model.factorization, AnyOrder)
    for system in fast:
        system.decider = lambda sampling: Select("random", 1)
    one = row_of(fast, [watched("mar", s) for s in fast])
    assert (one.order, one.forwards, one.growth) == ("all at once", (1, 1, 1), "1")


def ordered(layout, *turns, placed=True):
    first, again = (
        ImageOrder("k", "K", "token", "ids", "exact", layout.coord, torch.as_tensor(t), 0, (1, 1), 0)
        for t in (turns * 2)[:2]
    )
    return order_of(first, again, placed)


def test_patterns_of_turns_have_names():
    square, tall = grid(4, 4), pyramid([1, 2, 4])
    row, column = square.coord.unbind(1)
    raster = torch.arange(16) + 1
    assert ordered(square, raster) == "one by one, row by row"
    assert ordered(square, row + column + 1) == "anti-diagonals"
    assert ordered(square, row // 2 * 2 + column // 2 + 1) == "cells of 2 x 2"
    assert ordered(square, row + 1) == "runs of 4 along a line"
    assert ordered(square, torch.ones(16).long() * 25) == "all at once"
    assert ordered(square, raster, raster.flip(0)) == "places at random"
    assert ordered(square, (row * column) % 3 + 1) == "groups"
    assert ordered(line(6), torch.arange(6) + 1) == "one by one along a line"
    assert ordered(square, raster, placed=False) == "one by one along a line"
    assert ordered(tall, tall.coord[:, 0] + 1) == "map by map"
    later = tall.coord[:, 0] * 100 + tall.coord[:, 1] * 10 + tall.coord[:, 2] + 1
    assert ordered(tall, later, later.flip(0)) == "map by map, places at random"
    assert ordered(tall, torch.arange(21) + 1) == "map by map, all at once, then one by one, row by row"


def test_growth_is_read_off_doubled_sizes():
    assert [growth_of(x) for x in ((0, 0, 0), (32, 32, 32), (4, 16, 16), (2, 3, 4), (3, 7, 15), (4, 16, 64))] == [
        "none", "1", "1", "log n", "n", "n²",
    ]  # fmt: skip


def test_what_stands_in_front_of_a_picture_is_given_and_has_no_turn():
    drawn = watched("vf-prompt", toy("vf-prompt", 16))
    assert drawn.turn.tolist() == list(range(16)) and drawn.forwards == 16
