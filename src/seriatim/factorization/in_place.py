"""All open elements at once, denoised where they stand."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from seriatim.canvas import GUESSED, Canvas
from seriatim.decoding.guess import Guess
from seriatim.factorization.static import AnyOrder
from seriatim.plan import NOISE, Plan


class InPlace(AnyOrder):
    """As in any order, but what stands in an open element is its noise: every forward reads them all, revises them, and
    the last one decides them. Where nothing stands yet there is a mask; everybody sees everybody."""

    free = False  # a step decides all that was read, or nothing

    def __init__(self) -> None:
        super().__init__()

    def step(self, canvas: Canvas, guess: Guess | None, cached: int | Tensor) -> Plan | None:
        plan = super().step(canvas, guess, cached)
        if plan is None:
            return None
        guessed = canvas.status[:, : plan.size] == GUESSED
        if not bool(guessed.any()):
            return plan
        source = torch.where(guessed, NOISE, plan.slots.source)
        return replace(plan, slots=replace(plan.slots, source=source))
