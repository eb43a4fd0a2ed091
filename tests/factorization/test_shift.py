"""Orders whose elements are read at the slot before their own: reads, likelihoods, laws, caches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from seriatim.backbones.rope import RoPE
from seriatim.backbones.transformer import Transformer, TransformerConfig
from seriatim.canvas import Set
from seriatim.decoding.filters import Warper
from seriatim.decoding.loop import decode, generate
from seriatim.decoding.policy import FreeCache
from seriatim.decoding.sample import Above, Select
from seriatim.decoding.target import Target
from seriatim.embed import TokenEmbed
from seriatim.factorization.line import Line
from seriatim.factorization.static import AnyOrder, Blocks
from seriatim.heads.categorical import CategoricalHead
from seriatim.laws.case import Case, Unmasked, randomise
from seriatim.laws.laws import LAWS, Broken
from seriatim.layout import line
from seriatim.model import Model
from seriatim.objectives.masked import Masked, MaskedBlocks, by_time
from seriatim.plan import OrderError, Reads
from seriatim.random import Forced, Keyed

VOCAB, WIDTH = 2, 16
WHY = {1: "decided in any order", 2: "decided in any order"}


def model_of(order, length=6):
    backbone = Transformer(TransformerConfig(WIDTH, 2, 2, rope=RoPE()))
    embed, head = TokenEmbed(VOCAB, WIDTH, mask=True, start=False), CategoricalHead(WIDTH, VOCAB)
    return randomise(Model(line(length), order, embed, backbone, head))


def ids(rows, length, seed=0):
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def rows_of(model, plan, canvas):
    """Element -> log-probabilities (batch, vocab) of what a plan reads."""
    with torch.no_grad():
        dist, element, _ = model.dist(model.hidden(plan, canvas), plan, canvas)
    return {e: dist.log_probs()[:, i] for i, e in enumerate(element[0].tolist()) if e >= 0}


def read_at(plan):
    """Element -> the slot that reads it, in the first row."""
    pairs = zip(plan.reads.element[0].tolist(), plan.reads.slot[0].tolist(), strict=True)
    return {e: s for e, s in pairs if e >= 0}


# ---- where elements are read -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [0, 1, 3])
def test_in_any_order_each_unknown_element_is_read_one_slot_before_its_own(given):
    model = model_of(AnyOrder(shift=True))
    canvas = model.canvas({"token": ids(1, 6)}, given)
    plan = model.factorization.step(canvas, None, 0).check(model.mixers, canvas.open)
    assert read_at(plan) == {e: max(e - 1, 0) for e in range(given, 6)}


@pytest.mark.parametrize("inside", ["any", "parallel"])
def test_the_first_of_a_block_is_read_at_the_value_that_ends_the_block_before(inside):
    model = model_of(Blocks(2, inside, shift=True))
    plan = model.factorization.packed(model.blank(1)).check(model.mixers)
    assert read_at(plan) == {0: 0, 1: 0, 2: 6 + 1, 3: 2, 4: 6 + 3, 5: 4}


def test_a_first_element_read_at_a_value_of_its_own_block_peeks():
    """And so would any that is read where its value stands."""
    model = model_of(Blocks(2, "any", shift=True))
    plan = model.factorization.packed(model.blank(1))
    for element, slot in ((2, 8), (3, 8), (4, 10)):
        wrong = torch.where(plan.reads.element == element, slot, plan.reads.slot)
        with pytest.raises(OrderError, match=f"reads element {element}"):
            replace(plan, reads=Reads(wrong, plan.reads.element)).check(model.mixers)


# ---- likelihoods -----------------------------------------------------------------------------------------------------


def test_shifted_blocks_of_one_are_a_next_token_model():
    """Each element is read at the value before it, which sees all that is earlier."""
    ours = model_of(Blocks(1, shift=True))
    plain = Model(ours.layout, Line(), ours.embed, ours.backbone, ours.heads["token"])
    x = ids(4, 6)
    with torch.no_grad():
        got, want = (m.log_prob(m.canvas({"token": x}, 1)) for m in (ours, plain))
        unshifted = Model(ours.layout, Blocks(1), ours.embed, ours.backbone, ours.heads["token"])
        other = unshifted.log_prob(unshifted.canvas({"token": x}, 1))
    assert torch.allclose(got, want, rtol=0, atol=1e-12)
    assert (got - other).abs().max() > 1e-3


def test_one_shifted_block_is_shifted_masked_generation():
    parts = model_of(Blocks(6, "any", shift=True))
    shared = (parts.embed, parts.backbone, parts.heads["token"])
    block = MaskedBlocks(parts.layout, parts.factorization, *shared, masking=by_time)
    hidden, x = torch.tensor([[1, 0, 1, 1, 0, 1], [0, 0, 0, 1, 1, 0]]).bool(), ids(2, 6)
    said = []
    for shift in (True, False):
        whole = Masked(parts.layout, AnyOrder(shift), *shared, masking=by_time)
        with torch.no_grad():
            said.append(whole.hidden_losses(whole.canvas({"token": x}), hidden))
    with torch.no_grad():
        ours = block.hidden_losses(block.canvas({"token": x}), hidden)
    assert torch.allclose(ours, said[0], rtol=0, atol=1e-12)
    assert (ours - said[1]).abs().max() > 1e-3


@pytest.mark.parametrize("given", [0, 1, 2, 5])
@pytest.mark.parametrize("size", [1, 3, 4, 6])
def test_the_loss_of_one_pass_equals_a_slow_loop_over_blocks(size, given):
    model = model_of(Blocks(size, "any", shift=True))
    x = ids(1, 6)
    known = torch.tensor([[1, 0, 0, 1, 0, 1]]).bool() | (torch.arange(6) < given)
    canvas = model.canvas({"token": x.clone()}, given)
    canvas.apply([Set(x, torch.where(known & canvas.open, torch.arange(6), -1))])
    with torch.no_grad():
        fast = model.losses(canvas)[0]
    for start in range(0, 6, size):
        end = min(start + size, 6)
        here = model.canvas({"token": x.clone()}, known | (torch.arange(6) < start))
        hidden = [e for e in range(start, end) if not known[0, e]]
        rows = rows_of(model, model.factorization.step(here, None, 0), here) if hidden else {}
        for e in range(start, end):
            want = -float(rows[e][0, x[0, e]]) if e in hidden else 0.0
            assert abs(float(fast[e]) - want) < 1e-9


# ---- laws ------------------------------------------------------------------------------------------------------------


def case(name, given=0):
    if name == "parallel":
        return Case(model_of(Blocks(2, shift=True), 4), VOCAB, given)
    order, kind = {
        "any order": (AnyOrder(shift=True), Masked), "blocks": (Blocks(2, "any", shift=True), MaskedBlocks)
    }[name]  # fmt: skip
    m = model_of(order, 3 if name == "any order" else 4)
    model = kind(m.layout, order, m.embed, m.backbone, m.heads["token"], masking=by_time)
    return Case(model, VOCAB, given, decider=lambda: Select("random", steps=4), exempt=WHY)


@pytest.mark.parametrize("given", [0, 1])
@pytest.mark.parametrize("number", [1, 2, 3, 5, 6, 9, 10, 11])
@pytest.mark.parametrize("name", ["any order", "blocks"])
def test_law(name, number, given):
    LAWS[number][1](case(name, given))


@pytest.mark.parametrize("number", [1, 2, 3, 5, 6, 7, 9, 10])
def test_law_of_parallel_blocks(number):
    LAWS[number][1](case("parallel", given=1))


@pytest.mark.parametrize("name", ["any order", "blocks", "parallel"])
def test_values_in_place_of_masks_are_caught(name):
    wrong = case(name)
    wrong.model.embed.__class__ = Unmasked
    with pytest.raises(Broken):
        LAWS[2][1](wrong)


# ---- caches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompts", [(0, 0), (3, 3), (4, 4), (5, 3), (0, 4)], ids=str)
def test_cached_blocks_equal_recomputation(prompts):
    """Whatever of a block is decided first: its first element may be the last."""
    model = model_of(Blocks(3, "any", shift=True), 8)
    x = ids(2, 8, seed=2)
    known = torch.arange(8) < torch.tensor(prompts)[:, None]
    met, texts = [], []
    for cached in (True, False):
        forced, select = Forced(x), Select("confidence", commit=Above(0.6))
        canvas = model.canvas({"token": torch.where(known, x, 0)}, known)
        generate(Target(model, cached=cached), canvas, select, random=forced)
        met.append(forced.log_prob)
        canvas = model.canvas({"token": torch.where(known, x, 0)}, known)
        target = Target(model, cached=cached, warp=Warper(temperature=0))
        texts.append(generate(target, canvas, Select("confidence", commit=Above(0.6))).value["token"])
    assert torch.allclose(*met, rtol=0, atol=1e-9)
    assert torch.equal(*texts)


def test_a_block_costs_one_slot_more_and_the_value_before_it_is_not_remembered():
    model = model_of(Blocks(3, "any", shift=True), 9)
    target, slots, held = Target(model), [], []
    for step in decode(target, model.blank(1), Select(commit=Above(1.0)), random=Keyed(0)):
        slots.append(step.slots)
        held.append(target.cache.length)
    assert slots == [3, 3, 3, 6, 4, 4, 7, 4, 4]
    assert held == [0, 0, 0, 2, 2, 2, 5, 5, 5]


def test_an_element_of_an_earlier_block_cannot_become_unknown_again():
    model = model_of(Blocks(3, "any", shift=True), 9)
    canvas = model.canvas({"token": ids(1, 9)}, 6)
    with pytest.raises(OrderError, match="the cache holds 6 slots"):
        model.factorization.step(canvas, None, 6)


@pytest.mark.parametrize("order", [AnyOrder(shift=True), Blocks(2, "any", shift=True)], ids=["any order", "blocks"])
def test_a_policy_freezes_no_slot_that_is_read(order):
    """All unknown elements are read in each step, though the values before them are finished."""
    model, read = model_of(order, 8), []

    class Watched(Select):
        def decide(self, canvas, guess, rows, random):
            read.append((rows.element >= 0).sum().item())
            return super().decide(canvas, guess, rows, random)

    exact, policy = None, FreeCache(2, rewrite=True)
    for target in (Target(model, cached=False), Target(model, policy=policy)):
        read.clear()
        canvas = model.canvas({"token": ids(1, 8)}, 4)
        generate(target, canvas, Watched("random", commit=Above(1.0)), random=Keyed(1))
        exact = exact or list(read)
        assert read == exact
