"""Flows over whole maps: who sees whom, how states enter, and what is drawn."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from seriatim.canvas import Canvas
from seriatim.decoding.filters import Warper
from seriatim.heads.flow_map import MapFlowConfig, MapFlowHead
from seriatim.laws.case import randomise
from seriatim.layout import grid, pyramid
from seriatim.plan import Reads
from seriatim.random import Generator, Key, Keyed

WIDTH, DIM = 12, 3
LAYOUT = pyramid((1, 2, 3))
SCALE = LAYOUT.coord[:, 0]
ALL = torch.arange(14)[None]
INJECTIONS = ("spatial", "pooled", "concat")
CONFIG = MapFlowConfig(16, 2, steps=3, heads=2)


def head_of(inject="spatial", layout=LAYOUT, **changes):
    return randomise(MapFlowHead(WIDTH, DIM, layout, replace(CONFIG, inject=inject, **changes)), std=0.3)


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def says(head, x, t, h, element=ALL):
    plan = head.plan(element)
    with torch.no_grad():
        return head.net(x, torch.full(x.shape[:2], t).double(), head.net.told(h, plan), plan)


def canvas(rows=2):
    return Canvas(LAYOUT, {"token": torch.zeros(rows, 14, DIM, dtype=torch.float64)})


def test_a_fresh_head_says_that_nothing_moves():
    head = MapFlowHead(WIDTH, DIM, LAYOUT, CONFIG).double()
    assert float(says(head, draw(2, 14, DIM), 0.4, draw(2, 14, WIDTH)).abs().max()) == 0
    noise = Keyed(1).normal((2, 14, DIM), Key(torch.arange(2), ALL)).double()
    drawn = head.dist(draw(2, 14, WIDTH), Reads(ALL, ALL), canvas()).sample(Keyed(1), Key(torch.arange(2), ALL))
    assert torch.equal(drawn, noise)


@pytest.mark.parametrize("inject", INJECTIONS)
def test_a_map_sees_itself_as_a_whole_and_no_other(inject):
    head, x, h = head_of(inject), draw(2, 14, DIM), draw(2, 14, WIDTH, seed=1)
    before = says(head, x, 0.4, h)
    for e in range(14):
        mine = SCALE[e] == SCALE
        for a, b in ((x.clone(), h), (x, h.clone())):
            (a if a is not x else b)[:, e] += 1.0
            moved = (says(head, a, 0.4, b) - before).abs().amax((0, 2)) > 1e-9
            assert torch.equal(moved, mine), e


def test_a_constant_map_of_states_is_an_ordinary_adaptive_norm():
    """The same vector in all places, place by place or as the mean: one and the same."""
    spatial, pooled = head_of("spatial"), head_of("pooled")
    h = draw(2, 1, WIDTH).expand(-1, 14, -1)
    x = draw(2, 14, DIM, seed=1)
    assert (says(spatial, x, 0.3, h) - says(pooled, x, 0.3, h)).abs().max() < 1e-9
    assert (says(spatial, x, 0.3, h) - says(head_of("concat"), x, 0.3, h)).abs().max() > 1e-3


def test_only_a_pooled_state_forgets_where_it_stood():
    order = torch.cat([torch.arange(5), torch.tensor([9, 5, 13, 7, 8, 6, 10, 12, 11])])
    x, h = draw(2, 14, DIM), draw(2, 14, WIDTH, seed=1)
    for inject in INJECTIONS:
        head = head_of(inject)
        same = (says(head, x, 0.3, h[:, order]) - says(head, x, 0.3, h)).abs().max() < 1e-9
        assert bool(same) == (inject == "pooled")


def test_places_of_a_map_may_stand_in_any_order():
    head, order = head_of(), torch.tensor([7, 2, 13, 0, 9, 4, 1, 3, 5, 6, 8, 10, 12, 11])
    x, h = draw(2, 14, DIM), draw(2, 14, WIDTH, seed=1)
    shuffled = says(head, x[:, order], 0.3, h[:, order], order[None])
    assert (shuffled - says(head, x, 0.3, h)[:, order]).abs().max() < 1e-9


@pytest.mark.parametrize("times", ["uniform", "logit-normal"])
def test_the_loss_is_the_error_of_the_velocity_at_one_time_for_each_map(times):
    head, h, value = head_of(times=times), draw(2, 14, WIDTH), draw(2, 14, DIM, seed=2)
    key = Key(torch.arange(2), ALL)
    with torch.no_grad():
        losses = head.loss(h, Reads(ALL, ALL), value, Keyed(3), key)
        unit = Keyed(3).uniform((2, 14), key)[:, [0, *[1] * 4, *[5] * 9]]
        t = (unit if times == "uniform" else torch.special.ndtri(unit).sigmoid()).double()
        noise = Keyed(3).normal((2, 14, DIM), key._replace(draw=4)).double()
        plan = head.plan(ALL)
        said = head.net(t[..., None] * value + (1 - t[..., None]) * noise, t, head.net.told(h, plan), plan)
    assert (losses - (said - (value - noise)).square().mean(-1)).abs().max() < 1e-5
    with pytest.raises(TypeError, match="pass random="):
        head.loss(h, Reads(ALL, ALL), value)


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_maps_that_are_drawn_together_are_those_drawn_alone_and_guidance_mixes_velocities(sampler):
    head, h = head_of(sampler=sampler), draw(2, 14, WIDTH)
    row = torch.arange(2)
    together = head.dist(h, Reads(ALL, ALL), canvas()).sample(Keyed(1), Key(row, ALL))
    fine = (SCALE == 2).nonzero()[:, 0][None]
    alone = head.dist(h[:, fine[0]], Reads(fine, fine), canvas()).sample(Keyed(1), Key(row, fine))
    assert (together[:, fine[0]] - alone).abs().max() < 1e-9
    null = draw(2, 14, WIDTH, seed=5)
    dists = [head.dist(x, Reads(ALL, ALL), canvas()) for x in (h, null)]
    mixed = dists[0].mix(dists[1:], [1.5, -0.5])
    x = draw(2, 14, DIM, seed=7)
    a, b, both = (d.velocities()(x, 0.2) for d in (*dists, mixed))
    assert (both - (1.5 * a - 0.5 * b)).abs().max() < 1e-9
    cold = mixed.warped(Warper(0.5)).sample(Keyed(1), Key(row, ALL))
    assert bool(torch.isfinite(cold).all()) and not torch.equal(cold, mixed.sample(Keyed(1), Key(row, ALL)))


def test_a_grid_is_one_map_and_a_gradient_reaches_everything():
    head = randomise(MapFlowHead(WIDTH, DIM, grid(2, 3), CONFIG), std=0.3)
    e = torch.arange(6)[None]
    assert bool(head.plan(e).views["all"].mask().all())
    for inject in INJECTIONS:
        head = head_of(inject)
        h = draw(2, 14, WIDTH).requires_grad_(True)
        head.loss(h, Reads(ALL, ALL), draw(2, 14, DIM), Generator(0), Key(torch.arange(2), ALL)).sum().backward()
        assert not [n for n, p in head.named_parameters() if p.grad is None or not p.grad.any()]
        assert bool((h.grad.abs().amax((0, 2)) > 0).all())


def test_what_does_not_fit_is_refused():
    head = head_of()
    with pytest.raises(ValueError, match="same elements of a map"):
        head.plan(torch.tensor([[1, 2], [1, 3]]))
    with pytest.raises(TypeError, match="drawn as a whole"):
        head.dist(draw(2, 14, WIDTH), Reads(ALL, ALL), canvas()).take(ALL)
    with pytest.raises(ValueError, match="'spatial', 'pooled' or 'concat'"):
        MapFlowConfig(inject="cross")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one draw"):
        MapFlowConfig(draws=4)
