"""Generation by insertion: the law over texts equals a recursion by hand; order of arrival is immaterial; rows end when
they say so."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from seriatim.backbones.rope import RoPE
from seriatim.backbones.transformer import Transformer, TransformerConfig
from seriatim.canvas import Delete, Insert, Set
from seriatim.decoding.filters import Warper
from seriatim.decoding.guess import Guess
from seriatim.decoding.insert import Inserting
from seriatim.decoding.loop import decode, generate
from seriatim.decoding.target import Target
from seriatim.embed import TokenEmbed
from seriatim.factorization.insertion import Insertion, opened
from seriatim.factorization.line import Line
from seriatim.heads.insertion import InsertionHead
from seriatim.laws.case import randomise
from seriatim.laws.tabular import tabular
from seriatim.layout import line
from seriatim.model import Model
from seriatim.plan import OrderError
from seriatim.random import Keyed, enumerate_law

LIMIT = 3


def model_of(vocab=2, seed=0):
    backbone = Transformer(TransformerConfig(16, 2, 2, rope=RoPE()))
    return randomise(Model(line(1), Insertion(), TokenEmbed(vocab, 16), backbone, InsertionHead(16, vocab)), seed, 0.6)


MODEL = model_of()


def holding(model, *texts):
    """A canvas whose rows are these texts behind a gap, as if inserted there."""
    n = max(map(len, texts))
    value = torch.tensor([[0, *t] for t in texts])
    assert all(len(t) == n for t in texts)
    canvas = model.canvas({"token": value}, layout=line(n + 1))
    return canvas.apply([Set(value[:, 1:], torch.arange(1, n + 1).expand(len(texts), -1))])


def choices(model, text, warp=None):
    """Probabilities of all (slot, token) pairs and of stopping, from a forward over a finished text."""
    target, canvas = Target(model, warp=warp), holding(model, text)
    with torch.no_grad():
        return target.forward(target.plan(canvas), canvas).dist.probs()[0, 0].tolist()


def by_hand(model, limit, warp=None, start=(), stop=None):
    """The law over texts: a recursion over all ways to insert."""
    law, vocab = {}, model.heads["token"].vocab
    ask = cache(lambda text: choices(model, text, warp))

    def go(text, p):
        if p == 0:
            return
        if len(text) == limit:
            law[text] = law.get(text, 0.0) + p
            return
        *pairs, ends = ask(text)
        if stop is not None:
            if ends > stop:
                law[text] = law.get(text, 0.0) + p
                return
            pairs, ends = [x / sum(pairs) for x in pairs], 0.0
        law[text] = law.get(text, 0.0) + p * ends
        for i, x in enumerate(pairs):
            slot, token = divmod(i, vocab)
            go((*text[:slot], token, *text[slot:]), p * x)

    go(tuple(start), 1.0)
    return {text: p for text, p in law.items() if p > 0}


def enumerated(model, decider, warp=None, start=()):
    def run(random):
        canvas = generate(Target(model, warp=warp), holding(model, start), decider(), random=random)
        return tuple(canvas.read("token")[0].tolist())

    return enumerate_law(run)


def gap(a, b):
    return max(abs(a.get(x, 0.0) - b.get(x, 0.0)) for x in a.keys() | b.keys())


# ---- laws ------------------------------------------------------------------------------------------------------------


def test_the_law_over_texts_is_that_of_all_ways_to_insert():
    """Slots are in reading order whatever the order of arrival, and a text such as "aa" adds up over its ways."""
    law, want = enumerated(MODEL, lambda: Inserting(LIMIT)), by_hand(MODEL, LIMIT)
    assert abs(sum(law.values()) - 1) < 1e-12
    assert law.keys() == want.keys() and len(law) == 1 + 2 + 4 + 8
    assert gap(law, want) < 1e-12


@pytest.mark.parametrize("warp", [Warper(0.7), Warper(top_k=3)], ids=str)
def test_filters_apply_to_the_joint_choice(warp):
    assert gap(enumerated(MODEL, lambda: Inserting(LIMIT), warp), by_hand(MODEL, LIMIT, warp)) < 1e-12


@pytest.mark.parametrize("stop", [0.0, 0.3, 0.99])
def test_a_threshold_ends_a_text_instead_of_chance(stop):
    assert gap(enumerated(MODEL, lambda: Inserting(LIMIT, stop)), by_hand(MODEL, LIMIT, stop=stop)) < 1e-12


def test_a_text_ends_where_filters_leave_nothing_but_stopping():
    """Stopping is likeliest there, but not as likely as the threshold asks."""
    model = model_of(seed=6)
    with torch.no_grad():
        model.heads["token"].stop_bias += torch.logit(torch.tensor(0.8)) - torch.logit(
            torch.tensor(choices(model, ())[-1])
        )
    assert abs(choices(model, ())[-1] - 0.8) < 1e-6
    canvas = generate(Target(model, warp=Warper(top_k=1)), model.blank(1), Inserting(5, 0.95))
    assert canvas.done and canvas.read("token")[0].tolist() == []


def test_inserted_elements_are_continued_in_place():
    start = (1, 0)
    law = enumerated(MODEL, lambda: Inserting(LIMIT), start=start)
    assert gap(law, by_hand(MODEL, LIMIT, start=start)) < 1e-12
    assert all(text == start or text[:2] == start or text[1:] == start or (text[0], text[2]) == start for text in law)


@pytest.mark.parametrize("before, after", [((1, 0), (0,)), ((), (1, 1)), ((1,), ())])
def test_what_is_given_is_kept_together_around_a_gap(before, after):
    """Every text begins with what stands before the gap and ends with what stands behind it, and what is inserted has
    the law of the same model with all slots but those of the gap impossible."""
    limit = len(before) + len(after) + 2

    def run(random):
        value = torch.tensor([[*before, *after]])
        canvas = MODEL.canvas({"token": value}, value >= 0, layout=line(value.shape[1]))
        opened(canvas, torch.tensor([len(before) - 1]))
        generate(Target(MODEL), canvas, Inserting(limit), random=random)
        return tuple(canvas.read("token")[0].tolist())

    def go(middle, p, law):
        if len(middle) == 2:
            law[middle] = law.get(middle, 0.0) + p
            return
        *pairs, ends = choices(MODEL, (*before, *middle, *after))
        law[middle] = law.get(middle, 0.0) + p * ends
        allowed = range(2 * len(before), 2 * (len(before) + len(middle) + 1))
        mass = sum(pairs[i] for i in allowed)
        for i in allowed:
            at, token = i // 2 - len(before), i % 2
            go((*middle[:at], token, *middle[at:]), p * (1 - ends) * pairs[i] / mass, law)
        return law

    law = enumerate_law(run)
    end = len(before)
    assert all(t[:end] == before and t[len(t) - len(after) :] == after for t in law)
    want = go((), 1.0, {})
    assert gap({t[end : len(t) - len(after)]: p for t, p in law.items()}, want) < 1e-12 and len(law) == 7


def test_several_gaps_are_filled_and_closed_together():
    model = model_of(5, seed=3)
    value = torch.tensor([[0, 1, 2, 0, 3]])
    canvas = model.canvas({"token": value}, torch.tensor([[False, True, True, False, True]]), layout=line(5))
    generate(Target(model), canvas, Inserting(12, 0.999), random=Keyed(0))
    text = canvas.read("token")[0].tolist()
    assert canvas.done and len(text) == 12 and text[-1] == 3
    assert any(text[i : i + 2] == [1, 2] for i in range(11))
    elements = canvas.place[0][:5].tolist()
    assert elements[2] == elements[1] + 1  # nothing came between what was given together


def test_only_the_likeliest_slots_may_be_asked_for():
    model = model_of(3, seed=4)
    *pairs, ends = choices(model, (0, 2, 1))
    total = torch.tensor(pairs, dtype=torch.float64).view(4, 3).sum(1)
    for slots in (1, 2, 4):
        best = set(total.topk(slots).indices.tolist())
        found = enumerate_law(
            lambda random, slots=slots: tuple(
                generate(Target(model), holding(model, (0, 2, 1)), Inserting(4, slots=slots), random=random)
                .read("token")[0]
                .tolist()
            )
        )
        want = {(0, 2, 1): 0.0}
        mass = sum(float(total[s]) for s in best) / (1 - ends)  # stopping is as probable as before
        for slot in best:
            for token in range(3):
                text = list((0, 2, 1))
                text.insert(slot, token)
                want[tuple(text)] = want.get(tuple(text), 0.0) + pairs[3 * slot + token] / mass
        want[(0, 2, 1)] = ends
        assert gap(found, want) < 1e-12


class SlotOff(Inserting):
    """Inserts behind the neighbour of the slot that was chosen."""

    def decide(self, canvas, guess, rows, random):
        step = super().decide(canvas, guess, rows, random)
        for edit in step.edits:
            if isinstance(edit, Insert):
                places = rows.element[0].tolist()
                edit.after = torch.tensor([places[(places.index(int(edit.after)) + 1) % len(places)]])
        return step


class ByArrival(Insertion):
    """Slots in the order in which tokens arrived."""

    def step(self, canvas, guess, cached):
        place, canvas._place = canvas._place, None if canvas._place is None else torch.arange(canvas.layout.size)[None]
        try:
            return super().step(canvas, guess, cached)
        finally:
            canvas._place = place


def test_wrong_slots_and_wrong_places_give_another_law():
    model, wrong = model_of(seed=2), model_of(seed=2)
    want = by_hand(model, LIMIT, stop=0.99)
    assert gap(enumerated(model, lambda: Inserting(LIMIT, 0.99)), want) < 1e-12
    assert gap(enumerated(model, lambda: SlotOff(LIMIT, 0.99)), want) > 0.01
    wrong.factorization = ByArrival()
    assert gap(enumerated(wrong, lambda: Inserting(LIMIT, 0.99)), want) > 0.001


# ---- order and company -----------------------------------------------------------------------------------------------


def test_the_order_of_arrival_is_immaterial():
    """A text inserted in any order is read as the same text given."""
    want = choices(MODEL, (1, 0, 1))
    for first, edits in [(0, [(0, 1), (1, 0), (2, 1)]), (1, [(0, 1), (1, 1), (1, 0)]), (2, [(0, 1), (0, 0), (0, 1)])]:
        canvas = MODEL.blank(1)
        for after, value in edits:
            canvas.apply([Insert(torch.tensor([after]), torch.tensor([value]))])
        assert canvas.read("token")[0].tolist() == [1, 0, 1]
        target = Target(MODEL)
        with torch.no_grad():
            got = target.forward(target.plan(canvas), canvas).dist.probs()[0, 0]
        assert float((got - torch.tensor(want, dtype=got.dtype)).abs().max()) < 1e-12, first


def test_a_row_does_not_depend_on_its_company():
    model = model_of(5, seed=3)
    canvas = generate(Target(model), model.blank(6), Inserting(7), random=Keyed(1))
    texts = [x.tolist() for x in canvas.read("token")]
    assert len(set(map(len, texts))) > 2
    for row, text in enumerate(texts):
        alone = model.canvas({"token": torch.zeros(1, 1, dtype=torch.long)}, row=torch.tensor([row]))
        generate(Target(model), alone, Inserting(7), random=Keyed(1))
        assert alone.read("token")[0].tolist() == text


def test_every_step_inserts_one_element_or_ends_and_nothing_is_cached():
    model = model_of(5, seed=3)
    canvas, target, inserted = model.blank(3), Target(model), 0
    for step in decode(target, canvas, Inserting(6, 0.8), random=Keyed(0)):
        for edit in step.edits:
            inserted += int((edit.after > -2).sum()) if isinstance(edit, Insert) else 0
            assert isinstance(edit, Insert | Delete)
        assert target.cache.length == 0
    assert sum(len(x) for x in canvas.read("token")) == inserted > 3
    assert canvas.done


def test_no_noise_is_used_twice(accountant):
    model = model_of(5, seed=3)
    generate(Target(model), model.blank(3), Inserting(6, 0.99), random=accountant(0))


def test_temperature_zero_inserts_the_likeliest():
    model, text = model_of(4, seed=5), []
    warp = Warper(temperature=0)
    canvas = generate(Target(model, warp=warp), model.blank(1), Inserting(5, stop=0.9))
    while len(text) < 5:
        *pairs, ends = choices(model, tuple(text))
        if ends > 0.9:
            break
        slot, token = divmod(max(range(len(pairs)), key=pairs.__getitem__), 4)
        text.insert(slot, token)
    assert canvas.read("token")[0].tolist() == text


# ---- misuse ----------------------------------------------------------------------------------------------------------


def test_drafts_and_unknown_elements_are_refused():
    with pytest.raises(OrderError, match="drafted"):
        Insertion().step(MODEL.blank(1), Guess(torch.tensor([[0]])), 0)
    with pytest.raises(ValueError, match="without a proposer"):
        Target(MODEL).plan(MODEL.blank(1), Guess(torch.tensor([[0]])))
    with pytest.raises(OrderError, match="two stand side by side"):
        generate(
            Target(MODEL), MODEL.canvas({"token": torch.zeros(1, 3, dtype=torch.long)}, layout=line(3)), Inserting(4)
        )


def test_other_orders_and_deciders_do_not_fit():
    model = tabular(line(3), Line(1), 3)
    with pytest.raises(ValueError, match="order and the head of insertions"):
        generate(Target(model), model.blank(1), Inserting(3))
    with pytest.raises(TypeError, match="no exact likelihood"):
        MODEL.log_prob(holding(MODEL, (1,)))
    with pytest.raises(TypeError, match="no packed form"):
        MODEL.losses(holding(MODEL, (1,)))


@pytest.mark.parametrize("wrong", [(-1, None), (3, 1.0), (3, -0.1), (3, None, 0)])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError):
        Inserting(*wrong)
    with pytest.raises(ValueError, match="at least 1 id"):
        InsertionHead(8, 0)
