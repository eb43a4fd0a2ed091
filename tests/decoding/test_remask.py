"""Deciders that take back: the law of every time under ReMDM, what stays decided under RCR; and reading order."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict

import pytest
import torch

from seriatim.canvas import DECIDED, UNKNOWN, Set, Unset
from seriatim.decoding.filters import Warper
from seriatim.decoding.loop import decode, generate, select_rows
from seriatim.decoding.remask import First, ReMDM, RunningConfidence
from seriatim.decoding.sample import Remask, Select
from seriatim.decoding.target import Target
from seriatim.evaluation.ceilings import uniform
from seriatim.factorization.static import AnyOrder
from seriatim.laws.enumeration import enumerate_rows
from seriatim.laws.oracle import oracle
from seriatim.laws.tabular import tabular
from seriatim.layout import line
from seriatim.random import Generator, Keyed

LAW = {(0, 0, 1): 0.5, (1, 0, 0): 0.2, (0, 1, 1): 0.1, (1, 1, 1): 0.2}


def after(decider, steps):
    """The exact law of which elements are known after so many steps of a model that is sure of everything."""
    model = oracle({(0, 1): 1.0}, 2)

    def run(random, rows):
        canvas = model.blank(rows)
        for turns, _ in enumerate(decode(Target(model), canvas, decider(), random=random), 1):
            if turns == steps:
                break
        return [tuple(x) for x in (canvas.status == DECIDED).tolist()]

    return enumerate_rows(run)


def written(model, decider):
    def run(random, rows):
        canvas = generate(Target(model), model.blank(rows), decider(), random=random)
        return [tuple(x) for x in canvas.value["token"].tolist()]

    return enumerate_rows(run)


@pytest.mark.parametrize("most", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("steps", [2, 3, 4])
def test_the_law_of_every_time_does_not_depend_on_how_much_is_hidden_again(most, steps):
    """Each element is known at time t with probability 1 - t, by itself; by the probabilities of the coins."""
    for turn in range(1, steps):
        share, law = turn / steps, defaultdict(float)
        for known, p in process(most, steps, turn).items():
            law[known] += p
        for known in itertools.product((False, True), repeat=2):
            want = math.prod(share if k else 1 - share for k in known)
            assert abs(law[known] - want) < 1e-12


def process(most, steps, turns):
    """The chain of what is known, by the probabilities of the decider."""
    decider = ReMDM(steps, most)
    law = {(False, False): 1.0}
    for turn in range(turns):
        t = torch.tensor([[turn]])
        decide, hide = float(decider._kept(t)), float(decider._times(t)[2])
        new = defaultdict(float)
        for known, p in law.items():
            for now in itertools.product((False, True), repeat=2):
                chance = 1.0
                for was, is_ in zip(known, now, strict=True):
                    up = 1 - hide if was else decide
                    chance *= up if is_ else 1 - up
                new[now] += p * chance
        law = new
    return law


@pytest.mark.parametrize(("most", "steps"), [(0.0, 3), (0.3, 2), (0.3, 3), (0.6, 3)])
def test_steps_of_the_loop_are_those_of_the_process(most, steps):
    """After the first step; where everything is known then, the loop has already gone on until something is not."""
    first, second = process(most, steps, 1), process(most, steps, 2)
    law = after(lambda: ReMDM(steps, most), 1)
    if most == 0:
        assert all(abs(law[k] - first[k]) < 1e-12 for k in first)
    hide = float(ReMDM(steps, most)._times(torch.tensor([[1]]))[2])
    whole = (True, True)
    stays = (1 - hide) ** 2 if steps > 2 else 1.0
    for known, p in first.items():
        want = p if known != whole else 0.0
        want += first[whole] * (
            (1 - hide) ** sum(known) * hide ** (2 - sum(known)) if steps == 3 and known != whole else 0.0
        )
        want += first[whole] * stays if known == whole else 0.0
        assert abs(law.get(known, 0.0) - want) < 1e-12
    assert abs(sum(second.values()) - 1) < 1e-12


@pytest.mark.parametrize("most", [0.0, 0.2, 1.0])
def test_with_one_step_it_draws_everything_by_itself(most):
    model = oracle(LAW, 2)
    one = written(model, lambda: Select("random", 1))
    assert written(model, lambda: ReMDM(1, most)) == pytest.approx(one, abs=1e-12)


def test_more_steps_and_taking_back_come_closer_to_the_law():
    model, known = oracle(LAW, 2), LAW

    def gap(decider):
        law = written(model, decider)
        assert abs(sum(law.values()) - 1) < 1e-12
        return sum(abs(law.get(x, 0) - known.get(x, 0)) for x in {*law, *known}) / 2

    gaps = [gap(lambda s=s: ReMDM(s, 0.0)) for s in (1, 2, 3)]
    assert gaps[0] > gaps[1] > gaps[2] > 0.01


def test_everything_is_decided_in_the_last_step():
    model = tabular(line(8), AnyOrder(), 3)
    canvas = model.blank(16)
    steps = list(decode(Target(model), canvas, ReMDM(6, 0.4), random=Generator(0)))
    hidden = sum(int((e.element >= 0).sum()) for step in steps for e in step.edits if isinstance(e, Unset))
    assert canvas.done and len(steps) <= 6 and hidden > 10


@pytest.mark.parametrize("make", [lambda: ReMDM(5, 0.4), lambda: RunningConfidence("confidence", 4)])
def test_a_row_does_not_depend_on_its_company(make):
    model = tabular(line(6), AnyOrder(), 3)
    together = generate(Target(model), model.blank(4), make(), random=Keyed(5)).value["token"]
    for i in range(4):
        canvas = model.blank(1)
        canvas.row = torch.tensor([i])
        assert torch.equal(generate(Target(model), canvas, make(), random=Keyed(5)).value["token"][0], together[i])


@pytest.mark.parametrize("make", [lambda: ReMDM(5, 0.4), lambda: RunningConfidence("confidence", 4)])
def test_rows_that_go_on_go_on_as_they_would_have(make):
    model = tabular(line(6), AnyOrder(), 3)
    whole = generate(Target(model), model.blank(4), make(), random=Keyed(2)).value["token"]
    target, canvas = Target(model), model.blank(4)
    for turn, _ in enumerate(decode(target, canvas, make(), random=Keyed(2))):
        if turn == 1:
            select_rows(target, canvas, torch.tensor([3, 1]))
    assert torch.equal(canvas.value["token"], whole[[3, 1]])


def test_a_decider_serves_one_canvas_after_the_other():
    model, decider = tabular(line(6), AnyOrder(), 3), ReMDM(5, 0.4)
    both = [generate(Target(model), model.blank(3), decider, random=Keyed(1)).value["token"] for _ in range(2)]
    assert torch.equal(*both)


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_running_confidence_keeps_the_schedule_and_the_surest(steps):
    """After each step as many are unknown as the schedule says, and all that are known are at least as sure as any
    that was hidden."""
    model = tabular(line(7), AnyOrder(), 3)
    canvas, target = model.blank(5), Target(model)
    sure = torch.full((5, 7), math.nan, dtype=torch.float64)
    plain = [int(x) for x in left_after(Select("confidence", steps))]
    for turn, step in enumerate(decode(target, canvas, RunningConfidence("confidence", steps), random=Keyed(0))):
        edit = step.edits[0]
        assert isinstance(edit, Set)
        unknown = (canvas.status == UNKNOWN).sum(1)
        assert unknown.tolist() == [plain[turn]] * 5
        rows = met(model, canvas, edit, sure)
        for b in range(5):
            known = canvas.status[b] == DECIDED
            if bool((~known).any()):
                assert rows[b][known].min() >= rows[b][~known].max()
        sure = torch.where(canvas.status == DECIDED, rows, math.nan)
    assert canvas.done


def met(model, canvas, edit, sure):
    """The confidence of every value that stands after a step, kept ones as they were: by a forward from before it."""
    before = canvas.select(torch.arange(canvas.batch))
    before.row = canvas.row
    before._status = torch.where(sure.isnan(), UNKNOWN, DECIDED)
    target = Target(model)
    rows = target.forward(target.plan(before), before)
    element = rows.element.expand(canvas.batch, -1)
    x = torch.zeros(canvas.batch, 7, dtype=torch.long)
    b, i = (edit.element >= 0).nonzero(as_tuple=True)
    x[b, edit.element[b, i]] = edit.value[b, i]
    p = rows.dist.log_prob(x.gather(1, element.clamp(min=0))).exp()
    out = sure.clone()
    b, i = (element >= 0).nonzero(as_tuple=True)
    out[b, element[b, i]] = p[b, i]
    return out


def left_after(decider):
    model = tabular(line(7), AnyOrder(), 3)
    canvas = model.blank(1)
    for _ in decode(Target(model), canvas, decider):
        yield (canvas.status == UNKNOWN).sum()


def test_running_confidence_takes_back_what_plain_confidence_would_keep():
    model = tabular(line(7), AnyOrder(), 3)
    taken = 0
    for seed in range(5):
        canvas, settled = model.blank(4), None
        for _ in decode(Target(model), canvas, RunningConfidence("confidence", 4), random=Keyed(seed)):
            now = canvas.status == DECIDED
            taken += 0 if settled is None else int((settled & ~now).sum())
            settled = now
    assert taken > 0


def test_remasking_none_is_plain_selection():
    model = tabular(line(6), AnyOrder(), 3)
    both = [
        generate(Target(model, warp=Warper(0)), model.blank(3), make).value["token"]
        for make in (Select("confidence", 3), Remask("confidence", 3, again=0))
    ]
    assert torch.equal(*both)


def test_reading_order_goes_by_place():
    model = tabular(line(5), AnyOrder(), 3)
    canvas = model.canvas(
        {"token": torch.zeros(2, 5, dtype=torch.long)}, torch.tensor([[1, 0, 0, 1, 0], [0, 0, 1, 0, 0]]).bool()
    )
    known = []
    for _ in decode(Target(model), canvas, First(2)):
        known.append(canvas.known.int().tolist())
    assert known == [[[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]], [[1] * 5, [1] * 5]]


@pytest.mark.parametrize("wrong", [lambda: First(0), lambda: ReMDM(0), lambda: ReMDM(3, 1.5)])
def test_what_cannot_be_is_refused(wrong):
    with pytest.raises(ValueError):
        wrong()


def test_one_at_a_time_of_a_law_is_right():
    law = uniform(itertools.permutations(range(3)))
    model = oracle(law, 3)
    assert set(written(model, lambda: First(1))) == set(law)
