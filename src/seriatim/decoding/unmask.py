"""Unmasking of texts: block after block, some tokens at each step, until a text ends (LLaDA, Nie et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Int
from torch import Tensor

from seriatim.canvas import DELETED, GIVEN, Canvas, Truncate
from seriatim.decoding.guess import Guess
from seriatim.decoding.loop import Step
from seriatim.decoding.sample import Select
from seriatim.model import Rows
from seriatim.random import Random
from seriatim.view import INF


@dataclass
class Unmask:
    """Decide unknown elements, those of smallest rank first (a block), some at each step by `select`.

    The steps of `select` are those of the whole text, shared evenly by its blocks (LLaDA). A row ends at the first of
    the `stop` ids with nothing unknown before it.
    """

    select: Select
    stop: tuple[int, ...] = ()
    _of_block: dict[int, Select] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def redraws(self) -> bool:
        return self.select.redraws

    def decide(self, canvas: Canvas, guess: Guess | None, rows: Rows, random: Random) -> Step:
        length = ends(canvas, self.stop)
        if length is not None:
            return Step((Truncate(length),))
        ranks = canvas.rank[canvas.rank >= 0]  # without what is given
        blocks = int(ranks.max() - ranks.min()) + 1
        if blocks not in self._of_block:
            self._of_block[blocks] = replace(self.select, steps=max(self.select.steps // blocks, 1))
        return self._of_block[blocks].decide(canvas, guess, rows._replace(element=at_work(canvas, rows)), random)


def at_work(canvas: Canvas, rows: Rows) -> Int[Tensor, "b m"]:
    """The elements that were read, of each row's block at work only: those of smallest rank; -1 for others."""
    element = torch.as_tensor(rows.element).expand(canvas.batch, -1)
    rank = canvas.rank.gather(1, element.clamp(min=0)).masked_fill(element < 0, INF)
    return torch.where(rank == rank.amin(1, keepdim=True), element, -1)


def ends(canvas: Canvas, stop: tuple[int, ...]) -> Int[Tensor, "b"] | None:
    """Where each row ends, if any that ends has something behind its end."""
    if not stop:
        return None
    size = canvas.layout.size
    stops = torch.isin(canvas.value["token"].cpu(), torch.tensor(stop)) & (canvas.status != GIVEN)
    stops &= canvas.known.long().cumprod(1).bool()
    first = torch.where(stops, torch.arange(size), size - 1).amin(1) + 1
    behind = (torch.arange(size) >= first[:, None]) & (canvas.status != DELETED)
    return first if bool(behind.any()) else None
