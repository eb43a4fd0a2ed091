"""Several steps inside each block of an order, another number in each: scales that are refined (HMAR), pivots and what
follows from them (Hi-MAR)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from seriatim.canvas import Canvas
from seriatim.decoding.guess import Guess
from seriatim.decoding.loop import Step
from seriatim.decoding.sample import Rule, SampleAll, Schedule, Select
from seriatim.heads.dist import Greedy
from seriatim.model import Rows
from seriatim.random import Random


@dataclass(frozen=True)
class Nested:
    """`steps[k]` forwards for scale k of a pyramid (1 where the list ends): of all that is read those are decided whose
    drawn ids were the likeliest (or which a `rule` of `Select` prefers), few at first; the rest is hidden and drawn
    again in view of them.

    Likelihoods are those of what is drawn from, with guidance, temperature and filters, as in HMAR's released code;
    greedily, those of the model. What is decided stays. With one step everywhere it is `SampleAll`.
    """

    steps: Sequence[int] = ()
    schedule: Schedule = "cosine"
    rule: Rule = "confidence"

    def __post_init__(self) -> None:
        if any(n < 1 for n in self.steps):
            raise ValueError(f"every scale takes at least 1 forward, got {tuple(self.steps)}")

    def decide(self, canvas: Canvas, guess: Guess | None, rows: Rows, random: Random) -> Step:
        element = torch.as_tensor(rows.element)
        scale = int(canvas.layout.coord[int(element.max()), 0])
        steps = self.steps[scale] if scale < len(self.steps) else 1
        if steps == 1:
            return SampleAll().decide(canvas, guess, rows, random)
        said = rows.said if isinstance(rows.dist, Greedy) else rows.dist
        return Select(self.rule, steps, self.schedule).decide(canvas, guess, rows._replace(said=said), random)
