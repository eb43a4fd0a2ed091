"""Orders of decoding: 1 for left to right, -1 for right to left, about 0 for random; what is taken back comes later."""

from __future__ import annotations

import pytest
import torch

from seriatim.canvas import Set, Unset
from seriatim.decoding.loop import Step, decode
from seriatim.decoding.remask import First
from seriatim.decoding.sample import SampleAll, Select
from seriatim.decoding.target import Target
from seriatim.evaluation.decoding_order import decided_at, kendall, spearman, turns_of
from seriatim.factorization.line import Line
from seriatim.factorization.static import AnyOrder
from seriatim.laws.tabular import tabular
from seriatim.layout import line
from seriatim.random import Generator


def orders(decider, rows=2, n=6, known=0, order=None):
    model = tabular(line(n), order or AnyOrder(), 3)
    canvas = model.canvas({"token": torch.zeros(rows, n, dtype=torch.long)}, known)
    return decided_at(decode(Target(model), canvas, decider, random=Generator(1)), canvas)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_left_to_right_is_one_however_many_at_once(count):
    at = orders(First(count))
    assert at[0].tolist() == [i // count for i in range(6)]
    assert kendall(at).tolist() == pytest.approx([1, 1]) and spearman(at).tolist() == pytest.approx([1, 1])


def test_next_token_is_left_to_right():
    at = orders(SampleAll(), order=Line(1), known=2)
    assert at[0].tolist() == [-1, -1, 0, 1, 2, 3] and kendall(at[:, 2:]).tolist() == pytest.approx([1, 1])


def test_right_to_left_is_minus_one():
    at = torch.tensor([[5, 4, 3, 2, 1, 0]])
    assert kendall(at).item() == pytest.approx(-1) and spearman(at).item() == pytest.approx(-1)


@pytest.mark.parametrize("steps", [6, 3])
def test_random_is_about_zero(steps):
    """The mean of 2000 rows, each of which spreads by less than 0.45: 5 standard errors are 0.05."""
    at = orders(Select("random", steps), rows=2000)
    assert at.amax() == steps - 1
    assert abs(float(kendall(at).mean())) < 0.05 and abs(float(spearman(at).mean())) < 0.05
    assert float(kendall(at).std()) > 0.2


def test_all_at_once_is_no_order():
    at = orders(Select("random", 1))
    assert kendall(at).isnan().all() and spearman(at).isnan().all()


def test_they_are_the_statistics_of_the_books():
    from scipy.stats import kendalltau, spearmanr

    at = torch.randint(4, (20, 7), generator=torch.Generator().manual_seed(0))
    for row, tau, rho in zip(at, kendall(at), spearman(at), strict=True):
        left_to_right = row.sort().values
        assert tau.item() == pytest.approx(kendalltau(left_to_right, row).statistic)
        assert rho.item() == pytest.approx(spearmanr(left_to_right, row).statistic)


def test_what_is_taken_back_counts_when_it_is_decided_for_good():
    model = tabular(line(3), AnyOrder(), 2)
    x = torch.zeros(1, 1, dtype=torch.long)
    first, second = torch.tensor([[0]]), torch.tensor([[1, 2]])
    steps = [
        Step((Set(x, first), Unset(first))), Step((Set(x.expand(1, 2), second),)), Step((Unset(torch.tensor([[2]])),)),
        Step((Set(x, first),)),
    ]  # fmt: skip
    at = decided_at(steps, model.blank(1))
    assert at.tolist() == [[3, 1, -1]]
    assert turns_of(at, torch.tensor([[False, True, True]])).tolist() == [2]


def test_rows_that_come_and_go_are_refused():
    with pytest.raises(ValueError, match="row by row"):
        decided_at([Step((), select=torch.tensor([0]))], tabular(line(2), AnyOrder(), 2).blank(1))
