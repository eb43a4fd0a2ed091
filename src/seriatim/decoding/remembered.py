"""Hidden states that outlive their step: kept on the canvas with what was drawn from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from seriatim.canvas import Canvas, Remember, Set
from seriatim.decoding.guess import Guess
from seriatim.decoding.loop import Decider, Step
from seriatim.model import Rows, pick_slots
from seriatim.random import Random


@dataclass(frozen=True)
class Remembered:
    """What another decider decides; beside each element that it sets, the hidden state from which that was drawn (the
    full branch's, where it is guided) is kept as `Canvas.memo`."""

    decider: Decider

    def decide(self, canvas: Canvas, guess: Guess | None, rows: Rows, random: Random) -> Step:
        step = self.decider.decide(canvas, guess, rows, random)
        element = torch.as_tensor(rows.element).expand(canvas.batch, -1)
        decided = torch.zeros(canvas.batch, canvas.layout.size + 1, dtype=torch.bool)
        for edit in step.edits:
            if isinstance(edit, Set) and edit.element is not None:
                decided = decided.scatter(1, torch.where(edit.element < 0, canvas.layout.size, edit.element), True)
        live = (element >= 0) & decided.gather(1, element.clamp(min=0))
        states = pick_slots(rows.hidden, torch.as_tensor(rows.slot))
        step.edits = (*step.edits, Remember(torch.where(live, element, -1), states))
        return step
