"""A flow head: straight paths from noise (time 0) to data (time 1), integrated to the order its sampler claims."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from seriatim.decoding.filters import Warper
from seriatim.heads.flow import Flow, FlowConfig, FlowHead
from seriatim.laws.case import randomise
from seriatim.random import Generator, Key, Keyed

WIDTH, DIM = 6, 4
TINY = FlowConfig(hidden=16, blocks=2, steps=5, draws=2)
every_sampler = pytest.mark.parametrize("sampler", ["euler", "midpoint", "heun"])


def head_of(config=TINY, dim=DIM, seed=0):
    return randomise(FlowHead(WIDTH, dim, config), seed, std=0.3)


def states(b=2, m=3, seed=0):
    return torch.randn(b, m, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def normal(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def key(b=2, element=0):
    return Key(torch.arange(b), element)


def knows(oracle, says, config, dim=DIM):
    """A head whose network says what `says(x, t)` does, t from 0 to 1."""
    head = FlowHead(WIDTH, dim, replace(config, hidden=4, blocks=1)).double()
    head.net = oracle(lambda x, t: says(x, t / 1000))
    return head


def velocity_of_gaussian(mean, deviation):
    """E[value - noise | x at time t], where values are normal."""
    return lambda x, t: mean + (t * deviation**2 - (1 - t)) / ((1 - t) ** 2 + t**2 * deviation**2) * (x - t * mean)


# ---- sampling --------------------------------------------------------------------------------------------------------


@every_sampler
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_straight_path_is_followed_exactly_in_one_step(sampler, steps, oracle):
    config, go = FlowConfig(steps=steps, sampler=sampler), normal(2, 3, DIM)
    head = knows(oracle, lambda x, t: go.expand_as(x), config)
    got = head.dist(states(), None, None).sample(Keyed(0), key())
    noise = Keyed(0).normal((2, 3, DIM), key())
    torch.testing.assert_close(got, noise + go, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sampler", ["euler", "midpoint"])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_with_the_velocity_towards_a_value_it_is_reached_exactly(sampler, steps, oracle):
    value = normal(2, 3, DIM)
    head = knows(oracle, lambda x, t: (value - x) / (1 - t), FlowConfig(steps=steps, sampler=sampler))
    got = head.dist(states(), None, None).sample(Keyed(0), key())
    torch.testing.assert_close(got, value, rtol=0, atol=1e-12)


def error_of(oracle, impulses, sampler, steps, mean=0.7, deviation=0.5, wrong=None):
    """Largest error of mean and deviation, without chance: the map from noise is mean + deviation * noise."""
    right = velocity_of_gaussian(mean, deviation)
    head = knows(oracle, right if wrong is None else wrong(right), FlowConfig(steps=steps, sampler=sampler), dim=1)
    m, v = impulses(lambda rows: Flow(head, states(rows, 1)[None]), 1)
    return max(abs(float(m) - mean), abs(float(v.sqrt()) - deviation))


@pytest.mark.parametrize("sampler, order", [("euler", 1), ("midpoint", 2), ("heun", 2)])
@pytest.mark.parametrize("mean, deviation", [(0.7, 0.5), (-1.0, 1.3)])
def test_normal_data_come_out_to_the_order_of_the_sampler(sampler, order, mean, deviation, oracle, impulses):
    """Twice the steps, half or a quarter of the error (or less: midpoint is better than it claims on such data)."""
    error = [error_of(oracle, impulses, sampler, n, mean, deviation) for n in (80, 160)]
    assert math.log2(error[0] / error[1]) > order - 0.1 and error[1] < 0.02, error


def test_temperature_scales_the_noise_that_is_carried(oracle, impulses):
    head = knows(oracle, velocity_of_gaussian(0.7, 0.5), FlowConfig(steps=40, sampler="heun"), dim=1)
    for temperature in (0.0, 0.5):
        dist = lambda rows, t=temperature: Flow(head, states(rows, 1)[None]).warped(Warper(t))  # noqa: E731
        mean, variance = impulses(dist, 1)
        assert float(mean) == pytest.approx(0.7, abs=1e-3)
        assert float(variance.sqrt()) == pytest.approx(0.5 * temperature, abs=1e-3)


@every_sampler
def test_a_draw_does_not_depend_on_company(sampler):
    head = head_of(replace(TINY, sampler=sampler))
    x = head.dist(states(), None, None).sample(Keyed(7), key())
    for b in range(2):
        for m in range(3):
            alone = head.dist(states()[b : b + 1, m : m + 1], None, None)
            got = alone.sample(Keyed(7), Key(torch.tensor([b]), m))[0, 0]
            torch.testing.assert_close(got, x[b, m], rtol=0, atol=1e-12)


# ---- guidance --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def guided(head, w):
    """Samples of condition, null and their mixture from the same noise."""
    yes, no = (head.dist(states(seed=s), None, None) for s in (0, 5))
    return [d.sample(Keyed(2), key()) for d in (yes, no, yes.mix([no], [1 + w, -w]))]


def test_guidance_mixes_velocities():
    """One step is linear in the velocity, so guided samples are the same mixture of samples."""
    yes, no, mixed = guided(head_of(replace(TINY, steps=1)), 1.5)
    torch.testing.assert_close(mixed, 2.5 * yes - 1.5 * no, rtol=0, atol=1e-12)
    assert float((yes - no).abs().max()) > 1e-3
    wrong = guided(head_of(replace(TINY, steps=1)), -1.5)[2]
    assert float((wrong - (2.5 * yes - 1.5 * no)).abs().max()) > 1e-3, "the wrong sign must be seen"


@every_sampler
def test_guidance_of_scale_zero_changes_nothing(sampler):
    yes, no, mixed = guided(head_of(replace(TINY, sampler=sampler)), 0.0)
    torch.testing.assert_close(mixed, yes, rtol=0, atol=1e-12)
    assert float((yes - no).abs().max()) > 1e-3


# ---- the loss --------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_error_of_the_predicted_velocity(prepared):
    head, h, x = head_of(), states(), normal(2, 3, DIM)
    unit, noise = torch.rand(2, 3, 2, generator=torch.Generator().manual_seed(0)), normal(2, 3, 2, DIM, seed=2)
    got = head.loss(h, None, x, prepared(unit, {1: noise}), key())
    want = torch.zeros(2, 3).double()
    for b, m, n in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(2)).tolist():
        t = unit[b, m, n].double()
        mid = (1 - t) * noise[b, m, n] + t * x[b, m]
        said = head.net(mid, head.net.clock(1000 * t) + head.net.state(h[b, m]))
        want[b, m] += (said - (x[b, m] - noise[b, m, n])).square().mean() / 2
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_times_are_uniform_or_logit_normal(oracle, prepared):
    """Quantiles against the law that is claimed: the logit of the time is normal."""
    unit = (torch.arange(999) + 0.5).double() / 999
    for times in ("uniform", "logit-normal"):
        head = knows(oracle, lambda x, t: 0 * x, FlowConfig(times=times, draws=999), dim=1)
        head.loss(states(1, 1), None, normal(1, 1, 1), prepared(unit), key(1))
        t = head.net.times[0].flatten() / 1000
        law = t if times == "uniform" else torch.special.ndtr(torch.logit(t))
        torch.testing.assert_close(law, unit, rtol=0, atol=1e-9)


@pytest.mark.parametrize("times", ["uniform", "logit-normal"])
def test_the_loss_is_unbiased(times, oracle):
    """For the best prediction of normal data its expectation is known: the variance of the velocity given the noisy
    value, averaged over time. 200,000 draws, four standard errors."""
    mean, s = 0.7, 0.5
    config = FlowConfig(times=times, draws=10)
    head = knows(oracle, velocity_of_gaussian(mean, s), config, dim=1)
    x = mean + s * normal(20, 1000, 1)
    losses = head.loss(states(20, 1000), None, x, Generator(3), key(20))
    t = (torch.arange(100_000) + 0.5).double() / 100_000
    t = t if times == "uniform" else torch.sigmoid(torch.special.ndtri(t))
    rest = s**2 + 1 - (t * s**2 - (1 - t)) ** 2 / ((1 - t) ** 2 + t**2 * s**2)
    error = float(losses.std()) / math.sqrt(losses.numel())
    assert abs(float(losses.mean()) - float(rest.mean())) < 4 * error and error < 0.01 * float(rest.mean())
    backwards = knows(oracle, lambda x, t: velocity_of_gaussian(mean, s)(x, 1 - t), config, dim=1)
    worse = backwards.loss(states(20, 1000), None, x, Generator(3), key(20))
    assert float(worse.mean() - losses.mean()) > 4 * error


def test_the_loss_reaches_every_parameter_and_the_hidden_state():
    head, h = head_of(), states().requires_grad_()
    head.loss(h, None, normal(2, 3, DIM), Keyed(1), key()).sum().backward()
    assert h.grad is not None and bool((h.grad.abs().sum(-1) > 0).all())
    assert [n for n, p in head.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)] == []


def test_a_fresh_head_stands_still_and_randomising_wakes_it():
    head = FlowHead(WIDTH, DIM, TINY).double()
    noise = Keyed(0).normal((2, 3, DIM), key()).double()
    assert torch.equal(head.dist(states(), None, None).sample(Keyed(0), key()), noise)
    got = randomise(head).dist(states(), None, None).sample(Keyed(0), key())
    assert bool((got != noise).all())


# ---- mistakes --------------------------------------------------------------------------------------------------------


def test_there_is_no_likelihood_and_the_reason_is_given():
    with pytest.raises(TypeError, match="integral over all noise"):
        head_of().dist(states(), None, None).log_prob(normal(2, 3, DIM))


@pytest.mark.parametrize(
    "run, error, says",
    [
        (lambda: FlowConfig(sampler="ddim"), ValueError, "'euler', 'midpoint' or 'heun'"),
        (lambda: FlowConfig(times="cosine"), ValueError, "'uniform' or 'logit-normal'"),
        (lambda: FlowConfig(steps=0), ValueError, "at least 1 step"),
        (lambda: head_of().loss(states(), None, normal(2, 3, DIM)), TypeError, "random= to Model.losses"),
        (lambda: head_of().loss(states(), None, normal(2, 4, DIM), Keyed(), key()), ValueError, r"\(2, 3, 4\) vectors"),
    ],
)
def test_mistakes_are_named(run, error, says):
    with pytest.raises(error, match=says):
        run()


# ---- mutants that the laws above must catch --------------------------------------------------------------------------


@every_sampler
@pytest.mark.parametrize("wrong", ["time", "sign"])
def test_mutant_a_flow_that_runs_backwards_is_caught(sampler, wrong, oracle, impulses):
    mutate = {"time": lambda v: lambda x, t: v(x, 1 - t), "sign": lambda v: lambda x, t: -v(x, t)}[wrong]
    assert error_of(oracle, impulses, sampler, 160, wrong=mutate) > 0.1
