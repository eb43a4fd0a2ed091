"""Blocks of any lengths, one after another: which elements are a block stands on the canvas, in each row its own."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from seriatim.canvas import Canvas
from seriatim.decoding.guess import Guess
from seriatim.factorization.static import Blocks
from seriatim.plan import MASK, VALUE, OrderError, Plan, Reads, Slots
from seriatim.view import INF, inclusive


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
        rank = _shared(canvas.rank)
        highest = rank.cummax(1).values
        if bool(((rank >= 0) & (rank < highest)).any()):
            raise OrderError("blocks stand one after another, and ranks fall along the line here")
        prompt = (rank < 0).long().cumprod(1)
        begins = torch.diff(highest, dim=1, prepend=torch.full_like(rank[:, :1], -1)) > 0
        before = prompt.sum(1, keepdim=True) // self.size
        inside = torch.arange(rank.shape[1]) // self.size
        return torch.where(prompt.bool(), inside, before + begins.long().cumsum(1) - 1)

    def step(self, canvas: Canvas, guess: Guess | None, cached: int | Tensor) -> Plan | None:
        if canvas.done:
            return None
        if guess is not None:
            raise OrderError("blocks decided in any order verify no drafts")
        layout, unknown, block = canvas.layout, canvas.open, self.block(canvas).expand(canvas.batch, -1)
        held = torch.as_tensor(cached).reshape(-1, 1).expand(canvas.batch, 1)
        now = torch.where(unknown, block, INF).amin(1, keepdim=True)
        at_work = now < INF
        first = torch.where(at_work, (block < now).sum(1, keepdim=True), held)
        end = torch.where(at_work, (block <= now).sum(1, keepdim=True), held)
        if bool((held > first).any()):
            raise OrderError(
                "an element of a finished block is unknown again, but the cache holds it: blocks that are finished "
                "stay so (remask within the block at work, or decode without a cache)"
            )
        slot = torch.arange(int((end - held).max()))[None]
        element = torch.where(held + slot < end, held + slot, -1)
        open_ = unknown.gather(1, element.clamp(min=0)) & (element >= 0)
        start = int(torch.where(open_, slot, INF).amin())  # no row reads before it
        read = torch.where(open_, element, -1)[:, start:]
        source, at = torch.where(open_, self.source, VALUE), torch.where(open_, slot, -1)[:, start:]
        kept = torch.where(slot < first - held, slot, -1)[:, : int((first - held).max())]
        element, kept = _shared(element), _shared(kept)
        view = inclusive(_shared(block.gather(1, element.clamp(min=0).expand(canvas.batch, -1))))
        if bool((element < 0).any()):
            view = view.narrow(lane=torch.where(element < 0, -1, 0))
        slots = Slots(element[..., None], source, layout.coord[element.clamp(min=0)], torch.full_like(source, -1))
        turn = canvas.rank.masked_fill(unknown, -1).amax(1, keepdim=True) + 1
        rank = torch.where(unknown, turn, -1)
        return Plan(slots, {"all": view}, Reads(at, read), rank, layout=layout, kept=kept)


def _shared(x: Int[Tensor, "b n"]) -> Int[Tensor, "#b n"]:
    """One row where all are alike: labels that the batch shares are cheaper."""
    return x[:1] if bool((x == x[:1]).all()) else x


def in_blocks(lengths: Int[Tensor, "b k"], size: int, start: int = 0) -> Int[Tensor, "b E"]:
    """Ranks of `size` elements in blocks of these lengths, counted from element `start` on; what stands before it is
    given. Raises ValueError for lengths below 1, or where they do not reach the end."""
    last = lengths.cumsum(1)
    if int(lengths.min()) < 1 or int(last[:, -1].min()) < size - start:
        raise ValueError(f"blocks hold at least 1 element, and {size - start} in all; got {lengths.tolist()}")
    place = (torch.arange(size) - start).expand(len(lengths), -1).contiguous()
    return torch.where(place < 0, -1, torch.searchsorted(last, place, right=True))
