"""Estimates of log-probabilities beside the truth, by a model that knows the law."""

from __future__ import annotations

import itertools

import pytest
import torch

from seriatim.evaluation.ceilings import total_correlation
from seriatim.posttraining import policy
from seriatim.studies import survey_estimates
from seriatim.studies.survey_estimates import chain, knowing, missed, side_by_side

N = 4


def some_law(seed, n=N):
    """Any: its elements depend on each other."""
    p = torch.rand(2**n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 3
    return dict(zip(itertools.product((0, 1), repeat=n), (p / p.sum()).tolist(), strict=True))


def factorised(seed, n=N):
    share = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()
    law = {}
    for x in itertools.product((0, 1), repeat=n):
        law[x] = 1.0
        for value, p in zip(x, share, strict=True):
            law[x] *= p if value else 1 - p
    return law


@pytest.mark.parametrize("given", [0, 1])
@pytest.mark.parametrize("seed", [0, 1])
def test_of_a_factorised_law_every_estimate_is_the_true_log_probability(seed, given):
    for name, one in missed(factorised(seed), 2, given, draws=6).items():
        assert one.bias < 1e-9 and one.error < 1e-9, name


def test_of_a_correlated_law_coupled_is_closer_on_average():
    """In the mean over its draws; a single draw of it misses about as much as mean field does."""
    found = [missed(some_law(seed), 2, draws=24) for seed in range(4)]
    for one in found:
        assert one["coupled"].bias < 0.5 * one["mean-field"].bias
        assert one["coupled"].error > 3 * one["coupled"].bias
    assert all(one["trajectory"].error < 1e-9 for one in found)


def _read_where_shown(turn, generator):
    return [policy.Sight(a.hidden, ~a.counts & (turn >= 0)) for a in policy.coupled(turn, generator)]


def _one_half_only(turn, generator):
    return policy.coupled(turn, generator)[:1]


@pytest.mark.parametrize("wrong", [_read_where_shown, _one_half_only])
def test_halves_that_are_read_wrongly_are_seen_on_a_factorised_law(wrong, monkeypatch):
    monkeypatch.setitem(survey_estimates.ESTIMATORS, "coupled", wrong)
    assert missed(factorised(0), 2, draws=6)["coupled"].bias > 0.1


def test_mean_field_misses_the_total_correlation():
    """In the mean over the law, signs and all: the estimate's mean is the sum of the entropies."""
    law = some_law(3)
    model, ids = knowing(law, 2), torch.tensor(list(law))
    p = torch.tensor(list(law.values()), dtype=torch.float64)
    turn = torch.arange(N).expand(ids.shape)
    said = policy.log_probs(model, ids, policy.mean_field(turn, torch.Generator())).sum(1)
    assert float((p * (p.log() - said)).sum()) == pytest.approx(total_correlation(law), abs=1e-9)


def test_where_a_prompt_matters_hiding_some_of_it_is_worse_than_mean_field():
    found = missed(chain(0.8, N), 2, given=1, draws=24)
    assert found["diffu"].bias > found["mean-field"].bias + 0.05


def test_the_curves_begin_with_independent_coins_and_have_a_point_a_tie():
    found = side_by_side((0.0, 0.8), 3, 8)
    assert set(found) == {"trajectory", "mean-field", "diffu", "coupled"}
    assert all([p["tie"] for p in points] == [0.0, 0.8] for points in found.values())
    assert all(points[0]["bias"] < 1e-9 for points in found.values())
    assert found["mean-field"][1]["bias"] > 0.1


def test_a_chain_is_a_law_whose_ties_are_as_asked():
    law = chain(0.5, 3)
    assert sum(law.values()) == pytest.approx(1)
    assert sum(p for x, p in law.items() if x[1] == x[2]) == pytest.approx(0.75)
    assert set(chain(1.0, 3)) == {(0, 0, 0), (1, 1, 1)}
