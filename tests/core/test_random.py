"""The only source of randomness: keyed noise, laws of draws, exact enumeration, forced samples.

Statistical tests have fixed seeds; each would fail for one seed in 10,000 if the code were right.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare, kstest

from seriatim.random import (
    COIN,
    DRAFT,
    ORDER,
    VALUE,
    Enumerator,
    Forced,
    Generator,
    Key,
    Keyed,
    enumerate_law,
    numbered,
)

RARE = 1e-4


def key(rows: int | list[int], element: int | list[list[int]] = 0, draw: int = 0) -> Key:
    row = torch.arange(rows) if isinstance(rows, int) else torch.tensor(rows)
    return Key(row, element if isinstance(element, int) else torch.tensor(element), draw)


# ---- keyed noise -----------------------------------------------------------------------------------------------------


def test_keyed_noise_does_not_depend_on_company_or_order():
    """The same (row, element, draw) meets the same noise alone, in a batch, in a run, in any order."""
    noise = Keyed(7)
    whole = noise.uniform((3, 5), key(3))
    assert torch.equal(noise.uniform((1, 1), key([2], 4)), whole[2:, 4:])
    assert torch.equal(noise.uniform((3, 2), key(3, [[4, 1]])), whole[:, [4, 1]])
    assert torch.equal(noise.uniform((2, 3), key([2, 0], [[0, 1, 2], [3, 4, 0]]))[1], whole[0, [3, 4, 0]])


def test_keyed_samples_do_not_depend_on_company_or_order():
    noise, logits = Keyed(7), torch.randn(4, 6, 10, generator=torch.Generator().manual_seed(0))
    whole = noise.categorical(logits, key(4))
    order, rows = [3, 0, 5, 1], [2, 0]
    part = noise.categorical(logits[rows][:, order], key(rows, [order]))
    assert torch.equal(part, whole[rows][:, order])


def test_the_noise_of_a_vector_does_not_depend_on_company_either():
    noise = Keyed(1)
    whole = noise.normal((2, 3, 4), key(2))
    assert torch.equal(noise.normal((1, 1, 4), key([1], 2)), whole[1:, 2:])
    assert whole.unique().numel() == whole.numel()


def test_every_seed_row_element_and_draw_has_noise_of_its_own():
    units = [Keyed(seed).uniform((6, 7), key(6, 0, draw)) for seed in range(5) for draw in range(8)]
    assert torch.stack(units).unique().numel() == 5 * 8 * 6 * 7


@pytest.mark.parametrize("draw", [0, 1, 5, 1000, 2**40])
@pytest.mark.parametrize("seed", [0, 1, -3, 2**63 + 5])
def test_any_seed_and_any_draw_will_do(seed, draw):
    unit = Keyed(seed).uniform((4, 4), key([0, 1, 10**9, 2**50], 0, draw))
    assert bool(((unit > 0) & (unit < 1)).all()) and unit.unique().numel() == 16


def test_draws_of_one_run_may_be_numbered_each():
    noise = Keyed(2)
    together = noise.uniform((1, 3), Key(torch.tensor([0]), torch.tensor([[4, 4, 4]]), torch.tensor([0, 7, 9])))
    alone = [noise.uniform((1, 1), key(1, 4, d)) for d in (0, 7, 9)]
    assert torch.equal(together, torch.cat(alone, 1))


def test_no_two_purposes_turns_or_indices_share_a_number():
    numbers = [numbered(p, t, i) for p in (VALUE, COIN, DRAFT, ORDER) for t in range(20) for i in (0, 1, 4095)]
    assert len(set(numbers)) == len(numbers)
    assert numbered(VALUE) == 0


@pytest.mark.parametrize("vary", ["rows", "elements", "draws"])
def test_keyed_noise_is_uniform_and_neighbours_are_independent(vary):
    n, noise = 4096, Keyed(0)
    unit = {
        "rows": lambda: noise.uniform((n, 1), key(n)),
        "elements": lambda: noise.uniform((1, n), key(1)),
        "draws": lambda: torch.stack([noise.uniform((1, 1), key(1, 0, d)) for d in range(n)]),
    }[vary]().flatten()
    assert kstest(unit.numpy(), "uniform").pvalue > RARE
    pairs = torch.stack([unit[:-1], unit[1:]])
    assert abs(float(torch.corrcoef(pairs)[0, 1])) < 3.9 / n**0.5
    cells = torch.histogramdd(pairs.T.contiguous(), bins=[4, 4], range=[0.0, 1.0, 0.0, 1.0]).hist
    assert chisquare(cells.flatten().numpy()).pvalue > RARE


# ---- laws of draws ---------------------------------------------------------------------------------------------------


@pytest.fixture(params=[Generator, Keyed])
def random(request):
    return request.param(3)


def assert_law(drawn: torch.Tensor, p: list[float]) -> None:
    """Indices come with these probabilities (chi-square), and impossible ones never."""
    count = torch.bincount(drawn.flatten(), minlength=len(p)).tolist()
    assert all(c == 0 for c, x in zip(count, p, strict=True) if x == 0)
    possible = [(c, x * drawn.numel()) for c, x in zip(count, p, strict=True) if x > 0]
    assert chisquare(*zip(*possible, strict=True)).pvalue > RARE


def test_indices_come_with_their_probabilities(random):
    p = [0.5, 0.0, 0.3, 0.15, 0.05]
    assert_law(random.categorical(torch.tensor(p).log().expand(1, 20_000, -1), key(1)), p)


def test_elements_are_drawn_independently(random):
    drawn = random.categorical(torch.tensor([0.6, 0.4]).log().expand(20_000, 2, -1), key(20_000))
    assert_law(drawn[:, 0] * 2 + drawn[:, 1], [0.36, 0.24, 0.24, 0.16])


def test_normal_numbers_are_normal(random):
    x = random.normal((1, 8192), key(1)).flatten()
    assert x.dtype == torch.float32 and bool(torch.isfinite(x).all())
    assert kstest(x.numpy(), "norm").pvalue > RARE


def test_uniform_numbers_are_uniform_and_below_one(random):
    u = random.uniform((1, 8192), key(1)).flatten()
    assert u.dtype == torch.float32 and float(u.min()) >= 0 and float(u.max()) < 1
    assert kstest(u.numpy(), "uniform").pvalue > RARE


def test_heads_are_counted_until_the_first_tail(random):
    """With coins p, q: no head 1-p, one p(1-q), both pq."""
    p, q = 0.7, 0.4
    heads = random.heads(torch.tensor([[p, q]]).expand(20_000, -1), key(20_000))
    assert_law(heads, [1 - p, p * (1 - q), p * q])


def test_certain_coins_fall_as_they_must(random):
    certain = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
    for element in range(50):
        assert random.heads(certain, key(3, element)).tolist() == [3, 1, 0]


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    possible=st.lists(st.booleans(), min_size=1, max_size=300).filter(any),
    scale=st.sampled_from([0.0, 1.0, 30.0, 300.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    seed=st.integers(0, 2**32),
)
def test_an_impossible_index_is_never_drawn(possible, scale, dtype, seed):
    logits = (scale * torch.randn(len(possible), generator=torch.Generator().manual_seed(seed))).to(dtype)
    logits = logits.masked_fill(~torch.tensor(possible), -torch.inf).expand(1, 32, -1)
    for random in (Generator(seed), Keyed(seed)):
        drawn = random.categorical(logits, key(1)).flatten().tolist()
        assert all(possible[i] for i in drawn)


@pytest.mark.parametrize("unit", [0.0, 1 - 2.0**-52])
@pytest.mark.parametrize("possible", [[3], [0, 3], [3, 999], [0], [999]])
def test_not_even_at_the_ends_of_the_interval(monkeypatch, unit, possible):
    logits = torch.full((1, 1, 1000), -torch.inf)
    logits[..., possible] = torch.randn(len(possible), generator=torch.Generator().manual_seed(0))
    noise = Keyed(0)
    monkeypatch.setattr(noise, "_unit", lambda shape, key, device: torch.full(tuple(shape), unit, dtype=torch.float64))
    assert int(noise.categorical(logits, key(1))) == (possible[0] if unit == 0 else possible[-1])


def test_only_differences_of_logits_matter():
    noise, logits = Keyed(0), torch.randn(1, 50, 9, generator=torch.Generator().manual_seed(1))
    assert torch.equal(noise.categorical(logits, key(1)), noise.categorical(logits + 100, key(1)))


def test_a_seed_fixes_everything():
    for make in (Generator, Keyed):
        first, second, other = make(5), make(5), make(6)
        draws = [r.uniform((2, 8), key(2)) for r in (first, second, other)]
        assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


# ---- exact laws ------------------------------------------------------------------------------------------------------


def draw(random, p: list[float], element: int = 0) -> int:
    return int(random.categorical(torch.tensor(p, dtype=torch.float64).log()[None, None], key(1, element)))


def test_dependent_draws_are_enumerated_exactly():
    """A second draw whose law, and whether it is made at all, depends on the first."""

    def run(random):
        first = draw(random, [0.2, 0.5, 0.3])
        if first == 0:
            return (0,)
        return (first, draw(random, [0.25, 0.75] if first == 1 else [1.0, 0.0]))

    expected = {(0,): 0.2, (1, 0): 0.125, (1, 1): 0.375, (2, 0): 0.3}
    assert enumerate_law(run) == pytest.approx(expected, abs=1e-15)


def test_elements_drawn_together_are_enumerated_one_by_one():
    p = torch.tensor([[[0.5, 0.5], [0.1, 0.9]]], dtype=torch.float64)
    law = enumerate_law(lambda random: random.categorical(p.log(), key(1))[0].tolist())
    assert law == pytest.approx({(0, 0): 0.05, (0, 1): 0.45, (1, 0): 0.05, (1, 1): 0.45}, abs=1e-15)


def test_padding_is_not_drawn():
    p = torch.full((1, 3, 2), 0.5, dtype=torch.float64)
    law = enumerate_law(lambda random: random.categorical(p.log(), key(1, [[4, -1, -1]]))[0].tolist())
    assert law == pytest.approx({(0, 0, 0): 0.5, (1, 0, 0): 0.5})


def test_a_run_without_draws_has_one_outcome():
    assert enumerate_law(lambda random: "nothing") == {"nothing": 1.0}


def test_accept_or_resample_from_the_residual_gives_the_target_exactly():
    """Speculative sampling in three lines: draft from q, accept with min(1, p/q), else draw from (p - q)+."""
    p, q = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64), torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)

    def run(random):
        x = draw(random, q.tolist())
        if int(random.heads((p[x] / q[x]).clamp(max=1)[None, None], key(1, 0, numbered(COIN)))):
            return x
        residual = (p - q).clamp(min=0)
        return draw(random, (residual / residual.sum()).tolist())

    assert enumerate_law(run) == pytest.approx(dict(enumerate(p.tolist())), abs=1e-15)


def test_long_walks_are_enumerated_to_the_last_path():
    def run(random):
        steps = 0
        while steps < 8 and draw(random, [0.5, 0.5], steps):
            steps += 1
        return steps

    assert enumerate_law(run) == pytest.approx({n: 2.0 ** -min(n + 1, 8) for n in range(9)}, abs=1e-15)


def test_coins_are_enumerated_until_the_first_tail():
    """What follows the first tail is not tossed: four outcomes of three coins, not eight paths."""
    paths = 0

    def run(random):
        nonlocal paths
        paths += 1
        return int(random.heads(torch.tensor([[0.5, 0.25, 1.0]], dtype=torch.float64), key(1)))

    assert enumerate_law(run) == pytest.approx({0: 0.5, 1: 0.375, 3: 0.125}, abs=1e-15)
    assert paths == 3


def test_what_has_no_outcome_or_too_many_cannot_be_enumerated():
    with pytest.raises(ValueError, match="without any possible outcome"):
        Enumerator().categorical(torch.full((1, 1, 3), -torch.inf), key(1))
    with pytest.raises(TypeError, match="toss coins by `heads`"):
        Enumerator().uniform((1, 1), key(1))
    with pytest.raises(TypeError, match="cannot be enumerated"):
        Enumerator().normal((1, 1), key(1))


# ---- forced samples --------------------------------------------------------------------------------------------------


def test_a_forced_sample_is_returned_and_scored():
    logits = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    value = torch.tensor([[1, 3, 0], [2, 2, 1]])
    forced = Forced(value)
    assert torch.equal(forced.categorical(logits, key(2)), value)
    expected = logits.double().log_softmax(-1).gather(2, value[..., None]).sum((1, 2))
    torch.testing.assert_close(forced.log_prob, expected, atol=1e-12, rtol=0)
    assert forced.log_prob.dtype == torch.float64


def test_scores_add_up_over_steps_in_any_order():
    logits = torch.randn(1, 4, 5, generator=torch.Generator().manual_seed(1))
    value = torch.tensor([[4, 0, 2, 1]])
    at_once, one_by_one = Forced(value), Forced(value)
    at_once.categorical(logits, key(1))
    for e in (2, 0, 3, 1):
        assert int(one_by_one.categorical(logits[:, e : e + 1], key(1, [[e]]))) == int(value[0, e])
    torch.testing.assert_close(at_once.log_prob, one_by_one.log_prob, atol=1e-12, rtol=0)


def test_rows_are_scored_each_for_itself_and_padding_not_at_all():
    logits = torch.zeros(2, 2, 4)
    forced = Forced(torch.tensor([[0, 1], [2, 3]]))
    forced.categorical(logits, key(2, [[0, 1], [1, -1]]))
    assert forced.log_prob.tolist() == pytest.approx([-2 * math.log(4), -math.log(4)])


def test_an_impossible_sample_scores_minus_infinity():
    forced = Forced(torch.tensor([[1]]))
    forced.categorical(torch.tensor([[[0.0, -torch.inf]]]), key(1))
    assert forced.log_prob.tolist() == [-math.inf]


def test_the_distributions_that_a_forced_sample_met_are_kept():
    logits = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(2))
    forced = Forced(torch.tensor([[0, 1, 2], [2, 1, 0]]))
    forced.categorical(logits, key(2, 1))
    assert set(forced.met) == {1, 2}
    torch.testing.assert_close(forced.met[2], logits[:, 1].double().log_softmax(-1))


def test_noise_cannot_be_forced():
    forced = Forced(torch.zeros(1, 1, dtype=torch.long))
    for draw_noise in (forced.normal, forced.uniform):
        with pytest.raises(TypeError, match="cannot be forced"):
            draw_noise((1, 1), key(1))
    with pytest.raises(TypeError, match="coins cannot be forced"):
        forced.heads(torch.ones(1, 1), key(1))
