"""Unmasking of texts: block after block, some tokens at each step, until a text ends (LLaDA, Nie et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from seriatim.canvas import DELETED, GIVEN, Canvas, Truncate
from seriatim.decoding.guess import Guess
from seriatim.decoding.loop import Step
from seriatim.decoding.sample import Rule, Select
from seriatim.model import Rows
from seriatim.random import Random
from seriatim.view import INF


@dataclass(frozen=True)
class Unmask:
    """Decide unknown elements, those of smallest rank first (a block), some at each step by `Select`.

    `steps` are those of the whole text, shared evenly by its blocks (LLaDA). A row ends at the first of the `stop` ids
    with nothing unknown before it.
    """

    steps: int
    rule: Rule = "confidence"
    threshold: float | None = None
    stop: tuple[int, ...] = ()

    def decide(self, canvas: Canvas, guess: Guess | None, rows: Rows, random: Random) -> Step:
        length = self._ends(canvas)
        if length is not None:
            return Step((Truncate(length),))
        element = torch.as_tensor(rows.element).expand(canvas.batch, -1)
        rank = canvas.rank.gather(1, element.clamp(min=0)).masked_fill(element < 0, INF)
        now = torch.where(rank == rank.amin(1, keepdim=True), element, -1)
        ranks = canvas.rank[canvas.rank >= 0]  # without what is given
        blocks = int(ranks.max() - ranks.min()) + 1
        select = Select(self.rule, max(self.steps // blocks, 1), threshold=self.threshold)
        return select.decide(canvas, guess, rows._replace(element=now), random)

    def _ends(self, canvas: Canvas) -> Int[Tensor, "b"] | None:
        """Where each row ends, if any that ends has something behind its end."""
        if not self.stop:
            return None
        size = canvas.layout.size
        stops = torch.isin(canvas.value["token"].cpu(), torch.tensor(self.stop)) & (canvas.status != GIVEN)
        stops &= canvas.known.long().cumprod(1).bool()
        first = torch.where(stops, torch.arange(size), size - 1).amin(1) + 1
        behind = (torch.arange(size) >= first[:, None]) & (canvas.status != DELETED)
        return first if bool(behind.any()) else None
