"""A diffusion head: the process is the published one, sampling inverts it, the loss is its expectation."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from seriatim.decoding.filters import Warper
from seriatim.heads.diffusion import Diffusion, DiffusionConfig, DiffusionHead, process
from seriatim.laws.case import randomise
from seriatim.random import Generator, Key, Keyed

WIDTH, DIM = 6, 4
TINY = DiffusionConfig(hidden=16, blocks=2, steps=5, draws=2)


def head_of(config=TINY, dim=DIM, seed=0):
    return randomise(DiffusionHead(WIDTH, dim, config), seed, std=0.3)


def states(b=2, m=3, seed=0):
    return torch.randn(b, m, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def normal(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def key(b=2, element=0):
    return Key(torch.arange(b), element)


def knows(oracle, says, config, dim=DIM):
    """A head whose network says what `says(x, signal)` does, where signal is alpha-bar at the time it is asked."""
    head = DiffusionHead(WIDTH, dim, replace(config, hidden=4, blocks=1)).double()
    signal = process(config.train_steps, config.train_steps).signal
    head.net = oracle(lambda x, t: says(x, signal[t.long()]))
    return head


def eps_of_point(value):
    return lambda x, signal: (x - signal.sqrt() * value) / (1 - signal).sqrt()


def eps_of_gaussian(mean, deviation):
    """E[noise | x], where values are normal."""
    return lambda x, s: (1 - s).sqrt() * (x - s.sqrt() * mean) / (s * deviation**2 + 1 - s)


# ---- the process -----------------------------------------------------------------------------------------------------


def test_the_cosine_schedule_is_the_published_one():
    """Nichol & Dhariwal 2021, equation 17: alpha-bar is a squared cosine, until the clipped steps at the end."""
    p = process(1000, 1000)
    f = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(1001)]
    want = torch.tensor([f[t + 1] / f[0] for t in range(999)], dtype=torch.float64)
    torch.testing.assert_close(p.signal[:999], want, rtol=1e-10, atol=0)
    torch.testing.assert_close(p.beta[-1], torch.tensor(0.999, dtype=torch.float64))
    assert bool((p.beta > 0).all()) and bool((p.beta <= 0.999 + 1e-12).all())


@pytest.mark.parametrize("steps", [2, 3, 25, 100, 999, 1000])
def test_visited_steps_are_a_subset_of_one_process(steps):
    p, whole = process(1000, steps), process(1000, 1000)
    assert len(p.time.unique()) == steps and int(p.time[0]) == 0 and int(p.time[-1]) == 999
    assert torch.equal(p.signal, whole.signal[p.time])
    torch.testing.assert_close((1 - p.beta).cumprod(0), p.signal, rtol=1e-10, atol=1e-15)


def test_a_hundred_steps_are_those_of_the_official_code():
    time = process(1000, 100).time
    assert time[:8].tolist() == [0, 10, 20, 30, 40, 50, 61, 71] and time[-3:].tolist() == [979, 989, 999]


def test_the_lower_bound_of_the_variance_is_that_of_the_posterior():
    """By Bayes: precisions of the step and of the marginal before it add up."""
    p = process(1000, 50)
    precision = (1 - p.beta[1:]) / p.beta[1:] + 1 / (1 - p.before[1:])
    torch.testing.assert_close(p.low[1:].exp(), 1 / precision, rtol=1e-9, atol=0)
    assert float(p.low[0]) == float(p.low[1]) and bool((p.low[1:] < p.high[1:]).all())


# ---- sampling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("steps", [1, 2, 10, 1000])
def test_with_the_true_noise_the_value_comes_back_exactly(sampler, steps, oracle):
    value = normal(2, 3, DIM)
    config = DiffusionConfig(steps=steps, sampler=sampler, learned_variance=False)
    head = knows(oracle, eps_of_point(value), config)
    got = head.dist(states(), None, None).sample(Keyed(0), key())
    torch.testing.assert_close(got, value, rtol=0, atol=1e-10)


def moments(oracle, impulses, sampler, steps, variance=None, mean=0.7, deviation=0.5):
    """Mean and deviation, without chance, of a sampler that knows the noise in normal values."""
    config = DiffusionConfig(steps=steps, sampler=sampler, learned_variance=variance is not None)
    eps = eps_of_gaussian(mean, deviation)

    def says(x, signal):
        said = eps(x, signal)
        return said if variance is None else torch.cat([said, torch.full_like(said, variance)], -1)

    head = knows(oracle, says, config, dim=1)
    got = impulses(lambda rows: Diffusion(head, states(rows, 1)[None]), 1 if sampler == "ddim" else steps)
    return float(got[0]), float(got[1].sqrt())


@pytest.mark.parametrize("sampler, variance", [("ddim", None), ("ddpm", None), ("ddpm", -1.0), ("ddpm", 1.0)])
@pytest.mark.parametrize("mean, deviation", [(0.7, 0.5), (-1.0, 1.3)])
def test_normal_data_come_out_with_their_mean_and_deviation(sampler, variance, mean, deviation, oracle, impulses):
    """Exactly in the limit of many steps: the error falls with their number and is small at the end."""
    error = []
    for steps in (25, 100, 400):
        m, d = moments(oracle, impulses, sampler, steps, variance, mean, deviation)
        error.append(max(abs(m - mean), abs(d - deviation)))
    assert error[0] > error[1] > error[2] and error[2] < 0.02, error


def test_the_network_places_the_variance_between_its_bounds(oracle, impulses):
    """-1 is the posterior's, 1 is beta: at few steps they differ, and halfway lies between."""
    d = [moments(oracle, impulses, "ddpm", 10, v)[1] for v in (-1.0, 0.0, 1.0)]
    fixed = moments(oracle, impulses, "ddpm", 10)[1]
    assert d[0] < d[1] - 1e-3 and d[1] < d[2] - 1e-3 and d[2] == pytest.approx(fixed, abs=1e-12)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@torch.no_grad()
def test_clipping_bounds_what_is_predicted_and_leaves_alone_what_is_in_bounds(sampler, oracle):
    value = normal(2, 3, DIM)
    config = DiffusionConfig(steps=10, sampler=sampler, learned_variance=False)
    for clip in (5.0, 0.5):
        head = knows(oracle, eps_of_point(value), replace(config, clip=clip))
        got = head.dist(states(), None, None).sample(Keyed(0), key())
        torch.testing.assert_close(got, value.clamp(-clip, clip), rtol=0, atol=1e-10)
    wild, tame = (head_of(replace(TINY, sampler=sampler, clip=c)).dist(states(), None, None) for c in (None, 2.0))
    assert float(wild.sample(Keyed(0), key()).abs().max()) > 100
    assert float(tame.sample(Keyed(0), key()).abs().max()) < 2 + 1e-6


def test_temperature_scales_the_noise_of_every_step_but_not_the_first(oracle, prepared):
    config = DiffusionConfig(steps=6, learned_variance=False)
    head = knows(oracle, eps_of_gaussian(0.0, 1.0), config, dim=1)
    dist = Diffusion(head, states(1, 1)[None])

    def answer(dist, draw):
        return float(dist.sample(prepared(normal={draw: torch.ones(1, 1, 1)}), key(1)))

    for draw in range(6):
        plain, cold, frozen = (answer(d, draw) for d in (dist, dist.warped(Warper(0.5)), dist.warped(Warper(0.0))))
        assert abs(plain) > 1e-6
        assert cold == pytest.approx(plain * (1 if draw == 0 else 0.5), abs=1e-12)
        assert frozen == pytest.approx(plain if draw == 0 else 0.0, abs=1e-12)


@torch.no_grad()
def test_single_precision_samples_like_double():
    head = head_of(replace(TINY, steps=100))
    want = head.dist(states(), None, None).sample(Keyed(0), key())
    got = head.float().dist(states().float(), None, None).sample(Keyed(0), key())
    assert got.dtype == torch.float32 and float((got - want).abs().max()) < 1e-3 * float(want.abs().max())


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_a_draw_does_not_depend_on_company(sampler):
    head = head_of(replace(TINY, sampler=sampler))
    x = head.dist(states(), None, None).sample(Keyed(7), key())
    for b in range(2):
        for m in range(3):
            alone = head.dist(states()[b : b + 1, m : m + 1], None, None)
            got = alone.sample(Keyed(7), Key(torch.tensor([b]), m))[0, 0]
            torch.testing.assert_close(got, x[b, m], rtol=1e-10, atol=0)


def test_take_picks_the_laws_of_some_readouts():
    dist = head_of().dist(states(), None, None)
    x = dist.sample(Keyed(7), key())
    y = dist.take(torch.tensor([[2], [1]])).sample(Keyed(7), Key(torch.arange(2), torch.tensor([[2], [1]])))
    torch.testing.assert_close(y[:, 0], torch.stack([x[0, 2], x[1, 1]]), rtol=1e-10, atol=0)


# ---- guidance --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def guided(head, w, mix=None):
    """Samples of condition, null and their mixture from the same noise."""
    yes, no = (head.dist(states(seed=s), None, None) for s in (0, 5))
    mixed = yes.mix([no], [1 + w, -w]) if mix is None else mix(yes, no)
    return [d.sample(Keyed(2), key()) for d in (yes, no, mixed)]


def test_guidance_mixes_the_predicted_noise():
    """One step is linear in the predicted noise, so guided samples are the same mixture of samples."""
    head = head_of(replace(TINY, steps=1, sampler="ddim"))
    yes, no, mixed = guided(head, 1.5)
    torch.testing.assert_close(mixed, 2.5 * yes - 1.5 * no, rtol=1e-10, atol=1e-10)
    assert float((yes - no).abs().max()) > 1e-3


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_guidance_of_scale_zero_changes_nothing_and_the_variance_is_the_conditions(sampler):
    yes, no, mixed = guided(head_of(replace(TINY, sampler=sampler)), 0.0)
    torch.testing.assert_close(mixed, yes, rtol=1e-12, atol=0)
    assert float((yes - no).abs().max()) > 1e-3


def test_mutant_guidance_of_the_wrong_sign_is_caught():
    head = head_of(replace(TINY, steps=1, sampler="ddim"))
    yes, no, mixed = guided(head, 1.5, lambda yes, no: yes.mix([no], [1 - 1.5, 1.5]))
    assert float((mixed - (2.5 * yes - 1.5 * no)).abs().max()) > 1e-3


# ---- the loss --------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_error_of_the_predicted_noise(prepared):
    config = replace(TINY, learned_variance=False)
    head, h, x = head_of(config), states(), normal(2, 3, DIM)
    unit, eps = torch.rand(2, 3, 2, generator=torch.Generator().manual_seed(0)), normal(2, 3, 2, DIM, seed=2)
    got = head.loss(h, None, x, prepared(unit, {1: eps}), key())
    want = torch.zeros(2, 3).double()
    signal = process(1000, 1000).signal
    for b, m, n in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(2)).tolist():
        t = int(1000 * unit[b, m, n])
        noisy = signal[t].sqrt() * x[b, m] + (1 - signal[t]).sqrt() * eps[b, m, n]
        said = head.net(noisy, head.net.clock(torch.tensor(float(t)).double()) + head.net.state(h[b, m]))
        want[b, m] += (said - eps[b, m, n]).square().mean() / 2
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_every_time_is_drawn_with_the_same_probability(oracle, prepared):
    config = DiffusionConfig(learned_variance=False, draws=1000, train_steps=50, steps=5)
    head = knows(oracle, lambda x, s: 0 * x, config, dim=1)
    unit = (torch.arange(1000) + 0.5) / 1000
    head.loss(states(1, 1), None, normal(1, 1, 1), prepared(unit), key(1))
    assert torch.bincount(head.net.times[0].flatten().long()).tolist() == [20] * 50


def test_the_loss_is_unbiased(oracle):
    """For the best prediction of normal data its expectation is known: the variance of the noise given the noisy value,
    averaged over time. 200,000 draws, four standard errors."""
    mean, deviation = 0.7, 0.5
    config = DiffusionConfig(learned_variance=False, draws=10)
    head = knows(oracle, eps_of_gaussian(mean, deviation), config, dim=1)
    x = mean + deviation * normal(20, 1000, 1)
    losses = head.loss(states(20, 1000), None, x, Generator(3), key(20))
    signal = process(1000, 1000).signal
    want = float((signal * deviation**2 / (signal * deviation**2 + 1 - signal)).mean())
    error = float(losses.std()) / math.sqrt(losses.numel())
    assert abs(float(losses.mean()) - want) < 4 * error and error < 0.01 * want
    for wrong in (lambda x, s: 0.8 * eps_of_gaussian(mean, deviation)(x, s), eps_of_gaussian(mean + 0.5, deviation)):
        worse = knows(oracle, wrong, config, dim=1).loss(states(20, 1000), None, x, Generator(3), key(20))
        assert float(worse.mean() - losses.mean()) > 4 * error


def test_several_draws_are_a_mean():
    one, two = head_of(replace(TINY, draws=1)), head_of(replace(TINY, draws=2))
    assert two.net.out.weight.equal(one.net.out.weight)
    h, x = states(), normal(2, 3, DIM)
    unit, eps = torch.rand(2, 3, 2), normal(2, 3, 2, DIM)

    class Part(Generator):
        """Noise of draws `which` only."""

        def __init__(self, which):
            self.which = which

        def uniform(self, shape, key, device="cpu"):
            return unit[..., self.which]

        def normal(self, shape, key, device="cpu"):
            return eps[:, :, self.which]

    parts = [one.loss(h, None, x, Part([i]), key()) for i in range(2)]
    whole = two.loss(h, None, x, Part([0, 1]), key())
    torch.testing.assert_close(whole, (parts[0] + parts[1]) / 2, rtol=1e-12, atol=0)


@pytest.mark.parametrize("step", [0, 1, 500, 999])
def test_the_bound_that_trains_the_variance_is_a_divergence(step, prepared):
    """Between normal laws of one step back, by torch.distributions; at the first step the surprise at the value."""
    head, h, x = head_of(replace(TINY, draws=1)), states(), normal(2, 3, DIM)
    plain = head_of(replace(TINY, draws=1, learned_variance=False))
    plain.net.load_state_dict({k: v[:DIM] if k.startswith("out.") else v for k, v in head.net.state_dict().items()})
    eps, unit = normal(2, 3, 1, DIM, seed=2), torch.full((2, 3, 1), (step + 0.5) / 1000)
    random = prepared(unit, {1: eps})
    got = head.loss(h, None, x, random, key()) - plain.loss(h, None, x, random, key())
    p = process(1000, 1000)
    signal, before, beta = p.signal[step], p.before[step], p.beta[step]
    noisy = signal.sqrt() * x + (1 - signal).sqrt() * eps[:, :, 0]
    said = head.net(noisy, head.net.clock(torch.tensor(float(step)).double()) + head.net.state(h))
    guess = (noisy - (1 - signal).sqrt() * said[..., :DIM]) / signal.sqrt()

    def back(value):
        """Mean of the step back, if this is the value: Ho et al. 2020, equation 7."""
        return (before.sqrt() * beta * value + (1 - beta).sqrt() * (1 - before) * noisy) / (1 - signal)

    share = (said[..., DIM:] + 1) / 2
    law = Normal(back(guess), torch.exp((share * p.high[step] + (1 - share) * p.low[step]) / 2))
    want = -law.log_prob(x) if step == 0 else kl_divergence(Normal(back(x), (p.low[step] / 2).exp()), law)
    torch.testing.assert_close(got, want.mean(-1) / math.log(2), rtol=1e-7, atol=1e-9)


def test_the_bound_trains_the_variance_alone():
    learned = head_of(replace(TINY, draws=1))
    plain = head_of(replace(TINY, draws=1, learned_variance=False))
    plain.net.load_state_dict({k: v[:DIM] if k.startswith("out.") else v for k, v in learned.net.state_dict().items()})
    for head in (learned, plain):
        head.loss(states(), None, normal(2, 3, DIM), Keyed(1), key()).sum().backward()
    got, want = learned.net.out.weight.grad, plain.net.out.weight.grad
    torch.testing.assert_close(got[:DIM], want, rtol=1e-10, atol=1e-12)
    assert bool((got[DIM:].abs().sum(-1) > 0).all())


def test_the_loss_reaches_every_parameter_and_the_hidden_state():
    head, h = head_of(), states().requires_grad_()
    head.loss(h, None, normal(2, 3, DIM), Keyed(1), key()).sum().backward()
    assert h.grad is not None and bool((h.grad.abs().sum(-1) > 0).all())
    assert [n for n, p in head.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)] == []


def test_a_fresh_head_predicts_no_noise_and_randomising_wakes_it():
    """Its output and its gates start at zero, as published: laws on fresh weights would pass vacuously."""
    head = DiffusionHead(WIDTH, DIM, TINY).double()
    x, y = normal(2, 3, DIM), head.net.state(states())
    assert bool((head.net(x, y) == 0).all())
    randomise(head)
    assert bool((head.net(x, y) != 0).all())


# ---- mistakes --------------------------------------------------------------------------------------------------------


def test_there_is_no_likelihood_and_the_reason_is_given():
    with pytest.raises(TypeError, match="integral over all noise"):
        head_of().dist(states(), None, None).log_prob(normal(2, 3, DIM))


@pytest.mark.parametrize(
    "run, error, says",
    [
        (lambda: DiffusionConfig(sampler="euler"), ValueError, "'ddpm' or 'ddim'"),
        (lambda: DiffusionConfig(steps=0), ValueError, "1 to 1000"),
        (lambda: DiffusionConfig(steps=1001), ValueError, "1 to 1000"),
        (lambda: DiffusionConfig(clip=0.0), ValueError, "positive size"),
        (lambda: DiffusionHead(8, 0), ValueError, "positive"),
        (lambda: DiffusionHead(8, 4, DiffusionConfig(draws=0)), ValueError, "at least 1 draw"),
        (lambda: head_of().loss(states(), None, normal(2, 3, DIM)), TypeError, "random= to Model.losses"),
        (lambda: head_of().loss(states(), None, normal(2, 3, 5), Keyed(), key()), ValueError, r"\(2, 3, 4\) vectors"),
        (lambda: head_of().dist(states(), None, None).warped(Warper(top_k=3)).temperature, TypeError, "top_k"),
    ],
)
def test_mistakes_are_named(run, error, says):
    with pytest.raises(error, match=says):
        run()


# ---- mutants that the laws above must catch --------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", ["sign", "time"])
def test_mutant_a_prediction_that_is_reversed_is_caught(wrong, oracle):
    value = normal(2, 3, DIM)
    config = DiffusionConfig(steps=10, sampler="ddim", learned_variance=False)
    right = eps_of_point(value)
    signal = process(1000, 1000).signal
    says = {
        "sign": lambda x, s: -right(x, s),
        "time": lambda x, s: right(x, signal.flip(0)[torch.searchsorted(-signal, -s)]),
    }[wrong]
    got = knows(oracle, says, config).dist(states(), None, None).sample(Keyed(0), key())
    assert float((got - value).abs().max()) > 0.1


def test_mutant_noise_of_half_the_variance_is_caught(oracle, impulses):
    """The temperature is such a mutant: its moments are wrong, however many the steps."""
    config = DiffusionConfig(steps=200, learned_variance=False)
    head = knows(oracle, eps_of_gaussian(0.7, 0.5), config, dim=1)
    dist = lambda rows: Diffusion(head, states(rows, 1)[None]).warped(Warper(math.sqrt(0.5)))  # noqa: E731
    assert abs(float(impulses(dist, 200)[1].sqrt()) - 0.5) > 0.05
