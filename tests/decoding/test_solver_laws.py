"""Solvers of a group at a time, held to laws of data for which the right answer is known in closed form.

Mean and covariance of what is sampled are computed exactly, not by chance; what is left is the error of the step size,
which falls as the order of the method says.
"""

from __future__ import annotations

import pytest
import torch

from seriatim.backbones.transformer import Transformer, TransformerConfig
from seriatim.canvas import Set
from seriatim.decoding.loop import decode, generate
from seriatim.decoding.solver import MultiStep, Noise, SolverStep, StochasticStep
from seriatim.decoding.target import Target
from seriatim.embed import VectorEmbed
from seriatim.factorization.cells import cells, subsample
from seriatim.factorization.groups import Groups
from seriatim.heads.in_place import Cosine, InPlaceHead, Linear, Straight
from seriatim.laws.case import randomise
from seriatim.layout import grid
from seriatim.model import Model
from seriatim.random import Keyed
from support.gaussian import Normal, Oracle, expected, sampled_law

DIM = 2
WHOLE = torch.zeros(4, dtype=torch.long)
FLOW, NOISE = (Straight(), "velocity"), (Linear(), "noise")


def gaussian_model(group, path, predicts, seed=0):
    """Four elements; what the network says is replaced by what is to be expected."""
    head = Oracle(8, DIM, path, predicts)
    head.law = Normal(4, DIM, seed)
    embed = VectorEmbed(DIM, 8, noise=True, start=False)
    backbone = Transformer(TransformerConfig(8, 1, 2))
    return randomise(Model(grid(2, 2), Groups(group), embed, backbone, head)), head.law


def error(model, law, decider):
    """Of the covariance. (The mean of a normal law moves on a straight line, so that all of them find it.)"""
    mean, cov = sampled_law(model, decider)
    start = float(model.heads["token"].path.at(torch.ones(1))[0])  # of the mean there is still so much at level 1
    assert float((mean - law.mean).abs().max()) <= 1.2 * start * float(law.mean.abs().max()) + 1e-6
    return float((cov - law.cov).abs().max())


PARTS = [WHOLE, cells(2, 2, 1, 2), subsample(2, 2, 1, 2), cells(2, 2, 1, 1)]


@pytest.mark.parametrize("group", PARTS)
def test_eulers_method_reaches_the_law_of_the_data_with_an_error_of_first_order(group):
    model, law = gaussian_model(group, *FLOW)
    rough, fine = (sampled_law(model, SolverStep(n))[1] for n in (20, 40))
    assert 0.4 < error(model, law, SolverStep(40)) / error(model, law, SolverStep(20)) < 0.6
    assert (2 * fine - rough - law.cov).abs().max() < 0.01  # what many more steps would give


@pytest.mark.parametrize("path", [Linear(), Cosine()])
def test_ddim_reaches_the_law_of_the_data(path):
    model, law = gaussian_model(PARTS[1], path, "noise")
    assert 0.4 < error(model, law, SolverStep(50)) / error(model, law, SolverStep(25)) < 0.6
    assert error(model, law, SolverStep(50)) < 0.15


@pytest.mark.parametrize("group", PARTS[:2])
def test_the_multi_step_solver_has_an_error_of_second_order_and_beats_the_first(group):
    model, law = gaussian_model(group, Cosine(), "noise")
    assert error(model, law, MultiStep(50)) < 0.3 * error(model, law, MultiStep(25)) < 0.015
    for path, predicts in (NOISE, FLOW):
        model, law = gaussian_model(group, path, predicts)
        assert error(model, law, MultiStep(25)) < 0.1 * error(model, law, SolverStep(25))


def last_step_of(law, last):
    """The covariance of the law at level `last` after one step of the mean, in closed form."""
    n = len(law.cov)
    at = (1 - last) ** 2 * law.cov + last**2 * torch.eye(n, dtype=torch.float64)
    x = torch.eye(n, dtype=torch.float64)
    value = expected(torch.zeros(n, dtype=torch.float64), law.cov, x, 1 - last, last)
    noise = (x - (1 - last) * value) / last
    step = x - last * (2 * noise - value)
    return step.T @ at @ step


def limit(model, law, kind, last, steps=12):
    """Mean and covariance of very many steps, from those of two numbers of steps: the error is of first order."""
    (_, rough), (mean, fine) = (sampled_law(model, kind(n, last=last), n + 1) for n in (steps, 2 * steps))
    assert (mean - law.mean).abs().max() < 1e-5
    return 2 * fine - rough


@pytest.mark.parametrize("group", PARTS[:2])
def test_the_stochastic_solver_reaches_the_law_of_the_data(group):
    model, law = gaussian_model(group, *FLOW)
    assert (limit(model, law, StochasticStep, 0.02, 18) - law.cov).abs().max() < 0.01


def test_the_last_step_is_one_of_the_mean():
    """With the law of the data at the last level, and 0.2 left to go at once."""
    model, law = gaussian_model(WHOLE, *FLOW)
    assert (limit(model, law, StochasticStep, 0.2) - last_step_of(law, 0.2)).abs().max() < 0.005
    assert (law.cov - last_step_of(law, 0.2)).abs().max() > 0.1


class NoisyEnd(StochasticStep):
    """Wrong on purpose: the last step adds noise like all others."""

    def moved(self, dist, level, turn, key, canvas, random):
        return super().moved(dist, level.clamp(min=1e-9), turn, key, canvas, random)


class HalfTheNoise(StochasticStep):
    """Wrong on purpose: the deviation of the noise is that of a diffusion of t."""

    def moved(self, dist, level, turn, key, canvas, random):
        mean = super().moved(dist, level, turn, key, canvas, Nothing())
        return mean + (super().moved(dist, level, turn, key, canvas, random) - mean) / 2**0.5


class DriftOfTheFlow(StochasticStep):
    """Wrong on purpose: noise is added to the flow, without the score that makes up for it."""

    def moved(self, dist, level, turn, key, canvas, random):
        x = super().moved(dist, level, turn, key, canvas, random)
        return x + (dist.level - level)[..., None] * dist.parts()[1]


class Nothing:
    def normal(self, shape, key, device="cpu"):
        return torch.zeros(shape)


@pytest.mark.parametrize("wrong", [NoisyEnd, HalfTheNoise, DriftOfTheFlow])
def test_wrong_stochastic_solvers_are_caught(wrong):
    model, law = gaussian_model(WHOLE, *FLOW)
    assert (limit(model, law, wrong, 0.2) - last_step_of(law, 0.2)).abs().max() > 0.05


class Forgets(Oracle):
    """Wrong on purpose: later groups do not know earlier ones."""

    def dist(self, h, reads, canvas):
        blind = canvas.copy()
        blind.status[:] = torch.where(blind.known, 3, blind.status)
        return super().dist(h, reads, blind)


def test_groups_that_do_not_know_each_other_lose_the_covariance_between_them():
    model, law = gaussian_model(PARTS[1], *FLOW)
    model.heads["token"].__class__ = Forgets
    between = law.cov[:4, 4:].abs().max()
    assert error(model, law, SolverStep(20)) > 0.9 * float(between) > 0.1


# ---- how steps are made ----------------------------------------------------------------------------------------------


def plain_model(seed=0, path=None, predicts="velocity"):
    embed = VectorEmbed(DIM, 16, noise=True, start=False, positions=(4, 4))
    head = InPlaceHead(16, DIM, path or Straight(), predicts)
    group = cells(4, 4, 2, 2)
    return randomise(
        Model(grid(4, 4), Groups(group), embed, Transformer(TransformerConfig(16, 2, 2)), head), seed, std=0.3
    )


def drawn(model, decider, rows=2, cached=True, row=None):
    canvas = model.blank(rows)
    canvas.value["token"] = canvas.value["token"].double()
    canvas.row = canvas.row if row is None else row
    steps = list(decode(Target(model, cached=cached), canvas, decider, Noise(), Keyed(3)))
    return canvas.value["token"], [step.slots for step in steps]


DECIDERS = [
    (SolverStep, 4, Straight(), "velocity"),
    (StochasticStep, 4, Straight(), "velocity"),
    (MultiStep, 4, Linear(), "noise"),
]


@pytest.mark.parametrize(("kind", "steps", "path", "predicts"), DECIDERS)
def test_the_first_step_of_a_group_also_appends_the_group_before_and_the_cache_is_invisible(
    kind, steps, path, predicts
):
    model = plain_model(path=path, predicts=predicts)
    cached, slots = drawn(model, kind(steps))
    assert slots == [4] * steps + ([8] + [4] * (steps - 1)) * 3
    fresh, more = drawn(model, kind(steps), cached=False)
    assert more == [n for n in (4, 8, 20, 28) for _ in range(steps)]
    assert (cached - fresh).abs().max() < 1e-9


@pytest.mark.parametrize(("kind", "steps", "path", "predicts"), DECIDERS)
def test_rows_keep_to_themselves(kind, steps, path, predicts):
    model = plain_model(path=path, predicts=predicts)
    together = drawn(model, kind(steps), 3)[0]
    for row in range(3):
        alone = drawn(model, kind(steps), 1, row=torch.tensor([row]))[0]
        assert (alone[0] - together[row]).abs().max() < 1e-12


def test_the_fused_first_step_is_an_append_and_a_step():
    """By hand: the values of the group before alone, committed, and then the noise alone, over that cache."""
    model = plain_model()
    target, canvas = Target(model), model.blank(2)
    canvas.value["token"] = canvas.value["token"].double()
    with torch.inference_mode():
        for _ in zip(range(2), decode(target, canvas, SolverStep(2), Noise(), Keyed(3)), strict=False):
            pass
        plan = target.plan(canvas)
        fused = target.forward(plan, canvas)
        apart = Target(model)
        clean, noise = (plan.take(x[None]) for x in (torch.arange(4, 8), torch.arange(4)))
        if bool((plan.slots.source[0, :4] == 0).all()):
            clean, noise = noise, clean
        cache = model.new_cache(2, 32)
        model.hidden(clean, canvas, cache)
        cache.commit(clean.size, clean)
        h = model.hidden(noise, canvas, cache)
        said = model.dist(h, noise, canvas)[0].said
    assert apart.cache is None
    assert (said - fused.dist.said).abs().max() < 1e-12


def test_a_canvas_that_is_taken_up_again_goes_on_from_its_noise():
    model = plain_model()
    whole = drawn(model, StochasticStep(4))[0]
    canvas = model.blank(2)
    canvas.value["token"] = canvas.value["token"].double()
    for turn, _ in enumerate(decode(Target(model), canvas, StochasticStep(4), Noise(), Keyed(3)), 1):
        if turn == 6:
            break
    generate(Target(model), canvas, StochasticStep(4), Noise(), Keyed(3))
    assert (canvas.value["token"] - whole).abs().max() < 1e-9


def test_noise_stands_where_nothing_is_known_and_only_there():
    model = plain_model()
    value = torch.ones(2, 16, DIM, dtype=torch.float64)
    canvas = model.canvas({"token": value}, 3)
    canvas.apply([Set(value[:, :1], torch.tensor([[5]] * 2))])
    Noise().propose(canvas, None, Keyed(1))
    known = [*range(3), 5]
    assert canvas.known.nonzero()[:, 1].tolist() == known * 2
    rest = [e for e in range(16) if e not in known]
    assert bool((canvas.level[:, rest] == 1).all()) and bool((canvas.noise["token"][:, rest] != 0).all())
    before = canvas.noise["token"].clone()
    Noise().propose(canvas, None, Keyed(2))  # what is being denoised is left alone
    assert torch.equal(canvas.noise["token"], before)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="between 0 and 1"):
        StochasticStep(4, last=0.0)
    model = plain_model(path=Linear(), predicts="noise")
    with pytest.raises(TypeError, match="straight path, not of Linear"):
        drawn(model, StochasticStep(4))
