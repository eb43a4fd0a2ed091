"""What deciding several tokens at once must cost: closed forms, enumeration, and a model with the true conditionals run
through the real decoding loop, all of which must agree."""

from __future__ import annotations

import math
import random
from itertools import permutations, product

import pytest
import torch

from seriatim.canvas import Canvas, Set
from seriatim.data.list_tasks import LISTS, problem
from seriatim.decoding.loop import generate
from seriatim.decoding.sample import Select
from seriatim.decoding.target import Target
from seriatim.decoding.unmask import Unmask
from seriatim.evaluation.ceilings import (
    ceiling,
    correlation_one_changed,
    correlation_permuted,
    entropy,
    marginals,
    one_changed,
    permuted,
    total_correlation,
    uniform,
)  # fmt: skip
from seriatim.factorization.static import Blocks
from seriatim.laws.enumeration import enumerate_rows
from seriatim.laws.oracle import oracle
from seriatim.random import Generator

Z99 = 2.576


def shuffled(n):
    return uniform(permutations(range(n)))


def replaced(n):
    return uniform(tuple(n if j == i else j for j in range(n)) for i in range(n))


def inserted(n):
    return uniform((*range(i), n, *range(i, n)) for i in range(n + 1))


def copied(n):
    return uniform([tuple(range(n))])


def law_of(task, n):
    """A law of the data, of ids."""
    listed = problem(task, n, random.Random(0)).answers()
    ids = {x: i for i, x in enumerate(dict.fromkeys(word for x in listed for word in x))}
    return uniform(tuple(ids[word] for word in x) for x in listed)


def steps(n, k):
    return (k,) * (n // k)


def right(law, k, rows=512, decider=None, rank=None, **more):
    """The exact probability that the real loop ends in a possible outcome, k tokens a step; `rank`: of all elements."""
    model = oracle(law, 1 + max(map(max, law)), **more)
    n = model.layout.size

    def run(source, batch):
        canvas = model.blank(batch)
        if rank is not None:
            canvas = Canvas(canvas.layout, canvas.value, 0, torch.full((1, n), rank))
        generate(Target(model), canvas, decider or Select("random", n // k), random=source)
        return [tuple(x) in law for x in canvas.value["token"].tolist()]

    return enumerate_rows(run, rows).get(True, 0.0)


CLOSED = [
    (shuffled, 4, {4: 0.09375, 2: 0.375, 1: 1.0}), (shuffled, 3, {3: 6 / 27, 1: 1.0}),
    (replaced, 4, {4: 0.421875, 2: 0.65625, 1: 1.0}), (replaced, 3, {3: (2 / 3) ** 2, 1: 1.0}),
    (copied, 4, {4: 1.0, 2: 1.0, 1: 1.0}), (inserted, 3, {4: 0.1875, 1: 1.0}), (inserted, 2, {3: 8 / 27, 1: 1.0}),
]  # fmt: skip


@pytest.mark.parametrize(("law", "n", "wanted"), CLOSED)
def test_the_loop_meets_each_closed_form_exactly(law, n, wanted):
    for k, value in wanted.items():
        assert abs(right(law(n), k) - value) < 1e-12, k


def test_unmasking_of_texts_meets_them_too():
    """In one block; where every token is a block, one at a time."""
    assert abs(right(shuffled(4), 2, decider=Unmask(Select("random", 2)), rank=0) - 0.375) < 1e-12
    assert abs(right(shuffled(4), 2, decider=Unmask(Select("random", 2))) - 1) < 1e-12


def test_blocks_meet_them_from_left_to_right():
    """Which places are decided together does not matter to a permutation; their cache is exact."""
    assert abs(right(shuffled(4), 4, decider=Select("random", 1), factorization=Blocks(2, "any")) - 0.375) < 1e-12


@pytest.mark.parametrize(
    ("law", "n", "k", "value"),
    [
        (shuffled, 6, 6, 0.0154), (shuffled, 6, 3, 0.1235), (shuffled, 6, 2, 0.3125), (shuffled, 6, 1, 1.0),
        (replaced, 6, 6, 0.4019), (replaced, 6, 3, 0.6044), (replaced, 6, 2, 0.7335), (replaced, 6, 1, 1.0),
        (inserted, 4, 5, 0.1229), (inserted, 6, 7, 0.056), (copied, 6, 6, 1.0),
    ],
)  # fmt: skip
def test_of_six_the_loop_meets_them_within_an_interval_of_99_percent(law, n, k, value):
    known, rows = law(n), 2000
    model = oracle(known, n + 1)
    total = model.layout.size
    canvas = generate(Target(model), model.blank(rows), Select("random", total // k), random=Generator(3))
    share = sum(tuple(x) in known for x in canvas.value["token"].tolist()) / rows
    exact = ceiling(known, steps(total, k))
    assert abs(exact - value) < 6e-5
    assert abs(share - exact) <= Z99 * math.sqrt(exact * (1 - exact) / rows) + 1e-12


@pytest.mark.parametrize("law", [shuffled, replaced], ids=("shuffle", "replace"))
def test_the_likeliest_values_of_tied_marginals_never_go_together(law):
    """Greedily, in one step: every marginal of a permutation is flat, and in a replacement all stay as they are."""
    from seriatim.decoding.filters import Warper

    model, known = oracle(law(4), 5), law(4)
    canvas = generate(Target(model, warp=Warper(0)), model.blank(1), Select("random", 1))
    assert tuple(canvas.value["token"][0].tolist()) not in known


@pytest.mark.parametrize("n", [3, 4, 5])
def test_closed_forms_are_the_enumeration(n):
    for k in range(1, n + 1):
        if n % k == 0:
            assert abs(permuted(steps(n, k)) - ceiling(shuffled(n), steps(n, k))) < 1e-12
            assert abs(one_changed(steps(n, k)) - ceiling(replaced(n), steps(n, k))) < 1e-12
    uneven = (2, *(1,) * (n - 2))
    assert abs(permuted(uneven) - ceiling(shuffled(n), uneven)) < 1e-12
    assert abs(one_changed(uneven) - ceiling(replaced(n), uneven)) < 1e-12
    assert abs(one_changed((n,)) - (1 - 1 / n) ** (n - 1)) < 1e-12


@pytest.mark.parametrize("task", LISTS)
@pytest.mark.parametrize("k", [1, 2, 4])
def test_ceilings_of_the_data_are_those_of_the_loop(task, k):
    """Those of a shuffled list, which is never as it was, and of changes, whose places are not alike."""
    law = law_of(task, 3 if task.startswith("insert") else 5 if task.startswith("remove") else 4)
    assert abs(ceiling(law, steps(4, k)) - right(law, k)) < 1e-12
    if k == 1:
        assert ceiling(law, steps(4, 1)) == 1.0
    dependent = task == "shuffle" or task.endswith("random")
    assert (ceiling(law, (4,)) < 0.9) == dependent


def test_total_correlations():
    for n in (3, 4, 6):
        assert abs(total_correlation(shuffled(n)) - correlation_permuted(n)) < 1e-9
        assert abs(total_correlation(replaced(n)) - correlation_one_changed(n)) < 1e-9
        assert total_correlation(copied(n)) == 0
    assert abs(correlation_permuted(4) - (4 * math.log(4) - math.log(24))) < 1e-12


@pytest.mark.parametrize("law", [shuffled(3), replaced(3), inserted(2)], ids=("shuffle", "replace", "insert"))
def test_one_step_diverges_from_the_law_by_the_total_correlation(law):
    """What the loop emits in one step, by enumeration, is the product of the marginals."""
    model = oracle(law, 4)

    def run(source, batch):
        canvas = generate(Target(model), model.blank(batch), Select("random", 1), random=source)
        return [tuple(x) for x in canvas.value["token"].tolist()]

    emitted = enumerate_rows(run, 256)
    divergence = math.fsum(p * math.log(p / emitted[x]) for x, p in law.items())
    assert abs(divergence - total_correlation(law)) < 1e-12


def test_an_oracle_reads_the_true_conditionals_of_any_law():
    """Against brute force, in any state of a canvas."""
    g = torch.Generator().manual_seed(0)
    outcomes = list(product(range(2), repeat=3))
    law = dict(zip(outcomes, torch.rand(8, generator=g, dtype=torch.float64).softmax(0).tolist(), strict=True))
    model = oracle(law, 2)
    for outcome in outcomes:
        for shown in product((False, True), repeat=3):
            if all(shown):
                continue
            canvas = model.blank(1)
            element = [i for i in range(3) if shown[i]]
            if element:
                canvas.apply([Set(torch.tensor([[outcome[i] for i in element]]), torch.tensor([element]))])
            rows = Target(model).forward(Target(model).plan(canvas), canvas)
            agree = {x: p for x, p in law.items() if all(x[i] == outcome[i] for i in element)}
            want = marginals({x: p / sum(agree.values()) for x, p in agree.items()})
            for m, i in enumerate(rows.element[0].tolist()):
                if i >= 0:
                    assert torch.allclose(rows.dist.probs()[0, m], torch.tensor([want[i][0], want[i][1]]).double())


def test_an_oracle_leaves_what_does_not_go_together_open():
    model = oracle(shuffled(3), 3)
    canvas = model.blank(1)
    canvas.apply([Set(torch.tensor([[1, 1]]), torch.tensor([[0, 1]]))])
    rows = Target(model).forward(Target(model).plan(canvas), canvas)
    last = rows.element[0].tolist().index(2)
    assert torch.allclose(rows.dist.probs()[0, last], torch.full((3,), 1 / 3).double())


@pytest.mark.parametrize("wrong", [(2, 1), (0, 4), (5,)])
def test_steps_must_add_up(wrong):
    with pytest.raises(ValueError, match="add up"):
        ceiling(shuffled(4), wrong)


def test_a_law_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="ids below 2"):
        oracle({(0, 2): 1.0}, 2)


def test_entropy_is_in_nats():
    assert abs(entropy([0.25] * 4) - math.log(4)) < 1e-12 and entropy([1.0, 0.0]) == 0
