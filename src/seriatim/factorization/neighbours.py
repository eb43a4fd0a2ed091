"""Elements of a grid by their distance from the first corner, each from the neighbours before it (NAR, He et al. 2025).

A step decides one anti-diagonal: rows + columns - 1 steps instead of rows times columns. An element is read out at the
neighbours before it, one along each axis, each by a head of its own direction; their logits are averaged.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from seriatim.canvas import Canvas
from seriatim.factorization.base import Factorization
from seriatim.layout import Layout
from seriatim.plan import LEARNED, VALUE, Plan, Reads, Slots
from seriatim.random import Random
from seriatim.view import inclusive


class Neighbours(Factorization):
    """Any number of axes, elements in raster order. Slot 0 holds the class and stands before the corner on every axis;
    slot 1 + e carries element e; role a reads the next element along axis a. An axis of length 1 has no neighbours, and
    so no reader. A slot sees its own anti-diagonal and all before it."""

    def order(self, layout: Layout, random: Random | None = None) -> Int[Tensor, "1 E"]:
        return layout.coord.sum(1)[None]

    def packed(self, canvas: Canvas) -> Plan:
        coord, rank, size = canvas.layout.coord, canvas.rank, canvas.layout.size
        slot, element, role = readers(coord)
        read = torch.where(rank[:, element] >= 0, element[None], -1)
        source = torch.full((1, size + 1), VALUE)
        source[0, 0] = LEARNED
        slots = Slots(
            torch.arange(-1, size)[None, :, None],
            source,
            torch.cat([0 * coord[:1], coord])[None],
            F.pad(rank, (1, 0), value=-1),
        )
        view = inclusive(F.pad(coord.sum(1), (1, 0), value=-1))
        return Plan(slots, {"all": view}, Reads(slot[None], read, role[None]), rank, layout=canvas.layout)


def readers(coord: Int[Tensor, "E axes"]) -> tuple[Int[Tensor, "m"], Int[Tensor, "m"], Int[Tensor, "m"]]:
    """(slot, element, role) of every read-out: the first element once for each axis, at slot 0; every other one at each
    neighbour before it."""
    shape = coord.amax(0) + 1
    stride = shape.flip(0).cumprod(0).flip(0) // shape
    axes = [a for a in range(len(shape)) if int(shape[a]) > 1] or [0]
    parts = []
    for a in axes:
        element = (coord[:, a] > 0).nonzero()[:, 0]
        first = torch.zeros(1, dtype=torch.long)
        slot = torch.cat([first, 1 + element - stride[a]])
        parts.append(torch.stack([slot, torch.cat([first, element]), torch.full_like(slot, a)]))
    slot, element, role = torch.cat(parts, 1)
    return slot, element, role
