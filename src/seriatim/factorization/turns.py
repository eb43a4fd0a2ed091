"""The decoding steps of a packed plan, whatever stands in the cache: from the start, in the middle, or once more."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from seriatim.plan import OrderError, Plan
from seriatim.slots import Reads, gather, ragged
from seriatim.view import INF


class Turns:
    """The steps of a static order by the rank they decide, compiled once.

    What a step has to compute depends on what is cached: what the earlier steps left there (the usual case), nothing
    (a cache that is switched off, a half-finished sample that is taken up again), or what this very step left there
    (it is repeated: denoising in place).
    """

    def __init__(self, packed: Plan):
        self.packed = packed
        self.step = packed.step.masked_fill(~packed.used(), INF)
        self.turns: dict[int, Plan] = {}
        self.before: dict[int, Tensor] = {}  # entries in the cache before each step, one number a row
        self.during: dict[int, Tensor] = {}  # the slots there when those of the step are, and nothing is dropped yet
        self._memo: dict[tuple[bool, int], Plan] = {}
        cached = torch.full((self.step.shape[0], 0), -1)
        for turn in packed.steps():
            assert turn.decides is not None and turn.kept is not None
            rank = turn.decides
            self.turns[rank], self.before[rank] = turn, _count(cached)
            cached = torch.cat([cached, gather(ragged(self.step == rank), turn.kept)], 1)
            cached = self.during[rank] = gather(cached, ragged(cached >= 0))
            cached = cached if turn.retain is None else gather(cached, turn.retain)

    def at(self, rank: int, cached: int | Int[Tensor, "b"]) -> Plan:
        """The forward that decides `rank` when `cached` slots (one number, or one a row) are remembered."""
        if rank not in self.turns:
            raise OrderError(f"elements of rank {rank} are undecided, but nothing reads them in this order")
        held = torch.as_tensor(cached).reshape(-1)
        if _equal(held, self.before[rank]):
            return self.turns[rank]
        empty = not bool(held.any())
        if not empty and not _equal(held, _count(self.during[rank])):
            raise OrderError(
                f"{held.tolist()} slots are cached, but the step that decides rank {rank} follows "
                f"{self.before[rank].tolist()}; keep what the plan says, or start with an empty cache"
            )
        if (empty, rank) not in self._memo:
            self._memo[empty, rank] = self._afresh(rank) if empty else self._again(rank)
        return self._memo[empty, rank]

    def _afresh(self, rank: int) -> Plan:
        """This step and all that it looks at, from an empty cache."""
        index = ragged(self.step <= rank)
        plan = self.packed.take(index)
        element = plan.reads.element
        due = plan.rank.expand(element.shape[0], -1).gather(1, element.clamp(min=0)) == rank
        pick = ragged(due & (element >= 0) & (plan.reads.slot >= 0))
        role = None if plan.reads.role is None else gather(plan.reads.role, pick)
        reads = Reads(gather(plan.reads.slot, pick), gather(element, pick), role)
        size, kept = self.packed.size, self.during[rank]
        place = torch.full((index.shape[0], size + 1), -1)  # of each slot among these; the last is for padding
        place = place.scatter(1, torch.where(index < 0, size, index), torch.arange(index.shape[1]).expand_as(index))
        place[:, size] = -1
        kept = place.gather(1, torch.where(kept < 0, size, kept))
        return replace(plan, reads=reads, kept=kept, retain=self.turns[rank].retain, decides=rank)

    def _again(self, rank: int) -> Plan:
        """This step once more: without the slots that it has left in the cache. What the step drops is dropped when it
        is done."""
        turn = self.turns[rank]
        assert turn.kept is not None
        stays: Bool[Tensor, "b s"] = torch.zeros(turn.kept.shape[0], turn.size + 1, dtype=torch.bool)
        stays = stays.scatter(1, torch.where(turn.kept < 0, turn.size, turn.kept), True)[:, :-1]
        if bool(stays.gather(1, turn.reads.slot.clamp(min=0)).logical_and(turn.reads.slot >= 0).any()):
            raise OrderError(f"the step that decides rank {rank} reads slots that it caches, and cannot be repeated")
        index = ragged(~stays)
        return replace(turn.take(index), kept=index[:, :0], retain=turn.retain, decides=rank)


def _count(cached: Int[Tensor, "b m"]) -> Int[Tensor, "b"]:
    return (cached >= 0).sum(1)


def _equal(held: Int[Tensor, "b"], expected: Int[Tensor, "b"]) -> bool:
    """One number stands for all rows; branches of a guided batch repeat its rows."""
    rows = min(len(held), len(expected))
    return bool((held.view(-1, rows) == expected.view(-1, rows)).all())
