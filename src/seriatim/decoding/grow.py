"""Samples that grow as they are generated: no length is fixed before."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from seriatim.canvas import DELETED, Canvas, Grow, Truncate
from seriatim.decoding.guess import Guess
from seriatim.decoding.loop import Decider, Step
from seriatim.layout import Segment
from seriatim.model import Rows
from seriatim.random import Random


class Growing:
    """Whenever all elements are decided, one more is called for, behind the last and of its kind, in every row that has
    not said `stop` (an id, or the value of a group of ids). `limit`: the most elements a sample may have."""

    def __init__(self, decider: Decider, stop: int | Int[Tensor, "n"], limit: int):
        if limit < 1:
            raise ValueError(f"a sample has at least 1 element, got a limit of {limit}")
        self.decider, self.stop, self.limit = decider, torch.as_tensor(stop), limit

    def decide(self, canvas: Canvas, guess: Guess | None, rows: Rows, random: Random) -> Step:
        step = self.decider.decide(canvas, guess, rows, random)
        after = canvas.copy().apply(step.edits)
        layout = after.layout
        if not after.done or layout.size >= self.limit:
            return step
        kind = layout.segments[-1].kind
        last = after.value[kind][:, -1]
        alive = after.status != DELETED
        said = (last == self.stop.to(last)).flatten(1).all(1) if last.dim() > 1 else last == self.stop
        ended = ~alive[:, -1] | said.cpu()
        if bool(ended.all()):
            return step
        coord = layout.segments[-1].coord[-1:].clone()
        coord[:, 0] += 1
        length = alive.sum(1) + (~ended).long()
        step.edits = (*step.edits, Grow(Segment(kind, coord)), Truncate(length))
        return step
