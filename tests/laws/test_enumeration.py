"""The table and the enumerators that the laws of decoders rest on."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from seriatim.decoding.loop import generate
from seriatim.decoding.sample import SampleAll
from seriatim.decoding.target import Target
from seriatim.factorization.line import Line
from seriatim.factorization.static import AnyOrder, Blocks
from seriatim.laws.enumeration import Paths, enumerate_rows
from seriatim.laws.tabular import decoded_law, tabular, total_variation, true_law
from seriatim.layout import grid, line
from seriatim.random import Enumerator, Forced, Key, enumerate_law

V = 3


# ---- the table -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [Line(1), Blocks(2)], ids=["line", "blocks"])
@pytest.mark.parametrize("cached", [True, False])
def test_decoding_the_table_meets_the_rows_of_one_pass(order, cached):
    model = tabular(line(4), order, V, 2)
    x = torch.tensor(list(itertools.product(range(V), repeat=4)))
    want = model.log_prob(model.canvas({"token": x}))
    assert want.dtype == torch.float64 and abs(float(want.exp().sum()) - 1) < 1e-12
    forced = Forced(x)
    generate(Target(model, cached=cached), model.blank(len(x)), SampleAll(), random=forced)
    assert float((forced.log_prob - want).abs().max()) < 1e-12


@pytest.mark.parametrize("order", [Line(1), AnyOrder()], ids=["line", "any order"])
def test_every_known_element_matters_and_no_other(order):
    """The row of the last element changes with each element before it, and with nothing that is unknown."""
    model = tabular(line(4), order, V, 2)

    def last(x, known):
        target, canvas = Target(model), model.canvas({"token": torch.tensor([x])}, known)
        rows = target.forward(target.plan(canvas), canvas)
        return rows.dist.logits[0, -1]

    base = last([0, 0, 0, 0], 3)
    for e in range(3):
        other = [0, 0, 0, 0]
        other[e] = 1
        assert float((last(other, 3) - base).abs().max()) > 1e-3
    assert torch.equal(last([0, 0, 0, 1], 3), base)


def test_places_on_a_grid_and_tables_differ():
    model = tabular(grid(2, 2), AnyOrder(), V, 2)
    target, canvas = Target(model), model.blank(1)
    rows = target.forward(target.plan(canvas), canvas).dist.logits[0]
    other = tabular(grid(2, 2), AnyOrder(), V, 3)
    target = Target(other)
    assert len({tuple(r) for r in rows.tolist()}) == 4
    assert not torch.equal(target.forward(target.plan(canvas), canvas).dist.logits[0], rows)
    assert bool(((rows >= 0) & (rows < 3)).all())


def test_without_spread_the_table_is_flat():
    law = true_law(tabular(line(3), Line(1), V, spread=0.0), 2)
    assert all(abs(p - 1 / 9) < 1e-12 for p in law.values())


def test_a_slip_of_the_cache_gives_other_numbers():
    """The table drives the real cache: entries dropped from it are missed."""

    class Blurred(Target):
        def commit(self, keep, plan, repeats=False):
            super().commit(keep, plan, repeats)
            self.cache.buffer[..., 0, :] = 0

    model, x = tabular(line(4), Line(1), V, 2), torch.tensor([[0, 1, 2, 0]])
    right, wrong = Forced(x), Forced(x)
    generate(Target(model), model.blank(1), SampleAll(), random=right)
    generate(Blurred(model), model.blank(1), SampleAll(), random=wrong)
    assert abs(float(right.log_prob - wrong.log_prob)) > 1e-3


# ---- enumeration -----------------------------------------------------------------------------------------------------


def dice(random, rows):
    """Two draws and up to three coins, of which the second depends on the first draw."""
    row = torch.arange(rows)
    first = random.categorical(torch.log(torch.tensor([0.2, 0.3, 0.5, 0.0])).expand(rows, 1, -1), Key(row, 0))[:, 0]
    coins = torch.stack([torch.full((rows,), 0.25), first / 2, torch.ones(rows)], 1).double()
    heads = random.heads(coins, Key(row, 1))
    return list(zip(first.tolist(), heads.tolist(), strict=True))


WANT = {(0, 0): 0.15, (0, 1): 0.05, (1, 0): 0.225, (1, 1): 0.0375, (1, 3): 0.0375, (2, 0): 0.375, (2, 3): 0.125}


@pytest.mark.parametrize("batch", [1, 2, 5, 100])
def test_the_law_is_that_of_the_draws_for_every_batch(batch):
    law = enumerate_rows(dice, batch)
    assert law.keys() == WANT.keys()
    assert max(abs(law[x] - WANT[x]) for x in WANT) < 1e-7


def test_one_by_one_and_side_by_side_agree():
    one = enumerate_law(lambda random: dice(random, 1)[0])
    assert one.keys() == WANT.keys()
    assert max(abs(one[x] - enumerate_rows(dice)[x]) for x in WANT) < 1e-12


def test_padding_is_not_drawn_and_closed_rows_stand():
    random = Paths([[], []])
    logits = torch.zeros(2, 2, 3)
    random.categorical(logits, Key(torch.tensor([1, 0]), torch.tensor([[0, -1], [-1, -1]])))
    assert [len(b) for b in random.branch] == [0, 1]
    random.close([True, False])
    random.categorical(logits, Key(torch.tensor([0, 1]), 0))
    assert [len(b) for b in random.branch] == [0, 3]
    assert random.weight[0] == 1.0 and math.isclose(random.weight[1], 1 / 27)


@pytest.mark.parametrize("random", [Paths([[]]), Enumerator()], ids=["rows", "one"])
def test_what_cannot_be_enumerated_is_refused(random):
    key = Key(torch.zeros(1, dtype=torch.long), 0)
    for draw in (random.uniform, random.normal):
        with pytest.raises(TypeError, match="enumerated"):
            draw((1, 1), key)
    with pytest.raises(ValueError, match="without any possible outcome"):
        random.categorical(torch.full((1, 1, 2), torch.nan), key)


def test_rows_that_lean_on_each_other_give_a_wrong_law():
    """A decoder whose rows copy their neighbour is seen by the enumeration side by side, and only by it."""

    class Copies(SampleAll):
        def decide(self, canvas, guess, rows, random):
            step = super().decide(canvas, guess, rows, random)
            step.edits[0].value = step.edits[0].value.roll(1, 0)
            return step

    model = tabular(line(3), Line(1), V, 2)
    want = true_law(model, 2)
    assert total_variation(decoded_law(model, 2, SampleAll), want) < 1e-12
    assert total_variation(decoded_law(model, 2, Copies, batch=1), want) < 1e-12
    assert total_variation(decoded_law(model, 2, Copies), want) > 0.01


def test_total_variation():
    assert total_variation({(0,): 0.5, (1,): 0.5}, {(0,): 0.5, (1,): 0.5}) == 0
    assert total_variation({(0,): 1.0}, {(1,): 1.0}) == 1
    assert total_variation({(0,): 0.75, (1,): 0.25}, {(0,): 0.5, (1,): 0.5}) == 0.25
