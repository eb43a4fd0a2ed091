"""A coarse id of every place one after another, then the fine parts of all of them at once (CTF, Guo et al. 2025).

Two orders over one grid and two stacks of layers: the first reads coarse ids as text is written, the second sees the
whole coarse map and no fine part.
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from seriatim.canvas import Canvas
from seriatim.factorization.base import Factorization
from seriatim.layout import Layout
from seriatim.plan import LEARNED, VALUE, Plan, Reads, Slots
from seriatim.random import Random
from seriatim.view import View, inclusive

COARSE, FINE = 0, 1  # roles


class CoarseThenFine(Factorization):
    """Elements 0 to n - 1 are coarse, n to 2n - 1 the fine parts of the same places.

    Of `coarse` + `fine` layers the first ones compute the slots of the line (slot 0 holds the class), the others those
    of the map: slot n + e carries coarse element e and reads its fine part. The two see nothing of each other.
    """

    def __init__(self, coarse: int, fine: int):
        self.depths = coarse, fine

    def order(self, layout: Layout, random: Random | None = None) -> Int[Tensor, "1 E"]:
        return torch.arange(layout.size).clamp(max=layout.size // 2)[None]

    def packed(self, canvas: Canvas) -> Plan:
        return self.part(canvas, (COARSE, FINE))

    def part(self, canvas: Canvas, stages: tuple[int, ...]) -> Plan:
        """Teacher forcing of some of the stages: each is a forward of its own in training, through its own layers."""
        n, rank = canvas.layout.size // 2, canvas.rank
        element = torch.cat([torch.arange(-1, n - 1), torch.arange(n)])
        stage = torch.arange(2 * n) // n
        mine = torch.isin(stage, torch.tensor(stages)).nonzero()[:, 0]
        element, stage = element[mine], stage[mine]
        needs = torch.where(element >= 0, rank[:, element.clamp(min=0)], -1)
        source = torch.where(element >= 0, VALUE, LEARNED)
        slots = Slots(element[None, :, None], source[None], mine[None, :, None], needs)
        clock = inclusive(mine.clamp(max=n))
        view = View(clock.at, clock.born, clock.dies, lane=stage[None])
        layers = torch.arange(sum(self.depths)) >= self.depths[COARSE]
        read = torch.where(rank[:, mine] >= 0, mine, -1)
        reads = Reads(torch.arange(len(mine))[None], read, stage[None])
        return Plan(slots, {"all": view}, reads, rank, layers=layers[:, None].long() == stage, layout=canvas.layout)
