"""Any subset given: one pass is all steps, drafts keep the law, and forwards never outnumber the unknown elements."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from seriatim.canvas import Set, Unset
from seriatim.decoding.filters import Warper
from seriatim.decoding.guess import Guess
from seriatim.decoding.loop import decode, generate
from seriatim.decoding.sample import SampleAll
from seriatim.decoding.subset import Ahead, ContextBigrams, InOrder, SelfDraft, Together
from seriatim.decoding.target import Target
from seriatim.decoding.verify import Ratio
from seriatim.factorization import subset
from seriatim.factorization.static import AnyOrder
from seriatim.factorization.subset import AnySubset
from seriatim.heads.dist import Categorical
from seriatim.laws.case import randomise
from seriatim.laws.enumeration import enumerate_rows
from seriatim.laws.tabular import tabular, total_variation
from seriatim.layout import line
from seriatim.plan import OrderError
from seriatim.random import Forced, Keyed, enumerate_law
from seriatim.systems.text import as_arm
from seriatim.view import two_stream

torch.set_num_threads(1)
SETS = [torch.tensor(s) for s in itertools.product((False, True), repeat=4)]


def transformer(length=4, vocab=3):
    return randomise(as_arm.build(as_arm.Config(length=length, vocab=vocab, width=16, depth=2, heads=2)))


def table(length=3, vocab=3, seed=0):
    return tabular(line(length), AnySubset(), vocab, seed)


@pytest.fixture(scope="module")
def model():
    return transformer()


@pytest.fixture(scope="module")
def long():
    return transformer(24, 5)


def infills(known, vocab, filling=1):
    """Every text that has `filling` at the known places."""
    free = (~known).nonzero()[:, 0]
    x = torch.full((vocab ** len(free), len(known)), filling)
    x[:, free] = torch.tensor(list(itertools.product(range(vocab), repeat=len(free))), dtype=torch.long)
    return x


def exact(model, known, vocab=3):
    """The law of all infills, by one pass."""
    x = infills(known, vocab)
    p = model.log_prob(model.canvas({"token": x}, known.expand(len(x), -1))).exp()
    return dict(zip(map(tuple, x.tolist()), p.tolist(), strict=True))


def decoded(model, known, decider, proposer=None, warp=None):
    """The law of all infills, by every outcome of every draw of a decoder."""

    def run(random, rows):
        start = torch.where(known, 1, 0).expand(rows, -1)
        canvas = model.canvas({"token": start}, known.expand(rows, -1))
        generate(Target(model, warp=warp), canvas, decider(), proposer and proposer(), random)
        return [tuple(row) for row in canvas.value["token"].tolist()]

    return enumerate_rows(run)


def written(model, ids, known, decider, proposer=None, seed=0, rows=None, **target):
    rows = list(range(len(ids))) if rows is None else rows
    canvas = model.canvas({"token": ids[rows]}, known[rows], row=torch.tensor(rows))
    steps = list(decode(Target(model, **target), canvas, decider, proposer, Keyed(seed)))
    return canvas.value["token"], steps


# ---- one pass --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [True, False])
def test_the_joint_of_one_pass_is_the_sum_of_sequential_steps(model, cached):
    x = torch.randint(3, (len(SETS), 4), generator=torch.Generator().manual_seed(0))
    for together in (torch.stack(SETS), *(s[None] for s in SETS)):  # rows that differ, and each alone
        rows = x[: len(together)]
        forced = Forced(rows)
        generate(Target(model, cached=cached), model.canvas({"token": rows}, together), SampleAll(), random=forced)
        with torch.no_grad():
            joint = model.log_prob(model.canvas({"token": rows}, together))
        got = forced.log_prob if torch.is_tensor(forced.log_prob) else torch.zeros(len(rows))
        assert torch.allclose(got, joint, rtol=0, atol=1e-12)


@pytest.mark.parametrize("known", SETS)
def test_the_probabilities_of_all_infills_sum_to_one(model, known):
    with torch.no_grad():
        assert math.fsum(exact(model, known).values()) == pytest.approx(1, abs=1e-12)


def test_any_order_without_ties_is_exact_in_one_pass(model):
    x = torch.randint(3, (2, 4), generator=torch.Generator().manual_seed(1))
    rank = torch.tensor([[2, 0, 3, 1], [1, 3, 0, 2]])

    def canvas():
        made = model.canvas({"token": x}, torch.zeros(2, 4, dtype=torch.bool))
        made._rank = rank.clone()
        return made

    forced = Forced(x)
    generate(Target(model), canvas(), SampleAll(), random=forced)
    with torch.no_grad():
        assert torch.allclose(forced.log_prob, model.log_prob(canvas()), rtol=0, atol=1e-12)
        plain = model.log_prob(model.canvas({"token": x}))
    assert not torch.allclose(forced.log_prob, plain, atol=1e-3)


@pytest.mark.parametrize("known", SETS[:-1])
def test_a_query_sees_what_is_known_and_what_is_left_of_it_only(model, known):
    """Edits: no token changes what is read of itself, nor of unknown tokens left of it; a known one changes all."""
    x = torch.tensor([[0, 1, 2, 1]])
    free = (~known).nonzero()[:, 0].tolist()

    def losses(x):
        canvas = model.canvas({"token": x}, known[None])
        plan = model.factorization.packed(canvas)
        with torch.no_grad():
            dist, element, _ = model.dist(model.hidden(plan, canvas), plan, canvas)
        return dict(zip(element[0].tolist(), dist.log_probs()[0], strict=True))

    before = losses(x)
    assert list(before) == free
    for e in range(4):
        y = x.clone()
        y[0, e] = (y[0, e] + 1) % 3
        after = losses(y)
        moved = [i for i in free if float((before[i] - after[i]).abs().max()) > 1e-12]
        assert moved == ([i for i in free if i > e] if e in free else free)


def test_what_is_known_sees_all_that_is_known_and_nothing_else(model):
    canvas = model.canvas({"token": torch.zeros(1, 4, dtype=torch.long)}, SETS[0b1010][None])
    plan = model.factorization.packed(canvas)  # values of 0 to 3, then queries of 1 and 3
    seen = plan.views["all"].mask()[0].int().tolist()
    assert seen == [
        [1, 0, 1, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 0, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 0, 1, 0, 1, 0],
        [1, 1, 1, 0, 0, 1],
    ]


def test_all_known_takes_no_forward(model):
    def never(*_):
        raise AssertionError("a forward, though nothing is unknown")

    hook = model.backbone.register_forward_pre_hook(never)
    for decider, proposer in ((SampleAll(), None), (InOrder(sure=1), SelfDraft(3)), (InOrder(), ContextBigrams(3))):
        assert written(model, torch.zeros(2, 4).long(), torch.ones(2, 4).bool(), decider, proposer)[1] == []
    hook.remove()


def test_nothing_known_is_decided_from_left_to_right(long):
    for decider, proposer in ((SampleAll(), None), (InOrder(sure=1), SelfDraft(4)), (InOrder(), ContextBigrams(4))):
        _, steps = written(long, torch.zeros(1, 24).long(), torch.zeros(1, 24).bool(), decider, proposer)
        decided = torch.cat([step.edits[0].element[0] for step in steps])
        assert decided[decided >= 0].tolist() == list(range(24))


# ---- drafts ----------------------------------------------------------------------------------------------------------

SUBSETS = [torch.tensor(s) for s in itertools.product((False, True), repeat=3)][:-1]
WAYS = {
    "itself": (lambda k: InOrder(sure=1), SelfDraft),
    "bigrams": (lambda k: InOrder(), ContextBigrams),
}


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_law_of_drafting_is_that_of_sequential_sampling(seed, way, k):
    model, (decider, proposer) = table(seed=seed), WAYS[way]
    for known in SUBSETS:
        want = exact(model, known)
        assert total_variation(decoded(model, known, SampleAll), want) < 1e-12
        assert total_variation(decoded(model, known, lambda: decider(k), lambda: proposer(k)), want) < 1e-12


def test_the_law_holds_after_longer_histories_and_under_filters():
    model, known = table(5, 2, seed=3), torch.tensor([False, True, False, False, False])
    for warp in (None, Warper(0.7), Warper(1.0, top_k=1), Warper(0.8, top_p=0.9)):
        want = decoded(model, known, SampleAll, None, warp)
        for decider, proposer in WAYS.values():
            law = decoded(model, known, lambda d=decider: d(3), lambda p=proposer: p(3), warp)
            assert total_variation(law, want) < 1e-12


@pytest.mark.parametrize("seed", [0, 1])
def test_the_expected_number_of_forwards_is_what_the_acceptances_say(seed):
    """Three unknown elements: two forwards decide two of them. With drafts of two the last one costs a forward more;
    with drafts of three it does only where the second draft is rejected."""
    model, start = table(seed=seed), torch.zeros(1, 3, dtype=torch.long)

    def forwards(k):
        def run(random):
            canvas = model.canvas({"token": start})
            return sum(s.forwards for s in decode(Target(model), canvas, InOrder(sure=1), SelfDraft(k), random))

        return enumerate_law(run)

    def said(known, place):
        """The law of a place given first tokens, by a forward of its own."""
        canvas = model.canvas({"token": torch.tensor([[*known, *[0] * (3 - len(known))]])}, len(known))
        target = Target(model)
        guess = Guess(torch.full((1, place - len(known) + 1), -1)) if place > len(known) else None
        return target.forward(target.plan(canvas, guess), canvas, guess).dist.probs()[0, -1]

    with torch.no_grad():
        first, offered = said([], 0), said([], 1)
        accepted = sum(float(first[v] * torch.minimum(offered, said([v], 1)).sum()) for v in range(3))
    assert 0.2 < accepted < 0.95
    assert forwards(2) == pytest.approx({3: 1.0})
    law = forwards(3)
    assert set(law) == {2, 3}
    assert law[2] == pytest.approx(accepted, abs=1e-12)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("k", [1, 2, 4, 30])
def test_there_are_never_more_forwards_than_unknown_elements(long, way, k):
    decider, proposer = WAYS[way]
    for seed in range(6):
        g = torch.Generator().manual_seed(seed)
        known = torch.rand(1, 24, generator=g) < seed / 8
        ids = torch.randint(5, (1, 24), generator=g)
        text, steps = written(long, ids, known, decider(k), proposer(k), seed)
        assert sum(s.forwards for s in steps) <= int((~known).sum())
        assert torch.equal(text[known], ids[known])
        assert sum(int(s.accepted) for s in steps) <= sum(int(s.drafted) for s in steps)


def test_the_forward_that_drafts_is_counted(long):
    calls = []
    hook = long.backbone.register_forward_hook(lambda *_: calls.append(1))
    _, steps = written(long, torch.zeros(1, 24).long(), torch.zeros(1, 24).bool(), InOrder(sure=1), SelfDraft(5))
    hook.remove()
    assert sum(s.forwards for s in steps) == len(calls)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_a_row_does_not_depend_on_its_company_nor_on_the_cache(long, way, cached):
    decider, proposer = WAYS[way]
    g = torch.Generator().manual_seed(2)
    ids, known = torch.randint(5, (5, 24), generator=g), torch.rand(5, 24, generator=g) < 0.4
    known[3], known[4] = True, False
    together, _ = written(long, ids, known, decider(4), proposer(4), cached=cached)
    for order in ([0], [4, 1], [3, 2, 0]):
        assert torch.equal(written(long, ids, known, decider(4), proposer(4), rows=order)[0], together[order])


@pytest.mark.parametrize("way", WAYS)
def test_greedy_drafting_writes_the_greedy_text(long, way):
    decider, proposer = WAYS[way]
    g = torch.Generator().manual_seed(4)
    ids, known = torch.randint(5, (3, 24), generator=g), torch.rand(3, 24, generator=g) < 0.3
    want, _ = written(long, ids, known, SampleAll(), warp=Warper(0.0))
    assert torch.equal(written(long, ids, known, decider(6), proposer(6), warp=Warper(0.0))[0], want)


def test_stop_ids_end_a_row_inside_an_accepted_draft(long):
    ends = 0
    for seed in range(6):
        canvas = long.canvas({"token": torch.zeros(2, 24).long()})
        generate(Target(long), canvas, InOrder((2,), sure=1), SelfDraft(6), Keyed(seed))
        for text in canvas.read("token"):
            assert 2 not in text[:-1].tolist()
            ends += int(text[-1]) == 2 and len(text) < 24
    assert ends > 6


@pytest.mark.parametrize("way", WAYS)
def test_with_stop_ids_the_law_is_that_of_sequential_sampling_too(way):
    model, (decider, proposer) = table(4), WAYS[way]

    def law(make, propose):
        def run(random, rows):
            canvas = model.canvas({"token": torch.ones(rows, 4).long()}, 1)
            decide = make()
            decide.stop = frozenset({2})
            generate(Target(model), canvas, decide, propose and propose(), random)
            return [tuple(row.tolist()) for row in canvas.read("token")]

        return enumerate_rows(run)

    want = law(SampleAll, None)
    assert any(len(text) < 4 for text in want)
    assert total_variation(law(lambda: decider(3), lambda: proposer(3)), want) < 1e-12


def test_bigrams_are_those_of_what_is_known():
    model = table(8, 4)
    ids = torch.tensor([[0, 1, 0, 2, 0, 0, 3, 0]])
    known = torch.tensor([[1, 1, 1, 1, 1, 0, 1, 0]]).bool()
    canvas = model.canvas({"token": ids}, known)
    guess = ContextBigrams(2).propose(canvas, Target(model), Keyed(0))
    # behind 0 stood 1 and 2, once each; behind 3 nothing that is known: as often as known tokens are
    assert torch.allclose(
        guess.q.probs()[0], torch.tensor([[0, 0.5, 0.5, 0], [3, 1, 1, 1]]).double() / torch.tensor([[1], [6]])
    )
    assert guess.value[0, 0] in (1, 2)
    assert ContextBigrams(2).propose(model.canvas({"token": ids}), Target(model), Keyed(0)) is None


def test_a_drafted_token_is_the_context_of_the_next_bigram():
    model, ids = table(6, 4), torch.tensor([[0, 1, 2, 0, 0, 0]])
    canvas = model.canvas({"token": ids}, torch.tensor([[1, 1, 1, 1, 0, 0]]).bool())
    guess = ContextBigrams(2).propose(canvas, Target(model), Keyed(0))
    assert guess.value.tolist() == [[1, 2]]  # 0 1 2 stood there before


# ---- what is wrong must show -----------------------------------------------------------------------------------------

KNOWN = torch.tensor([False, True, False, False])


class Believing(InOrder):
    """Wrong on purpose: all drafts stand."""

    def _chances(self, p, q, drafted, live):
        return live.double()


class Redrawing(InOrder):
    """Wrong on purpose: what is rejected is drawn from the law itself, not from what is left of it."""

    def __init__(self):
        super().__init__(sure=1)
        self.ratio = type("Whole", (Ratio,), {"rest": lambda self, p, q: p})()


class Twisted(InOrder):
    """Wrong on purpose: accepted by the law of the neighbour's read-out."""

    def _chances(self, p, q, drafted, live):
        return super()._chances(p.roll(1, 1), q, drafted, live)


class Hoarding(InOrder):
    """Wrong on purpose: the first rejected draft stays in the cache, where the token drawn in its place belongs."""

    def _keep(self, canvas, rows, count, number):
        return super()._keep(canvas, rows, torch.minimum(count + 1, number), number)


@pytest.mark.parametrize("decider", [Believing, Redrawing, lambda: Twisted(sure=1), lambda: Hoarding(sure=1)])
def test_a_wrong_verifier_changes_the_law(decider):
    model = table(4)
    assert total_variation(decoded(model, KNOWN, decider, lambda: SelfDraft(3)), exact(model, KNOWN)) > 0.01


def test_independent_sampling_is_another_law_the_product_of_what_is_read(model):
    model = table(4)
    law, want = decoded(model, KNOWN, Together, lambda: Ahead(3)), exact(model, KNOWN)
    assert total_variation(law, want) > 0.01
    canvas, blank = model.canvas({"token": torch.ones(1, 4).long()}, KNOWN[None]), Guess(torch.full((1, 3), -1))
    target = Target(model)
    p = target.forward(target.plan(canvas, blank), canvas, blank).dist.probs()[0]
    product = {(a, 1, b, c): float(p[0, a] * p[1, b] * p[2, c]) for a, b, c in itertools.product(range(3), repeat=3)}
    assert total_variation(law, product) < 1e-12


def test_queries_that_see_each_other_would_change_the_first_law(long, monkeypatch):
    """Drafted together or read alone, the first unknown element has one law; with a plain two-stream view, in which
    queries of one step see each other, it has not."""

    def gap():
        laws = []
        for size in (1, 5):
            canvas = long.canvas({"token": torch.ones(1, 24).long()}, 3)
            guess, target = Guess(torch.full((1, size), -1)), Target(long)
            with torch.no_grad():
                laws.append(target.forward(target.plan(canvas, guess), canvas, guess).dist.log_probs()[0, 0])
        return float((laws[0] - laws[1]).abs().max())

    assert gap() < 1e-12
    right = subset._labels

    def wrong(canvas, rank, element, query, node=None):
        slots, _ = right(canvas, rank, element, query, node)
        now = int(canvas.open.nonzero()[0, 1])
        seen = torch.where(query, now, element)
        return slots, two_stream(seen, query)

    monkeypatch.setattr(subset, "_labels", wrong)
    assert gap() > 1e-3


def test_the_first_draft_stands_whatever_rounding_says_of_it():
    """Its two laws are one; a ratio a little below 1 would reject it, and leave nothing to draw from."""
    p = torch.tensor([[[0.5, 0.5], [0.5, 0.5]]])
    q = p + torch.tensor([1e-6, -1e-6])
    drafted, live = torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2, dtype=torch.bool)
    assert InOrder(sure=1)._chances(p, q, drafted, live)[0, 0] == 1
    assert InOrder()._chances(p, q, drafted, live)[0, 0] < 1  # trap: without `sure` it may be rejected


class Blurred(SelfDraft):
    """Its own law comes back changed by far more than rounding."""

    def propose(self, canvas, target, random):
        guess = super().propose(canvas, target, random)
        if guess is not None:
            logits = guess.q.logits.clone()
            logits[..., 0] += 1.0
            guess.q = Categorical(logits)
        return guess


def test_without_a_sure_first_draft_forwards_may_outnumber_elements(long):
    """The bound rests on it: one element by two forwards is what a rejected first draft costs."""
    ids = torch.zeros(1, 24, dtype=torch.long)

    def most(sure):
        runs = [written(long, ids, ids < 0, InOrder(sure=sure), Blurred(2), seed)[1] for seed in range(4)]
        return max(sum(step.forwards for step in steps) for steps in runs)

    assert most(1) <= 24 < most(0)


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_what_was_decided_is_not_made_unknown_again(model):
    canvas, target = model.canvas({"token": torch.zeros(1, 4).long()}), Target(model)
    with torch.inference_mode():
        stream = decode(target, canvas, SampleAll(), random=Keyed(0))
        next(stream), next(stream), next(stream)
        canvas.apply([Unset(torch.tensor([[1]]))])
        with pytest.raises(OrderError, match="before one of lower rank"):
            next(stream)
        canvas.apply([Unset(torch.tensor([[0, 2]]))])
        with pytest.raises(OrderError, match="stays"):
            next(decode(target, canvas, SampleAll(), random=Keyed(0)))


def test_elements_decided_out_of_order_are_refused(model):
    canvas = model.canvas({"token": torch.zeros(1, 4).long()}).apply([Set(torch.tensor([[1]]), torch.tensor([[2]]))])
    with pytest.raises(OrderError, match="before one of lower rank"):
        Target(model).plan(canvas)


def test_drafts_in_this_order_are_chains_and_say_their_law(model):
    canvas = model.canvas({"token": torch.zeros(1, 4).long()})
    with pytest.raises(OrderError, match="a chain"):
        Target(model).plan(canvas, Guess(torch.zeros(1, 2).long(), (-1, -1)))
    guess, target = Guess(torch.zeros(1, 2).long()), Target(model)
    rows = target.forward(target.plan(canvas, guess), canvas, guess)
    with pytest.raises(TypeError, match="from which law"):
        InOrder().decide(canvas, guess, rows, Keyed(0))
    with pytest.raises(ValueError, match="at least 1 token"):
        SelfDraft(0)


def test_orders_that_verify_nothing_still_refuse_drafts():
    model = tabular(line(3), AnyOrder(), 3)
    with pytest.raises(ValueError, match="cannot verify drafts"):
        Target(model).plan(model.blank(1), Guess(torch.zeros(1, 2).long()))
