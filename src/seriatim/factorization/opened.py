"""Groups of a line one after another, behind a first group that is decided element by element.

DetailFlow (Liu et al. 2025, arXiv 2505.21473): the elements of a group are decided independently of each other, which
costs most where everything is still open; so the first group is plain next-token prediction, and each later one takes a
single step.
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


def opened_turns(count: int, group: int) -> Int[Tensor, "count"]:
    """The turn of each of `count` elements: 0, 1, ... in the first group, then one for each group. Raises ValueError
    where groups are not whole."""
    if group < 1 or count < 1 or count % group:
        raise ValueError(f"{count} elements cannot be cut into whole groups of {group}")
    place = torch.arange(count)
    return torch.where(place < group, place, group + place // group - 1)


class OpenedGroups(Factorization):
    """As many slots as elements, and slot i reads element i. Slot 0 is learned (a class) and those up to `group` carry
    the element before, as along a line. The second group is read there and at `group` - 1 learned slots; each later one
    at the slots that carry the group before it. A slot's coordinates are group and place of what it reads; line: its
    number, alone."""

    def __init__(self, count: int, group: int, line: bool = False):
        self.turn, self.group, self.line = opened_turns(count, group), group, line

    def order(self, layout: Layout, random: Random | None = None) -> Int[Tensor, "1 E"]:
        if layout.size != len(self.turn):
            raise OrderError(f"this order is of {len(self.turn)} elements, and the layout has {layout.size}")
        return self.turn[None]

    def packed(self, canvas: Canvas) -> Plan:
        rank, g = canvas.rank, self.group
        place = torch.arange(len(self.turn))
        carried = torch.where(place <= g, place - 1, torch.where(place < 2 * g, -1, place - g))
        needs = torch.where(carried >= 0, rank[:, carried.clamp(min=0)], -1)
        source = torch.where(carried >= 0, VALUE, LEARNED)
        coord = place[:, None] if self.line else torch.stack([place // g, place % g], 1)
        slots = Slots(carried[None, :, None], source[None], coord[None], needs)
        reads = Reads(place[None], torch.where(rank >= 0, place, -1))
        return Plan(slots, {"all": inclusive(self.turn)}, reads, rank, layout=canvas.layout)
