"""Approximate caches: which slots of an exact plan are not computed again but read as they once were.

An order in which everybody sees everybody (masked generation) has no exact cache: every forward computes everything.
A `CachePolicy` drops slots from that plan and lets the others see their old entries; this changes the law that is
sampled, so it is part of the `Target`. At its neutral setting a policy drops nothing and the target is exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from seriatim.plan import OrderError, Plan
from seriatim.slots import MASK, VALUE, Slots, gather, ragged
from seriatim.view import INF


class CachePolicy(Protocol):
    """What is not computed again. A value: what was computed, and from what, is remembered for it by `Memory`."""

    def frozen(self, plan: Plan, past: Int[Tensor, "b s"], rank: Int[Tensor, "b s"]) -> Bool[Tensor, "b s"]:
        """The slots of the exact plan that are to be read from memory, of those that stand there.

        `past` says from which source (VALUE, MASK, ...) the newest entry of each slot was computed; -1: there is none;
        `rank`: the rank on the canvas of the element that each carries, equal ones are a block (-1: given).
        """
        ...


@dataclass(frozen=True)
class FreeCache:
    """Keep the entries of blocks once all of a block is decided, and never compute them again (FlashDLM, 2025).

    Blocks are counted from the first element; a prompt is kept in whole blocks. As published, entries are kept as the
    block's last forward left them: what that forward decided is remembered as masks. With `rewrite` the block is
    computed once more, in the first forward of the next block: exact where a block sees no later ones. Neutral: a block
    as long as the sample.
    """

    block: int
    rewrite: bool = False

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ValueError(f"a block has at least 1 element, got {self.block}")

    def frozen(self, plan: Plan, past: Int[Tensor, "b s"], rank: Int[Tensor, "b s"]) -> Bool[Tensor, "b s"]:
        done = (plan.slots.source == VALUE) & (past == VALUE if self.rewrite else past >= 0)
        finished = done.long().cumprod(1).sum(1, keepdim=True) // self.block * self.block
        return torch.arange(plan.size) < finished


@dataclass(frozen=True)
class OutsideBlock:
    """Compute only the block at work, from its second step on: what lies before it stays as it was at the block's first
    step, which computes everything (Fast-dLLM, Wu et al. 2025, arXiv 2505.22618: its prefix cache; with `behind`, its
    dual cache: what lies behind the block stays, too).

    Blocks are those of the canvas, elements of equal rank. Neutral: one block as long as the sample, without a prompt.
    """

    behind: bool = False

    def frozen(self, plan: Plan, past: Int[Tensor, "b s"], rank: Int[Tensor, "b s"]) -> Bool[Tensor, "b s"]:
        source, place = plan.slots.source, torch.arange(plan.size)
        now = torch.where(source == MASK, rank, INF).amin(1, keepdim=True)
        work = rank == now
        going_on = (work & (source == VALUE) & (past == MASK)).any(1, keepdim=True)  # a step decided some of it
        before = place < torch.where(work, place, INF).amin(1, keepdim=True)
        if self.behind:
            before = before | (place > torch.where(work, place, -1).amax(1, keepdim=True))
        return going_on & before


@dataclass(frozen=True)
class InsideBlock:
    """In a model of blocks, compute only the part of a block at work, from the step on in which the part's first
    element is known: what stands outside it stays as it was at the block's last whole step (Fast-dLLM v2, Wu et al.
    2025, arXiv 2509.26328: its sub-block cache). Finished blocks are computed once more, whole, and then kept: exact.

    block: the model's; part: how many elements of it are decided before the next ones. Neutral: a part as long as a
    block.
    """

    block: int
    part: int

    def __post_init__(self) -> None:
        check_part(self.block, self.part)

    def frozen(self, plan: Plan, past: Int[Tensor, "b s"], rank: Int[Tensor, "b s"]) -> Bool[Tensor, "b s"]:
        source, e = plan.slots.source, torch.arange(plan.size)
        done = (source == VALUE) & (past == VALUE)
        finished = done.long().cumprod(1).sum(1, keepdim=True) // self.block * self.block
        first = torch.where(source == MASK, e, plan.size).amin(1, keepdim=True)  # of the part at work
        going_on = first % self.part > 0  # the first element of a part is read outside it, where outputs are shifted
        inside = (e // self.block == first // self.block) & (e // self.part != first // self.part)
        return (e < finished) | (inside & going_on)


def check_part(block: int, part: int) -> None:
    """Refuse parts that do not fill a block."""
    if not 1 <= part <= block or block % part:
        raise ValueError(f"parts fill a block of {block} elements: {block} is no multiple of {part}")


class Change(NamedTuple):
    """What a step does to the cache before its forward: pending entries to commit, with their labels as they are now,
    and committed columns to retain (None: all); and the plan that is left to compute."""

    keep: Int[Tensor, "b k"]
    labels: Plan | None
    retain: Int[Tensor, "b m"] | None
    live: Plan


class Memory:
    """Which element each entry of the cache stands for, and what it was computed from; one for each canvas."""

    def __init__(self, policy: CachePolicy):
        self.policy = policy
        self.element = torch.zeros(1, 0, dtype=torch.long)  # of each committed column; -1 behind shorter rows
        self.source = torch.zeros(1, 0, dtype=torch.long)
        self.pending: Slots | None = None  # what was computed last and stands behind the committed columns

    def next(self, plan: Plan, rank: Int[Tensor, "b E"]) -> Change:
        """What to keep of the last forward, now that it is known what it decided, and what to compute of the exact
        `plan`, given the ranks of the canvas. Whoever runs it says so by `pending`."""
        now, size, held = _elements(plan), plan.rank.shape[1], self.element.shape[1]
        element, source = self.element, self.source
        if self.pending is not None:
            element, source = _beside(element, self.pending.element[..., 0]), _beside(source, self.pending.source)
        columns = torch.arange(element.shape[1]).expand_as(element)
        newest = torch.full((len(element), size + 1), -1)  # column of each element; the last is for padding
        newest = newest.scatter_reduce(1, torch.where(element < 0, size, element), columns, "amax")[:, now]
        frozen = self.policy.frozen(plan, gather(source, newest), rank[:, now]) & (newest >= 0) & ~_read(plan)
        stay = torch.zeros(len(frozen), element.shape[1] + 1, dtype=torch.bool)
        stay = stay.scatter(1, torch.where(frozen, newest, element.shape[1]).expand(len(frozen), -1), True)[:, :-1]
        live = plan if not bool(frozen.any()) else plan.take(_shared(ragged(~frozen)))
        present = (element[:, :held] >= 0).expand(len(stay), -1)
        if not bool(stay[:, held:].any()) and torch.equal(stay[:, :held], present):  # nothing comes and nothing goes
            nothing, self.pending = torch.zeros(1, 0, dtype=torch.long), None
            return Change(nothing, plan, None, live)
        keep = ragged(stay[:, held:])
        order = ragged(torch.cat([present, stay[:, held:]], 1))  # as the cache will stand after the commit
        wanted = gather(stay, order) & (order >= 0)
        retain = None if torch.equal(wanted, order >= 0) else ragged(wanted)
        order = order if retain is None else gather(order, retain)
        labels = None
        if self.pending is not None:
            place = torch.full((size + 1,), -1).scatter(0, now, torch.arange(len(now)))
            labels = plan.take(place[self.pending.element[..., 0]])
        self.element, self.source, self.pending = gather(element, order), gather(source, order), None
        return Change(_shared(keep), labels, retain, live)

    def select(self, rows: Int[Tensor, "b2"]) -> None:
        """Follow the canvas. What is pending is forgotten."""
        if bool((rows < 0).any()):
            raise ValueError("rows cannot be admitted to a target with a cache policy: their past is not remembered")
        self.element, self.source = (x if len(x) == 1 else x[rows] for x in (self.element, self.source))
        self.pending = None


def _shared(index: Int[Tensor, "b m"]) -> Int[Tensor, "b m"]:
    """One row where all are the same: it is cheaper."""
    return index[:1] if bool((index == index[:1]).all()) else index


def _beside(a: Int[Tensor, "b n"], b: Int[Tensor, "b m"]) -> Int[Tensor, "b n+m"]:
    rows = max(len(a), len(b))
    return torch.cat([a.expand(rows, -1), b.expand(rows, -1)], 1)


def _read(plan: Plan) -> Bool[Tensor, "b s"]:
    """Slots that hold a value, and that another element is read at (a shifted order): they are computed anew."""
    slot = plan.reads.slot
    out = torch.zeros(len(slot), plan.size + 1, dtype=torch.bool)
    return out.scatter(1, torch.where(slot >= 0, slot, plan.size), True)[:, :-1] & (plan.slots.source == VALUE)


def _elements(plan: Plan) -> Int[Tensor, "s"]:
    """The element of each slot of an exact plan."""
    element = plan.slots.element
    if element.shape[0] == 1 and element.shape[2] == 1 and bool((element >= 0).all()) and plan.layers is None:
        first = element[0, :, 0]
        if bool((first[1:] > first[:-1]).all()) or first.unique().numel() == first.numel():
            return first
    raise OrderError(
        "a cache policy needs an order that computes one slot for each element, the same in all rows, such as "
        "AnyOrder or Blocks(inside='any')"
    )
