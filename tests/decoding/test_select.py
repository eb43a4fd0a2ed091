"""Masked generation: schedules, counts a row, rules, remasking; the law of the random rule by enumeration."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from seriatim.canvas import Set, Unset
from seriatim.decoding.filters import Warper
from seriatim.decoding.guess import Guess
from seriatim.decoding.loop import decode, generate
from seriatim.decoding.sample import Above, Remask, SampleAll, Select, schedule
from seriatim.decoding.target import Target
from seriatim.factorization.line import Line
from seriatim.factorization.static import AnyOrder, Blocks
from seriatim.laws.enumeration import enumerate_rows
from seriatim.laws.tabular import tabular
from seriatim.layout import line
from seriatim.random import VALUE, Key, Keyed, enumerate_law, numbered

RULES = ["random", "confidence", "margin", "entropy"]


def masked(size=12, vocab=5, seed=0):
    return tabular(line(size), AnyOrder(), vocab, seed)


# ---- schedules -------------------------------------------------------------------------------------------------------


def test_the_linear_schedule_is_that_of_llada():
    """n // steps at each step, one more at the first n % steps."""
    for n, steps in itertools.product(range(1, 30), range(1, 12)):
        left = (n, *schedule(n, steps, "linear"))
        counts = [a - b for a, b in itertools.pairwise(left)]
        want = [n // steps + (i < n % steps) for i in range(steps)]
        assert counts == [c for c in want if c]


def test_the_cosine_schedule_is_that_of_maskgit():
    """floor(n cos(pi t / 2 steps)) remain, at least one is decided at each step and all at the last."""
    for n, steps in itertools.product(range(1, 70), range(1, 20)):
        left, want = n, []
        for t in range(1, steps + 1):
            now = math.floor(n * math.cos(math.pi / 2 * t / steps) + 1e-9)
            left = 0 if t == steps else max(0, min(left - 1, now))
            want.append(left)
            if left == 0:
                break
        assert list(schedule(n, steps, "cosine")) == want
    assert schedule(256, 8, "cosine") == (251, 236, 212, 181, 142, 97, 49, 0)


def test_a_schedule_may_say_how_many_at_each_step():
    assert schedule(9, 8, (1, 2, 3, 2, 1)) == (8, 6, 3, 1, 0)
    assert schedule(5, 8, (1, 2, 3, 2, 1)) == (4, 2, 0), "as long as there are so many"
    assert schedule(12, 8, (1, 2, 3, 2, 1)) == (11, 9, 6, 4, 0), "the last step decides what is left"
    with pytest.raises(ValueError, match="at least one element"):
        Select(sizes=(2, 0))


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_schedules_end_and_progress(kind):
    for n, steps in itertools.product(range(1, 40), range(1, 50)):
        left = (n, *schedule(n, steps, kind))
        assert left[-1] == 0 and len(left) <= min(n, steps) + 1
        assert all(a > b for a, b in itertools.pairwise(left))


def counts(steps_of, canvas):
    """Elements decided in each row at each step."""
    return [(step.edits[0].element >= 0).sum(1).tolist() for step in steps_of]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_steps_follow_the_schedule_in_each_row(rule, kind):
    """Rows of which different numbers of elements are given have schedules of their own; given ones stay."""
    model = masked()
    x = torch.randint(5, (3, 12), generator=torch.Generator().manual_seed(0))
    known = torch.zeros(3, 12, dtype=torch.bool)
    known[1, [0, 5, 6]] = known[2, 3:] = True
    canvas = model.canvas({"token": x}, known)
    made = counts(decode(Target(model), canvas, Select(rule, steps=4, schedule=kind), random=Keyed(0)), canvas)
    for row, n in enumerate([12, 9, 3]):
        left = (n, *schedule(n, 4, kind))
        want = [a - b for a, b in itertools.pairwise(left)]
        assert [c[row] for c in made] == want + [0] * (len(made) - len(want))
        assert torch.equal(canvas.value["token"][row, known[row]], x[row, known[row]])
    assert canvas.done and len(made) == 4


def test_blocks_have_schedules_of_their_own():
    model = tabular(line(10), Blocks(4, "any"), 3)
    canvas = model.canvas({"token": torch.zeros(2, 10, dtype=torch.long)}, 1)
    made = counts(decode(Target(model), canvas, Select("margin", steps=2), random=Keyed(0)), canvas)
    assert made == [[2, 2], [1, 1], [2, 2], [2, 2], [1, 1], [1, 1]]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("order", [AnyOrder(), Blocks(5, "any")], ids=["any order", "blocks"])
def test_taken_up_again_by_another_decoder_it_goes_on_as_before(rule, order):
    model = tabular(line(11), order, 4)
    select = lambda: Select(rule, steps=3)  # noqa: E731
    whole = generate(Target(model), model.blank(2), select(), random=Keyed(1)).value["token"]
    for stop in (1, 2, 4):
        canvas = model.blank(2)
        stream = decode(Target(model), canvas, select(), random=Keyed(1))
        for _ in range(stop):
            next(stream, None)
        generate(Target(model), canvas, select(), random=Keyed(1))
        assert torch.equal(canvas.value["token"], whole)


@pytest.mark.parametrize("rule", RULES)
def test_a_row_does_not_depend_on_its_company(rule):
    model = masked(8)
    together = generate(Target(model), model.blank(3), Select(rule, steps=3), random=Keyed(2)).value["token"]
    canvas = model.canvas({"token": torch.zeros(1, 8, dtype=torch.long)}, row=torch.tensor([2]))
    alone = generate(Target(model), canvas, Select(rule, steps=3), random=Keyed(2)).value["token"]
    assert torch.equal(alone[0], together[2])


# ---- rules -----------------------------------------------------------------------------------------------------------


def first_step(rule, **kinds):
    """(laws of all elements, values drawn, which were decided) of a first step."""
    model = masked(9)
    canvas, target = model.blank(2), Target(model)
    plan = target.plan(canvas)
    rows = target.forward(plan, canvas)
    step = Select(rule, **kinds).decide(canvas, None, rows, Keyed(3))
    chosen = torch.zeros(2, 9, dtype=torch.bool)
    edit = step.edits[0]
    b, i = (edit.element >= 0).nonzero(as_tuple=True)
    chosen[b, edit.element[b, i]] = True
    return rows.dist, edit, chosen


def scores_by_hand(rule, dist, edit):
    p = dist.probs()
    if rule == "confidence":
        return p.gather(-1, edit.value[..., None])[..., 0]
    if rule == "margin":
        ordered = p.sort(-1).values
        return ordered[..., -1] - ordered[..., -2]
    return (p * p.log()).sum(-1)


@pytest.mark.parametrize("rule", ["confidence", "margin", "entropy"])
def test_the_best_are_decided_first(rule):
    dist, edit, chosen = first_step(rule, steps=3)
    score = scores_by_hand(rule, dist, edit)
    for row in range(2):
        assert set(score[row].topk(3).indices.tolist()) == set(chosen[row].nonzero()[:, 0].tolist())


@pytest.mark.parametrize(("rule", "threshold"), [("confidence", 0.3), ("margin", 0.2), ("entropy", -1.3)])
def test_a_threshold_decides_all_above_it(rule, threshold):
    dist, edit, chosen = first_step(rule, commit=Above(threshold))
    score = scores_by_hand(rule, dist, edit)
    want = score > threshold
    assert 1 < int(want.sum()) < want.numel()
    assert torch.equal(chosen, want)


@pytest.mark.parametrize("rule", RULES)
def test_a_threshold_that_none_exceeds_decides_the_best_one(rule):
    model, canvas = masked(6), masked(6).blank(3)
    made = counts(decode(Target(model), canvas, Select(rule, commit=Above(2.0)), random=Keyed(0)), canvas)
    assert made == [[1, 1, 1]] * 6


def test_one_value_leaves_no_margin_to_compare():
    model = tabular(line(3), AnyOrder(), 1)
    assert generate(Target(model), model.blank(1), Select("margin", steps=2)).done


# ---- laws ------------------------------------------------------------------------------------------------------------


def conditional(model, x, known, element, warp=None):
    """p of each value of an element given the known ones."""
    shown = torch.zeros(1, model.layout.size, dtype=torch.bool)
    shown[0, list(known)] = True
    target = Target(model, warp=warp, cached=False)
    canvas = model.canvas({"token": torch.where(shown, torch.tensor([x]), 0)}, shown)
    rows = target.forward(target.plan(canvas), canvas)
    return rows.dist.probs()[0, rows.element[0].tolist().index(element)]


def mean_over_orders(model, groups, warp=None):
    """Brute force: the mean over all orders of groups (of elements decided at once) of products of conditionals."""
    n, vocab = model.layout.size, model.heads["token"].vocab
    law = {}
    for x in itertools.product(range(vocab), repeat=n):
        for order in groups:
            p, known = 1.0, []
            for group in order:
                for e in group:
                    p *= float(conditional(model, x, known, e, warp)[x[e]])
                known += group
            law[x] = law.get(x, 0.0) + p / len(groups)
    return law


def enumerated(model, select, warp=None):
    def run(random, rows):
        canvas = generate(Target(model, warp=warp), model.blank(rows), select(), random=random)
        return [tuple(row) for row in canvas.value["token"].tolist()]

    return enumerate_rows(run)


def gap(a, b):
    return max(abs(a.get(x, 0.0) - b.get(x, 0.0)) for x in a.keys() | b.keys())


@pytest.mark.parametrize("warp", [None, Warper(0.7, top_k=2)], ids=str)
def test_one_at_random_a_step_is_the_any_order_law(warp):
    model = tabular(line(3), AnyOrder(), 3, 4)
    want = mean_over_orders(model, [[[e] for e in order] for order in itertools.permutations(range(3))], warp)
    assert abs(sum(want.values()) - 1) < 1e-12
    assert gap(enumerated(model, lambda: Select("random", steps=3), warp), want) < 1e-12
    assert gap(enumerated(model, lambda: Select("random", commit=Above(1.0)), warp), want) < 1e-12


def test_two_at_random_a_step_are_every_pair_equally_often():
    model = tabular(line(4), AnyOrder(), 2, 5)
    pairs = [list(p) for p in itertools.combinations(range(4), 2)]
    orders = [[p, [e for e in range(4) if e not in p]] for p in pairs]
    assert gap(enumerated(model, lambda: Select("random", steps=2)), mean_over_orders(model, orders)) < 1e-12


def test_a_fixed_order_is_another_law():
    """What the test above could not see if the table ignored its context."""
    model = tabular(line(3), AnyOrder(), 3, 4)
    every = mean_over_orders(model, [[[e] for e in order] for order in itertools.permutations(range(3))])
    assert gap(mean_over_orders(model, [[[0], [1], [2]]]), every) > 1e-3


def test_all_at_once_are_independent_draws():
    model = tabular(line(3), AnyOrder(), 3, 4)
    want = mean_over_orders(model, [[[0, 1, 2]]])
    for rule in RULES:
        assert gap(enumerated(model, lambda rule=rule: Select(rule, steps=1)), want) < 1e-12
    assert gap(enumerated(model, SampleAll), want) < 1e-12


def test_confidence_draws_anew_what_it_did_not_keep():
    """Brute force of two elements: the likelier draw is kept, the other element is drawn again with it known."""
    model = tabular(line(2), AnyOrder(), 3, 6)
    first = [conditional(model, (0, 0), [], e).tolist() for e in range(2)]
    want = {}
    for a, b in itertools.product(range(3), repeat=2):
        p, kept = first[0][a] * first[1][b], 0 if first[0][a] >= first[1][b] else 1
        again = conditional(model, (a, b), [kept], 1 - kept).tolist()
        for c in range(3):
            x = (a, c) if kept == 0 else (c, b)
            want[x] = want.get(x, 0.0) + p * again[c]
    assert gap(enumerated(model, lambda: Select("confidence", steps=2)), want) < 1e-12


@pytest.mark.parametrize("rule", ["random", "confidence"])
def test_keyed_noise_has_the_enumerated_law(rule):
    """20,000 keyed samples against the exact law: noise is not reused between steps (chi-square, error rate 0.001)."""
    from scipy.stats import chisquare

    model = tabular(line(3), AnyOrder(), 2, 8)
    law = enumerated(model, lambda: Select(rule, steps=3))
    n = 20_000
    got = generate(Target(model), model.blank(n), Select(rule, steps=3), random=Keyed(1)).value["token"]
    seen = torch.bincount(got @ torch.tensor([4, 2, 1]), minlength=8)
    want = [n * law[x] for x in itertools.product(range(2), repeat=3)]
    assert chisquare(seen.tolist(), want).pvalue > 0.001


@pytest.mark.parametrize("order", [AnyOrder(), Blocks(5, "any")], ids=["any order", "blocks"])
@pytest.mark.parametrize(
    "select", [*(Select(r, steps=n) for r in RULES for n in (5, 12)), Remask("margin", 5, again=2)]
)
def test_no_noise_is_used_twice(accountant, select, order):
    model = tabular(line(12), order, 5)
    generate(Target(model), model.blank(2), select, random=accountant(0))


# ---- remasking -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["confidence", "margin", "entropy"])
@pytest.mark.parametrize("again", [1, 3, 50])
def test_remasking_ends_with_a_complete_canvas_and_alters_nothing_it_keeps(rule, again):
    model = masked()
    x = torch.randint(5, (2, 12), generator=torch.Generator().manual_seed(1))
    known = torch.zeros(2, 12, dtype=torch.bool)
    known[0, 2] = known[1, :4] = True
    canvas, steps = model.canvas({"token": x}, known), 0
    before, was = canvas.value["token"].clone(), canvas.known.clone()
    for step in decode(Target(model), canvas, Remask(rule, steps=5, again=again), random=Keyed(2)):
        steps += 1
        kept = was & canvas.known
        assert torch.equal(canvas.value["token"][kept], before[kept])
        (edit, *unset) = step.edits
        assert isinstance(edit, Set) and len(unset) == (steps < 5)
        if unset:
            assert isinstance(unset[0], Unset)
        before, was = canvas.value["token"].clone(), canvas.known.clone()
    assert steps == 5 and canvas.done
    assert torch.equal(canvas.value["token"][known], x[known])


def test_the_least_certain_are_remasked():
    """Of all that is decided, by the scores they had when decided."""
    model, select = masked(), Remask("margin", steps=4, again=2)
    canvas, score = model.blank(1), {}
    target = Target(model)
    while not canvas.done:
        plan = target.plan(canvas)
        rows = target.forward(plan, canvas)
        top = rows.dist.probs().topk(2, -1).values
        margin = dict(zip(rows.element[0].tolist(), (top[..., 0] - top[..., 1])[0].tolist(), strict=True))
        step = select.decide(canvas, None, rows, Keyed(0))
        score |= {e: margin[e] for e in step.edits[0].element[0].tolist() if e >= 0}
        canvas.apply(step.edits)
        if len(step.edits) > 1:
            gone = [e for e in step.edits[1].element[0].tolist() if e >= 0]
            assert gone == sorted(score, key=lambda e: score[e])[:2]
            for e in gone:
                del score[e]
    assert len(score) == 12


def test_remasking_nothing_is_selection():
    model = masked()
    for rule in ("confidence", "margin", "entropy"):
        one = generate(Target(model), model.blank(2), Select(rule, steps=1), random=Keyed(5)).value["token"]
        other = generate(Target(model), model.blank(2), Remask(rule, steps=1, again=3), random=Keyed(5)).value["token"]
        assert torch.equal(one, other)
    a, b = tabular(line(3), AnyOrder(), 2, 7), Warper(temperature=0.8)
    select, remask = (enumerated(a, make, b) for make in (lambda: Select(steps=3), lambda: Remask(steps=3, again=0)))
    assert gap(select, remask) < 1e-12


def test_remasking_changes_the_law():
    """It is a decoder of its own, not another way to the same law."""
    model = tabular(line(3), AnyOrder(), 2, 7)
    assert gap(enumerated(model, lambda: Remask(steps=3)), enumerated(model, lambda: Select(steps=3))) > 1e-3


def test_remasking_starts_anew_with_another_canvas_and_in_another_block():
    model, select = masked(), Remask(steps=4, again=2)
    stream = decode(Target(model), model.blank(2), select, random=Keyed(0))
    next(stream), next(stream)
    strings = [generate(Target(model), model.blank(2), s, random=Keyed(0)) for s in (select, Remask(steps=4, again=2))]
    assert torch.equal(*(c.value["token"] for c in strings))
    blocks = tabular(line(8), Blocks(4, "any"), 3)
    canvas, unset = blocks.blank(1), []
    for step in decode(Target(blocks), canvas, Remask(steps=3), random=Keyed(0)):
        unset.append([e for edit in step.edits[1:] for e in edit.element[0].tolist()])
    assert canvas.done and [len(u) for u in unset] == [1, 1, 0, 1, 1, 0]
    assert all(e < 4 for u in unset[:3] for e in u) and all(e >= 4 for u in unset[3:] for e in u)


# ---- misuse ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [{"rule": "best"}, {"steps": 0}, {"schedule": "square"}],
)
def test_impossible_selections_are_refused(wrong):
    with pytest.raises(ValueError):
        Select(**wrong)


@pytest.mark.parametrize("wrong", [{"again": -1}, {"commit": Above(0.5)}, {"rule": "random"}])
def test_impossible_remasking_is_refused(wrong):
    with pytest.raises(ValueError, match="remask"):
        Remask(**wrong)


def test_drafts_are_refused():
    model = tabular(line(4), Line(1), 3)
    target, canvas, guess = Target(model), model.blank(1), Guess(torch.tensor([[1]]))
    rows = target.forward(target.plan(canvas, guess), canvas, guess)
    for decider in (Select(), SampleAll()):
        with pytest.raises(ValueError, match="verif"):
            decider.decide(canvas, guess, rows, Keyed(0))


def test_on_a_line_selection_is_plain_sampling():
    model = tabular(line(6), Line(1), 3)
    strings = [generate(Target(model), model.blank(2), d, random=Keyed(0)) for d in (Select("random"), SampleAll())]
    assert torch.equal(*(c.value["token"] for c in strings))


def test_the_random_order_is_enumerated_once_for_each_set():
    """Where all that is left is taken, nothing is drawn: 2 x 2 x 2 values in 3 x 2 orders."""
    model, outcomes = tabular(line(3), AnyOrder(), 2), []

    def run(random):
        outcomes.append(1)
        return tuple(
            generate(Target(model), model.blank(1), Select("random", steps=3), random=random).value["token"][0].tolist()
        )

    enumerate_law(run)
    assert len(outcomes) == 8 * 6


# ---- certainty is the model's, whatever is sampled -------------------------------------------------------------------

SHARP = [Warper(0), Warper(1e-3), Warper(1e-30), Warper(top_k=1), Warper(top_p=1e-9), Warper(0.5, top_k=2)]


@pytest.mark.parametrize("warp", SHARP, ids=str)
@pytest.mark.parametrize("rule", ["confidence", "margin", "entropy"])
def test_scores_are_those_before_temperature_and_filters(rule, warp):
    """With greedy decoding all values would look certain, and the first elements would be decided first."""
    model = masked(9)
    canvas, target = model.blank(2), Target(model, warp=warp)
    edit = next(decode(target, canvas, Select(rule, steps=3), random=Keyed(3))).edits[0]
    plain = Target(model)
    law = plain.forward(plain.plan(empty := model.blank(2)), empty).dist
    if rule == "confidence":  # of what is drawn
        drawn = Target(model, warp=warp)
        turn = torch.zeros(2, 1, dtype=torch.long)
        key = Key(empty.row, torch.arange(9).expand(2, -1), numbered(VALUE, turn))
        x = drawn.forward(drawn.plan(empty), empty).dist.sample(Keyed(3), key)
        score = law.log_prob(x)
    else:
        score = scores_by_hand(rule, law, None)
    for row in range(2):
        best = set(score[row].topk(3).indices.tolist())
        assert {e for e in edit.element[row].tolist() if e >= 0} == best != {0, 1, 2}


@pytest.mark.parametrize("rule", ["confidence", "margin", "entropy"])
def test_greedy_remasking_takes_back_the_least_certain(rule):
    model = masked(9)
    canvas, target = model.blank(1), Target(model, warp=Warper(0))
    step = next(decode(target, canvas, Remask(rule, steps=3, again=1), random=Keyed(3)))
    plain = Target(model)
    p = plain.forward(plain.plan(empty := model.blank(1)), empty).dist
    score = p.probs().amax(-1) if rule == "confidence" else scores_by_hand(rule, p, None)
    chosen = score[0].topk(3).indices.tolist()
    assert sorted(step.edits[0].element[0][step.edits[0].element[0] >= 0].tolist()) == sorted(chosen)
    assert step.edits[1].element[0].tolist() == [chosen[-1]]


def test_a_threshold_is_compared_with_the_models_certainty():
    """Greedy decoding with a threshold decides no more than the model is sure of."""
    model = masked(9)
    plain = Target(model)
    top = plain.forward(plain.plan(empty := model.blank(1)), empty).dist.probs().amax(-1)[0]
    threshold = float(top.sort().values[4:6].mean())
    step = next(decode(Target(model, warp=Warper(0)), model.blank(1), Select(commit=Above(threshold))))
    decided = {e for e in step.edits[0].element[0].tolist() if e >= 0}
    assert decided == set((top > threshold).nonzero()[:, 0].tolist()) and len(decided) == 4
