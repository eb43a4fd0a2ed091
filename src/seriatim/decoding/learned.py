"""Elements that are decided as a learned filter takes their values for final (Learn2PD, 2025, arXiv 2509.25188)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from seriatim.canvas import Canvas
from seriatim.decoding.sample import Above, first_of

TRUSTED = Above(1.5)  # what `Trusted` and an oracle rank above all confidences: it is decided at once


@dataclass(frozen=True)
class Trusted:
    """A `Scorer` for the commit `TRUSTED`: everything that the filter accepts is decided, and by confidence at least
    one where it accepts nothing.

    filter: logits for each place of a block from the confidences there, 1 where nothing is to be decided; threshold: on
    their sigmoid (1: nothing is accepted). It sees one block: elements of others are padding here.
    """

    filter: Callable[[Float[Tensor, "b B"]], Float[Tensor, "b B"]]
    size: int
    threshold: float

    def __call__(
        self, canvas: Canvas, element: Int[Tensor, "b m"], x: Int[Tensor, "b m"], score: Float[Tensor, "b m"]
    ) -> Float[Tensor, "b m"]:
        sure, place = by_place(canvas, element, score, self.size)
        accepted = torch.sigmoid(self.filter(sure)).cpu() > self.threshold
        return torch.where(accepted.gather(1, place) & (element >= 0), 2 + score, score)


def by_place(
    canvas: Canvas, element: Int[Tensor, "b m"], score: Float[Tensor, "b m"], size: int
) -> tuple[Float[Tensor, "b B"], Int[Tensor, "b m"]]:
    """Scores of unknown elements of a block by their places in it, 1 elsewhere; and these places. Raises ValueError for
    blocks longer than `size`."""
    live = element >= 0
    now = canvas.rank.gather(1, first_of(element).clamp(max=canvas.layout.size - 1))
    block = torch.where(canvas.rank == now, torch.arange(canvas.layout.size), -1)
    place = torch.where(live, element - first_of(block), size)
    if bool((live & (place >= size)).any()):
        raise ValueError(
            f"this filter looks at blocks of {size} tokens, and here is a longer one: decide no more at once"
        )
    sure = torch.ones(len(element), size + 1, dtype=score.dtype).scatter(1, place, torch.where(live, score, 1))
    return sure[:, :-1], place.clamp(max=size - 1)
