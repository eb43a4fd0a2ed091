"""Guided unmasking: the guide says how much of a draft is decided, and never what."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from seriatim.backbones.rope import RoPE
from seriatim.backbones.transformer import Transformer, TransformerConfig
from seriatim.canvas import DELETED
from seriatim.decoding.filters import Warper
from seriatim.decoding.guess import Guess
from seriatim.decoding.guide import Among, Chance, Equal, Guided, Likely
from seriatim.decoding.loop import decode, generate
from seriatim.decoding.policy import FreeCache
from seriatim.decoding.target import Target
from seriatim.embed import TokenEmbed
from seriatim.factorization.line import Line
from seriatim.factorization.static import AnyOrder, Blocks
from seriatim.heads.categorical import CategoricalHead
from seriatim.heads.dist import Categorical
from seriatim.laws.case import randomise
from seriatim.layout import line
from seriatim.model import Model
from seriatim.random import Keyed, enumerate_law

VOCAB, WIDTH, LENGTH = 3, 16, 8
GREEDY = Warper(temperature=0)


def model_of(order, seed=0, vocab=VOCAB, length=LENGTH, start=True):
    """A masked model, or (`Line`) a next-token model."""
    text = isinstance(order, Line)
    embed = TokenEmbed(vocab, WIDTH, mask=not text, start=text and start)
    backbone = Transformer(TransformerConfig(WIDTH, 2, 2, rope=RoPE()))
    return randomise(Model(line(length), order, embed, backbone, CategoricalHead(WIDTH, vocab)), seed)


def constant(order, token, **shape):
    """One that always writes the same token."""
    model = model_of(order, **shape)
    head = CategoricalHead(WIDTH, model.heads["token"].vocab, bias=True).double()
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(F.one_hot(torch.tensor(token), head.vocab) * 5.0)
    model.heads["token"] = head
    return model


def text(rows=1, seed=3):
    return torch.randint(VOCAB, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))


def written(model, guided, policy=None, known=2, x=None, warp=GREEDY, **more):
    """The text, and how many elements each step decided of each row."""
    x = text() if x is None else x
    canvas = model.canvas({"token": torch.where(_given(known), x, 0)}, known)
    target, counts = Target(model, policy=policy, warp=warp), []
    for step in decode(target, canvas, guided, random=Keyed(1)):
        counts.append((step.edits[0].element >= 0).sum(1).tolist())
    return canvas.value["token"], counts


def _given(known):
    e = torch.arange(LENGTH)
    return e < known if isinstance(known, int) else known if known.dtype == torch.bool else e < known[:, None]


def left_to_right(model, x, known):
    """The model's own greedy text, one element a step, each from a canvas of its own."""
    for e in range(known, LENGTH):
        canvas = model.canvas({"token": x}, e)
        plan = model.factorization.step(canvas, None, 0)
        with torch.no_grad():
            dist, element, _ = model.dist(model.hidden(plan, canvas), plan, canvas)
        x = x.clone()
        x[0, e] = dist.mode()[0, element[0].tolist().index(e)]
    return x


def guide_of(order=None, **more):
    return Target(model_of(order or Line(prefix=1), seed=2, **more))


# ---- how much is decided ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [1, 3, 32])
def test_a_guide_that_always_agrees_decides_everything_in_one_step(ahead):
    guided = Guided(Target(constant(Line(prefix=1), 1)), ahead=ahead)
    x, counts = written(constant(AnyOrder(), 1), guided)
    assert counts == [[6]]
    assert x[0, 2:].tolist() == [1] * 6


def test_a_guide_that_never_agrees_leaves_the_models_own_greedy_text_from_left_to_right():
    model = model_of(AnyOrder())
    x, counts = written(model, Guided(Target(constant(Line(prefix=1), 3, vocab=4))))
    assert counts == [[1]] * 6
    assert torch.equal(x, left_to_right(model, text(), 2))


class Perfect(Guided):
    """It would write what the masked model writes from left to right."""

    def __init__(self, guide, model, ahead=32):
        super().__init__(guide, lambda said, x: self.same[:, self.read : self.read + x.shape[1]], ahead=ahead)
        self.model = model

    def agreed(self, canvas, front, draft, new, random):
        known = int(front)
        x = canvas.value["token"].clone()
        x[:, known:] = draft
        said = []
        for e in range(known, LENGTH):  # of each element, given all that stands before it in the draft
            one = self.model.canvas({"token": x}, e)
            plan = self.model.factorization.step(one, None, 0)
            dist, element, _ = self.model.dist(self.model.hidden(plan, one), plan, one)
            said.append(int(dist.mode()[0, element[0].tolist().index(e)]))
        self.same, self.read = (torch.tensor([said]) == draft).double(), 0
        return super().agreed(canvas, front, draft, new, random)


@pytest.mark.parametrize("seed", [1, 4])
def test_a_perfect_guide_changes_nothing_and_saves_forwards(seed):
    """It agrees with more than one element at a step, and the text is that of one at a time."""
    model = model_of(AnyOrder(), seed)
    x, counts = written(model, Perfect(guide_of(), model))
    assert torch.equal(x, left_to_right(model, text(), 2))
    assert sum(n for (n,) in counts) == 6
    assert len(counts) < 6


@pytest.mark.parametrize("order", [AnyOrder(), Blocks(3, "any")], ids=["any order", "blocks"])
@pytest.mark.parametrize("agree", [Equal(), Likely(0.2), Among(2), Among(3, 0.4), Chance()], ids=str)
def test_every_step_decides_at_least_one_element(order, agree):
    model = model_of(order)
    _, counts = written(model, Guided(guide_of(), agree))
    assert sum(n for (n,) in counts) == 6
    assert min(n for (n,) in counts) >= 1


@pytest.mark.parametrize("order", [AnyOrder(), Blocks(3, "any")], ids=["any order", "blocks"])
def test_how_much_the_guide_reads_at_once_changes_nothing(order):
    model = model_of(order, 1)
    texts = [written(model, Guided(guide_of(), Likely(0.25), ahead=n)) for n in (1, 2, 32)]
    assert max(max(c) for c in texts[0][1]) > 1  # so that the smallest had to read on
    assert all(torch.equal(x, texts[0][0]) and counts == texts[0][1] for x, counts in texts)


def test_elements_that_are_given_ahead_are_agreed_on_and_stay():
    """The row ends with two given elements, and one stands in the middle: they are no draft."""
    known = torch.tensor([[True, False, False, True, False, False, True, True]])
    model, x = constant(AnyOrder(), 1), torch.tensor([[2, 0, 0, 2, 0, 0, 2, 2]])
    found, counts = written(model, Guided(Target(constant(Line(prefix=1), 1))), known=known, x=x)
    assert found.tolist() == [[2, 1, 1, 2, 1, 1, 2, 2]]
    assert counts == [[4]]


def test_where_the_guide_has_no_room_or_nothing_to_begin_with_elements_are_decided_one_by_one():
    """A guide of 5 elements reads the first 5; one without a learned start does not see an empty text."""
    model = constant(AnyOrder(), 1)
    short = Guided(Target(constant(Line(prefix=1), 1, length=5)))
    assert written(model, short)[1] == [[3], [1], [1], [1]]
    no_start = Guided(Target(constant(Line(), 1, start=False)))
    assert written(model, no_start, known=0)[1] == [[1], [7]]


# ---- agreement -------------------------------------------------------------------------------------------------------


def test_what_counts_as_agreement():
    said = Categorical(torch.tensor([[[0.5, 0.3, 0.15, 0.05]]]).log().expand(1, 4, 4))
    x = torch.tensor([[0, 1, 2, 3]])
    assert Equal()(said, x).tolist() == [[1, 0, 0, 0]]
    assert Likely(0.1)(said, x).tolist() == [[1, 1, 1, 0]]
    assert Among(2)(said, x).tolist() == [[1, 1, 0, 0]]
    assert Among(3, 0.5)(said, x).tolist() == [[1, 1, 0, 0]]
    assert torch.allclose(Chance()(said, x), torch.tensor([[0.5, 0.3, 0.15, 0.05]]).double(), rtol=0, atol=1e-7)
    for wrong in ((0, 0.0), (1, 1.5)):
        with pytest.raises(ValueError, match="at least the likeliest"):
            Among(*wrong)


@pytest.mark.parametrize("ahead", [1, 32])
def test_by_chance_a_run_is_as_long_as_the_guides_own_probabilities_say(ahead):
    """Enumerated: of a draft of three, the run has n elements with the probability that n - 1 are agreed on and the
    next is not, and that of no agreement counts as one; reading it bit by bit changes nothing."""
    model, guide = constant(AnyOrder(), 1), model_of(Line(prefix=1), seed=2)
    whole = torch.tensor([[2, 0, 1, 0, 2, 1, 1, 1]])
    with torch.no_grad():
        canvas = guide.canvas({"token": whole})
        plan = guide.factorization.packed(canvas)
        p = guide.dist(guide.hidden(plan, canvas), plan, canvas)[0].probs()[0, 5:, 1].tolist()

    def run(random):
        canvas = model.canvas({"token": whole}, 5)
        step = next(
            iter(
                decode(Target(model, warp=GREEDY), canvas, Guided(Target(guide), Chance(), ahead=ahead), random=random)
            )
        )
        return int((step.edits[0].element >= 0).sum())

    law = enumerate_law(run)
    expected = {1: 1 - p[0] + p[0] * (1 - p[1]), 2: p[0] * p[1] * (1 - p[2]), 3: p[0] * p[1] * p[2]}
    assert set(law) == set(expected)
    assert all(abs(law[n] - expected[n]) < 1e-9 for n in law)


# ---- caches ----------------------------------------------------------------------------------------------------------


class Checked(Guided):
    """Compares what the guide says with a fresh one at every step, and counts the slots that it saved."""

    saved: tuple[int, ...] = ()

    def agreed(self, canvas, front, draft, new, random):
        fresh, guess = Target(self.guide.model), Guess(draft)
        plan, mine = fresh.plan(canvas.copy(), guess), self.guide.plan(canvas, guess)
        again, now = fresh.forward(plan, canvas, guess), self.guide.forward(mine, canvas, guess)
        live = plan.reads.slot.expand(canvas.batch, -1) >= 0
        assert torch.allclose(now.dist.log_probs()[live], again.dist.log_probs()[live], rtol=0, atol=1e-9)
        self.saved += (plan.size - mine.size,)
        return super().agreed(canvas, front, draft, new, random)


@pytest.mark.parametrize("policy", [None, FreeCache(2), FreeCache(2, rewrite=True)], ids=str)
@pytest.mark.parametrize("known", [2, torch.tensor([1, 4, 2])], ids=["a prompt", "prompts"])
def test_the_guides_cropped_cache_equals_a_fresh_one(policy, known):
    x = text() if isinstance(known, int) else text(3)
    guided = Checked(guide_of(), Likely(0.3))
    written(model_of(AnyOrder()), guided, policy, known, x)
    assert guided.saved[0] == 0
    assert min(guided.saved[1:]) > 0  # later, part of the text stands in the cache


def test_rows_of_different_lengths_are_as_alone():
    model, x, known = model_of(AnyOrder()), text(3), torch.tensor([1, 4, 2])
    both, counts = written(model, Guided(guide_of(), Among(2)), FreeCache(2), known, x)
    assert len({tuple(c) for c in zip(*counts, strict=True)}) > 1
    for i in range(3):
        alone, _ = written(model, Guided(guide_of(), Among(2)), FreeCache(2), int(known[i]), x[i : i + 1])
        assert torch.equal(alone[0], both[i])


# ---- ends and mistakes -----------------------------------------------------------------------------------------------


def test_a_row_ends_at_the_first_end_that_is_agreed_on():
    """Row 0 meets the end at once, row 1 (whose guide disagrees until then) later; nothing stands behind it."""
    model = constant(AnyOrder(), 1)
    canvas = model.canvas({"token": text(2)}, torch.tensor([2, 5]))
    generate(Target(model, warp=GREEDY), canvas, Guided(Target(constant(Line(prefix=1), 1)), stop=(1,)))
    assert [len(ids) for ids in canvas.read("token")] == [3, 6]
    assert (canvas.status[0, 3:] == DELETED).all()


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="AnyOrder is another order"):
        Guided(Target(model_of(AnyOrder())))
    with pytest.raises(ValueError, match="at least 1 element"):
        Guided(guide_of(), ahead=0)
    model = model_of(AnyOrder())
    with pytest.raises(ValueError, match="leave out the proposer"):
        Guided(guide_of()).decide(model.blank(1), Guess(torch.zeros(1, 1)), None, Keyed(0))


def test_an_unlikely_draft_is_decided_even_so():
    """At a temperature, what is drawn is decided, however unlikely the guide finds it: a step may not stand still."""
    never = Guided(guide_of(), Likely(math.inf))
    _, counts = written(model_of(AnyOrder()), never, warp=Warper(temperature=2.0))
    assert counts == [[1]] * 6
