"""Generation by insertion: no places are fixed before, tokens appear anywhere between those that are there.

Insertion Transformer (Stern et al. 2019), insertion language models (Patel et al. 2025). An unknown element is a *gap*:
a place in the reading order where any number of elements may be inserted, until it is deleted. A learned start stands
in front of every text; behind it stand the known elements in reading order, a slot each, with their present place as
coordinate. A slot reads what comes right behind it: the one in front of a gap, and those of inserted elements. What was
given is kept together, so a gap between two given texts is infilling. Places move with every insertion, so nothing is
worth keeping in a cache.
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from seriatim.canvas import DECIDED, Canvas, Insert, Unset
from seriatim.decoding.guess import Guess
from seriatim.factorization.base import Factorization
from seriatim.plan import LEARNED, VALUE, OrderError, Plan, Reads, Slots
from seriatim.view import INF, full


class Insertion(Factorization):
    """Everybody sees everybody; read-outs are at slots, not of elements that exist: a slot reads the number of the
    element behind which it inserts (its own, or that of the gap), -1 where nothing may be inserted.

    A sample can be reached in as many ways as its elements have orders, which bounds its likelihood."""

    likelihood = "bound"

    def step(self, canvas: Canvas, guess: Guess | None, cached: int | Tensor) -> Plan | None:
        if guess is not None:
            raise OrderError("insertions cannot be drafted; decode without a proposer")
        gaps = canvas.open
        rows = gaps.any(1, keepdim=True)
        if not bool(rows.any()):
            return None
        known = canvas.known & rows
        place = canvas.place.masked_fill(~(known | gaps), INF)
        order = place.argsort(dim=1, stable=True)[:, : int((known | gaps).sum(1).max())]
        gap, token = gaps.gather(1, order), known.gather(1, order)
        if bool((gap[:, 1:] & gap[:, :-1]).any()):
            raise OrderError(
                "an unknown element is a gap, for any number of insertions, and two stand side by side here: let one "
                "of them be unknown, and all other elements given or decided"
            )
        slot = token.long().cumsum(1)  # of a token; of a gap that of what stands in front of it
        size = int(slot.max()) + 1
        nothing = torch.full((canvas.batch, size + 1), -1)
        element = nothing.scatter(1, torch.where(token, slot, size), order)[:, :size]
        inserted = canvas.status.gather(1, element.clamp(min=0)) == DECIDED
        read = torch.where(inserted & (element >= 0), element, -1)
        read = torch.cat([read, nothing[:, :1]], 1).scatter(1, torch.where(gap, slot, size), order)[:, :size]
        slot = torch.arange(size)[None]
        live = slot < (known.sum(1, keepdim=True) + 1) * rows
        slots = Slots(
            element[..., None],
            torch.where(slot == 0, LEARNED, VALUE),
            slot[..., None],
            torch.full_like(slot, -1),
        )
        view = full(size)
        if not bool(live.all()):
            view = view.narrow(lane=torch.where(live, 0, -1))
        reads = Reads(torch.where(live, slot, -1), read)
        rank = torch.zeros(1, canvas.layout.size, dtype=torch.long)  # what is inserted comes after all that is there
        return _Between(slots, {"all": view}, reads, rank, kept=slot[:, :0])


class _Between(Plan):
    """What is read here is new: it is named by what it comes behind, which is there already."""

    @property
    def needs(self) -> Tensor:  # type: ignore[override]
        return self.slots.needs


def opened(canvas: Canvas, after: Int[Tensor, "b"]) -> Canvas:
    """The canvas with a gap behind element `after` of each row (-1: in front), in place; it gets the last number."""
    value = torch.zeros(canvas.batch, dtype=torch.long)
    canvas.apply([Insert(after, value)])
    return canvas.apply([Unset(torch.full((canvas.batch, 1), canvas.layout.size - 1))])
