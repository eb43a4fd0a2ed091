"""Several steps inside each block of an order, another number in each: scales that are refined (HMAR), pivots and what
follows from them (Hi-MAR)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from seriatim.canvas import Canvas, Revise, Set
from seriatim.decoding.guess import Guess
from seriatim.decoding.loop import Step
from seriatim.decoding.sample import Rule, SampleAll, Schedule, Select
from seriatim.heads.dist import Greedy
from seriatim.model import Rows
from seriatim.random import Random


@dataclass(frozen=True)
class Nested:
    """`steps[k]` forwards for scale k of a pyramid (1 where the list ends), or how many elements each of them decides:
    of all that is read those whose drawn ids were the likeliest (or which a `rule` of `Select` prefers), few at first;
    the rest is hidden and drawn again in view of them. standing: what is to be drawn again stands on the canvas
    meanwhile, as a guess, for embeddings that look at it.

    Likelihoods are those of what is drawn from, with guidance, temperature and filters, as in HMAR's released code;
    greedily, those of the model. What is decided stays. With one step everywhere it is `SampleAll`.
    """

    steps: Sequence[int | Sequence[int]] = ()
    schedule: Schedule = "cosine"
    rule: Rule = "confidence"
    standing: bool = False

    def __post_init__(self) -> None:
        if any(n < 1 if isinstance(n, int) else not n or min(n) < 1 for n in self.steps):
            raise ValueError(f"every scale takes at least 1 forward, got {tuple(self.steps)}")

    def decide(self, canvas: Canvas, guess: Guess | None, rows: Rows, random: Random) -> Step:
        element = torch.as_tensor(rows.element)
        scale = int(canvas.layout.coord[int(element.max()), 0])
        steps = self.steps[scale] if scale < len(self.steps) else 1
        counts = () if isinstance(steps, int) else tuple(steps)
        number = len(counts) or steps
        if number == 1:
            return SampleAll().decide(canvas, guess, rows, random)
        said = rows.said if isinstance(rows.dist, Greedy) else rows.dist
        select = Counted(self.rule, number, self.schedule, counts=counts)  # type: ignore[arg-type]
        step = select.decide(canvas, guess, rows._replace(said=said), random)
        (edit,) = step.edits
        if self.standing and isinstance(edit, Set) and edit.element is not None:
            rest = torch.where(edit.element < 0, element.expand(canvas.batch, -1), -1)
            step.edits = (edit, Revise(rest, edit.value))
        return step


@dataclass
class Counted(Select):
    """`Select` that is told how many elements of a block each step decides (none: `steps` by the schedule)."""

    counts: tuple[int, ...] = ()

    def _below(self, left: int, total: int) -> int:
        if not self.counts:
            return super()._below(left, total)
        return next((total - n for n in accumulate(self.counts) if total - n < left), 0)
