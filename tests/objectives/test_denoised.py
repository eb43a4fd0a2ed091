"""Levels of noise in training: their laws, one for each group, and what the loss of a draw is."""

from __future__ import annotations

import math

import pytest
import torch

from seriatim.backbones.transformer import Transformer, TransformerConfig
from seriatim.conditions.clock import NoiseClock
from seriatim.embed import VectorEmbed
from seriatim.factorization.cells import cells, subsample
from seriatim.factorization.groups import Groups
from seriatim.heads.categorical import CategoricalHead
from seriatim.heads.in_place import InPlaceHead, Linear, Straight
from seriatim.laws.case import randomise
from seriatim.layout import grid
from seriatim.objectives.denoised import Denoising, EachStep, LogitNormal, Uniform
from seriatim.plan import MASK, NOISE, VALUE
from seriatim.random import Generator, Key, Keyed

DIM, WIDTH = 3, 16


def model_of(noisy, group=None, path=None, predicts="velocity", times=None, values=0.0):
    group = cells(4, 4, 2, 2) if group is None else group
    embed = VectorEmbed(DIM, WIDTH, positions=(4, 4), start=False)
    backbone = Transformer(TransformerConfig(WIDTH, 2, 2, vector=WIDTH))
    head = InPlaceHead(WIDTH, DIM, path or Straight(), predicts)
    clock = NoiseClock(WIDTH, values)
    return randomise(
        Denoising(grid(4, 4), Groups(group), embed, backbone, head, clock=clock, times=times or Uniform(),
                  noisy_context=noisy), std=0.3)  # fmt: skip


def vectors(n, seed=0):
    return torch.randn(n, 16, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def canvas_of(model, n=2, known=0, seed=0):
    return model.canvas({"token": vectors(n, seed)}, known)


UNITS = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000


def test_laws_of_levels():
    assert torch.equal(Uniform()(UNITS[1:]), UNITS[1:])
    logit = LogitNormal(0.5, 2.0)(UNITS).logit()
    want = torch.distributions.Normal(0.5, 2.0).icdf(UNITS)
    assert (logit - want).abs().max() < 1e-9
    steps = EachStep(4)(torch.tensor([0.0, 0.24, 0.25, 0.74, 0.75, 1 - 1e-9]))
    assert steps.tolist() == [0.25, 0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize("group", [cells(4, 4, 2, 2), subsample(4, 4, 1, 4)])
def test_each_group_has_one_level_of_its_own_and_a_batch_covers_the_law_evenly(group):
    model = model_of(True, group)
    noisy = model.noised(canvas_of(model, 50), Generator(1))
    for g in group.unique():
        level = noisy.level[:, group == g]
        assert bool((level == level[:, :1]).all())
        stratum = (level[:, 0] * 50).floor().sort().values
        assert torch.equal(stratum, torch.arange(50.0))
    first = torch.stack([noisy.level[:, group == g][:, 0] for g in group.unique()])
    together = torch.corrcoef(first) - torch.eye(len(first))
    assert together.abs().max() < 0.55  # of 50 independent pairs: beyond four deviations


def test_what_stands_there_is_made_of_value_and_noise_and_given_elements_stay():
    model = model_of(True)
    canvas = canvas_of(model, 3, known=5)
    noisy = model.noised(canvas, Keyed(4))
    noise = Keyed(4).normal((3, 16, DIM), Key(canvas.row, torch.arange(16)[None])).double()
    level = noisy.level[..., None].double()
    want = (1 - level) * canvas.value["token"] + level * noise
    assert (noisy.noise["token"] - want)[:, 5:].abs().max() < 1e-6
    assert bool((noisy.noise["token"][:, :5] == 0).all())
    assert canvas.level is None and torch.equal(canvas.open, torch.arange(16).expand(3, -1) >= 5)


@pytest.mark.parametrize("noisy", [True, False])
@pytest.mark.parametrize(
    ("path", "predicts", "times"), [(Straight(), "velocity", None), (Linear(), "noise", EachStep())]
)
def test_the_loss_is_the_error_of_what_is_predicted(noisy, path, predicts, times):
    model = model_of(noisy, path=path, predicts=predicts, times=times)
    canvas = canvas_of(model, 3)
    with torch.no_grad():
        losses = model.losses(canvas, random=Keyed(4))
        drawn = model.noised(canvas, Keyed(4))
        plan = model.factorization.noisy(drawn) if noisy else model.factorization.packed(drawn)
        said = model.heads["token"].out(model.hidden(plan, drawn)[:, :16])
    noise = Keyed(4).normal((3, 16, DIM), Key(canvas.row, torch.arange(16)[None])).double()
    want = noise if predicts == "noise" else canvas.value["token"] - noise
    assert (losses - (said - want).square().mean(-1)).abs().max() < 1e-3
    assert plan.size == (16 if noisy else 32)


def test_a_whole_picture_is_plain_flow_matching():
    """The network of a diffusion transformer, written out: one level a picture, everybody sees everybody."""
    model = model_of(True, torch.zeros(16, dtype=torch.long))
    canvas = canvas_of(model, 4)
    drawn = model.noised(canvas, Keyed(2))
    t = drawn.level[:, 0]
    assert bool((drawn.level == t[:, None]).all())
    x, b = drawn.noise["token"], model.backbone
    with torch.no_grad():
        h = (
            model.embed.project(x)
            + model.embed.positions[0].repeat_interleave(4, 0)
            + model.embed.positions[1].repeat(4, 1)
        )
        angle = 1000 * t[:, None].double() * torch.exp(-math.log(10_000) * torch.arange(128).double() / 128)
        driven = torch.nn.functional.silu(model.clock.net(torch.cat([angle.cos(), angle.sin()], -1)))[:, None]
        rms = lambda x: x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()  # noqa: E731
        for layer in b.layers:
            s1, c1, g1, s2, c2, g2 = torch.nn.functional.linear(driven, layer.ada, layer.ada_bias).chunk(6, -1)
            q, k, v = ((rms(h) * (1 + c1) + s1) @ layer.qkv.T).view(4, 16, 6, 8).transpose(1, 2).split(2, 1)
            seen = torch.softmax(q @ k.transpose(2, 3) / 8**0.5, -1) @ v
            h = h + g1 * (seen.transpose(1, 2).reshape(4, 16, 16) @ layer.out.T)
            gate, up = ((rms(h) * (1 + c2) + s2) @ layer.up.T).chunk(2, -1)
            h = h + g2 * ((torch.nn.functional.silu(gate) * up) @ layer.down.T)
        s, c = torch.nn.functional.linear(driven, b.ada, b.ada_bias).chunk(2, -1)
        said = model.heads["token"].out(rms(h) * (1 + c) + s)
        noise = Keyed(2).normal((4, 16, DIM), Key(canvas.row, torch.arange(16)[None])).double()
        want = (said - (canvas.value["token"] - noise)).square().mean(-1)
        losses = model.losses(canvas, random=Keyed(2))
    assert (losses - want).abs().max() < 1e-3 * want.max()


def says(model, canvas, noisy):
    plan = model.factorization.noisy(canvas) if noisy else model.factorization.packed(canvas)
    with torch.no_grad():
        return model.heads["token"].out(model.hidden(plan, canvas))[:, :16]


@pytest.mark.parametrize("noisy", [True, False])
def test_what_is_said_of_a_group_depends_on_its_noise_and_on_earlier_groups_only(noisy):
    model, group = model_of(noisy), cells(4, 4, 2, 2)
    drawn = model.noised(canvas_of(model), Keyed(1))
    before = says(model, drawn, noisy)
    for e in range(16):
        other = drawn.copy()
        other.noise["token"][:, e] += 1.0
        moved = (says(model, other, noisy) - before).abs().amax((0, 2)) > 1e-9
        mine = group >= group[e] if noisy else group == group[e]
        assert torch.equal(moved, mine), e
        other = drawn.copy()
        other.value["token"][:, e] += 1.0
        moved = (says(model, other, noisy) - before).abs().amax((0, 2)) > 1e-9
        assert torch.equal(moved, torch.zeros(16, dtype=torch.bool) if noisy else group > group[e]), e


@pytest.mark.parametrize("values", [0.0, 0.1, None])
def test_the_clock_tells_each_slot_its_level(values):
    model = model_of(False, values=values)
    canvas = model.noised(canvas_of(model), Keyed(1))
    plan = model.factorization.packed(canvas)
    level = model.clock.levels(canvas, plan)
    assert torch.equal(level[:, :16], canvas.level)
    assert bool((level[:, 16:] == (-1 if values is None else torch.tensor(values))).all())
    assert plan.slots.source[0].tolist() == [NOISE] * 16 + [VALUE] * 16
    driven = model.clock(canvas, plan, torch.zeros(4, WIDTH, dtype=torch.float64))  # two branches
    assert driven.vector.shape[0] == 4 and driven.vector.shape[1] <= 5
    assert (driven.plain is not None) == (values is None)
    ids = Groups(model.factorization.group, MASK)
    assert bool((model.clock.levels(canvas, ids.packed(canvas))[:, :16] == 1).all())


def test_a_gradient_reaches_every_parameter_and_likelihood_is_refused():
    model = model_of(True).train()
    model.losses(canvas_of(model), random=Generator(0)).sum().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    with pytest.raises(TypeError, match="no exact likelihood"):
        model.log_prob(canvas_of(model))
    with pytest.raises(TypeError, match="have no likelihood"):
        model.losses(canvas_of(model), strict=True)
    canvas, model.heads["token"] = canvas_of(model), CategoricalHead(WIDTH, 2)
    with pytest.raises(TypeError, match="does not denoise in place"):
        model.losses(canvas)
