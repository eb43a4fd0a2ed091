"""What stands in the slots of `factorization.axes`: values with their row and column, and the channels before."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from seriatim.canvas import Canvas
from seriatim.decoding.guess import Guess
from seriatim.factorization.axes import EARLIER
from seriatim.initial import drawn
from seriatim.plan import VALUE, Plan


class AxialEmbed(nn.Module):
    """Ids through a table, plus vectors of row and column; zeros in place of a value where a slot carries none.

    Where there are several channels, a slot of the first stage holds what a convolution of 3 x 3 says of the channels
    before its own, as shares of the highest id (the others zero), and of which channel that is, plus places of its own.
    A condition's vector is added to the slots of the first stage that there is.
    """

    kind = "token"

    def __init__(self, vocab: int, width: int, channels: int, rows: int, columns: int, std: float):
        super().__init__()
        self.vocab, self.width, self.channels = vocab, width, channels
        self.table = nn.Parameter(drawn(vocab, width, std=std))
        self.row, self.column = (nn.Parameter(drawn(n, width, std=std)) for n in (rows, columns))
        self.earlier = nn.Conv2d(2 * channels, width, 3, padding=1) if channels > 1 else None
        places = (rows, columns) if channels > 1 else ()
        self.earlier_places = nn.ParameterList(nn.Parameter(drawn(n, width, std=std)) for n in places)

    def forward(
        self, canvas: Canvas, plan: Plan, guess: Guess | None = None, prefix: Tensor | None = None
    ) -> Float[Tensor, "b s d"]:
        """`prefix` (b, 1, d): the condition."""
        if guess is not None:
            raise ValueError("slots of rows and columns hold no drafts")
        device = self.table.device
        stage = plan.slots.coord[..., 0].to(device)
        _, channel, row, column = plan.slots.coord.clamp(min=0).to(device).unbind(2)  # padding stands nowhere
        element = plan.slots.element[..., 0].expand(canvas.batch, -1)
        value = canvas.value[self.kind].gather(1, element.clamp(min=0).to(canvas.value[self.kind].device))
        there = (plan.slots.source == VALUE).to(device)[..., None]
        x = F.embedding(value.to(device), self.table) * there
        x = x + F.embedding(row, self.row) + F.embedding(column, self.column)
        if self.earlier is None:
            return x if prefix is None else x + prefix
        first = stage == EARLIER
        if bool(first.any()):
            told = self._earlier(canvas, channel, row, column)
            x = torch.where(first[..., None], told if prefix is None else told + prefix, x)
        return x

    def _earlier(self, canvas: Canvas, channel: Tensor, row: Tensor, column: Tensor) -> Float[Tensor, "b s d"]:
        """What a slot of each place would hold that is told the channels before."""
        assert self.earlier is not None
        rows, columns = self.row.shape[0], self.column.shape[0]
        maps = canvas.value[self.kind].view(canvas.batch, self.channels, rows, columns)
        maps = maps.to(self.table) / (self.vocab - 1)
        flat = self.table.new_zeros(canvas.batch, self.channels, rows * columns, self.width)
        for c in channel.unique().tolist():
            which = torch.arange(self.channels, device=maps.device)[:, None, None]
            said = torch.cat([maps * (which < c), (which == c).to(maps).expand_as(maps)], 1)
            flat[:, c] = self.earlier(said).flatten(2).mT.to(flat.dtype)
        at = ((channel * rows + row) * columns + column).expand(canvas.batch, -1)
        told = flat.flatten(1, 2).gather(1, at[..., None].expand(-1, -1, self.width))
        return told + F.embedding(row, self.earlier_places[0]) + F.embedding(column, self.earlier_places[1])


__all__ = ["AxialEmbed"]
