"""Drafts from states that were moved ahead inside the verifying forward itself (hidden transfer, Wu et al. 2024).

Every token that is looked at, and the last known one, spawns a pseudo state for each of the next tokens, which runs
through the remaining layers beside it. So wherever verification ends, what follows there has been guessed by then.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from seriatim.canvas import Canvas
from seriatim.decoding.draft import beside
from seriatim.decoding.features import states_behind
from seriatim.decoding.guess import Guess, room
from seriatim.decoding.heads import MedusaHeads
from seriatim.decoding.loop import Step
from seriatim.decoding.target import Target
from seriatim.decoding.templates import Template
from seriatim.model import Rows
from seriatim.random import Random


class TransferredStates(MedusaHeads):
    """Fills a template from the pseudo states behind the last token that stands; candidates at different depths are
    independent.

    part: the maps (`posttraining.transfer.HiddenTransfer`). A forward computes the template's nodes and one slot more,
    and above the maps' layers 1 + k times as many. The first one, which reads the prompt, spawns nothing.
    """

    def __init__(self, part: Any, base: Any, template: Template):
        super().__init__(part, base, template)
        self.spawn = part.transfers()

    def propose(self, canvas: Canvas, target: Target, random: Random) -> Guess | None:
        fresh = canvas is not self._canvas
        guess = super().propose(canvas, target, random)
        if fresh or max(room(canvas)) < 3:  # the next step has no room for a draft
            return guess
        if guess is None:
            guess = Guess(beside(canvas, torch.zeros(canvas.batch, 0, dtype=torch.long)))
        guess.spawn = self.spawn
        return guess

    def behind(self, rows: Rows, step: Step) -> Float[Tensor, "b k d"] | None:  # type: ignore[override]
        """The pseudo states that the last token which stands has spawned; None where nothing was."""
        return None if rows.spawned is None else states_behind(rows, step, len(self.spawn))
