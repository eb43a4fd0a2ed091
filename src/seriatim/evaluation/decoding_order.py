"""In which order elements were decided, from the stream of steps, and how much like reading order that is.

Correlations are with the order that would be left to right with as many elements at each turn (ParallelBench): 1 for
left to right, however many at once, 0 on the mean for random, -1 for right to left, and not defined (NaN) where all
were decided together.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from seriatim.canvas import Canvas, Set, Unset
from seriatim.decoding.loop import Step


def decided_at(steps: Iterable[Step], canvas: Canvas) -> Int[Tensor, "b E"]:
    """The turn, from 0, that decided each element for good; -1 where none did (given, or unknown still). Drains the
    steps of a decoding of this canvas, of which rows neither come nor go."""
    at = torch.full((canvas.batch, canvas.layout.size), -1)
    start = canvas.length
    for turn, step in enumerate(steps):
        if step.select is not None:
            raise ValueError("rows came and went while they were decided: their order has to be followed row by row")
        for edit in step.edits:
            if isinstance(edit, Set) and edit.element is None:
                assert start is not None
                at[:, start : start + edit.value.shape[1]] = turn
                start += edit.value.shape[1]
            elif isinstance(edit, Set | Unset):
                element: Tensor = edit.element  # type: ignore[assignment]
                b, i = (element >= 0).nonzero(as_tuple=True)
                at[b, element[b, i]] = turn if isinstance(edit, Set) else -1
    return at


def kendall(at: Int[Tensor, "b n"]) -> Float[Tensor, "b"]:
    """Kendall's tau (b, which allows for ties) of each row with reading order."""
    i, j = torch.triu_indices(at.shape[1], at.shape[1], 1)
    said, left_to_right = ((x[:, j] - x[:, i]).sign().double() for x in (at, at.sort(1).values))
    return (said * left_to_right).sum(1) / (said.square().sum(1) * left_to_right.square().sum(1)).sqrt()


def spearman(at: Int[Tensor, "b n"]) -> Float[Tensor, "b"]:
    """Spearman's correlation of ranks (those of ties are their mean) of each row with reading order."""
    said, left_to_right = (_ranks(x) for x in (at, at.sort(1).values))
    said, left_to_right = (x - x.mean(1, keepdim=True) for x in (said, left_to_right))
    return (said * left_to_right).sum(1) / (said.square().sum(1) * left_to_right.square().sum(1)).sqrt()


def _ranks(x: Int[Tensor, "b n"]) -> Float[Tensor, "b n"]:
    below = (x[:, None] < x[:, :, None]).sum(2)
    return below.double() + ((x[:, None] == x[:, :, None]).sum(2) - 1) / 2


def turns_of(at: Int[Tensor, "b E"], mine: Bool[Tensor, "b E"]) -> Int[Tensor, "b"]:
    """Turns until each row was done with these elements."""
    return torch.where(mine, at, -1).amax(1) + 1
