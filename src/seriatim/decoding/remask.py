"""Deciders of masked generation that take back: what was decided may be hidden again, and decided anew.

`Remask` (decoding/sample.py) hides so many of the least certain after each step. Here are the sampler that does so by
chance, as the reverse of a diffusion (ReMDM), and the one that decides everything at every step and keeps what it was
surest of (RCR). And `First`, which takes nothing back: reading order, several at a step.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from seriatim.canvas import DECIDED, Canvas, Edit, Set, Unset
from seriatim.decoding.guess import Guess, moved
from seriatim.decoding.loop import Step
from seriatim.decoding.sample import Remask, SampleAll
from seriatim.model import Rows
from seriatim.random import ORDER, VALUE, Key, Random, numbered


@dataclass(frozen=True)
class First:
    """The first `count` unknown elements of each row, in reading order."""

    count: int = 1

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"at least 1 element is decided at a step, got {self.count}")

    def decide(self, canvas: Canvas, guess: Guess | None, rows: Rows, random: Random) -> Step:
        if isinstance(rows.element, int):  # a line, read at its end
            return SampleAll().decide(canvas, guess, rows, random)
        element = rows.element.expand(canvas.batch, -1)
        place = torch.where(element >= 0, canvas.place.gather(1, element.clamp(min=0)), canvas.layout.size)
        first = (element >= 0) & (place.argsort(1).argsort(1) < self.count)
        return SampleAll().decide(canvas, guess, rows._replace(element=torch.where(first, element, -1)), random)


@dataclass
class ReMDM:
    """The remasking sampler of Wang et al. (2025, arXiv 2503.00307): `steps` from time 1 to 0, a share 1 - t of the
    elements known at time t. From t to s each known one is hidden again with probability `most`, or s/(1 - t) where
    that is less, and each hidden one is decided with the probability that leaves the shares as they are to be. With
    `most` 0 it is the ancestral sampler of masked diffusion.

    How many are decided at a step is chance, and may be none. Where a row has nothing hidden before its time is up, it
    goes on until something is, without a forward. Remembers the turns of one canvas at a time.
    """

    steps: int = 8
    most: float = 0.1
    redraws = True
    _canvas: Canvas | None = field(default=None, init=False, repr=False, compare=False)
    _row: Tensor = field(init=False, repr=False, compare=False)
    _turn: Int[Tensor, "b 1"] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 <= self.most <= 1:
            raise ValueError(f"at least 1 step, and a probability of 0 to 1, got {self.steps} and {self.most}")

    def decide(self, canvas: Canvas, guess: Guess | None, rows: Rows, random: Random) -> Step:
        if guess is not None:
            raise ValueError("masked generation verifies nothing: use a verifier as decider, or no proposer")
        self._follow(canvas)
        element = torch.as_tensor(rows.element).expand(canvas.batch, -1)
        x = rows.dist.sample(random, Key(canvas.row, element, numbered(VALUE, self._turn)))
        chosen = self._tossed(canvas, element, self._kept(self._turn), random, 0)
        known = canvas.status == DECIDED
        edits: list[Edit] = [Set(x, torch.where(chosen, element, -1))]
        again = self._hidden(canvas, known, random)
        now = known & ~_marked(known, again) | _marked(known, torch.where(chosen, element, -1))
        edits += [Unset(again)] if bool((again >= 0).any()) else []
        self._turn = self._turn + 1
        mine = known | canvas.open
        while bool((idle := (now == mine).all(1, keepdim=True) & (self._turn < self.steps)).any()):
            again = self._hidden(canvas, now & idle, random)  # a forward would read nothing
            now = now & ~_marked(now, again)
            edits += [Unset(again)] if bool((again >= 0).any()) else []
            self._turn = self._turn + idle.long()
        return Step(tuple(edits))

    def _times(self, turn: Int[Tensor, "b 1"]) -> tuple[Tensor, Tensor, Tensor]:
        """Which share is known before and after a step, and the probability of hiding again."""
        before, after = turn.double() / self.steps, ((turn + 1).double() / self.steps).clamp(max=1)
        return before, after, ((1 - after) / before.clamp(min=1e-12)).clamp(max=self.most)

    def _kept(self, turn: Int[Tensor, "b 1"]) -> Tensor:
        """The probability that a hidden element is decided."""
        before, after, again = self._times(turn)
        return ((after - (1 - again) * before) / (1 - before).clamp(min=1e-12)).clamp(0, 1)

    def _hidden(self, canvas: Canvas, known: Bool[Tensor, "b E"], random: Random) -> Int[Tensor, "b E"]:
        """Which of the known elements are hidden again."""
        element = torch.where(known, torch.arange(known.shape[1]), -1)
        again = self._tossed(canvas, element, self._times(self._turn)[2], random, 1)
        return torch.where(again, element, -1)

    def _tossed(
        self, canvas: Canvas, element: Int[Tensor, "b m"], p: Tensor, random: Random, index: int
    ) -> Bool[Tensor, "b m"]:
        """A coin for each element (-1: none), heads with probability p (b, 1)."""
        sides = torch.stack([1 - p, p], -1).log().expand(*element.shape, 2)
        coin = random.categorical(sides, Key(canvas.row, element, numbered(ORDER, self._turn, index)))
        return (coin == 1) & (element >= 0)

    def _follow(self, canvas: Canvas) -> None:
        """Another canvas starts anew; rows may have come and gone."""
        if canvas is not self._canvas:
            self._canvas, self._row = canvas, canvas.row
            self._turn = torch.zeros(canvas.batch, 1, dtype=torch.long)
        rows = moved(self._row, canvas.row)
        if rows is not None:
            self._row, self._turn = canvas.row, self._turn[rows].masked_fill((rows < 0)[:, None], 0)


def _marked(like: Bool[Tensor, "b E"], element: Int[Tensor, "b m"]) -> Bool[Tensor, "b E"]:
    """Elements (-1: none) as a boolean."""
    out = torch.zeros_like(like)
    b, i = (element >= 0).nonzero(as_tuple=True)
    out[b, element[b, i]] = True
    return out


@dataclass
class RunningConfidence(Remask):
    """All unknown elements of the block are decided at each step; of all that are decided, those of least score, which
    each keeps from when it was decided, are hidden again, so that as many remain unknown as the schedule says (RCR, He
    et al. 2025, arXiv 2508.13148). What was certain early may so give way to what is more certain late. `again` is not
    looked at."""

    def _counts(self, left: Int[Tensor, "b"], after: Int[Tensor, "b"]) -> tuple[Int[Tensor, "b"], Int[Tensor, "b"]]:
        return left, torch.minimum(after, left)
