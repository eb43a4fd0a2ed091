"""A coarse map, then a fine one, each in any order: the pivots of Hi-MAR (Zheng et al. 2025, arXiv 2505.20288).

Elements with first coordinate 0 are pivots. While any is unknown the forward is one of pivots alone, unknown ones as
masks; afterwards the fine elements stand behind them. What a fine forward is told of a pivot is the state from which it
was drawn (`Canvas.memo`), which training has at hand without drawing anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from seriatim.canvas import DECIDED, Canvas
from seriatim.decoding.guess import Guess
from seriatim.factorization.static import AnyOrder, behind
from seriatim.layout import Layout
from seriatim.plan import DERIVED, LEARNED, MASK, VALUE, OrderError, Plan, Reads, Slots
from seriatim.random import Random
from seriatim.view import full


@dataclass(frozen=True, eq=False)
class PhasePlan(Plan):
    """A forward over pivots (phase 0), or over pivots and fine elements, of which the fine ones are read (1)."""

    phase: int = 0


class Pivots(AnyOrder):
    """Pivots in any order, then the other elements in any order, everybody sees everybody.

    told: what stands in the slot of a pivot in fine forwards, the "states" from which pivots were drawn, or their
    "values". A pivot of which there is neither (given beforehand, where states are told; unknown) is a mask. `whole`:
    states of all fine slots are handed to the head, for one that draws the map as a whole; known ones are not read.
    prefix: so many slots in front carry no element (a class). masked: as in the released code, fine elements stand as
    masks behind the pivots while these are drawn, and of what is not told a learned vector stands in place of a mask.
    """

    def __init__(
        self, told: Literal["states", "values"] = "states", whole: bool = True, prefix: int = 0, masked: bool = False
    ):
        super().__init__(prefix=prefix)
        if told not in ("states", "values"):
            raise ValueError(f"of pivots either 'states' or 'values' are told, not {told!r}")
        self.told, self.whole, self.masked = told, whole, masked
        self.likelihood = "none"  # type: ignore[assignment]  # states from which pivots are drawn are seen, too

    def order(self, layout: Layout, random: Random | None = None) -> Tensor:
        return layout.coord[:, 0].clamp(max=1)[None]

    def step(self, canvas: Canvas, guess: Guess | None, cached: int | Tensor) -> Plan | None:
        if guess is not None:
            raise OrderError("elements decided in any order verify no drafts")
        if canvas.done:
            return None
        return self.coarse(canvas) if bool(canvas.open[:, coarse(canvas.layout)].any()) else self.fine(canvas)

    def coarse(self, canvas: Canvas) -> PhasePlan:
        """The forward of the pivots; what is known of finer elements is left aside."""
        pivot = coarse(canvas.layout)
        source = torch.where(canvas.open | ~pivot, MASK, VALUE)
        shown = torch.ones_like(pivot) if self.masked else pivot
        return self._plan(canvas, shown, source[:, shown], pivot, 0)

    def fine(self, canvas: Canvas) -> PhasePlan:
        """The forward of the fine elements, whatever is known of the pivots."""
        layout, known = canvas.layout, canvas.known
        told = known if self.told == "values" else (canvas.status == DECIDED) & (canvas.memo is not None)
        source = torch.where(known, VALUE, MASK)
        untold = LEARNED if self.masked else MASK
        pivot = torch.where(told, VALUE if self.told == "values" else DERIVED, untold)
        source = torch.where(coarse(layout), pivot, source)
        every = torch.ones(layout.size, dtype=torch.bool)
        return self._plan(canvas, every, source, ~coarse(layout), 1)

    def _plan(
        self, canvas: Canvas, shown: Bool[Tensor, "E"], source: Tensor, read: Bool[Tensor, "E"], phase: int
    ) -> PhasePlan:
        """A forward over the elements `shown`, whose slots hold `source`, reading the unknown ones of `read`."""
        layout, open_ = canvas.layout, canvas.open
        element, reads = shown.nonzero()[:, 0][None], read.nonzero()[:, 0][None]
        slots = Slots(element[..., None], source, layout.coord[element[0]][None], torch.full_like(source, -1))
        at = torch.searchsorted(element[0], reads[0])[None]
        unknown = open_[:, reads[0]]
        at = at.clone() if self.whole and phase else torch.where(unknown, at, -1)
        nothing, view = torch.zeros(1, 0, dtype=torch.long), full(element.shape[1])
        if self.prefix:
            slots, view, at = behind(self.prefix, slots, torch.zeros_like(source, dtype=torch.bool), at)
        return PhasePlan(
            slots, {"all": view}, Reads(at, torch.where(unknown, reads, -1)),
            torch.where(open_, layout.coord[:, 0].clamp(max=1), -1), layout=layout, kept=nothing,
            progress=share(canvas, read), phase=phase,
        )  # fmt: skip


def coarse(layout: Layout) -> Bool[Tensor, "E"]:
    """Which elements are pivots."""
    return layout.coord[:, 0] == 0


def share(canvas: Canvas, mine: Bool[Tensor, "E"]) -> Float[Tensor, "b 1"]:
    """The share of these elements that is decided, 1 where one is left."""
    decided = ((canvas.status == DECIDED) & mine).sum(1, keepdim=True)
    left = (canvas.open & mine).sum(1, keepdim=True)
    return decided / (decided + left - 1).clamp(min=1).double()
