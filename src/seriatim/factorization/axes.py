"""Raster order by two contexts: rows that are done, and what stands left in a row (Axial Transformer, Ho et al. 2019).

Elements are the values of (channel, row, column), channel by channel, each in raster order. Every value has a slot in
each of three stages: *earlier* holds the channels before it (where there are several), *upper* its own value, and
*inner*, where it is read, that of its left neighbour. Layers of the first two look along rows and columns, and what
they make of a slot is handed on: `told` to the same place, `down` to the place below. So an inner slot knows all
earlier channels, all rows above and all that stands left of it; and it follows that a row above is computed once.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from seriatim.canvas import DELETED, Canvas
from seriatim.decoding.guess import Guess
from seriatim.factorization.base import Factorization
from seriatim.factorization.turns import Turns
from seriatim.plan import DERIVED, VALUE, OrderError, Plan, Reads, Slots
from seriatim.view import INF, View, timed

EARLIER, UPPER, INNER = 0, 1, 2  # stages, the first coordinate of a slot
EARLIER_ROW, EARLIER_COLUMN, ROW, COLUMN, LEFT = "earlier row", "earlier column", "row", "column", "left"
TOLD, DOWN = "told", "down"  # not kinds of layers: what is handed on between them
Size = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class AxialPlan(Plan):
    """A forward over whole channels: the slots are those of each stage, one stage behind the other, and in it so many
    channels of so many rows and columns. Who sees whom follows from the place in this array, without masks."""

    grids: Size | None = None  # type: ignore[assignment]


class Axes(Factorization):
    """Channels one after another, each row by row, as the layout numbers them: coordinates are (channel, row, column).

    A channel is a forward of its own (`channel`): none of its slots sees a slot of another, what is known of earlier
    ones stands in it.
    """

    def size(self, canvas: Canvas) -> Size:
        """Channels, rows and columns."""
        channels, rows, columns = (canvas.layout.coord.amax(0) + 1).tolist()
        return channels, rows, columns

    def packed(self, canvas: Canvas) -> AxialPlan:
        return self.part(canvas, range(self.size(canvas)[0]))

    def channel(self, canvas: Canvas, number: int) -> AxialPlan:
        """Teacher forcing of one channel."""
        return self.part(canvas, range(number, number + 1))

    def part(self, canvas: Canvas, which: range) -> AxialPlan:
        """Teacher forcing of some channels."""
        channels, rows, columns = self.size(canvas)
        rank, n = canvas.rank, rows * columns
        if bool((rank == rank[:1]).all()):
            rank = rank[:1]
        place = torch.arange(which.start * n, which.stop * n)
        stages = (EARLIER, UPPER, INNER) if channels > 1 else (UPPER, INNER)
        stage = torch.tensor(stages).repeat_interleave(len(place))
        each = place.repeat(len(stages))
        channel, row, column = each // n, each % n // columns, each % columns
        left = torch.where(column > 0, each - 1, -1)
        element = torch.where(stage == UPPER, each, torch.where(stage == INNER, left, -1))
        before = torch.cat([torch.full((len(rank), 1), -1), rank.view(len(rank), channels, n).amax(2)], 1).cummax(1)
        needs = torch.where(stage == EARLIER, before.values[:, channel], -1)
        source = torch.where(element >= 0, VALUE, DERIVED)
        coord = torch.stack([stage, channel, row, column], 1)
        slots = Slots(element[None, :, None], source[None], coord[None], needs)
        inner = (stage == INNER).nonzero()[:, 0]
        read = torch.where(rank[:, place] >= 0, place, -1)
        views = views_of(coord, (channels, rows, columns))
        reads = Reads(inner[None], read)
        return AxialPlan(slots, views, reads, rank, layout=canvas.layout, grids=(len(which), rows, columns))

    def step(self, canvas: Canvas, guess: Guess | None, cached: int | Tensor) -> Plan | None:
        """The steps of a channel follow from that channel alone, where rows have the same elements given."""
        if guess is not None:
            raise OrderError(f"{type(self).__name__} cannot verify a guess; decode it without a proposer")
        if canvas.done:
            return None
        if not bool((canvas.rank == canvas.rank[:1]).all()):
            return super().step(canvas, None, cached)
        due = int(torch.where(canvas.known | (canvas.status == DELETED), INF, canvas.rank).min())
        number = int(canvas.layout.coord[int((canvas.rank[0] == due).long().argmax()), 0])
        return self._channels(canvas, number).at(due, cached)

    def _channels(self, canvas: Canvas, number: int) -> Turns:
        """The steps of a channel, checked and compiled once for each layout, order and set of given elements."""
        memo: OrderedDict[tuple, Turns] = self.__dict__.setdefault("_memo", OrderedDict())
        key = (canvas.layout, canvas.rank[:1].numpy().tobytes(), number)
        if key not in memo:
            plan, mine = self.channel(canvas, number), canvas.layout.coord[:, 0] == number
            memo[key] = Turns(plan.check(due=self.due(canvas)[:1] & mine))
            while len(memo) > 8:
                memo.popitem(last=False)
        memo.move_to_end(key)
        return memo[key]


def views_of(coord: Int[Tensor, "s 4"], size: Size) -> dict[str, View]:
    """Who sees whom along each axis, and who is handed what. coord: stage, channel, row and column of each slot."""
    channels, rows, columns = size
    stage, channel, row, column = coord.unbind(1)
    along_row, along_column = channel * rows + row, channel * columns + column
    place = along_row * columns + column
    still, later = torch.zeros_like(stage), torch.full_like(stage, INF)

    def within(lane: Tensor, *stages: int) -> Tensor:
        return torch.where(torch.isin(stage, torch.tensor(stages)), lane, -1)

    views = {
        ROW: timed(still, lane=within(along_row, UPPER)),
        COLUMN: timed(row, lane=within(along_column, UPPER)),
        LEFT: timed(column, lane=within(along_row, INNER)),
        DOWN: timed(still, torch.where(stage == UPPER, 0, later), lane=within(
            place + torch.where(stage == UPPER, columns, 0) + channel * columns, UPPER, INNER)),
    }  # fmt: skip
    if channels > 1:
        views |= {
            EARLIER_ROW: timed(still, lane=within(along_row, EARLIER)),
            EARLIER_COLUMN: timed(still, lane=within(along_column, EARLIER)),
            TOLD: timed(still, torch.where(stage == EARLIER, 0, later), lane=place),
        }
    return views
