"""Blocks of any lengths, one after another: which elements are a block stands on the canvas, in each row its own."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from seriatim.canvas import Canvas
from seriatim.decoding.guess import Guess
from seriatim.factorization.static import Blocks, shared_rows
from seriatim.plan import MASK, OrderError, Plan


class VaryingBlocks(Blocks):
    """`Blocks(inside="any")` whose lengths are data: along the line, elements of equal rank on the canvas are a block.

    What is given in front (a prompt) stands in blocks of `size`, and the first block behind it completes the last of
    them; what is given further on belongs to the block before it. Without ranks of its own a canvas has blocks of
    `size`. Rows may have blocks of other lengths, and be at work on different ones; an end may be set while what stands
    before it is decided (`canvas.Reorder`). Raises OrderError for ranks that fall along the line.
    """

    def __init__(self, size: int, source: int = MASK):
        super().__init__(size, "any", source)

    def block(self, canvas: Canvas) -> Int[Tensor, "#b E"]:
        rank = shared_rows(canvas.rank)
        highest = rank.cummax(1).values
        if bool(((rank >= 0) & (rank < highest)).any()):
            raise OrderError("blocks stand one after another, and ranks fall along the line here")
        prompt = (rank < 0).long().cumprod(1)
        begins = torch.diff(highest, dim=1, prepend=torch.full_like(rank[:, :1], -1)) > 0
        before = prompt.sum(1, keepdim=True) // self.size
        inside = torch.arange(rank.shape[1]) // self.size
        return torch.where(prompt.bool(), inside, before + begins.long().cumsum(1) - 1)

    def fill(self, canvas: Canvas, cached: int | Tensor, most: int, leave: int = 0) -> Plan | None:
        """Nothing: where blocks begin is told on the canvas."""
        return None

    def step(self, canvas: Canvas, guess: Guess | None, cached: int | Tensor) -> Plan | None:
        if canvas.done:
            return None
        if guess is not None:
            raise OrderError("blocks decided in any order verify no drafts")
        return self._ragged(canvas, cached)


def in_blocks(lengths: Int[Tensor, "b k"], size: int, start: int = 0) -> Int[Tensor, "b E"]:
    """Ranks of `size` elements in blocks of these lengths, counted from element `start` on; what stands before it is
    given. Raises ValueError for lengths below 1, or where they do not reach the end."""
    last = lengths.cumsum(1)
    if int(lengths.min()) < 1 or int(last[:, -1].min()) < size - start:
        raise ValueError(f"blocks hold at least 1 element, and {size - start} in all; got {lengths.tolist()}")
    place = (torch.arange(size) - start).expand(len(lengths), -1).contiguous()
    return torch.where(place < 0, -1, torch.searchsorted(last, place, right=True))
