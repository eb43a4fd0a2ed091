"""Orders that no system has, for tests of those that might."""

from __future__ import annotations

import torch

from seriatim.canvas import Canvas
from seriatim.factorization.base import Factorization
from seriatim.plan import MASK, VALUE, Plan, Reads, Slots
from seriatim.view import two_stream


class AnyRank(Factorization):
    """Two streams in whatever order the canvas says, another one in each row: queries, then values."""

    def packed(self, canvas: Canvas) -> Plan:
        n, rank = canvas.layout.size, canvas.rank
        e = torch.arange(n)
        query = (torch.arange(2 * n) < n)[None]
        needs = torch.cat([torch.full_like(rank, -1), rank], 1)
        source = torch.where(query, MASK, VALUE)
        coord = canvas.layout.coord.repeat(2, 1)[None]
        slots = Slots(torch.cat([e, e])[None, :, None], source, coord, needs)
        view = two_stream(torch.cat([rank, rank], 1), query.expand(len(rank), -1))
        read = torch.where(rank >= 0, e, -1)
        return Plan(slots, {"all": view}, Reads(torch.where(read >= 0, e, -1), read), rank, layout=canvas.layout)
