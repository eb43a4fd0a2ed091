"""Probe `sdar` with FreeCache: block diffusion, and an approximate cache.

SDAR (2025): blocks one after another, the elements of a block in any order, trained in one pass of two streams.
FreeCache (FlashDLM, 2025): a masked generator that never computes finished blocks again; how it is guided is held to
its laws in tests/decoding/test_guide.py.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from seriatim.backbones.rope import RoPE
from seriatim.backbones.transformer import Transformer, TransformerConfig
from seriatim.canvas import Set
from seriatim.conditions.condition import ClassCondition
from seriatim.decoding.filters import Warper
from seriatim.decoding.loop import decode, generate
from seriatim.decoding.policy import FreeCache
from seriatim.decoding.sample import Above, Select
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
from seriatim.random import Forced, Key, Keyed, enumerate_law
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
    u = random.uniform(x.shape, key._replace(draw=1)).masked_fill(torch.arange(x.shape[1]) < given, 2.0)
    hidden = (u < rate) | (u == u.amin(1, keepdim=True))
    canvas = model.canvas({"token": x.clone()}, given)
    shown = torch.where(hidden | (u == 2.0), -1, torch.arange(x.shape[1]))
    return canvas.apply([Set(x, shown)]), 1 / rate[:, 0]


# ---- SDAR: laws ------------------------------------------------------------------------------------------------------

BOUND = {1: "decided in any order inside a block", 2: "decided in any order inside a block"}


def case(order=None, given=0, rule="confidence"):
    model = randomise(generator(6, order or Blocks(3, "any")))
    return Case(model, VOCAB, given, decider=lambda: Select(rule, commit=Above(1.0)), exempt=BOUND)


@pytest.mark.parametrize("given", [0, 2])
@pytest.mark.parametrize("number", [1, 3, 5, 6, 9, 10])
def test_law(number, given):
    LAWS[number][1](case(given=given))


@pytest.mark.parametrize("given", [0, 2])
def test_law_11_a_sample_is_taken_up_again_inside_a_block(given):
    LAWS[11][1](case(given=given, rule="margin"))


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
        generate(Target(model), canvas, Select("random", commit=Above(torch.inf)), random=random)
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


@pytest.mark.parametrize(
    "select", [Select("confidence", commit=Above(0.6)), Select("margin", commit=Above(1.0))], ids=str
)
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
        met.append(forced.log_prob)
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
    for step in decode(target, canvas, Select(commit=Above(1.0)), random=Keyed(0)):
        slots.append(step.slots)
        held.append(target.cache.length)
    assert slots == [3, 3, 3, 6, 3, 3, 6, 3, 3]
    assert held == [0, 0, 0, 3, 3, 3, 6, 6, 6]


def test_dynamic_selection_at_a_threshold_of_one_is_one_element_a_step():
    model = randomise(generator(6, Blocks(3, "any")))
    strings = []
    for select in (Select(commit=Above(1.0)), Select(steps=6)):
        canvas = generate(Target(model, warp=Warper(temperature=0)), model.blank(1), select)
        strings.append(canvas.value["token"])
    assert torch.equal(*strings)


class OwnBlock(Blocks):
    """Queries see the values of their own block."""

    def packed(self, canvas):
        plan = super().packed(canvas)
        n = canvas.layout.size
        block, query = torch.arange(n).repeat(2) // self.size, torch.arange(2 * n) < n
        view = two_stream(block, query)
        view = replace(view, at=torch.where(query, view.at + 1, view.at))
        return replace(plan, views={"all": view})


class OwnValues(TokenEmbed):
    """Queries hold the values that stand in their places, of which their labels know nothing."""

    def forward(self, canvas, plan, guess=None, prefix=None):
        slots = replace(plan.slots, source=torch.full_like(plan.slots.source, VALUE))
        return super().forward(canvas, replace(plan, slots=slots), guess, prefix)


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
    with pytest.raises(OrderError, match="sees element"):
        LAWS[3][1](Case(randomise(generator(6, OwnBlock(3, "parallel"))), VOCAB))


@pytest.mark.parametrize("number", [1, 3])
def test_queries_that_hold_their_own_values_in_secret_are_found(number):
    wrong = Case(randomise(generator(6, Blocks(3, "parallel"))), VOCAB)
    wrong.model.embed.__class__ = OwnValues
    with pytest.raises(Broken):
        LAWS[number][1](wrong)


def test_entries_kept_before_the_block_is_finished_are_found():
    with pytest.raises((Broken, OrderError)):
        LAWS[5][1](case(KeepsMasks(3, "any")))


def test_a_prompt_hidden_in_training_is_found():
    with pytest.raises(AssertionError):
        check_training(HidesThePrompt(3, "any"), 2)


# ---- FreeCache -------------------------------------------------------------------------------------------------------


def text(rows, seed=3):
    return torch.randint(VOCAB, (rows, 8), generator=torch.Generator().manual_seed(seed))


def met(model, policy, known, cached=True, seed=3):
    """What was read of each element when it was decided, one a step and forced to a text; and slots of each forward."""
    forced, x = Forced(text(1, seed)), text(1, seed)
    target, canvas = Target(model, cached=cached, policy=policy), model.canvas({"token": x.clone()}, known)
    slots = [step.slots for step in decode(target, canvas, Select(commit=Above(1.0)), random=forced)]
    return torch.stack([forced.met[e] for e in range(known, 8)]), slots


@pytest.mark.parametrize("known", [0, 3, 4])
def test_where_blocks_see_no_later_ones_rewritten_entries_are_exact_and_others_are_not(known):
    model = randomise(generator(8, Blocks(2, "any")))
    exact, slots = met(model, None, known, cached=False)
    for block in (2, 4):
        rewritten, fewer = met(model, FreeCache(block, rewrite=True), known)
        assert torch.allclose(exact, rewritten, rtol=0, atol=1e-9)
        assert sum(fewer) < sum(slots)
    stale, fewest = met(model, FreeCache(2), known)
    assert (exact - stale).abs().max() > 1e-3
    assert sum(fewest) < sum(slots)


def test_where_everybody_sees_everybody_drift_grows_with_what_is_frozen():
    """Mean total variation from the exact rows, over 6 texts: none at the neutral setting, less where entries are
    rewritten and where blocks are long."""
    model = randomise(generator(8, AnyOrder()))
    policies = [FreeCache(8), FreeCache(4, rewrite=True), FreeCache(4), FreeCache(2, rewrite=True), FreeCache(2)]
    drift = dict.fromkeys(policies, 0.0)
    for seed in range(6):
        exact, _ = met(model, None, 0, seed=seed)
        for policy in policies:
            rows, _ = met(model, policy, 0, seed=seed)
            drift[policy] += float((rows.exp() - exact.exp()).abs().sum(-1).mean()) / 2 / 6
    assert drift[FreeCache(8)] < 1e-12
    assert 1e-5 < drift[FreeCache(4, rewrite=True)] < drift[FreeCache(4)] < drift[FreeCache(2)] < 0.2
    assert 1e-5 < drift[FreeCache(2, rewrite=True)] < drift[FreeCache(2)]
