"""Probe `variant` (VARiant 2025): which layers compute which slot.

A next-scale generator whose coarse scales run all layers and whose fine ones a subset, all from one set of weights. The
composition is VAR with one more label; the depth of each scale is free, so that the laws meet subsets that do not nest.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from seriatim.backbones.cache import KVCache
from seriatim.decoding.loop import decode, generate
from seriatim.decoding.sample import SampleAll
from seriatim.decoding.target import Target
from seriatim.laws.case import Case, randomise
from seriatim.laws.laws import LAWS, Broken
from seriatim.random import Forced, Keyed
from seriatim.systems.image.var import Config, build
from seriatim.systems.image.variant import Supernet
from seriatim.tokenizers.multiscale import MultiScaleConfig

DEPTH, SCALES, CLASSES = 4, (1, 1, 2), 3

# ---- the composition -------------------------------------------------------------------------------------------------


def variant(depths, scales=SCALES, order=None):
    """`depths`: of each scale; None is plain VAR."""
    tokenizer = MultiScaleConfig(scales=scales, vocab=2, dim=3, width=8, phis=2)
    model = randomise(build(Config(tokenizer, classes=CLASSES, width=16, depth=DEPTH, heads=2, dropout=0.0)))
    if depths is not None:
        model.factorization = (order or Supernet)(DEPTH, depths)
    return model


# ---- laws ------------------------------------------------------------------------------------------------------------


def case(depths=(4, 2, 3), order=None, given=0):
    spread = {"class": torch.arange(CLASSES)}
    return Case(variant(depths, order=order), 2, given, {"class": torch.tensor([1])}, spread)


@pytest.mark.parametrize("depths", [(4, 2, 2), (4, 2, 3), (1, 4, 2)], ids=str)
@pytest.mark.parametrize("number", [1, 3, 5, 6, 7, 9, 11])
def test_law(number, depths):
    """Law 1 among them: one pass with its layers by scale = step by step, for late scales that skip what earlier ones
    ran, and that run what earlier ones skipped."""
    LAWS[number][1](case(depths))


@pytest.mark.parametrize("number", [2, 10])
def test_law_on_all_samples(number):
    LAWS[number][1](case())


@pytest.mark.parametrize("given", [1, 2, 4], ids=["a scale given", "two scales given", "half of the last given"])
@pytest.mark.parametrize("number", [1, 2, 3, 5, 9])
def test_law_with_given_scales(number, given):
    LAWS[number][1](case(given=given))


class ForgetsItsLayers(Supernet):
    """In a decoding step all layers are run."""

    def step(self, canvas, guess, cached):
        plan = super().step(canvas, guess, cached)
        return None if plan is None else replace(plan, layers=None)


class ForgetfulCache(KVCache):
    """Does not remember which layers an entry was computed in."""

    def computed(self, layer):
        return None


def test_steps_that_forget_their_layers_are_found():
    with pytest.raises(Broken):
        LAWS[1][1](case(order=ForgetsItsLayers))


@pytest.mark.parametrize("number", [1, 5])
def test_a_cache_that_forgets_its_layers_is_found(number, monkeypatch):
    monkeypatch.setattr(KVCache, "computed", ForgetfulCache.computed)
    with pytest.raises(Broken):
        LAWS[number][1](case())


# ---- what the sheet says ---------------------------------------------------------------------------------------------


def test_published_subsets_of_thirty_layers():
    net = Supernet(30, (30, 16, 8, 4, 2))
    chosen = [net.layers[:, k].nonzero()[:, 0].tolist() for k in range(5)]
    assert chosen[0] == list(range(30))
    assert chosen[1] == [0, *range(1, 30, 2)]
    assert chosen[2] == [0, 4, 8, 12, 16, 20, 24, 29]
    assert chosen[3] == [0, 9, 19, 29]
    assert chosen[4] == [0, 29]


@pytest.mark.parametrize("depth, share", [(16, 0.596), (8, 0.365), (4, 0.249), (2, 0.192)])
def test_published_share_of_the_cache(depth, share):
    """Ten scales, the first six at full depth."""
    sizes = torch.tensor((1, 2, 3, 4, 5, 6, 8, 10, 13, 16)) ** 2
    layers = Supernet(30, (30,) * 6 + (depth,) * 4).layers
    assert float((layers * sizes).sum()) / (30 * 680) == pytest.approx(share, abs=6e-4)


@pytest.mark.parametrize("depths", [(4, 4, 4)], ids=str)
def test_full_depth_is_plain_var_to_the_last_bit(depths):
    plain, full = variant(None), variant(depths)
    x = case().sample(8)
    label = {"class": torch.arange(8) % CLASSES}
    with torch.no_grad():
        assert torch.equal(*(m.losses(m.canvas({"token": x}), label) for m in (plain, full)))
    rows = []
    for model in (plain, full):
        forced = Forced(x)
        generate(Target(model, label), model.blank(8), SampleAll(), random=forced)
        rows.append(torch.stack([forced.met[e] for e in range(x.shape[1])]))
    assert torch.equal(*rows)


def test_the_depth_of_late_scales_leaves_early_states_alone():
    x = case().sample(4)
    label = {"class": torch.arange(4) % CLASSES}
    states = []
    for depths in ((4, 4, 4), (4, 4, 2), (4, 2, 2)):
        model = variant(depths)
        canvas = model.canvas({"token": x})
        with torch.no_grad():
            states.append(model.hidden(model.factorization.packed(canvas), canvas, None, model.encode(label)))
    full, half, both = states
    assert torch.allclose(full[:, :2], half[:, :2], rtol=0, atol=1e-12)
    assert torch.allclose(full[:, :1], both[:, :1], rtol=0, atol=1e-12)
    for a, b in ((full[:, 2:], half[:, 2:]), (full[:, 1:2], both[:, 1:2])):
        assert (a - b).abs().amax(-1).min() > 1e-3


def test_layers_that_no_slot_of_a_step_runs_cost_nothing():
    """Their weights are not even looked at."""
    model = variant((2, 2, 2))
    label = {"class": torch.tensor([0])}
    expected = generate(Target(model, label), model.blank(1), SampleAll(), random=Keyed(0)).value["token"]
    with torch.no_grad():
        for skipped in (1, 2):
            for p in model.backbone.layers[skipped].parameters():
                p.fill_(torch.nan)
    canvas = generate(Target(model, label), model.blank(1), SampleAll(), random=Keyed(0))
    assert torch.equal(canvas.value["token"], expected)


@pytest.mark.parametrize("depths", [(4, 4, 4, 4), (4, 4, 2, 2), (4, 2, 2, 2), (4, 3, 2, 2)], ids=str)
def test_cache_bytes_follow_the_formula(depths):
    """After each scale: 2 (keys, values) x heads x head size x 8 bytes for each slot in each layer that it ran. The
    last scale is never looked at, so it is never kept."""
    scales = (1, 2, 3, 4)
    model = variant(depths, scales)
    target = Target(model, {"class": torch.tensor([0, 1])})
    canvas = model.blank(2)
    entry = 2 * 2 * 8 * 8 * len(canvas.row)
    held = []
    for _ in decode(target, canvas, SampleAll(), random=Keyed(0)):
        held.append(target.cache.nbytes() / entry)
    used = torch.tensor([side * side * depth for side, depth in zip(scales, depths, strict=True)]).cumsum(0).tolist()
    assert held == [*used[:3], 0]


def test_one_model_serves_every_depth_in_turn():
    """The depth is the order's business: weights and layers know nothing of it."""
    x = case().sample(4)
    label = {"class": torch.arange(4) % CLASSES}
    model = variant(None)
    fresh = {d: variant(d) for d in ((4, 2, 2), (4, 4, 4), (4, 3, 3))}
    for depths in ((4, 2, 2), (4, 4, 4), (4, 3, 3), (4, 2, 2)):
        model.factorization = Supernet(DEPTH, depths)
        with torch.no_grad():
            now, alone = (m.log_prob(m.canvas({"token": x}), label) for m in (model, fresh[depths]))
        assert torch.equal(now, alone)
