"""Slots of several kinds in one forward: each embedded by the part that knows its kind, as the layout routes it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from seriatim.canvas import Canvas
from seriatim.decoding.guess import Guess
from seriatim.initial import drawn
from seriatim.plan import LEARNED, Plan, Reads
from seriatim.view import full


class ByKind(nn.Module):
    """A table of embeddings, one for each kind of element.

    Slots that carry no element (registers, markers, a start) take a learned vector each, by their first coordinate, or
    what a condition puts in their place: `learned` is how many there are, `width` that of the vectors.
    """

    def __init__(self, embeds: Mapping[str, nn.Module], width: int, learned: int = 0, std: float = 0.02):
        super().__init__()
        if not embeds:
            raise ValueError("ByKind needs the embedding of at least one kind of element")
        self.embeds = nn.ModuleDict(embeds)
        self.width = width
        self.learned = nn.Parameter(drawn(learned, width, std=std))

    def forward(
        self, canvas: Canvas, plan: Plan, guess: Guess | None = None, prefix: Tensor | None = None
    ) -> Float[Tensor, "b s d"]:
        if guess is not None:
            raise ValueError("drafts stand in slots of one kind; embed them without ByKind")
        layout, first = canvas.layout, plan.slots.element[..., 0]
        kind = torch.where(first >= 0, layout.kind[first.clamp(min=0)], -1)
        x = self._vectors(plan, prefix, canvas.batch)
        for number, name in enumerate(layout.kinds):
            mine = kind == number
            if not bool(mine.any()):
                continue
            if name not in self.embeds:
                raise ValueError(f"no embedding for elements of kind {name!r}; there are {', '.join(self.embeds)}")
            columns = mine.any(0).nonzero()[:, 0]
            part = self.embeds[name](canvas, _columns(plan, columns), None, None)
            here = mine[:, columns, None].to(x.device)
            x = x.to(part.dtype).index_copy(1, columns.to(x.device), torch.where(here, part, x[:, columns].to(part)))
        return x

    def _vectors(self, plan: Plan, prefix: Tensor | None, batch: int) -> Float[Tensor, "b s d"]:
        """Learned vectors at slots without an element, zeros elsewhere."""
        empty = plan.slots.source == LEARNED
        table = self.learned[None] if prefix is None else prefix
        if not bool(empty.any()):
            return table.new_zeros(batch, plan.size, self.width)
        index = plan.slots.coord[..., 0]
        needed = int(index[empty.expand_as(index)].max()) + 1
        if needed > table.shape[1]:
            raise ValueError(
                f"slots without an element ask for {needed} learned vectors, there are {table.shape[1]}; say "
                "`learned` in ByKind, or number them from 0 by their first coordinate"
            )
        index = torch.where(empty, index, 0).to(table.device).expand(batch, -1)
        vectors = table.expand(batch, -1, -1).gather(1, index[..., None].expand(-1, -1, self.width))
        return vectors * empty[..., None].to(vectors)


def _columns(plan: Plan, columns: Int[Tensor, "m"]) -> Plan:
    """Some slots of a plan, as labels for an embedding: nobody reads or sees anything here."""
    nothing = torch.zeros(1, 0, dtype=torch.long)
    slots = plan.slots.take(columns[None])
    views = {"all": full(len(columns))}
    return Plan(slots, views, Reads(nothing, nothing), plan.rank, layout=plan.layout)
