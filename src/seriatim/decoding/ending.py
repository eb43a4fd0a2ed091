"""Ends of texts in any order: a model that was taught to fill what is left with ends of text is sure of them too early,
and what stands behind an end need not be written."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from seriatim.canvas import DECIDED, DELETED, Canvas, Edit, Set, Truncate
from seriatim.decoding.guess import Guess
from seriatim.decoding.loop import Decider, Step
from seriatim.decoding.sample import Schedule, ours, schedule
from seriatim.model import Rows
from seriatim.random import Random


@dataclass(frozen=True)
class LateEnds:
    """A `Scorer`: the confidence in an end of text (`ids`) counts by a factor that grows from `least` to 1 while the
    text is written, so that ends wait (EOS early rejection; EOSER-ASS, 2025, arXiv 2509.23924). What was drawn stays as
    it was. The factor follows the steps of the whole text: linear in them, under "powers" linear in the elements that
    will be decided after each. Neutral: a `least` of 1.
    """

    ids: tuple[int, ...]
    least: float
    steps: int
    kind: Schedule = "linear"

    def __post_init__(self) -> None:
        if not 0 <= self.least <= 1:
            raise ValueError(f"the least factor is a share from 0 to 1, got {self.least}")

    def __call__(
        self, canvas: Canvas, element: Int[Tensor, "b m"], x: Int[Tensor, "b m"], score: Float[Tensor, "b m"]
    ) -> Float[Tensor, "b m"]:
        done = (canvas.status == DECIDED).sum(1).tolist()
        share = [self.progress(d, n) for d, n in zip(done, ours(canvas).tolist(), strict=True)]
        factor = self.least + (1 - self.least) * torch.tensor(share, dtype=score.dtype)[:, None]
        return torch.where(torch.isin(x, torch.tensor(self.ids, dtype=torch.long)), score * factor, score)

    def progress(self, done: int, total: int) -> float:
        """How far a text is of which so many elements of all are decided: 0 at the first step, at the last 1 (of
        "powers": a little more and a little less)."""
        if total < 1:
            return 1.0
        if self.kind == "powers":
            return min((2 * done + 1) / 2 ** (total.bit_length() - 1), 1.0)
        plan = schedule(total, self.steps, self.kind)
        turn = bisect_right(plan, done - total, key=lambda n: -n)  # steps that are behind it
        return turn / (len(plan) - 1) if len(plan) > 1 else 1.0


@dataclass
class EndOfText:
    """Another decider, and where the text seems to end it is cut: what stands behind is not written (end-of-text
    prediction; Learn2PD, 2025, arXiv 2509.25188).

    A row is cut behind the first of the `stop` ids that is decided, whatever is still unknown before it; where there is
    none, behind the surest place at which one is the likeliest value, if its probability is at least `floor` (0:
    always, as published; above 1: never). What was decided before is never cut off; what the same step would decide
    behind a decided end is not decided.
    """

    inner: Decider
    stop: tuple[int, ...]
    floor: float

    @property
    def needs(self) -> frozenset[str]:
        return getattr(self.inner, "needs", frozenset())

    def decide(self, canvas: Canvas, guess: Guess | None, rows: Rows, random: Random) -> Step:
        step = self.inner.decide(canvas, guess, rows, random)
        if not self.stop or any(isinstance(edit, Truncate) for edit in step.edits):
            return step
        known, stops = self._after(canvas, step)
        place, ended = torch.arange(canvas.layout.size), stops.any(1)
        first = torch.where(stops, place, canvas.layout.size).amin(1)
        end = torch.where(ended, first, self._expected(canvas, known, rows))
        stays = torch.where(ended[:, None], canvas.known, known)
        length = torch.maximum(end, torch.where(stays, place, -1).amax(1)) + 1
        behind = (place >= length[:, None]) & (canvas.status != DELETED)
        if not bool(behind.any()):
            return step
        return replace(step, edits=(*(before(edit, length) for edit in step.edits), Truncate(length)))

    def _after(self, canvas: Canvas, step: Step) -> tuple[Tensor, Tensor]:
        """What will be known when a step is taken, and which of the decided elements will be ends."""
        ids = torch.tensor(self.stop)
        known = canvas.known.clone()
        stops = torch.isin(canvas.value["token"].cpu(), ids) & (canvas.status == DECIDED)
        for edit in step.edits:
            if isinstance(edit, Set) and edit.element is not None:
                row, column = (edit.element >= 0).nonzero(as_tuple=True)
                element = edit.element[row, column]
                known[row, element] = True
                stops[row, element] = torch.isin(edit.value.cpu()[row, column], ids)
        return known, stops

    def _expected(self, canvas: Canvas, known: Tensor, rows: Rows) -> Int[Tensor, "b"]:
        """The surest place of an end that is not decided, the first of equals; the last element where there is none."""
        size = canvas.layout.size
        element = torch.as_tensor(rows.element).expand(canvas.batch, -1)
        token = rows.said.mode()
        sure = rows.said.log_prob(token).exp().cpu()
        open_ = (element >= 0) & ~known.gather(1, element.clamp(min=0))
        there = open_ & torch.isin(token.cpu(), torch.tensor(self.stop)) & (sure >= self.floor)
        best = sure.masked_fill(~there, -1).max(1, keepdim=True).values
        place = torch.where(there & (sure == best), element, size).amin(1)
        return torch.where(there.any(1), place, size - 1)


def before(edit: Edit, length: Int[Tensor, "b"]) -> Edit:
    """An edit without what it would decide behind the first `length` elements of each row."""
    if not isinstance(edit, Set) or edit.element is None:
        return edit
    return Set(edit.value, torch.where(edit.element < length[:, None], edit.element, -1))
