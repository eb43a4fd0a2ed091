"""Probe `nar` (NAR, He et al. 2025): several readers of one element.

Anti-diagonals of a grid one after another. An element is read by its neighbours before it, one along each axis, each
with a head of its own direction; their logits are averaged. The class stands before the corner.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from seriatim.backbones.rope import RoPE
from seriatim.backbones.transformer import Transformer, TransformerConfig
from seriatim.conditions.condition import ClassCondition
from seriatim.decoding.loop import generate
from seriatim.decoding.sample import SampleAll
from seriatim.decoding.target import Target
from seriatim.embed import TokenEmbed
from seriatim.factorization.base import Factorization
from seriatim.factorization.line import Line
from seriatim.heads.categorical import CategoricalHead
from seriatim.laws.case import Case, randomise
from seriatim.laws.laws import LAWS, Broken
from seriatim.layout import grid, line
from seriatim.model import Model
from seriatim.plan import LEARNED, VALUE, Cost, OrderError, Plan, Reads, Slots
from seriatim.random import Forced
from seriatim.view import inclusive

VOCAB, WIDTH, CLASSES = 2, 16, 3

# ---- the composition -------------------------------------------------------------------------------------------------


class Neighbours(Factorization):
    """Elements of a grid by their distance from the first corner. Slot 0 holds the class and stands before the corner
    on every axis; role a reads the next element along axis a. An axis of length 1 has no neighbours, so no reader."""

    def order(self, layout, random=None):
        return layout.coord.sum(1)[None]

    def packed(self, canvas):
        coord, rank = canvas.layout.coord, canvas.rank
        axes = [a for a in range(coord.shape[1]) if int(coord[:, a].max()) > 0] or [0]
        number = {tuple(place): e for e, place in enumerate(coord.tolist())}
        reads = [(0, 0, a) for a in axes]
        for place, e in number.items():
            back = {a: number.get((*place[:a], place[a] - 1, *place[a + 1 :])) for a in axes}
            reads += [(1 + b, e, a) for a, b in back.items() if b is not None]
        slot, element, role = torch.tensor(reads).T[:, None]
        read = torch.where(rank[:, element[0]] >= 0, element, -1)
        front = torch.tensor([-1])
        slots = Slots(
            torch.cat([front, torch.arange(len(coord))])[None, :, None],
            torch.tensor([[LEARNED] + [VALUE] * len(coord)]),
            torch.cat([0 * coord[:1], coord])[None],
            torch.nn.functional.pad(rank, (1, 0), value=-1),
        )
        view = inclusive(torch.cat([front, coord.sum(1)]))
        return Plan(slots, {"all": view}, Reads(slot, read, role), rank, layout=canvas.layout)


def nar(*shape, order=None, **embed):
    rope = None if embed else RoPE(axes=(4, 4) if len(shape) == 2 else (4, 2, 2))
    backbone = Transformer(TransformerConfig(WIDTH, 2, 2, rope=rope))
    condition = {"class": ClassCondition(CLASSES, WIDTH, ("prefix",))}
    head = CategoricalHead(WIDTH, VOCAB, roles=len(shape))
    return Model(
        grid(*shape), order or Neighbours(), TokenEmbed(VOCAB, WIDTH, start=False, **embed), backbone, head, condition
    )


# ---- laws ------------------------------------------------------------------------------------------------------------


def case(order=None, given=0):
    model = randomise(nar(2, 3, order=order))
    spread = {"class": torch.arange(CLASSES)}
    return Case(model, VOCAB, given, {"class": torch.tensor([1])}, spread)


@pytest.mark.parametrize("given", [0, 2])
@pytest.mark.parametrize("number", [1, 2, 3, 5, 6, 7, 9, 10, 11])
def test_law(number, given):
    LAWS[number][1](case(given=given))


class ReadsItself(Neighbours):
    """Each slot reads the element that it carries."""

    def packed(self, canvas):
        plan = super().packed(canvas)
        return replace(plan, reads=Reads(plan.reads.element + 1, plan.reads.element, plan.reads.role))


class OneDiagonalTooFar(Neighbours):
    """A slot also sees the next anti-diagonal; a label denies that this holds anything."""

    def packed(self, canvas):
        plan = super().packed(canvas)
        at = plan.views["all"].at
        view = replace(plan.views["all"], born=at - (at > 0).long())
        return replace(plan, views={"all": view}, slots=replace(plan.slots, needs=-torch.ones_like(plan.slots.needs)))


class NextDiagonal(TokenEmbed):
    """A slot also holds its right neighbour, of which its labels know nothing."""

    def forward(self, canvas, plan, guess=None, prefix=None):
        more = (plan.slots.element + 1).clamp(max=canvas.layout.size - 1)
        element = torch.where(plan.slots.element >= 0, more, -1)
        x = super().forward(canvas, plan, guess, prefix)
        return x + super().forward(canvas, replace(plan, slots=replace(plan.slots, element=element)), guess, prefix)


class OneRole(Neighbours):
    """All read-outs by the same head."""

    def packed(self, canvas):
        plan = super().packed(canvas)
        return replace(plan, reads=replace(plan.reads, role=torch.zeros_like(plan.reads.role)))


def test_a_slot_that_reads_what_it_carries_is_found_by_its_labels():
    with pytest.raises(OrderError, match="reads element 0, but sees element 0 through itself"):
        LAWS[3][1](case(ReadsItself()))


def test_a_view_too_wide_is_found_by_its_labels_though_one_denies_it():
    """What a slot carries speaks for itself, whatever `needs` says."""
    subject = case(OneDiagonalTooFar())
    for number in (1, 3):
        with pytest.raises(OrderError, match="slot 1 reads element 1, but sees element 1 through slot 2"):
            LAWS[number][1](subject)


def test_a_feed_of_what_comes_later_is_found_by_edits_where_labels_know_nothing():
    subject = case()
    subject.model.embed.__class__ = NextDiagonal
    subject.plan(subject.sample(1)).check()
    with pytest.raises(Broken, match="changes what is read of element"):
        LAWS[3][1](subject)
    with pytest.raises(Broken, match="rows of one pass and of single steps differ"):
        LAWS[1][1](subject)


def test_one_head_for_all_directions_is_found_by_the_limit():
    with pytest.raises(AssertionError):
        test_one_row_is_raster_with_the_head_of_its_axis(OneRole())


# ---- what the sheet says ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape, forwards", [((4, 4), 7), ((16, 16), 31), ((3, 5), 7), ((2, 3, 3), 6), ((1, 1), 1)])
def test_anti_diagonals_are_the_steps(shape, forwards):
    layout = grid(*shape)
    model = nar(*shape)
    turns = model.factorization.packed(model.canvas({"token": torch.zeros(1, layout.size, dtype=torch.long)})).steps()
    decided = [sorted(set(turn.reads.element[0].tolist())) for turn in turns]
    distance = layout.coord.sum(1)
    assert len(turns) == forwards
    assert decided == [(distance == d).nonzero()[:, 0].tolist() for d in range(forwards)]


def test_each_element_is_read_once_from_each_neighbour_before_it():
    layout = grid(3, 4)
    plan = Neighbours().packed(nar(3, 4).canvas({"token": torch.zeros(1, 12, dtype=torch.long)}))
    slot, element, role = (x[0] for x in (plan.reads.slot, plan.reads.element, plan.reads.role))
    carried = plan.slots.element[0, slot, 0]
    found = sorted(zip(element.tolist(), carried.tolist(), role.tolist(), strict=True))
    expected = [(0, -1, 0), (0, -1, 1)]
    for e, (i, j) in enumerate(layout.coord.tolist()):
        expected += [(e, e - 4, 0)] if i else []
        expected += [(e, e - 1, 1)] if j else []
    assert found == sorted(expected)


def test_two_elements_of_a_diagonal_are_independent_given_the_corner():
    model = randomise(nar(2, 2))
    x = torch.tensor(list(itertools.product(range(VOCAB), repeat=4)))
    with torch.no_grad():
        p = model.log_prob(model.canvas({"token": x}), {"class": torch.ones(16, dtype=torch.long)}).exp()
    joint = p.view(2, 2, 2, 2).sum(3)  # corner, right, below
    joint = joint / joint.sum((1, 2), keepdim=True)
    assert torch.allclose(joint, joint.sum(2, keepdim=True) * joint.sum(1, keepdim=True), rtol=0, atol=1e-12)
    assert (joint[0] - joint[1]).abs().max() > 1e-3  # and they do depend on it


def test_one_row_is_raster_with_the_head_of_its_axis(order=None):
    model = randomise(nar(1, 4, order=order, positions=(1, 4)))
    embed = TokenEmbed(VOCAB, WIDTH, positions=(5,), start=False)
    conditions = dict(model.conditions)
    raster = Model(line(4), Line(prefix=1), embed, model.backbone, CategoricalHead(WIDTH, VOCAB), conditions).double()
    rows, columns = model.embed.positions
    with torch.no_grad():
        embed.table.copy_(model.embed.table)
        embed.positions[0].copy_(torch.cat([columns[:1], columns]) + rows)
        raster.heads["token"].weight.copy_(model.heads["token"].weight[VOCAB:])
        x = torch.tensor(list(itertools.product(range(VOCAB), repeat=4)))
        label = {"class": torch.arange(16) % CLASSES}
        losses = [m.losses(m.canvas({"token": x}), label) for m in (model, raster)]
    assert torch.allclose(*losses, rtol=0, atol=1e-12)


def test_transposing_grid_heads_and_rotary_axes_changes_nothing():
    model, other = (randomise(nar(*shape)) for shape in ((2, 3), (3, 2)))
    swap = torch.tensor([2, 3, 0, 1, 6, 7, 4, 5])  # the rotary dimensions of the two axes
    with torch.no_grad():
        for layer in other.backbone.layers:
            qkv = layer.qkv.view(3, 2, 8, WIDTH)  # (q, k, v), heads
            qkv[:2] = qkv[:2][:, :, swap]
        other.heads["token"].weight.copy_(model.heads["token"].weight.view(2, VOCAB, WIDTH).flip(0).flatten(0, 1))
        x = torch.tensor(list(itertools.product(range(VOCAB), repeat=6)))
        label = {"class": torch.arange(64) % CLASSES}
        losses = model.losses(model.canvas({"token": x}), label)
        turned = x.view(-1, 2, 3).transpose(1, 2).reshape(-1, 6)
        transposed = other.losses(other.canvas({"token": turned}), label)
        unswapped = model.losses(model.canvas({"token": x.flip(1)}), label)
    assert torch.allclose(losses, transposed.view(-1, 3, 2).transpose(1, 2).reshape(-1, 6), rtol=0, atol=1e-12)
    assert not torch.allclose(losses.sum(1), unswapped.sum(1), rtol=0, atol=1e-3)


def test_rows_with_different_given_corners_decode_as_they_train():
    """Out-painting: each row knows another part."""
    model = randomise(nar(2, 3))
    x = torch.randint(VOCAB, (3, 6), generator=torch.Generator().manual_seed(0))
    known = torch.tensor([[1, 0, 0, 0, 0, 0], [1, 1, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0]]).bool()
    label = {"class": torch.arange(3)}
    with torch.no_grad():
        packed = model.log_prob(model.canvas({"token": x}, known), label)
    for cached in (True, False):
        forced = Forced(x)
        canvas = model.canvas({"token": torch.where(known, x, 0)}, known)
        generate(Target(model, label, cached=cached), canvas, SampleAll(), random=forced)
        assert torch.equal(canvas.value["token"], x)
        assert torch.allclose(forced.log_prob, packed, rtol=0, atol=1e-9)


def test_the_cache_grows_by_one_diagonal_a_step_and_never_holds_the_last():
    model = nar(3, 3)
    plan = model.factorization.packed(model.canvas({"token": torch.zeros(1, 9, dtype=torch.long)}))
    # slots 0 | (0,0) | 2 | 3 | 2: the last corner is never fed; each step computes one diagonal over all before it
    assert plan.cost() == Cost(forwards=5, slots=9, pairs=1 + 2 + 2 * 4 + 3 * 7 + 2 * 9, peak_cache=9, kept=7)
