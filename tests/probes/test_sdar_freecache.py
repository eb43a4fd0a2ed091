"""Probe `sdar` with `freecache-guided`: block diffusion, an approximate cache, and a decider with a model of its own.

SDAR (2025): blocks one after another, the elements of a block in any order, trained in one pass of two streams.
FreeCache and guided diffusion (FlashDLM, 2025): a masked generator that never computes finished blocks again, and an
autoregressive model that says how much of a draft to trust.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from seriatim.backbones.rope import RoPE
from seriatim.backbones.transformer import Transformer, TransformerConfig
from seriatim.canvas import Set, Unset
from seriatim.conditions.condition import ClassCondition
from seriatim.decoding.filters import Warper
from seriatim.decoding.guess import Guess
from seriatim.decoding.guidance import Guidance
from seriatim.decoding.loop import Step, decode, generate
from seriatim.decoding.policy import FreeCache
from seriatim.decoding.sample import SampleAll, Select
from seriatim.decoding.target import Target
from seriatim.embed import TokenEmbed
from seriatim.factorization.line import Line
from seriatim.factorization.static import AnyOrder, Blocks
from seriatim.heads.categorical import CategoricalHead
from seriatim.laws.case import Case, randomise
from seriatim.laws.laws import LAWS, Broken
from seriatim.layout import line
from seriatim.model import Model
from seriatim.plan import MASK, VALUE, OrderError
from seriatim.random import Forced, Generator, Key, Keyed, enumerate_law
from seriatim.view import two_stream

VOCAB, WIDTH = 2, 16

# ---- the composition -------------------------------------------------------------------------------------------------


def generator(length, order, **config):
    """SDAR with `Blocks(size, "any")`, a masked generator with `AnyOrder()`, next token with `Line(prefix=1)`."""
    backbone = Transformer(TransformerConfig(WIDTH, 2, 2, rope=RoPE(), **config))
    text = isinstance(order, Line)
    embed = TokenEmbed(VOCAB, WIDTH, positions=(length + text,), mask=not text, start=text)
    condition = {"class": ClassCondition(3, WIDTH)} if config else None
    return Model(line(length), order, embed, backbone, CategoricalHead(WIDTH, VOCAB), condition)


def masked(model, x, given, random):
    """A training canvas of SDAR and the weight of each row: one masking rate a row, at least one mask."""
    key = Key(torch.arange(len(x)), 0)
    rate = (1 - 1e-3) * random.uniform((len(x), 1), key) + 1e-3
    u = random.uniform(x.shape, key).masked_fill(torch.arange(x.shape[1]) < given, 2.0)
    hidden = (u < rate) | (u == u.amin(1, keepdim=True))
    canvas = model.canvas({"token": x.clone()}, given)
    shown = torch.where(hidden | (u == 2.0), -1, torch.arange(x.shape[1]))
    return canvas.apply([Set(x, shown)]), 1 / rate[:, 0]


class Guided:
    """Commit the longest run of the draft (the generator's likeliest values) on which the guide, which reads from left
    to right, agrees; at least one element. The guide decides how many, never what."""

    def __init__(self, guide, canvas):
        self.guide, self.canvas = Target(guide), guide.canvas({"token": canvas.value["token"].clone()}, canvas.length)

    def says(self, draft):
        """What the guide would write in each place of the draft."""
        self.plan = self.guide.plan(self.canvas, Guess(draft))
        return self.guide.forward(self.plan, self.canvas, Guess(draft)).dist.mode()[:, : draft.shape[1]]

    def decide(self, canvas, guess, rows, random):
        unknown = rows.element >= 0
        draft, element = rows.dist.mode()[unknown][None], rows.element[unknown][None]
        n = max(int((self.says(draft) == draft).long().cumprod(1).sum()), 1)
        self.guide.commit(self.plan.size - draft.shape[1] + n - 1, self.plan)
        self.canvas.apply([Set(draft[:, :n])])
        return Step((Set(draft[:, :n], element[:, :n]),))


# ---- SDAR: laws ------------------------------------------------------------------------------------------------------

BOUND = {1: "decided in any order inside a block", 2: "decided in any order inside a block"}


def case(order=None, given=0, size=3):
    model = randomise(generator(6, order or Blocks(size, "any")))
    return Case(model, VOCAB, given, decider=lambda: Select("confidence", threshold=1.0), exempt=BOUND)


@pytest.mark.parametrize("given", [0, 2])
@pytest.mark.parametrize("number", [1, 3, 5, 6, 9, 10, 11])
def test_law(number, given):
    LAWS[number][1](case(given=given))


def shown(model, x, element):
    """A canvas that knows some elements of x."""
    known = torch.zeros(1, x.shape[1], dtype=torch.bool)
    known[0, list(element)] = True
    canvas = model.canvas({"token": x.clone()})
    return canvas.apply([Set(x, torch.where(known, torch.arange(x.shape[1]), -1))])


def rows_of(model, plan, canvas):
    """Element -> log-probabilities (batch, vocab) of what a plan reads."""
    with torch.no_grad():
        dist, element, _ = model.dist(model.hidden(plan, canvas), plan, canvas)
    return {e: dist.log_probs()[:, i] for i, e in enumerate(element[0].tolist()) if e >= 0}


def test_one_element_a_step_at_random_is_the_any_order_law_inside_blocks():
    """The decoder's law, enumerated, equals the mean over orders of products of conditionals, which are taken from the
    training pass; it sums to 1. The prompt ends inside the first block."""
    model = randomise(generator(4, Blocks(2, "any")))

    def run(random):
        canvas = model.canvas({"token": torch.tensor([[1, 0, 0, 0]])}, 1)
        generate(Target(model), canvas, Select("random", threshold=torch.inf), random=random)
        return tuple(canvas.value["token"][0].tolist())

    law = enumerate_law(run)
    assert abs(sum(law.values()) - 1) < 1e-12
    assert len(law) == 8
    for values, p in law.items():
        expected = 0.0
        for order in ((1, 2, 3), (1, 3, 2)):
            before, total = [0], 0.0
            for e in order:
                canvas = shown(model, torch.tensor([values]), before)
                total += float(rows_of(model, model.factorization.packed(canvas), canvas)[e][0, values[e]])
                before.append(e)
            expected += torch.tensor(total, dtype=torch.float64).exp().item() / 2
        assert abs(p - expected) < 1e-12


def test_blocks_of_one_are_next_token():
    """Each element read at its own mask (targets are not shifted) given all before it: an exact law that sums to 1, and
    the same in training and decoding."""
    model, exact = (randomise(generator(4, Blocks(1, inside))) for inside in ("any", "parallel"))
    x = torch.tensor(list(itertools.product(range(VOCAB), repeat=4)))
    with torch.no_grad():
        p = exact.log_prob(exact.canvas({"token": x}))
        losses = model.losses(model.canvas({"token": x})).sum(1)
    forced = Forced(x)
    generate(Target(model), model.blank(16), Select(), random=forced)
    assert abs(float(p.exp().sum()) - 1) < 1e-12
    assert torch.allclose(forced.log_prob, p, rtol=0, atol=1e-9)
    assert torch.allclose(losses, -p, rtol=0, atol=1e-9)
    plan = model.factorization.packed(model.canvas({"token": x}))
    assert torch.equal(plan.slots.element[:, plan.reads.slot[0], 0][0], plan.reads.element[0])


def training(model, given=0, rows=4):
    x = torch.randint(VOCAB, (rows, model.layout.size), generator=torch.Generator().manual_seed(1))
    canvas, weight = masked(model, x, given, Keyed(0))
    return x, canvas, weight


@pytest.mark.parametrize("given", [0, 2, 3, 5])
@pytest.mark.parametrize("size", [1, 3, 4, 6])
def test_the_loss_of_one_pass_equals_a_slow_loop_over_blocks(size, given):
    """Prompts that end inside a block included: what is known of a block is shown to the rest of it."""
    check_training(Blocks(size, "any"), given)


def check_training(order, given):
    model, size = randomise(generator(6, order)), order.size
    x, canvas, weight = training(model, given)
    hidden = canvas.open
    assert bool(hidden.any(1).all()) and not bool(hidden[:, :given].any())
    fast = model.losses(canvas) * weight[:, None]
    slow = torch.zeros_like(fast)
    for b in range(len(x)):
        for start in range(0, 6, size):
            block = [e for e in range(start, min(start + size, 6)) if bool(hidden[b, e])]
            if not block:
                continue
            now = shown(model, x[b : b + 1], [e for e in range(start + size) if e < 6 and e not in block])
            rows = rows_of(model, model.factorization.step(now, None, 0), now)
            for e in block:
                slow[b, e] = F.nll_loss(rows[e], x[b, e : e + 1]) * weight[b]
    assert torch.allclose(fast, slow, rtol=0, atol=1e-9)
    assert (fast.detach() > 0).equal(hidden)


def test_streams_and_blocks_keep_apart_in_the_training_pass():
    """Values do not depend on what is masked; the queries of a block depend neither on its own values and later ones
    nor on the queries of other blocks."""
    model = randomise(generator(6, Blocks(2, "any")))
    x = torch.tensor([[0, 1, 1, 0, 1, 0]])

    def states(x, known):
        canvas = shown(model, x, known)
        with torch.no_grad():
            return model.hidden(model.factorization.packed(canvas), canvas)[0].view(2, 6, WIDTH)

    queries, values = states(x, [2])
    for known in ([], [0, 3], [1, 2, 4]):
        assert torch.allclose(states(x, known)[1], values, rtol=0, atol=1e-12)
    other = states(x, [0, 2, 5])[0]
    assert torch.allclose(other[2:4], queries[2:4], rtol=0, atol=1e-12)
    for e in range(6):
        edited = x.clone()
        edited[0, e] = 1 - edited[0, e]
        moved = (states(edited, [2])[0] - queries).abs().amax(1) > 1e-9
        own = [2, 3] if e == 2 else []  # shown in its block
        assert moved.nonzero()[:, 0].tolist() == sorted({*own, *range((e // 2 + 1) * 2, 6)})


@pytest.mark.parametrize("inside", ["any", "parallel"])
def test_a_prompt_that_ends_inside_a_block_is_seen_by_the_rest_of_it(inside):
    model = randomise(generator(4, Blocks(2, inside)))
    rows = []
    for first in (0, 1):
        canvas = model.canvas({"token": torch.tensor([[first, 0, 0, 0]])}, 1)
        rows.append(rows_of(model, model.factorization.step(canvas, None, 0), canvas)[1])
    assert (rows[0] - rows[1]).abs().max() > 1e-3


@pytest.mark.parametrize("select", [Select("confidence", threshold=0.6), Select("margin", threshold=1.0)], ids=str)
@pytest.mark.parametrize("prompts", [(0, 0), (2, 2), (4, 4), (5, 3), (0, 4)], ids=str)
def test_cached_blocks_equal_recomputation(select, prompts):
    """Rows with prompts of different lengths, that end inside a block or at its end."""
    model = randomise(generator(8, Blocks(3, "any")))
    x = torch.randint(VOCAB, (2, 8), generator=torch.Generator().manual_seed(2))
    known = torch.arange(8) < torch.tensor(prompts)[:, None]
    met, texts = [], []
    for cached in (True, False):
        forced = Forced(x)
        canvas = model.canvas({"token": torch.where(known, x, 0)}, known)
        generate(Target(model, cached=cached), canvas, replace(select), random=forced)
        met.append(torch.stack([forced.met[e] for e in range(max(prompts), 8)]))
        canvas = model.canvas({"token": torch.where(known, x, 0)}, known)
        target = Target(model, cached=cached, warp=Warper(temperature=0))
        texts.append(generate(target, canvas, replace(select)).value["token"])
    assert torch.allclose(*met, rtol=0, atol=1e-9)
    assert torch.equal(*texts)


def test_a_finished_block_is_written_with_the_first_forward_of_the_next():
    """No forward is spent on it: as many forwards as steps. The last block is never written."""
    model = randomise(generator(9, Blocks(3, "any")))
    target, canvas = Target(model), model.blank(1)
    slots, held = [], []
    for step in decode(target, canvas, Select(threshold=1.0), random=Keyed(0)):
        slots.append(step.slots)
        held.append(target.cache.length)
    assert slots == [3, 3, 3, 6, 3, 3, 6, 3, 3]
    assert held == [0, 0, 0, 3, 3, 3, 6, 6, 6]


def test_dynamic_selection_at_a_threshold_of_one_is_one_element_a_step():
    model = randomise(generator(6, Blocks(3, "any")))
    strings = []
    for select in (Select(threshold=1.0), Select(steps=6)):
        canvas = generate(Target(model, warp=Warper(temperature=0)), model.blank(1), select)
        strings.append(canvas.value["token"])
    assert torch.equal(*strings)


class OwnBlock(Blocks):
    """Queries see the values of their own block."""

    honest = True

    def packed(self, canvas):
        plan = super().packed(canvas)
        n = canvas.layout.size
        block, query = torch.arange(n).repeat(2) // self.size, torch.arange(2 * n) < n
        view = two_stream(block, query)
        view = replace(view, at=torch.where(query, view.at + 1, view.at))
        slots = plan.slots if self.honest else replace(plan.slots, needs=torch.full_like(plan.slots.needs, -1))
        return replace(plan, views={"all": view}, slots=slots)


class KeepsMasks(Blocks):
    """Keeps the entries of a block as its first forward left them."""

    def step(self, canvas, guess, cached):
        plan = super().step(canvas, guess, cached)
        return None if plan is None else replace(plan, kept=torch.arange(plan.size)[None])


class HidesThePrompt(Blocks):
    """In training, queries show nothing of their block."""

    def packed(self, canvas):
        plan = super().packed(canvas)
        query = torch.arange(plan.size) < canvas.layout.size
        return replace(plan, slots=replace(plan.slots, source=torch.where(query, MASK, plan.slots.source)))


def test_queries_that_see_their_own_values_are_found():
    with pytest.raises(OrderError, match="sees element"):
        LAWS[3][1](case(OwnBlock(3, "any")))
    denied = OwnBlock(3, "parallel")
    denied.honest = False
    wrong = Case(randomise(generator(6, denied)), VOCAB)
    for number in (1, 3):
        with pytest.raises((Broken, OrderError)):
            LAWS[number][1](wrong)


def test_entries_kept_before_the_block_is_finished_are_found():
    with pytest.raises((Broken, OrderError)):
        LAWS[5][1](case(KeepsMasks(3, "any")))


def test_a_prompt_hidden_in_training_is_found():
    with pytest.raises(AssertionError):
        check_training(HidesThePrompt(3, "any"), 2)


# ---- FreeCache -------------------------------------------------------------------------------------------------------


class Recorder(Select):
    """Confidence picks; remembers what was read of each element when it was decided."""

    def decide(self, canvas, guess, rows, random):
        step = super().decide(canvas, guess, rows, random)
        log_p = rows.dist.log_probs()
        for b, i in (step.edits[0].element >= 0).nonzero().tolist():
            self.met[int(canvas.row[b]), int(step.edits[0].element[b, i])] = log_p[b, i]
        return step


def run(model, policy, x, known=0, cached=True, threshold=1.0, row=None, **more):
    """Rows met (samples x elements, vocab) when decoding is forced to x, slots of each forward, and the target."""
    select = Recorder("confidence", threshold=threshold)
    select.met = {}
    target = Target(model, cached=cached, policy=policy, **more)
    canvas = model.canvas({"token": x.clone()}, known, row=row)
    slots = [step.slots for step in decode(target, canvas, select, random=Forced(x))]
    assert torch.equal(canvas.value["token"], x)
    return torch.stack([select.met[key] for key in sorted(select.met)]), slots, target


def text(rows, seed=3):
    return torch.randint(VOCAB, (rows, 8), generator=torch.Generator().manual_seed(seed))


KNOWN = torch.arange(8) < torch.tensor([[0], [3], [5]])


@pytest.mark.parametrize("rewrite", [False, True])
@pytest.mark.parametrize("known", [0, 3, KNOWN], ids=["nothing given", "a prompt", "prompts"])
def test_with_a_block_as_long_as_the_sample_the_policy_is_exact(known, rewrite):
    model = randomise(generator(8, AnyOrder()))
    exact, slots, _ = run(model, None, text(3), known)
    neutral, same, _ = run(model, FreeCache(8, rewrite), text(3), known)
    assert torch.allclose(exact, neutral, rtol=0, atol=1e-12)
    assert slots == same == [8] * len(slots)


@pytest.mark.parametrize("known", [0, 3, KNOWN], ids=["nothing given", "a prompt", "prompts"])
def test_where_blocks_see_no_later_ones_rewritten_entries_are_exact_and_others_are_not(known):
    model = randomise(generator(8, Blocks(2, "any")))
    exact, slots, _ = run(model, None, text(3), known, cached=False)
    for block in (2, 4):
        rewritten, fewer, _ = run(model, FreeCache(block, rewrite=True), text(3), known)
        assert torch.allclose(exact, rewritten, rtol=0, atol=1e-9)
        assert sum(fewer) < sum(slots)
    stale, fewest, _ = run(model, FreeCache(2), text(3), known)
    assert (exact - stale).abs().max() > 1e-3
    assert sum(fewest) < sum(slots)


@pytest.mark.parametrize("rewrite", [False, True])
def test_where_everybody_sees_everybody_the_policy_drifts_once_it_freezes(rewrite):
    """Rows are exact up to the first frozen block, not after it."""
    model = randomise(generator(8, AnyOrder()))
    exact, _, _ = run(model, None, text(1), 2)
    frozen, slots, _ = run(model, FreeCache(2, rewrite), text(1), 2)
    assert slots[0] == 8 and slots[1] == 6  # the prompt is a block
    assert 1e-3 < (exact - frozen).abs().max() < torch.inf


@pytest.mark.parametrize("rewrite", [False, True])
def test_a_forward_computes_what_is_not_frozen(rewrite):
    """All blocks but the first ones that are finished; to rewrite them costs a forward with them in it."""
    model, x = randomise(generator(8, AnyOrder())), text(1)
    canvas = model.canvas({"token": x.clone()}, 1)
    target, expected, slots = Target(model, policy=FreeCache(2, rewrite)), [8], []
    for step in decode(target, canvas, Select(threshold=1.0), random=Forced(x)):
        slots.append(step.slots)
        expected.append(8 - int(canvas.known[0].long().cumprod(0).sum()) // 2 * 2)
    if rewrite:
        expected.insert(0, 8)
    assert slots == expected[: len(slots)]
    assert len(set(slots)) > 2


def test_a_frozen_element_that_is_unknown_again_is_computed_again():
    """Then nothing before it is frozen either, and this forward is exact."""

    class TakesBack(Recorder):
        def decide(self, canvas, guess, rows, random):
            step = super().decide(canvas, guess, rows, random)
            self.read.append(rows.dist.log_probs())
            return Step((*step.edits, Unset(torch.tensor([[0]])))) if len(self.read) == 2 else step

    model, x = randomise(generator(8, AnyOrder())), text(1)
    rows = []
    for policy in (None, FreeCache(1)):
        decider = TakesBack("confidence", threshold=1.0)
        decider.met, decider.read = {}, []
        canvas = model.canvas({"token": x.clone()}, torch.tensor([[0, 1, 1, 1, 0, 0, 0, 0]]).bool())
        canvas.apply([Set(x[:, :1], torch.tensor([[0]]))])
        slots = [step.slots for step in decode(Target(model, policy=policy), canvas, decider, random=Forced(x))]
        rows.append(decider.read[2])
    assert slots[:3] == [8, 4, 8]
    assert torch.allclose(*rows, rtol=0, atol=1e-12)


@pytest.mark.parametrize("order", [AnyOrder(), Blocks(2, "any")], ids=["any order", "blocks"])
@pytest.mark.parametrize("rewrite", [False, True])
def test_what_is_frozen_of_a_row_does_not_depend_on_its_company(order, rewrite):
    """Rows with different prompts that decide at different speeds."""
    model, x = randomise(generator(8, order)), text(3)
    together, _, _ = run(model, FreeCache(2, rewrite), x, KNOWN, threshold=0.6)
    alone = [
        run(model, FreeCache(2, rewrite), x[i : i + 1], KNOWN[i : i + 1], threshold=0.6, row=torch.tensor([i]))[0]
        for i in range(3)
    ]
    assert torch.allclose(together, torch.cat(alone), rtol=0, atol=1e-9)


def test_branches_of_guidance_freeze_together():
    model = randomise(generator(8, Blocks(2, "any"), vector=WIDTH))
    more = {"condition": {"class": torch.arange(3)}, "guidance": Guidance(1.5)}
    exact, _, _ = run(model, None, text(3), KNOWN, cached=False, **more)
    rewritten, _, _ = run(model, FreeCache(2, rewrite=True), text(3), KNOWN, **more)
    stale, _, _ = run(model, FreeCache(2), text(3), KNOWN, **more)
    assert torch.allclose(exact, rewritten, rtol=0, atol=1e-9)
    assert (exact - stale).abs().max() > 1e-3


def test_one_target_serves_one_canvas_after_the_other():
    model = randomise(generator(8, AnyOrder()))
    target = Target(model, policy=FreeCache(2))
    strings = [generate(target, model.blank(2), Select(threshold=1.0), random=Keyed(0)).value["token"] for _ in "ab"]
    assert torch.equal(*strings)


def test_what_a_policy_cannot_serve_is_refused():
    with pytest.raises(ValueError, match="at least 1 element"):
        FreeCache(0)
    model = randomise(generator(4, AnyOrder()))
    with pytest.raises(ValueError, match="needs a cache"):
        Target(model, cached=False, policy=FreeCache(2))
    plain = randomise(generator(4, Line(prefix=1)))
    with pytest.raises(OrderError, match="one slot for each element"):
        generate(Target(plain, policy=FreeCache(2)), plain.blank(1), SampleAll())


# ---- guided diffusion ------------------------------------------------------------------------------------------------


def constant(order, token, vocab=VOCAB):
    """A model that always writes the same token."""
    model = randomise(generator(8, order))
    head = CategoricalHead(WIDTH, vocab, bias=True).double()
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(F.one_hot(torch.tensor(token), vocab))
    model.heads["token"] = head
    return model


def guided(model, make, policy=None, known=2):
    canvas = model.canvas({"token": text(1)}, known)
    decider = make(canvas)
    steps = [step for step in decode(Target(model, policy=policy), canvas, decider)]
    return canvas.value["token"], [step.edits[0].element.shape[1] for step in steps], decider


def left_to_right(model, x, known):
    """The generator's own greedy text, one element a step."""
    for e in range(known, 8):
        canvas = shown(model, x, range(e))
        x = x.clone()
        x[0, e] = rows_of(model, model.factorization.step(canvas, None, 0), canvas)[e].argmax()
    return x


def test_a_guide_that_always_agrees_commits_everything_in_one_step():
    _, counts, _ = guided(constant(AnyOrder(), 1), lambda canvas: Guided(constant(Line(prefix=1), 1), canvas))
    assert counts == [6]


def test_a_guide_that_never_agrees_leaves_the_generators_own_greedy_text():
    model, never = randomise(generator(8, AnyOrder())), constant(Line(prefix=1), 2, vocab=3)
    x, counts, _ = guided(model, lambda canvas: Guided(never, canvas))
    assert counts == [1] * 6
    assert torch.equal(x, left_to_right(model, text(1), 2))


def test_a_perfect_guide_changes_nothing_and_saves_forwards():
    """It writes what the generator would write there from left to right."""
    model = randomise(generator(8, AnyOrder()), seed=1)

    class Perfect(Guided):
        def says(self, draft):
            super().says(draft)
            known = self.canvas.length
            full = torch.cat([self.canvas.value["token"][:, :known], draft], 1)
            out = []
            for e in range(known, 8):
                canvas = shown(model, full, range(e))
                out.append(rows_of(model, model.factorization.step(canvas, None, 0), canvas)[e].argmax())
            return torch.stack(out)[None]

    plain = randomise(generator(8, Line(prefix=1)))
    x, counts, _ = guided(model, lambda canvas: Perfect(plain, canvas))
    assert torch.equal(x, left_to_right(model, text(1), 2))
    assert sum(counts) == 6 and len(counts) < 6


@pytest.mark.parametrize("policy", [None, FreeCache(2), FreeCache(2, rewrite=True)], ids=str)
def test_at_least_one_element_a_step_and_a_cropped_guide_equals_a_fresh_one(policy):
    model, guide = randomise(generator(8, AnyOrder())), randomise(generator(8, Line(prefix=1)), seed=2)
    checked = []

    class Checked(Guided):
        def says(self, draft):
            kept = super().says(draft)
            fresh, canvas = Target(guide), self.canvas.copy()
            plan = fresh.plan(canvas, Guess(draft))
            again = fresh.forward(plan, canvas, Guess(draft)).dist
            now = self.guide.plan(self.canvas, Guess(draft))
            mine = self.guide.forward(now, self.canvas, Guess(draft)).dist
            assert torch.allclose(mine.log_probs(), again.log_probs(), rtol=0, atol=1e-9)
            checked.append(plan.size - now.size)
            return kept

    x, counts, decider = guided(model, lambda canvas: Checked(guide, canvas), policy)
    assert sum(counts) == 6 and min(counts) >= 1
    assert checked[0] == 0 and min(checked[1:]) > 0  # later, part of the text stands in the cache
    assert torch.equal(decider.canvas.value["token"], x)
