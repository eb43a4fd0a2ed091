"""Deciders of edits in continuous time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from seriatim.canvas import Canvas, Delete, Edit, Insert, Revise, Set
from seriatim.decoding.guess import Guess
from seriatim.decoding.loop import Step
from seriatim.heads.edits import Rates
from seriatim.model import Rows
from seriatim.random import VALUE, Key, Random, numbered
from seriatim.slots import ragged


@dataclass(frozen=True)
class Editing:
    """Many edits a step, each slot for itself: tau-leaping of a continuous-time Markov chain (Edit Flows).

    Time runs from 0 to 1 in `steps`, and stands on the canvas as the noise level of a row's gap: 1 - k(t), where
    k = t ** power is the share of a text's edits that are done (the paper: power 3). In a step each edit that is left
    happens with the probability that a column jumps in it, (k' - k) / (1 - k): at most one insertion behind a slot, and
    one change of its token. In the last step all happen, and the row ends. limit: the most known elements of a row; of
    insertions that exceed it the first in reading order stay.
    """

    steps: int
    limit: int
    power: float = 3.0
    redraws: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.steps < 1 or self.limit < 0 or not self.power > 0:
            raise ValueError(
                f"edits take at least 1 step, a limit of at least 0 and a positive power; got {self.steps}, "
                f"{self.limit}, {self.power}"
            )

    def decide(self, canvas: Canvas, guess: Guess | None, rows: Rows, random: Random) -> Step:
        dist = rows.dist
        if not isinstance(dist, Rates) or guess is not None:
            raise ValueError("Editing decides by the rates of edits: use it with the order of insertions and EditHead")
        element = torch.as_tensor(rows.element).expand(canvas.batch, -1)
        live = element >= 0
        turn, share = self._time(canvas)
        place = torch.where(live, torch.arange(element.shape[1]), -1)  # numbers of elements depend on batch mates
        insert, *change = (_among(x, share) for x in dist.groups())
        edits: list[Edit] = []
        gone = torch.zeros(canvas.batch, dtype=torch.long)
        if change:
            at = live & (change[0] > -torch.inf)[..., :-1].any(-1).cpu()
            pick = random.categorical(
                change[0], Key(canvas.row, torch.where(at, place, -1), numbered(VALUE, turn, 1))
            ).cpu()
            put, delete = at & (pick < dist.vocab), at & (pick == dist.vocab)
            edits = [Set(pick, torch.where(put, element, -1))] if bool(put.any()) else []
            edits += [Delete(torch.where(delete, element, -1))] if bool(delete.any()) else []
            gone = delete.sum(1)
        room = (self.limit - canvas.known.sum(1) + gone)[:, None]
        key = Key(canvas.row, torch.where(room > 0, place, -1), numbered(VALUE, turn))
        pick = random.categorical(insert, key).cpu()
        new = live & (pick < dist.vocab)
        new &= new.long().cumsum(1) <= room
        if bool(new.any()):
            some = ragged(new)
            after = torch.where(some >= 0, element.gather(1, some.clamp(min=0)), -2)
            edits.append(Insert(after, pick.gather(1, some.clamp(min=0))))
        return Step((*edits, *self._later(canvas, turn)))

    def _time(self, canvas: Canvas) -> tuple[Int[Tensor, "b 1"], Float[Tensor, "b"]]:
        """The step of each row, and the probability that a column that has not jumped does so in it."""
        done = 1 - level_of(canvas).double()
        turn = (done ** (1 / self.power) * self.steps).round().clamp(max=self.steps - 1)
        now, later = ((t / self.steps) ** self.power for t in (turn, turn + 1))
        return turn.long()[:, None], (later - now) / (1 - now)

    def _later(self, canvas: Canvas, turn: Int[Tensor, "b 1"]) -> list[Edit]:
        """Time goes on, or a row ends."""
        gaps, last = ragged(canvas.open), turn + 1 >= self.steps
        going = torch.where(last, -1, gaps)
        level = 1 - ((turn + 1) / self.steps) ** self.power
        edits: list[Edit] = [Revise(going, torch.zeros_like(gaps), level.expand(gaps.shape))]
        return [*edits, Delete(torch.where(last, gaps, -1))]


def level_of(canvas: Canvas) -> Float[Tensor, "b"]:
    """The share of edits that is left, 1 - k(t), of each row."""
    return torch.ones(canvas.batch) if canvas.level is None else canvas.level.amax(1)


def _among(rates: Float[Tensor, "b m n"], share: Float[Tensor, "b"]) -> Float[Tensor, "b m n1"]:
    """Log-probabilities of each edit and, last, of none of them, if each happens at its rate times a share."""
    total = rates.double().logsumexp(-1, keepdim=True)
    happens = (total.exp() * share.to(total)[:, None, None]).clamp(max=1)
    which = (rates.double() - total).masked_fill(total == -torch.inf, -torch.inf)
    return torch.cat([which + happens.log(), torch.log1p(-happens)], -1)
