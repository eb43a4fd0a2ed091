"""Masks beside the line of a text: what WeDLM and TiDAR train, and how WeDLM decodes.

The slots of a line come first, then a second stream: for each element a slot that holds its mask, or shows it. That of
a block sees the line up to its first element, and slots of its block. An element has another rank in either order, so
each order is a plan of its own over the same slots, checked by itself; the forward is run once and read by both.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from seriatim.canvas import Canvas
from seriatim.decoding.guess import Guess
from seriatim.factorization.base import Factorization
from seriatim.factorization.line import Line
from seriatim.plan import LEARNED, MASK, VALUE, OrderError, Plan, Reads, Slots
from seriatim.view import INF, timed


def beside_line(
    canvas: Canvas, hidden: Bool[Tensor, "b E"], size: int, prefix: int = 1, causal: bool = False
) -> tuple[Plan, Plan]:
    """The order of blocks of `size` elements, of which the `hidden` ones are read, and that of the line: two plans over
    the same slots and views.

    causal: inside a block the elements that are shown come first, each in its place, then the masks, and every slot
    sees those before it (WeDLM); else all slots of a block see each other (TiDAR). The last block is as long as the
    others: masks behind the end are read by nobody.
    """
    n = canvas.layout.size
    line = Line(prefix).packed(canvas)
    e = torch.arange(-(-n // size) * size)
    there, block = (e < n)[None], (e // size)[None]
    masked = torch.ones(len(hidden), len(e), dtype=torch.bool)
    masked[:, :n] = hidden
    first = prefix + block * size  # the place of a block's first element
    turn = torch.zeros(1, 1, dtype=torch.long)
    if causal:
        late = masked.long().unflatten(1, (-1, size))
        turn = late.argsort(dim=2, stable=True).argsort(2).flatten(1)
    # a place takes 1 + size ticks: those of a block that begins there, then the line's own
    place, rows = line.slots.coord[..., 0], max(len(masked), line.slots.element.shape[0])
    tick, start = (1 + size) * place + size, (1 + size) * first
    at = _cat(rows, tick, (start + turn).expand(len(turn), -1))
    dies = _cat(rows, torch.full_like(tick, INF), start + size)
    element = _cat(rows, line.slots.element[..., 0], torch.where(there, e, -1))
    source = _cat(rows, line.slots.source, torch.where(masked, MASK, VALUE))
    coord = torch.cat([place, (prefix + e)[None]], 1)[..., None]
    slots = Slots(element[..., None], source, coord, torch.full_like(element, -1))
    open_ = (line.rank >= 0) & hidden
    rank = torch.where(line.rank >= 0, 2 * block[:, :n] + hidden, -1)  # what is shown of a block comes before its rest
    reads = Reads(torch.where(open_, place.shape[1] + e[:n], -1), torch.where(open_, e[:n], -1))
    plan = Plan(slots, {"all": timed(at, at, dies)}, reads, rank, layout=canvas.layout)
    return plan, replace(plan, reads=line.reads, rank=line.rank)


def _cat(rows: int, a: Tensor, b: Tensor) -> Tensor:
    """Labels of both streams; one row where the batch shares them."""
    return torch.cat([a.expand(rows, -1), b.expand(rows, -1)], 1)


class Streaming(Factorization):
    """Unknown elements as masks behind the known ones, each in its own place, and every slot sees those before it:
    known from the front, known further on, then the masks of a window (WeDLM, Liu et al. 2025).

    The window holds `window` places from the first unknown one on. A forward remembers what is known from the front,
    and nothing else: that has seen what stands before it only, so it is what a causal pass over the text computes. It
    is trained in blocks of `size`, by `beside_line`.
    """

    likelihood = "bound"
    free = True

    def __init__(self, size: int, window: int, prefix: int = 1):
        if size < 1 or window < 1:
            raise ValueError(f"a block and a window hold at least 1 element, got {size} and {window}")
        self.size, self.window, self.prefix = size, window, prefix

    def packed(self, canvas: Canvas) -> Plan:
        """The text, and beside it its blocks, in which what is known on the canvas is shown."""
        return beside_line(canvas, canvas.open, self.size, self.prefix, causal=True)[0]

    def due(self, canvas: Canvas) -> Bool[Tensor, "b E"]:
        return canvas.open  # what is shown is not read

    def step(self, canvas: Canvas, guess: Guess | None, cached: int | Tensor) -> Plan | None:
        if canvas.done:
            return None
        if guess is not None:
            raise OrderError("masks are filled in any order and verify no drafts; decode without a proposer")
        unknown, front = canvas.open, canvas.lengths()[:, None]
        alive, held = unknown.any(1, keepdim=True), torch.as_tensor(cached).expand(canvas.batch)[:, None]
        run = torch.where(alive, self.prefix + front - held, 0)  # known from the front, and not remembered yet
        if bool((run < 0).any()):
            row = int((run[:, 0] < 0).nonzero()[0, 0])
            raise OrderError(
                f"an element of row {row} is unknown again, but {int(held[row])} slots are cached: what is known from "
                "the front stays so (or decode without a cache)"
            )
        offset = torch.arange(int(run.max()))[None]
        there, place = offset < run, held + offset
        order, filled, masked = self._behind(unknown, canvas.known & alive, front)
        live = torch.cat([there, filled | masked], 1)
        element = torch.cat([place - self.prefix, order], 1)
        at = torch.cat([place, self.prefix + front + torch.arange(order.shape[1])], 1)
        source = torch.cat([torch.where(place < self.prefix, LEARNED, VALUE), torch.where(masked, MASK, VALUE)], 1)
        slots = Slots(
            torch.where(live, element, -1).clamp(min=-1)[..., None],
            source,
            (self.prefix + element)[..., None],
            torch.full_like(source, -1),
        )
        read = torch.where(masked, order, -1)
        reads = Reads(torch.where(masked, offset.shape[1] + torch.arange(order.shape[1]), -1), read)
        whole = bool(live.all())
        view = timed(at, lane=None if whole else torch.where(live, 0, -1))
        kept = offset if bool(there.all()) else torch.where(there, offset, -1)
        rank = torch.where(unknown, 0, -1)
        return _Streamed(slots, {"all": view}, reads, rank, layout=canvas.layout, kept=kept)

    def _behind(
        self, unknown: Bool[Tensor, "b E"], known: Bool[Tensor, "b E"], front: Int[Tensor, "b 1"]
    ) -> tuple[Int[Tensor, "b m"], Bool[Tensor, "b m"], Bool[Tensor, "b m"]]:
        """The elements behind the front in the order in which they stand there, and which of them are known, and
        masks."""
        element = torch.arange(unknown.shape[1])[None]
        known, masks = known & (element > front), unknown & (element < front + self.window)
        order = self._order(known, masks)
        width = int((known | masks).sum(1).max())
        order = order[:, :width]
        return order, known.gather(1, order), masks.gather(1, order)

    def _order(self, known: Bool[Tensor, "b E"], masks: Bool[Tensor, "b E"]) -> Int[Tensor, "b E"]:
        """What is known first, then the masks; each in their places."""
        return torch.where(known, 0, torch.where(masks, 1, 2)).argsort(dim=1, stable=True)


class _Streamed(Plan):
    """What it keeps is a run of the text, which everything later sees."""

    plain = True
