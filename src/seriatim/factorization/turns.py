"""The decoding steps of a packed plan, whatever stands in the cache: from the start, in the middle, or once more."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from seriatim.plan import OrderError, Plan
from seriatim.reach import closure
from seriatim.slots import Reads, gather, ragged
from seriatim.view import INF


@dataclass(frozen=True, eq=False)
class Turn(Plan):
    """One forward of a static order."""

    order: Turns | None = field(default=None, repr=False)
    index: Int[Tensor, "b s"] | None = field(default=None, repr=False)  # its slots in the packed plan
    readers: Reads | None = field(default=None, repr=False)  # type: ignore[assignment]  # also of earlier steps

    @cached_property
    def fixed(self) -> Int[Tensor, "b m"]:  # type: ignore[override]
        """Slots that no noise of this step reaches: they stay as they are while it is repeated."""
        assert self.order is not None and self.index is not None and self.decides is not None
        return _places(self.order.during(self.decides), self.index, drop=True)


class Turns:
    """The steps of a static order by the rank they decide, compiled once.

    What a step has to compute depends on what is cached: what the earlier steps left there (the usual case), nothing
    (a cache that is switched off, a half-finished sample that is taken up again), or also what stays the same of this
    very step (it is repeated: denoising in place).
    """

    def __init__(self, packed: Plan):
        self.packed = packed
        self.step = packed.step.masked_fill(~packed.used(), INF)
        self.turns: dict[int, Turn] = {}
        self.before: dict[int, Tensor] = {}  # the slots that stand in the cache before each step, in order
        self.after: dict[int, Tensor] = {}
        self._during: dict[int, Tensor] = {}
        self._memo: dict[tuple[bool, int], Turn] = {}
        cached = torch.full((self.step.shape[0], 0), -1)
        for plan in packed.steps():
            assert plan.decides is not None and plan.kept is not None
            index = ragged(self.step == plan.decides)
            self.turns[plan.decides] = self._turn(plan, index, decides=plan.decides)
            self.before[plan.decides] = cached
            cached = torch.cat([cached, gather(index, plan.kept)], 1)
            cached = gather(cached, ragged(cached >= 0))
            cached = cached if plan.retain is None else gather(cached, plan.retain)
            self.after[plan.decides] = cached

    def at(self, rank: int, cached: int | Int[Tensor, "b"]) -> Plan:
        """The forward that decides `rank` when `cached` slots (one number, or one a row) are remembered."""
        if rank not in self.turns:
            raise OrderError(f"elements of rank {rank} are undecided, but nothing reads them in this order")
        held = torch.as_tensor(cached)
        if bool((held == _count(self.before[rank])).all()):
            return self.turns[rank]
        empty = not bool(held.any())
        if not empty and bool((held != _count(self.during(rank))).any()):
            raise OrderError(
                f"{held.tolist()} slots are cached, but the step that decides rank {rank} follows "
                f"{_count(self.before[rank]).tolist()}; keep what the plan says, or start with an empty cache"
            )
        if (empty, rank) not in self._memo:
            self._memo[empty, rank] = self._afresh(rank) if empty else self._again(rank)
        return self._memo[empty, rank]

    def during(self, rank: int) -> Int[Tensor, "b m"]:
        """The slots that stand in the cache while a step is repeated: what was there, and what its noise does not
        reach. That is: neither slots that it reads, nor that carry what is undecided, nor that see such slots."""
        if rank not in self._during:
            packed, due = self.packed, self.packed.rank.expand(self.packed.batch, -1)
            carried = packed.slots.element.expand(packed.batch, -1, -1)
            open_ = due.gather(1, carried.clamp(min=0).flatten(1)).view_as(carried) >= rank
            slot, element = (x.expand(packed.batch, -1) for x in (packed.reads.slot, packed.reads.element))
            now = (slot >= 0) & (element >= 0) & (due.gather(1, element.clamp(min=0)) >= rank)
            changes = torch.zeros(packed.batch, packed.size + 1, dtype=torch.long)
            changes = changes.scatter(1, torch.where(now, slot, packed.size), 1)[:, :-1].bool()
            changes = changes | (open_ & (carried >= 0)).any(2)
            still = (self.step == rank) & (closure(packed.seen(), changes.long()) == 0)
            held = torch.cat([self.before[rank].expand(len(still), -1), ragged(still)], 1)
            self._during[rank] = gather(held, ragged(held >= 0))
        return self._during[rank]

    def _turn(self, plan: Plan, index: Int[Tensor, "b s"], **changes: Any) -> Turn:
        """A plan of the slots `index` as a step of this order."""
        own = {f.name: getattr(plan, f.name) for f in fields(Plan)}
        return Turn(**{**own, **changes}, order=self, index=index)

    def _afresh(self, rank: int) -> Turn:
        """This step and all that it looks at, from an empty cache."""
        index = ragged(self.step <= rank)
        plan = self.packed.take(index)
        element = plan.reads.element
        due = plan.rank.expand(element.shape[0], -1).gather(1, element.clamp(min=0)) == rank
        pick = ragged(due & (element >= 0) & (plan.reads.slot >= 0))
        role = None if plan.reads.role is None else gather(plan.reads.role, pick)
        reads = Reads(gather(plan.reads.slot, pick), gather(element, pick), role)
        kept = _places(self.after[rank], index)
        return self._turn(plan, index, reads=reads, readers=plan.reads, kept=kept, decides=rank)

    def _again(self, rank: int) -> Turn:
        """This step once more: without what stays the same. When it is done, the cache is as after any such step."""
        before, after = self.during(rank), self.after[rank]
        changes = (self.step == rank) & ~_marks(before, self.packed.size)
        index = ragged(changes)
        kept = _places(after, index, drop=True)
        held = torch.cat([before, gather(index, kept)], 1)
        held = gather(held, ragged(held >= 0))
        return self._turn(self.packed.take(index), index, kept=kept, retain=_places(after, held), decides=rank)


def _count(slots: Int[Tensor, "b m"]) -> Int[Tensor, "b"]:
    return (slots >= 0).sum(1)


def _marks(slots: Int[Tensor, "b m"], size: int) -> Bool[Tensor, "b s"]:
    """Which of `size` slots are among these (-1: padding)."""
    marks = torch.zeros(len(slots), size + 1, dtype=torch.bool)
    return marks.scatter(1, torch.where(slots < 0, size, slots), True)[:, :-1]


def _places(slots: Int[Tensor, "b m"], among: Int[Tensor, "b n"], drop: bool = False) -> Int[Tensor, "b k"]:
    """Where each slot stands among others: -1 for padding and for what is not there, or (`drop`) only what is there."""
    rows = max(len(slots), len(among))
    slots, among = slots.expand(rows, -1), among.expand(rows, -1)
    size = max([int(x.max()) + 1 for x in (slots, among) if x.numel()], default=0)
    place = torch.full((rows, size + 1), -1)
    place = place.scatter(1, torch.where(among < 0, size, among), torch.arange(among.shape[1]).expand(rows, -1))
    place[:, size] = -1
    found = place.gather(1, torch.where(slots < 0, size, slots))
    return gather(found, ragged(found >= 0)) if drop else found
