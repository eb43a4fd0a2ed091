"""Training of edits in continuous time: part of a text has become another one, and the model says what is still to do.

Edit Flows (Havasi et al. 2025, arXiv 2506.09018). Two texts are aligned, with blanks where one of them has nothing; at
time t each column has jumped from the first to the second with probability k(t). What is left are edits: a blank that
becomes a token is an insertion, a token that becomes a blank a deletion, a token that becomes another a substitution.
The model gives the rate of every edit of the present text, and never sees the alignment.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from seriatim.canvas import GIVEN, Canvas, Delete, Revise, Set
from seriatim.conditions.condition import Condition
from seriatim.factorization.insertion import opened
from seriatim.layout import line
from seriatim.model import Model
from seriatim.objectives.inserted import spread
from seriatim.random import ORDER, Generator, Key, Random, numbered
from seriatim.slots import ragged

MATCH, DELETION, INSERTION = 0, 1, 2  # kinds of columns
LEAST = 1e-3  # share of columns that have not jumped, in training: from there to 1


class Edited(Model):
    """A model of edits whose losses are those of one draw of an alignment and a time.

    start: how many tokens, drawn uniformly, a text begins with (0: none, and all edits are insertions). Rates are in
    units of k'(t) / (1 - k(t)), which is what drives every column. Drawn is 1 - k itself, by half uniformly and by half
    uniform in its logarithm, so that no weight is above 2 log(1 / `LEAST`) = 14: the same expectation as over uniform
    times, whatever the schedule, but for those near the end. It bounds the negative log-likelihood of a text under the
    process in continuous time.
    """

    def __init__(self, *parts: Any, start: int = 0):
        super().__init__(*parts)
        self.start = start

    def losses(
        self,
        canvas: Canvas,
        condition: Mapping[str, Tensor] | Condition | None = None,
        drop: Bool[Tensor, "b"] | None = None,
        strict: bool = False,
        random: Random | None = None,
    ) -> Float[Tensor, "b E"]:
        """The loss of each row of finished texts under one draw, in nats, spread evenly over its elements. `strict` is
        refused: one draw of a bound is no likelihood."""
        if strict:
            raise TypeError("one draw of a bound is no likelihood; average `losses` over draws")
        random, free = random or Generator(), canvas.open
        columns = canvas.layout.size + self.start

        def noise(n: int, index: int) -> Tensor:
            return random.uniform((canvas.batch, n), Key(canvas.row, 0, numbered(ORDER, 0, index)))

        unit = (torch.arange(canvas.batch) + noise(1, 1)[:, 0]) / canvas.batch
        level = torch.where(noise(1, 6)[:, 0] < 0.5, LEAST**unit, 1 - unit * (1 - LEAST))
        density = 0.5 / (1 - LEAST) - 0.5 / (level * math.log(LEAST))
        kinds = aligned(free.sum(1), self.start, columns, noise(1, 2)[:, 0], noise(columns, 3))
        first = (noise(max(self.start, 1), 4) * self.vocab).long()[:, : self.start]
        jumped = noise(columns, 5) >= level[:, None]
        loss = self.edited_losses(canvas, first, kinds, jumped, level, condition, drop)
        return spread(loss / (level * density).to(loss), canvas)

    @property
    def vocab(self) -> int:
        (kind,) = self.layout.kinds
        return int(self.heads[kind].vocab)  # type: ignore[arg-type]

    def edited_losses(
        self,
        canvas: Canvas,
        first: Int[Tensor, "b start"],
        kinds: Int[Tensor, "b C"],
        jumped: Bool[Tensor, "b C"],
        level: Float[Tensor, "b"],
        condition: Mapping[str, Tensor] | Condition | None = None,
        drop: Bool[Tensor, "b"] | None = None,
    ) -> Float[Tensor, "b"]:
        """The divergence of the model's rates u from those of the alignment, c: the sum of u - c log u + c log c - c
        over the edits of a half-edited text. first: the tokens a text began with; kinds: of the columns of an alignment
        (-1: none); jumped: which have become the text of the canvas already; level: the share that has not."""
        shown, slot, edit = self._between(canvas, first, kinds, jumped, level)
        plan = self.factorization.step(shown, None, 0)
        assert plan is not None
        if self._sound is not self.factorization:  # an order that peeks is refused before it is trained
            plan.check(self.mixers)
            self._sound = self.factorization
        encoded = condition if isinstance(condition, Condition) else self.encode(condition, drop)
        dist, _, _ = self.dist(self.hidden(plan, shown, None, encoded), plan, shown)
        rates = dist.logits  # type: ignore[attr-defined]
        left = (edit >= 0).to(rates.device)
        index = (slot * rates.shape[2] + edit).to(rates.device).masked_fill(~left, 0)
        met = torch.where(left, rates.flatten(1).gather(1, index), 0.0).sum(1)
        alike = (index[:, None] == index[:, :, None]) & left[:, None]  # columns that need the very same edit
        target = torch.where(left, alike.sum(2).clamp(min=1).log() - 1, 0.0).sum(1)
        return rates.exp().sum((1, 2)) - met + target.to(rates)

    def _between(
        self, canvas: Canvas, first: Tensor, kinds: Tensor, jumped: Tensor, level: Tensor
    ) -> tuple[Canvas, Int[Tensor, "b C"], Int[Tensor, "b C"]]:
        """What decoding would see of a half-edited text: what is given, then a gap with the columns that hold a token;
        and for each column its slot and the edit that it still needs, as rates are numbered (-1: none)."""
        (kind,), vocab = canvas.layout.kinds, self.vocab
        value, free = canvas.value[kind], canvas.open
        given = canvas.status.eq(GIVEN).long().cumprod(1).sum(1)
        front, batch = int(given.max()), canvas.batch
        was, will = (kinds == MATCH) | (kinds == DELETION), (kinds == MATCH) | (kinds == INSERTION)
        there = torch.where(jumped, will, was)
        before = _nth(first, was)
        after = _nth(value.gather(1, ragged(free).clamp(min=0)), will)
        ids = torch.cat([value[:, :front], torch.where(jumped, after, before)], 1)
        known = torch.cat([torch.arange(front) < given[:, None], torch.zeros_like(there)], 1)
        shown = self.canvas({kind: ids}, known, row=canvas.row, layout=line(ids.shape[1], kind))
        number = torch.arange(front, ids.shape[1])
        gone = torch.cat([torch.arange(front) >= given[:, None], ~there], 1)
        shown.apply([
            Set(ids[:, front:], torch.where(there, number, -1)),
            Delete(torch.where(gone, torch.arange(ids.shape[1]), -1)),
        ])  # fmt: skip
        slot = shown.known.long().cumsum(1)[:, front:]
        gap = torch.full((batch, 1), ids.shape[1])
        opened(shown, given - 1).apply([Revise(gap, torch.zeros_like(gap), level.float()[:, None])])
        edit = torch.where(kinds == INSERTION, after, torch.where(kinds == DELETION, 2 * vocab, vocab + after))
        done = jumped | (kinds < 0) | ((kinds == MATCH) & (before == after))
        return shown, slot, edit.masked_fill(done, -1)


def aligned(
    count: Int[Tensor, "b"], start: int, columns: int, unit: Float[Tensor, "b"], noise: Float[Tensor, "b C"]
) -> Int[Tensor, "b C"]:
    """The kinds of the columns of a random alignment of `start` tokens with `count` others, -1 behind its end: how many
    are matched is uniform, and so is the order of what is matched, deleted and inserted."""
    most = count.clamp(max=start)
    pairs = torch.minimum((unit * (most + 1)).long(), most)
    there = torch.arange(columns) < (count + start - pairs)[:, None]
    order = noise.masked_fill(~there, torch.inf).argsort(1).argsort(1)
    kinds = torch.where(order < pairs[:, None], MATCH, torch.where(order < start, DELETION, INSERTION))
    return kinds.masked_fill(~there, -1)


def _nth(value: Int[Tensor, "b n"], where: Bool[Tensor, "b C"]) -> Int[Tensor, "b C"]:
    """The values one after another in marked columns; anything elsewhere."""
    if not value.shape[1]:
        return torch.zeros(where.shape, dtype=torch.long)
    return value.gather(1, (where.long().cumsum(1) - 1).clamp(min=0, max=value.shape[1] - 1))
