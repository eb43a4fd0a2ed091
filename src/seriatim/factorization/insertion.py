"""Generation by insertion: no places are fixed before, tokens appear anywhere between those that are there.

Insertion Transformer (Stern et al. 2019), insertion language models (Patel et al. 2025). Element 0 is the open end of
the sample: it stands in front, carries nothing, and is deleted when nothing more is to be inserted. A slot stands for a
known element (the first for the open end), in reading order and with its present place as coordinate; there is read
what comes right behind it. Places move with every insertion, so nothing is worth keeping in a cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seriatim.canvas import Canvas
from seriatim.decoding.guess import Guess
from seriatim.factorization.base import Factorization
from seriatim.plan import LEARNED, VALUE, OrderError, Plan, Reads, Slots
from seriatim.view import INF, full


class Insertion(Factorization):
    """Everybody sees everybody; read-outs are at slots, not of elements that exist. A sample can be reached in many
    ways, so there is no likelihood."""

    likelihood = "none"

    def step(self, canvas: Canvas, guess: Guess | None, cached: int | Tensor) -> Plan | None:
        if guess is not None:
            raise OrderError("insertions cannot be drafted; decode without a proposer")
        open_ = canvas.open
        if bool(open_[:, 1:].any()):
            raise OrderError(
                "element 0 stands for what is to be inserted; all others are given or inserted, not unknown"
            )
        rows = open_[:, :1]
        if not bool(rows.any()):
            return None
        there = canvas.known & rows
        there[:, :1] = rows
        place = canvas.place.masked_fill(~there, INF)
        place[:, 0] = torch.where(rows[:, 0], -1, INF)
        count = there.sum(1, keepdim=True)
        order = place.argsort(dim=1, stable=True)[:, : int(count.max())]
        slot = torch.arange(order.shape[1])[None]
        live = slot < count
        read = torch.where(live, order, -1)
        slots = Slots(
            torch.where(read > 0, read, -1)[..., None],
            torch.where(read == 0, LEARNED, VALUE),
            slot[..., None],
            torch.full_like(slot, -1),
        )
        view = full(order.shape[1])
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
