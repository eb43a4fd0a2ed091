"""Groups of elements one after another, each read at one slot that carries the group before it.

Next-token prediction with a group in the place of a token: as many slots as groups (Token-Shuffle, Ma et al. 2025).
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from seriatim.canvas import Canvas
from seriatim.factorization.base import Factorization
from seriatim.layout import Layout
from seriatim.plan import LEARNED, VALUE, OrderError, Plan, Reads, Slots
from seriatim.random import Random
from seriatim.view import inclusive


class NextGroup(Factorization):
    """group: that of each element, from 0 in the order of decision, all equally large. `prefix` learned slots stand in
    front (a class, the words of a prompt); behind them a slot for each group but the last. The last learned slot reads
    the elements of group 0 by their place in it (role), independently, the slot that carries group w those of w + 1."""

    def __init__(self, group: Int[Tensor, "E"], prefix: int = 1):
        if prefix < 1:
            raise ValueError(f"the first group is read at a learned slot, so there is at least 1; got {prefix}")
        sizes = group.bincount()
        if not bool((sizes == sizes[0]).all()):
            raise ValueError(f"groups are equally large here, and these have {sizes.unique().tolist()} elements")
        self.group, self.prefix = group, prefix
        self.members = group.argsort(stable=True).view(len(sizes), -1)  # (groups, elements of each)

    def order(self, layout: Layout, random: Random | None = None) -> Int[Tensor, "1 E"]:
        if layout.size != len(self.group):
            raise OrderError(f"this order groups {len(self.group)} elements, and the layout has {layout.size}")
        return self.group[None]

    def packed(self, canvas: Canvas) -> Plan:
        rank, (groups, size) = canvas.rank, self.members.shape
        carried = torch.cat([torch.full((self.prefix, size), -1), self.members[:-1]])
        needs = torch.where(carried >= 0, rank[:, carried.clamp(min=0)], -1).amax(2)
        place, element = torch.arange(groups + self.prefix - 1), self.members.flatten()
        source = torch.where(place < self.prefix, LEARNED, VALUE)
        slots = Slots(carried[None], source[None], place[None, :, None], needs)
        read = torch.where(rank[:, element] >= 0, element, -1)
        reads = Reads(
            place[self.prefix - 1 :].repeat_interleave(size)[None], read, torch.arange(size).repeat(groups)[None]
        )
        return Plan(slots, {"all": inclusive(place)}, reads, rank, layout=canvas.layout)
