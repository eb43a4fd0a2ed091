"""Training of texts that grow by insertion: some tokens are dropped, and the model says which belong where.

The number of dropped tokens is uniform in 0..L and every set equally likely (ILM, Patel et al. 2025, arXiv 2505.05755).
What is learned is one choice: a (slot, token) pair, of which each dropped token is as likely a target as any other, or
to stop, where nothing was dropped. This is the exact reversal of dropping tokens one by one in random order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from seriatim.canvas import GIVEN, Canvas, Delete, Set
from seriatim.conditions.condition import Condition
from seriatim.factorization.insertion import opened
from seriatim.model import Model
from seriatim.objectives.masked import fewest
from seriatim.random import ORDER, Generator, Key, Random, numbered


class Dropped(Model):
    """A model of insertions whose losses are those of one draw of dropped tokens.

    length_weight: each text counts once for each number of tokens that it can have lost, L + 1 times. Without it (the
    paper's loss) a canvas of a long text has less weight than one of a short text, and where lengths differ the optimum
    stops too early; with it the optimum is the law of the data, and the loss of a text, less log L!, bounds its
    negative log-likelihood.
    """

    def __init__(self, *parts: Any, length_weight: bool = False):
        super().__init__(*parts)
        self.length_weight = length_weight

    def losses(
        self,
        canvas: Canvas,
        condition: Mapping[str, Tensor] | Condition | None = None,
        drop: Bool[Tensor, "b"] | None = None,
        strict: bool = False,
        random: Random | None = None,
    ) -> Float[Tensor, "b E"]:
        """The loss of each row of finished texts under one draw, in nats, spread evenly over its elements. `strict` is
        refused: one draw is no likelihood."""
        if strict:
            raise TypeError("one draw of a bound is no likelihood; average `bound` over draws")
        loss = self.dropped_losses(canvas, self.drawn(canvas, random), condition, drop)
        if self.length_weight:
            loss = loss * (1 + canvas.open.sum(1)).to(loss)
        return spread(loss, canvas)

    def drawn(self, canvas: Canvas, random: Random | None = None) -> Bool[Tensor, "b E"]:
        """Which elements are dropped: 0 to all of those that are not given, spread evenly over the batch."""
        random, free = random or Generator(), canvas.open
        unit = random.uniform((canvas.batch, 1), Key(canvas.row, 0, numbered(ORDER, 0, 1)))[:, 0]
        noise = random.uniform(free.shape, Key(canvas.row, 0, numbered(ORDER)))
        n = free.sum(1)
        count = ((torch.arange(canvas.batch) + unit) / canvas.batch * (n + 1)).long()
        return fewest(free, torch.minimum(count, n), noise)

    def dropped_losses(
        self,
        canvas: Canvas,
        dropped: Bool[Tensor, "b E"],
        condition: Mapping[str, Tensor] | Condition | None = None,
        drop: Bool[Tensor, "b"] | None = None,
    ) -> Float[Tensor, "b"]:
        """The cross-entropy of the next choice when these elements of finished texts are missing, by the very step that
        decoding takes: each missing token is as likely a target as any other; where none is, to stop."""
        shown, known = with_gap(canvas, dropped)
        plan = self.factorization.step(shown, None, 0)
        assert plan is not None
        if self._sound is not self.factorization:  # an order that peeks is refused before it is trained
            plan.check(self.mixers)
            self._sound = self.factorization
        encoded = condition if isinstance(condition, Condition) else self.encode(condition, drop)
        dist, _, _ = self.dist(self.hidden(plan, shown, None, encoded), plan, shown)
        said = dist.logits[:, 0]  # type: ignore[attr-defined]
        (kind,) = canvas.layout.kinds
        vocab = int(self.heads[kind].vocab)  # type: ignore[arg-type]
        choice = (known.long().cumsum(1) * vocab).to(said.device) + canvas.value[kind]
        gone = dropped.to(said.device)
        met = torch.where(gone, said.gather(1, choice.masked_fill(~gone, 0)), 0.0).sum(1)
        count = gone.sum(1)
        return -torch.where(count > 0, met / count.clamp(min=1), said[:, -1])

    def bound(self, canvas: Canvas, random: Random | None = None) -> Float[Tensor, "b"]:
        """One draw of a bound on the negative log-likelihood of each row, in nats. (The sum over all numbers of dropped
        tokens is the mean surprise over orders of insertion; each of the L! orders is a way of its own to the text.)"""
        n = canvas.open.sum(1)
        loss = self.dropped_losses(canvas, self.drawn(canvas, random)).double()
        return loss * (n + 1).to(loss) - torch.lgamma(n + 1.0).to(loss)


def with_gap(canvas: Canvas, dropped: Bool[Tensor, "b E"]) -> tuple[Canvas, Bool[Tensor, "b E"]]:
    """What decoding would see of finished texts without some of their elements: a gap behind what is given in front,
    the rest inserted there; and which elements of the finished texts are there."""
    free, e = canvas.open, torch.arange(canvas.layout.size)
    (kind,) = canvas.layout.kinds
    shown = canvas.copy()
    shown.apply([Set(canvas.value[kind], torch.where(free & ~dropped, e, -1)), Delete(torch.where(dropped, e, -1))])
    known = shown.known
    first = canvas.status.eq(GIVEN).long().cumprod(1).sum(1)
    return opened(shown, first - 1), known


def spread(loss: Float[Tensor, "b"], canvas: Canvas) -> Float[Tensor, "b E"]:
    """A loss of each row, spread evenly over its elements that are not given; over all, where it has none."""
    free = canvas.open
    share = torch.where(free.any(1, keepdim=True), free, torch.ones_like(free)).to(loss)
    return loss[:, None] * share / share.sum(1, keepdim=True).clamp(min=1)
