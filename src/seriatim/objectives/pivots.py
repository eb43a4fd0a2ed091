"""Training of two phases in any order: pivots some of which are hidden, then fine elements behind their states.

Hi-MAR (Zheng et al. 2025, arXiv 2505.20288): the fine phase is told the hidden states of the pivots that were hidden in
the first, never what they are, so that it learns with what it will meet; no gradient flows back through them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from seriatim.canvas import Canvas, Remember, Set
from seriatim.conditions.condition import Condition
from seriatim.factorization.pivots import PhasePlan, Pivots, coarse
from seriatim.model import pick_slots
from seriatim.objectives.masked import Masked, Masking, showing
from seriatim.plan import Reads
from seriatim.random import ORDER, Generator, Key, Random, numbered


class TwoPhases(Masked):
    """A model of `Pivots`, whose losses are those of one draw of a masking in each phase.

    masking, fine: of pivots and of fine elements, in training; in evaluation mode both are by `judging` (None: the
    same), with weights of 1. weights: of the two losses. told: the share of rows in training whose fine phase is told
    of pivots at all; the others see masks in their places.
    """

    factorization: Pivots

    def __init__(
        self, *parts: Any, masking: Masking, fine: Masking, weights: tuple[float, float] = (1.0, 1.0),
        judging: Masking | None = None,
    ):  # fmt: skip
        super().__init__(*parts, masking=masking)
        self.fine, self.weights, self.told = fine, weights, 1.0
        self.judged = (judging or masking, judging or fine)

    def drawn(self, canvas: Canvas, random: Random) -> tuple[Bool[Tensor, "b E"], Float[Tensor, "b E"]]:
        """Which elements of both phases are hidden, and the weights of their losses."""
        noise = random.uniform(canvas.open.shape, Key(canvas.row, 0, numbered(ORDER)))
        maskings, factors = (self.masking, self.fine), self.weights
        if not self.training:
            maskings, factors = self.judged, (1.0, 1.0)
        pivot = coarse(canvas.layout)
        hidden, weight = torch.zeros_like(canvas.open), torch.zeros(canvas.open.shape)
        for k, (masking, factor) in enumerate(zip(maskings, factors, strict=True)):
            unit, place = (
                random.uniform((canvas.batch, 1), Key(canvas.row, 0, numbered(ORDER, 0, 1 + 2 * k + i)))[:, 0]
                for i in range(2)
            )
            mine = pivot == (k == 0)  # shares of a batch lie evenly, in each phase in an order of its own
            part, by_row = masking(canvas.open & mine, (place.argsort() + unit) / canvas.batch, noise)
            hidden, weight = hidden | part, torch.where(mine, factor * by_row[:, None].to(weight), weight)
        return hidden, weight

    def hidden_losses(
        self,
        canvas: Canvas,
        hidden: Bool[Tensor, "b E"],
        condition: Mapping[str, Tensor] | Condition | None = None,
        drop: Bool[Tensor, "b"] | None = None,
        random: Random | None = None,
    ) -> Float[Tensor, "b E"]:
        """The loss of each hidden element, pivots given those shown, fine ones given those shown and what is told of
        the pivots; of a head that draws maps as a whole that of all fine elements. 0 elsewhere."""
        order, pivot, random = self.factorization, coarse(canvas.layout), random or Generator()
        encoded = condition if isinstance(condition, Condition) else self.encode(condition, drop)
        first = showing(self, canvas, ~canvas.open | (pivot & ~hidden))
        plan = order.coarse(first)
        h = self.hidden(plan, first, None, encoded)
        states = h.detach()[:, order.prefix : order.prefix + int(pivot.sum())]
        second = self.second(canvas, hidden, states, random)
        then = order.fine(second)
        if self._sound is not order:  # an order that peeks is refused before it is trained
            plan.check(self.mixers, first.open & pivot)
            then.check(self.mixers, second.open & ~pivot)
            self._sound = order
        losses = self.losses_at(h, plan.reads, canvas, random=random)
        return losses + self._fine(self.hidden(then, second, None, encoded), then, canvas, random)

    def second(self, canvas: Canvas, hidden: Bool[Tensor, "b E"], h: Tensor, random: Random) -> Canvas:
        """What the fine phase sees of finished samples. h: the states of all pivots in the first."""
        pivot = coarse(canvas.layout)
        told = torch.ones(canvas.batch, 1, dtype=torch.bool)
        if self.training and self.told < 1:
            told = random.uniform((canvas.batch, 1), Key(canvas.row, 0, numbered(ORDER, 0, 5))) < self.told
        known = ~canvas.open | (~pivot & ~hidden)
        if self.factorization.told == "values":
            return showing(self, canvas, known | (pivot & told))
        second = showing(self, canvas, known)
        element = torch.where(pivot & hidden & told, torch.arange(canvas.layout.size), -1)
        (kind,) = canvas.layout.kinds
        return second.apply([Set(canvas.value[kind], element), Remember(element[:, pivot], h)])

    def _fine(self, h: Tensor, plan: PhasePlan, canvas: Canvas, random: Random) -> Float[Tensor, "b E"]:
        (kind,) = canvas.layout.kinds
        head: Any = self.heads[kind]
        if not getattr(getattr(head, "fine", None), "whole", False):
            return self.losses_at(h, plan.reads, canvas, random=random)
        element = (~coarse(canvas.layout)).nonzero()[:, 0]
        value, key = canvas.value[kind][:, element], Key(canvas.row, element[None])
        loss = head.fine.loss(pick_slots(h, plan.reads.slot), Reads(plan.reads.slot, element[None]), value, random, key)
        out = loss.new_zeros(canvas.batch, canvas.layout.size)
        return out.index_copy(1, element.to(out.device), loss * canvas.open[:, element].to(loss))
