"""Ways to decide several tokens at once: how many of the surest, as far as their scores allow."""

from __future__ import annotations

import itertools

import pytest
import torch

from seriatim.decoding.loop import decode
from seriatim.decoding.sample import Budget, Factor, Select, schedule
from seriatim.decoding.target import Target
from seriatim.factorization.static import AnyOrder
from seriatim.laws.tabular import tabular
from seriatim.layout import line
from seriatim.random import Keyed


def test_a_factor_takes_the_most_whose_uncertainty_it_allows():
    """(n + 1) (1 - confidence of the n-th) < f, from the surest on."""
    score = torch.tensor([[0.99, 0.9, 0.85, 0.2], [0.99, 0.4, 0.3, -torch.inf], [0.4, 0.1, 0.1, 0.1]])
    assert Factor(1.0)(score).tolist() == [3, 1, 0]
    assert Factor(0.1)(score).tolist() == [1, 1, 0]


def test_where_a_factor_of_one_allows_it_the_likeliest_values_are_the_likeliest_together():
    """Over joint laws of three values of two symbols, drawn at random: the bound of Fast-dLLM, which is tight."""
    g, held = torch.Generator().manual_seed(0), 0
    for _ in range(3000):
        joint = torch.rand(2, 2, 2, generator=g) ** 8
        joint /= joint.sum()
        margins = [joint.sum([d for d in range(3) if d != i]) for i in range(3)]
        best, conf = zip(*((int(m.argmax()), float(m.max())) for m in margins), strict=True)
        score = torch.tensor([sorted(conf, reverse=True)])
        if int(Factor(1.0)(score)) == 3:
            held += 1
            assert joint[best] == joint.max()
    assert held > 100


def test_a_budget_is_spent_on_the_surest_and_bounds_what_they_do_not_know_of_each_other():
    """The total correlation of those that are taken is at most the sum of their entropies."""
    score = -torch.tensor([[0.1, 0.2, 0.3, 2.0], [0.5, 0.6, 0.7, torch.inf]])
    assert Budget(0.65)(score).tolist() == [3, 1]
    assert Budget(0.05)(score).tolist() == [0, 0]


@pytest.mark.parametrize(("n", "counts"), [
    (128, [1, 2, 4, 8, 16, 32, 65]), (100, [1, 2, 4, 8, 16, 69]), (1, [1]), (2, [2]), (3, [3]), (4, [1, 3]),
])  # fmt: skip
def test_powers_double_at_each_step_and_the_last_takes_the_rest(n, counts):
    left = (n, *schedule(n, 7, "powers"))
    assert [a - b for a, b in itertools.pairwise(left)] == counts


def test_counts_of_all_schedules_add_up():
    for n in range(1, 200):
        left = (n, *schedule(n, 5, "powers"))
        assert left[-1] == 0 and all(a > b for a, b in itertools.pairwise(left))


@pytest.mark.parametrize(("rule", "commit"), [("margin", Factor(1.0)), ("confidence", Budget(1.0))])
def test_a_way_to_commit_that_does_not_understand_the_rule_is_refused(rule, commit):
    with pytest.raises(ValueError, match="goes by"):
        Select(rule, commit=commit)


@pytest.mark.parametrize(("rule", "commit"), [("confidence", Factor(1e-9)), ("entropy", Budget(1e-9))])
def test_at_least_one_is_decided(rule, commit):
    model = tabular(line(12), AnyOrder(), 5, 0)
    canvas = model.blank(2)
    steps = decode(Target(model), canvas, Select(rule, commit=commit), random=Keyed(0))
    made = [(step.edits[0].element >= 0).sum(1).tolist() for step in steps]
    assert made == [[1, 1]] * 12
