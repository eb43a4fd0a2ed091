"""Cache policies: what is frozen is not computed again, and nothing else changes.

Rows are met by forcing the decoder to a text, one element a step unless said otherwise.
"""

from __future__ import annotations

import pytest
import torch

from seriatim.backbones.rope import RoPE
from seriatim.backbones.transformer import Transformer, TransformerConfig
from seriatim.canvas import Canvas, Set, Unset
from seriatim.conditions.condition import ClassCondition
from seriatim.decoding.guidance import Guidance
from seriatim.decoding.loop import Step, decode, generate, select_rows
from seriatim.decoding.policy import FreeCache, OutsideBlock
from seriatim.decoding.sample import Above, SampleAll, Select
from seriatim.decoding.target import Target
from seriatim.decoding.unmask import Unmask, at_work
from seriatim.embed import TokenEmbed
from seriatim.factorization.line import Line
from seriatim.factorization.static import AnyOrder, Blocks
from seriatim.heads.categorical import CategoricalHead
from seriatim.laws.case import randomise
from seriatim.layout import line
from seriatim.model import Model
from seriatim.plan import MASK, VALUE, OrderError
from seriatim.random import Forced, Key, Keyed

VOCAB, WIDTH, LENGTH = 2, 16, 8


def generator(order, **config):
    backbone = Transformer(TransformerConfig(WIDTH, 2, 2, rope=RoPE(), **config))
    embed = TokenEmbed(VOCAB, WIDTH, positions=(LENGTH + 1,), mask=True)
    condition = {"class": ClassCondition(3, WIDTH)} if config else None
    model = Model(line(LENGTH), order, embed, backbone, CategoricalHead(WIDTH, VOCAB), condition)
    return randomise(model)


class Recorder(Select):
    """Confidence picks; remembers what was read of each element when it was decided."""

    def decide(self, canvas, guess, rows, random):
        step = super().decide(canvas, guess, rows, random)
        log_p = rows.dist.log_probs()
        for b, i in (step.edits[0].element >= 0).nonzero().tolist():
            self.met[int(canvas.row[b]), int(step.edits[0].element[b, i])] = log_p[b, i]
        return step


def run(model, policy, x, known=0, cached=True, threshold=1.0, row=None, **more):
    """Rows met (samples x elements, vocab) when decoding is forced to x, and slots of each forward."""
    select = Recorder("confidence", commit=Above(threshold))
    select.met = {}
    target = Target(model, cached=cached, policy=policy, **more)
    canvas = model.canvas({"token": x.clone()}, known, row=row)
    slots = [step.slots for step in decode(target, canvas, select, random=Forced(x))]
    assert torch.equal(canvas.value["token"], x)
    return torch.stack([select.met[key] for key in sorted(select.met)]), slots


def text(rows, seed=3):
    return torch.randint(VOCAB, (rows, 8), generator=torch.Generator().manual_seed(seed))


KNOWN = torch.arange(LENGTH) < torch.tensor([[0], [3], [5]])


@pytest.mark.parametrize("rewrite", [False, True])
@pytest.mark.parametrize("known", [0, 3, KNOWN], ids=["nothing given", "a prompt", "prompts"])
def test_with_a_block_as_long_as_the_sample_the_policy_is_exact(known, rewrite):
    model = generator(AnyOrder())
    exact, slots = run(model, None, text(3), known)
    neutral, same = run(model, FreeCache(8, rewrite), text(3), known)
    assert torch.allclose(exact, neutral, rtol=0, atol=1e-12)
    assert slots == same == [8] * len(slots)


class LeftToRight:
    """One element a step, in order; may take back elements at one of the steps. Remembers what was read."""

    def __init__(self, back):
        self.back, self.read = back or {}, []

    def decide(self, canvas, guess, rows, random):
        first = (rows.element[0] >= 0).nonzero()[:1, 0]
        element = rows.element[:, first]
        self.read.append(rows.dist.log_probs())
        again = torch.tensor([self.back.get(len(self.read), [])], dtype=torch.long)
        value = rows.dist.take(first[None]).sample(random, Key(canvas.row, element))
        return Step((Set(value, element), Unset(again)))


def in_order(model, policy, known=1, back=None):
    """Slots of each forward, and the rows that it read, for one text."""
    decider, x = LeftToRight(back), text(1)
    canvas = model.canvas({"token": x.clone()}, known)
    slots = [step.slots for step in decode(Target(model, policy=policy), canvas, decider, random=Forced(x))]
    return slots, decider.read


def test_a_forward_computes_what_is_not_frozen():
    """All blocks but the first ones that are finished. To rewrite a block it is computed once more."""
    model = generator(AnyOrder())
    assert in_order(model, FreeCache(2))[0] == [8, 6, 6, 4, 4, 2, 2]
    assert in_order(model, FreeCache(2, rewrite=True))[0] == [8, 8, 6, 6, 4, 4, 2]
    assert in_order(model, FreeCache(3))[0] == [8, 8, 5, 5, 5, 2, 2]
    assert in_order(model, FreeCache(2), known=5)[0] == [8, 2, 2]  # two blocks of the prompt, then its remainder's


def test_a_frozen_element_that_is_unknown_again_is_computed_again_with_all_behind_it():
    """If it is the first one, nothing is frozen any more, and the forward is exact."""
    model, back = generator(AnyOrder()), {3: [1]}
    exact = in_order(model, None, back=back)
    frozen = in_order(model, FreeCache(1), back=back)
    assert frozen[0][:6] == [8, 6, 5, 7, 4, 3]
    assert (frozen[1][2] - exact[1][2][:, 3:]).abs().max() > 1e-3  # of the elements from 3 on
    model, back = generator(AnyOrder()), {3: [0]}
    exact, frozen = (in_order(model, policy, known=0, back=back) for policy in (None, FreeCache(1)))
    assert frozen[0][:5] == [8, 7, 6, 8, 5]
    assert torch.allclose(frozen[1][3], exact[1][3], rtol=0, atol=1e-12)


@pytest.mark.parametrize("order", [AnyOrder(), Blocks(2, "any")], ids=["any order", "blocks"])
@pytest.mark.parametrize("rewrite", [False, True])
def test_what_is_frozen_of_a_row_does_not_depend_on_its_company(order, rewrite):
    """Rows with different prompts that decide at different speeds."""
    model, x = generator(order), text(3)
    together, _ = run(model, FreeCache(2, rewrite), x, KNOWN, threshold=0.6)
    alone = [
        run(model, FreeCache(2, rewrite), x[i : i + 1], KNOWN[i : i + 1], threshold=0.6, row=torch.tensor([i]))[0]
        for i in range(3)
    ]
    assert torch.allclose(together, torch.cat(alone), rtol=0, atol=1e-9)


def test_branches_of_guidance_freeze_together():
    model = generator(Blocks(2, "any"), vector=WIDTH)
    more = {"condition": {"class": torch.arange(3)}, "guidance": Guidance(1.5)}
    exact, _ = run(model, None, text(3), KNOWN, cached=False, **more)
    rewritten, _ = run(model, FreeCache(2, rewrite=True), text(3), KNOWN, **more)
    stale, _ = run(model, FreeCache(2), text(3), KNOWN, **more)
    assert torch.allclose(exact, rewritten, rtol=0, atol=1e-9)
    assert (exact - stale).abs().max() > 1e-3


def test_rows_that_are_selected_take_what_is_frozen_of_them_along():
    """Where rewritten entries are exact, the rows that go on decode as if they had been alone."""
    model, x = generator(Blocks(2, "any")), text(3)
    whole = generate(Target(model), model.canvas({"token": x.clone()}, 2), Select(commit=Above(1.0)), random=Keyed(0))
    target, canvas = Target(model, policy=FreeCache(2, rewrite=True)), model.canvas({"token": x.clone()}, 2)
    for turn, _ in enumerate(decode(target, canvas, Select(commit=Above(1.0)), random=Keyed(0))):
        if turn == 2:
            select_rows(target, canvas, torch.tensor([2, 0]))
    assert torch.equal(canvas.value["token"], whole.value["token"][[2, 0]])
    with pytest.raises(ValueError, match="rows cannot be admitted"):
        target.memory.select(torch.tensor([0, -1]))


def test_one_target_serves_one_canvas_after_the_other():
    model = generator(AnyOrder())
    target, told = Target(model, policy=FreeCache(2)), []
    for _ in range(2):
        canvas = model.canvas({"token": text(2)}, 2)
        slots = [step.slots for step in decode(target, canvas, Select(commit=Above(1.0)), random=Keyed(0))]
        told.append((slots, canvas.value["token"].tolist()))
    assert told[0] == told[1]
    assert told[0][0][0] == 8


def test_what_a_policy_cannot_serve_is_refused():
    with pytest.raises(ValueError, match="at least 1 element"):
        FreeCache(0)
    model = generator(AnyOrder())
    with pytest.raises(ValueError, match="needs a cache"):
        Target(model, cached=False, policy=FreeCache(2))
    plain = generator(Line(prefix=1))
    with pytest.raises(OrderError, match="one slot for each element"):
        generate(Target(plain, policy=FreeCache(2)), plain.blank(1), SampleAll())


def test_a_policy_on_a_state_space_cache_is_refused_when_joined():
    from seriatim.backbones.mamba import Mamba, MambaConfig

    backbone = Mamba(MambaConfig(16, 1, head_dim=8, state=4))
    model = Model(line(4), Line(1), TokenEmbed(3, 16), backbone, CategoricalHead(16, 3))
    with pytest.raises(ValueError, match=r"FreeCache needs a cache that can evict and subset; that of Mamba cannot"):
        Target(model, policy=FreeCache(2))


# ---- what lies outside the block at work -----------------------------------------------------------------------------


def in_blocks(model, policy, x, known, block):
    """Rows met, and slots of each forward, when blocks behind `known` elements are decided one after another."""
    select = Recorder("confidence", commit=Above(1.0))
    select.met = {}
    plain = model.canvas({"token": x.clone()}, known)
    rank = torch.where(plain.known, -1, (torch.arange(LENGTH) - known).clamp(min=0) // block)
    canvas, slots = Canvas(plain.layout, plain.value, plain.known, rank), []
    for step in decode(Target(model, policy=policy), canvas, Unmask(select), random=Forced(x)):
        slots.append(step.slots)
    return torch.stack([select.met[key] for key in sorted(select.met)]), slots


@pytest.mark.parametrize("known", [0, 2])
def test_a_block_is_computed_alone_from_its_second_step_on(known, monkeypatch):
    """The first step of a block computes everything."""
    monkeypatch.setattr(Unmask, "decide", only_the_block_at_work)
    model, x = generator(AnyOrder()), text(2)
    _, prefix = in_blocks(model, OutsideBlock(), x, known, 3)
    _, dual = in_blocks(model, OutsideBlock(behind=True), x, known, 3)
    blocks = [range(i, min(i + 3, LENGTH)) for i in range(known, LENGTH, 3)]
    assert dual == [LENGTH if i == 0 else len(b) for b in blocks for i in range(len(b))]
    assert prefix == [LENGTH if i == 0 else LENGTH - b.start for b in blocks for i in range(len(b))]


def only_the_block_at_work(self, canvas, guess, rows, random):
    return self.select.decide(canvas, guess, rows._replace(element=at_work(canvas, rows)), random)


def test_blocks_are_those_of_the_canvas():
    model, x = generator(AnyOrder()), text(1)
    source = torch.where(torch.arange(LENGTH) < 5, VALUE, MASK)[None]
    plan = model.factorization.step(model.canvas({"token": x}, 5), None, 0)
    past = source.clone()
    past[0, 4] = MASK  # decided at the last step, in the block of places 2 to 5
    rank = torch.tensor([[-1, 0, 1, 1, 1, 1, 2, 2]])
    assert OutsideBlock(True).frozen(plan, past, rank).tolist() == [[True] * 2 + [False] * 4 + [True] * 2]
    assert OutsideBlock().frozen(plan, past, rank).tolist() == [[True] * 2 + [False] * 6]
    assert not OutsideBlock(True).frozen(plan, source, rank).any(), "nothing was decided: the block begins"


def test_a_cache_around_blocks_is_exact_where_one_block_is_all_and_drifts_where_it_is_not(monkeypatch):
    """The more is read as it was, the further; and the first step of each block is exact for its share."""
    monkeypatch.setattr(Unmask, "decide", only_the_block_at_work)
    model = generator(AnyOrder())
    drift = dict.fromkeys(("all", "prefix", "dual"), 0.0)
    for seed in range(6):
        x = text(1, seed)
        for name, policy, block in (
            ("all", OutsideBlock(True), 8), ("prefix", OutsideBlock(), 2), ("dual", OutsideBlock(True), 2),
        ):  # fmt: skip
            exact, _ = in_blocks(model, None, x, 0, block)
            rows, _ = in_blocks(model, policy, x, 0, block)
            drift[name] += float((rows.exp() - exact.exp()).abs().sum(-1).mean()) / 2 / 6
    assert drift["all"] < 1e-12
    assert 1e-4 < drift["prefix"] < drift["dual"] < 0.2


def test_rows_that_begin_their_blocks_at_different_steps_are_as_alone(monkeypatch):
    """Company: a row at the first step of a block beside one in the middle of it."""
    monkeypatch.setattr(Unmask, "decide", only_the_block_at_work)
    model, x, policy = generator(AnyOrder()), text(2), OutsideBlock(behind=True)
    known = torch.arange(LENGTH) < torch.tensor([[1], [3]])
    select = Recorder("confidence", commit=Above(1.0))

    def met(rows):
        select.met = {}
        plain = model.canvas({"token": x[rows].clone()}, known[rows], row=torch.tensor(rows))
        start = plain.known.sum(1, keepdim=True)
        rank = torch.where(plain.known, -1, (torch.arange(LENGTH) - start).clamp(min=0) // 3)
        canvas = Canvas(plain.layout, plain.value, plain.known, rank, row=plain.row)
        for _ in decode(Target(model, policy=policy), canvas, Unmask(select), random=Forced(x[rows])):
            pass
        return dict(select.met)

    both, alone = met([0, 1]), {**met([0]), **met([1])}
    assert both.keys() == alone.keys()
    assert all(torch.allclose(both[k], alone[k], rtol=0, atol=1e-9) for k in both)
