"""Groups of any elements one after another, all of a group at once: cells of a grid, frames, a subsample.

The parts of a group need not stand side by side. What is generated stands in one slot as noise (or a mask), which is
read, and in another as its value, which later groups see.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from seriatim.canvas import Canvas
from seriatim.factorization.static import Blocks
from seriatim.layout import Layout
from seriatim.plan import NOISE, VALUE, Plan, Reads, Slots
from seriatim.random import Random
from seriatim.view import inclusive


class Groups(Blocks):
    """`Blocks` of any elements. group: that of each element, from 0 in the order of decision, of layouts of this size;
    None: elements with the same first coordinate (frames), of layouts of any size.

    Of values that are denoised (source `NOISE`) there is no likelihood: `likelihood` is "none".
    """

    def __init__(self, group: Int[Tensor, "E"] | None = None, source: int = NOISE):
        super().__init__(1, "parallel", source)
        if group is not None:
            known = group.unique()
            if group.dim() != 1 or not torch.equal(known, torch.arange(len(known))):
                raise ValueError(f"groups are numbered from 0 without holes, one number an element, got {group}")
        self.group = group
        self.likelihood: Literal["exact", "bound", "none"] = "none" if source == NOISE else "exact"

    def of(self, layout: Layout) -> Int[Tensor, "E"]:
        """The group of each element."""
        if self.group is None:
            return layout.coord[:, 0]
        if len(self.group) != layout.size:
            raise ValueError(f"this order groups {len(self.group)} elements, and the layout has {layout.size}")
        return self.group

    def order(self, layout: Layout, random: Random | None = None) -> Int[Tensor, "1 E"]:
        return self.of(layout)[None]

    def block(self, canvas: Canvas) -> Int[Tensor, "1 E"]:
        return self.of(canvas.layout)[None]

    def noisy(self, canvas: Canvas) -> Plan:
        """One stream of noise: each group sees itself and what stands in earlier ones, noisy as it is (noisy context
        learning, xAR; diffusion forcing). Where their noise is all gone, what is read is what decoding reads.

        Given elements are context as they are, and are not read."""
        layout, rank = canvas.layout, canvas.rank
        e = torch.arange(layout.size)[None]
        hidden = rank >= 0
        source = torch.where(hidden, self.source, VALUE)
        slots = Slots(e[..., None], source, layout.coord[None], torch.where(hidden, -1, rank))
        read = torch.where(hidden, e, -1)
        return Plan(slots, {"all": inclusive(self.block(canvas))}, Reads(read, read), rank, layout=layout)
