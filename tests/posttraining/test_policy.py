"""Reinforcement of masked generators: log-probabilities of what was really done, and the gradients that follow."""

from __future__ import annotations

import itertools

import pytest
import torch

from seriatim.decoding.loop import generate
from seriatim.decoding.sample import Remask, Select
from seriatim.decoding.target import Target
from seriatim.laws.case import randomise
from seriatim.laws.enumeration import enumerate_rows
from seriatim.posttraining.policy import (
    advantages,
    coupled,
    diffu,
    log_probs,
    mean_field,
    roll_out,
    surrogate,
    trajectory,
    weights,
)
from seriatim.random import Keyed
from seriatim.systems.text import mdlm

N, V = 3, 2
G = torch.Generator().manual_seed(0)


def model(n=N, seed=0):
    return randomise(mdlm.build(mdlm.Config(length=n, vocab=V, width=16, depth=2, heads=2)), seed)


def rolled(one, steps, rows=64, seed=0, given=0):
    x = torch.randint(V, (rows, one.layout.size), generator=torch.Generator().manual_seed(seed))
    canvas = one.canvas({"token": x}, given)
    turn = roll_out(Target(one), canvas, Select("random", steps), Keyed(seed))
    return canvas.value["token"], turn


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_steps_are_those_that_decided_each_element(steps):
    _, turn = rolled(model(), steps, given=1 if steps < 3 else 0)
    made = N - (1 if steps < 3 else 0)
    assert bool((turn[:, : N - made] == -1).all())
    for row in turn.tolist():
        counts = [row.count(i) for i in range(steps)]
        assert sum(counts) == made and all(counts[: min(steps, made)])


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_probability_of_a_trajectory_is_the_samplers_by_enumeration(steps):
    """exp of the recomputed log-probability, times that of the order (all sets alike), is how likely the decoder takes
    it."""
    one = model()

    def run(random, rows):
        canvas = one.blank(rows)
        turn = roll_out(Target(one), canvas, Select("random", steps), random)
        return [(*x, *t) for x, t in zip(canvas.value["token"].tolist(), turn.tolist(), strict=True)]

    law = enumerate_rows(run)
    found = torch.tensor(list(law))
    with torch.no_grad():
        said = log_probs(one, found[:, :N], trajectory(found[:, N:], G)).double().sum(1)
    orders = len({tuple(t) for t in found[:, N:].tolist()})
    want = torch.tensor(list(law.values()), dtype=torch.float64)
    torch.testing.assert_close(said.exp() / orders, want, rtol=1e-9, atol=1e-12)


def test_with_one_step_all_estimates_of_it_are_mean_field():
    one = model()
    ids, turn = rolled(one, 1)
    with torch.no_grad():
        exact = log_probs(one, ids, trajectory(turn, G))
        assert torch.equal(exact, log_probs(one, ids, mean_field(turn, G)))
        assert torch.equal(exact, log_probs(one, ids, diffu(turn, G, 0.0)))


def test_of_independent_elements_all_estimates_are_exact():
    """A model that ignores what it is shown: at once, with some of the prompt hidden, in halves, all the same."""
    one = model()
    with torch.no_grad():
        for name, p in one.named_parameters():
            if name.endswith(".out"):  # of attention
                p.zero_()
    ids, turn = rolled(one, 3)
    with torch.no_grad():
        exact = log_probs(one, ids, trajectory(turn, G)).sum(1)
        assert float(exact.std()) > 0.1
        for estimate in (mean_field, diffu, coupled):
            torch.testing.assert_close(log_probs(one, ids, estimate(turn, G)).sum(1), exact, rtol=0, atol=1e-9)


def test_in_halves_a_correlated_law_is_met_more_closely_than_at_once():
    """In the mean over texts and draws, against the exact log-probability of a trajectory of single steps."""
    gaps = {"coupled": 0.0, "mean field": 0.0}
    for seed in range(8):
        one = model(4, seed)
        ids, turn = rolled(one, 4, rows=128, seed=seed)
        with torch.no_grad():
            exact = log_probs(one, ids, trajectory(turn, G)).sum(1)
            gaps["mean field"] += float((log_probs(one, ids, mean_field(turn, G)).sum(1) - exact).abs().mean())
            gaps["coupled"] += float((log_probs(one, ids, coupled(turn, G)).sum(1) - exact).abs().mean())
    assert gaps["coupled"] < 0.9 * gaps["mean field"]


def test_each_element_counts_in_exactly_one_half():
    _, turn = rolled(model(), 2, given=1)
    first, second = coupled(turn, G)
    assert bool((first.counts ^ second.counts)[:, 1:].all()) and not bool((first.counts | second.counts)[:, :1].any())


# ---- gradients -------------------------------------------------------------------------------------------------------


def reward_of(ids):
    """Arbitrary, of each text of two tokens."""
    return torch.tensor([0.3, 1.0, -0.5, 0.9], dtype=torch.float64)[ids[:, 0] * 2 + ids[:, 1]]


def laws(one):
    """Every trajectory of two single steps, its probability and its text."""
    found = torch.tensor([(*x, *t) for x in itertools.product(range(V), repeat=2) for t in ((0, 1), (1, 0))])
    return found[:, :2], found[:, 2:]


def expected_reward(one):
    ids, turn = laws(one)
    with torch.no_grad():
        p = log_probs(one, ids, trajectory(turn, G)).sum(1).exp() / 2
    return float((p * reward_of(ids)).sum())


def policy_gradient(one, estimate):
    """The expectation of the surrogate's gradient at the first inner iteration, with raw rewards and sums for means."""
    ids, turn = laws(one)
    p = log_probs(one, ids, trajectory(turn, G)).sum(1).exp().detach() / 2
    new = log_probs(one, ids, estimate(turn, G))
    loss = surrogate(new, new.detach(), new.detach(), reward_of(ids), torch.ones_like(new))
    one.zero_grad()
    (-(loss * p).sum()).backward()
    return [None if q.grad is None else q.grad.clone() for q in one.parameters()]


def test_the_gradient_is_that_of_the_expected_reward_and_mean_fields_is_not():
    """Finite differences of the expected reward by enumeration, along random directions."""
    one = model(2)
    exact, rough = policy_gradient(one, trajectory), policy_gradient(one, mean_field)
    g = torch.Generator().manual_seed(1)
    worst = {"exact": 0.0, "rough": 0.0}
    for _ in range(4):
        direction = [torch.randn(q.shape, generator=g, dtype=q.dtype) for q in one.parameters()]
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                for q, d in zip(one.parameters(), direction, strict=True):
                    q.add_(d, alpha=sign * 1e-5)
                values.append(expected_reward(one))
                for q, d in zip(one.parameters(), direction, strict=True):
                    q.sub_(d, alpha=sign * 1e-5)
        slope = (values[0] - values[1]) / 2e-5
        for name, gradient in (("exact", exact), ("rough", rough)):
            mine = sum(float((a * d).sum()) for a, d in zip(gradient, direction, strict=True) if a is not None)
            worst[name] = max(worst[name], abs(mine - slope) / abs(slope))
    assert worst["exact"] < 1e-5 and worst["rough"] > 1e-2


def test_at_the_first_iteration_the_ratio_is_one_and_nothing_diverges():
    new = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    gain = torch.tensor([1.0, -1.0, 0.5, 0.0])
    weight = torch.full((4, 3), 1 / 3)
    torch.testing.assert_close(surrogate(new, new, new, gain, weight), -gain)
    assert bool((surrogate(new, new, new - 1, gain, weight, kl=1.0) > -gain).all()), "a reference pulls back"


def test_a_ratio_that_has_grown_enough_is_not_pushed_further():
    old = torch.zeros(1, 1)
    new = torch.tensor([[1.0]], requires_grad=True)
    surrogate(new, old, new.detach(), torch.tensor([1.0]), torch.ones(1, 1)).sum().backward()
    assert float(new.grad) == 0
    new = torch.tensor([[-2.0]], requires_grad=True)
    surrogate(new, old, new.detach(), torch.tensor([1.0]), torch.ones(1, 1)).sum().backward()
    assert float(new.grad) < 0, "what became too unlikely is still pulled up"


def test_weights_are_means_over_a_step_then_over_steps():
    turn = torch.tensor([[-1, 0, 1, 1, 1], [0, 0, 0, 0, 2]])
    assert torch.allclose(weights(turn, True)[0], torch.tensor([0, 1 / 2, 1 / 6, 1 / 6, 1 / 6]))
    assert torch.allclose(weights(turn, True)[1], torch.tensor([1 / 8, 1 / 8, 1 / 8, 1 / 8, 1 / 2]))
    assert torch.allclose(weights(turn, False)[0], torch.tensor([0, 1 / 4, 1 / 4, 1 / 4, 1 / 4]))


def test_advantages_are_within_the_samples_of_one_prompt():
    found = advantages(torch.tensor([1.0, 0.0, 5.0, 5.0]), 2)
    assert found.tolist() == pytest.approx([1.0, -1.0, 0.0, 0.0])


def test_what_is_taken_back_has_no_trajectory():
    one = model()
    with pytest.raises(ValueError, match=r"takes nothing back|does something else"):
        roll_out(Target(one), one.blank(1), Remask(steps=3), Keyed(0))
    generate(Target(one), one.blank(1), Select("random", 3), random=Keyed(0))
