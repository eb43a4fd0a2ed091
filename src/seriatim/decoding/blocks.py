"""Blocks whose ends are found on the way: where one begins, a rule looks at what the model says, and sets its end."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from seriatim.canvas import DECIDED, Canvas, Reorder, Truncate
from seriatim.decoding.guess import Guess
from seriatim.decoding.loop import Step
from seriatim.decoding.sample import Select, first_of, ours
from seriatim.decoding.unmask import at_work, ends
from seriatim.heads.dist import largest
from seriatim.model import Rows
from seriatim.random import Random
from seriatim.view import INF


class BlockRule(Protocol):
    """How long the next block is. A value: what it needs to know is on the canvas, or was just read."""

    def __call__(self, canvas: Canvas, element: Int[Tensor, "b m"], rows: Rows) -> Int[Tensor, "b"]:
        """The number of places from the first unknown element of each row to the end of its block, at least 1. element:
        unknown ones in order, -1 for padding, as `rows` has them."""
        ...


@dataclass(frozen=True)
class Delimited:
    """Blocks end where the text pauses (AdaBlock-dLLM, 2025, arXiv 2509.26432).

    Among the next elements, a share `window` of all that are to be decided, those are looked at whose likeliest value
    is one of `ids` (a line's end); if the surest of them, the first of equals, has at least the probability
    `threshold`, the block ends with it, else after `default` elements. Without ids, or with an infinite threshold, all
    blocks are equally long.
    """

    ids: tuple[int, ...]
    threshold: float
    default: int
    window: float = 0.25

    def __post_init__(self) -> None:
        if self.default < 1 or not 0 <= self.window <= 1:
            raise ValueError(
                f"a block holds at least 1 token, and a window is a share; got {self.default} and {self.window}"
            )

    def __call__(self, canvas: Canvas, element: Int[Tensor, "b m"], rows: Rows) -> Int[Tensor, "b"]:
        said, place = rows.said, element - first_of(element)
        token = said.mode()
        near = (element >= 0) & (place < (self.window * ours(canvas)).floor()[:, None])
        pauses = near & torch.isin(token.cpu(), torch.tensor(self.ids, dtype=torch.long))
        sure = said.log_prob(token).exp().cpu().masked_fill(~pauses, -torch.inf)
        best = largest(sure)[:, None]
        found = sure.gather(1, best) >= self.threshold
        return torch.where(pauses.any(1, keepdim=True) & found, place.gather(1, best) + 1, self.default)[:, 0]


@dataclass
class InBlocks:
    """`Unmask` where the blocks are not known in advance: all unknown elements have one rank at first, and from each
    forward in which a row begins a block the rule parts this block from the rest. The same forward decides the first
    elements of the block; the end costs none.

    A row ends at the first of the `stop` ids with nothing unknown before it. Has no memory: blocks stand on the canvas.
    """

    select: Select
    rule: BlockRule
    stop: tuple[int, ...] = ()

    def decide(self, canvas: Canvas, guess: Guess | None, rows: Rows, random: Random) -> Step:
        length = ends(canvas, self.stop)
        if length is not None:
            return Step((Truncate(length),))
        element, begins = at_work(canvas, rows), beginning(canvas)[:, None]
        if not bool(begins.any()):
            return self.select.decide(canvas, guess, rows._replace(element=element), random)
        end = first_of(element) + self.rule(canvas, element, rows).clamp(min=1)[:, None]
        end = torch.where(begins, end, INF)
        later = canvas.open & (torch.arange(canvas.layout.size) >= end)
        element = torch.where(element < end, element, -1)
        step = self.select.decide(canvas, guess, rows._replace(element=element), random)
        return replace(step, edits=(Reorder(torch.where(later, canvas.rank + 1, -1)), *step.edits))


def beginning(canvas: Canvas) -> Bool[Tensor, "b"]:
    """Which rows begin a block whose end is not known: of the rank at work nothing is decided, and none is higher."""
    now = torch.where(canvas.open, canvas.rank, INF).amin(1, keepdim=True)
    decided = ((canvas.status == DECIDED) & (canvas.rank == now)).any(1)
    later = (canvas.open & (canvas.rank > now)).any(1)
    return canvas.open.any(1) & ~decided & ~later
