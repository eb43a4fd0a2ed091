"""The rows of one forward pass and what is read out at them: labels only, batch 1 when the batch shares them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

VALUE, MASK, NOISE, DERIVED, LEARNED = 0, 1, 2, 3, 4
SOURCES = ("value", "mask", "noise", "derived", "learned")


@dataclass(frozen=True, eq=False)
class Slots:
    """Rows of one forward: labels only, batch 1 when the batch shares them.

    `element` lists what a slot carries (-1: nothing; several: summed codes, a fused window), `source` how: its VALUE,
    a MASK in its place, its NOISE, something DERIVED from other elements, a LEARNED vector. `needs` is the highest
    rank on which the content depends (-1: nothing that is generated); a VALUE needs its element, whatever is said here
    (`Plan.needs`). `node` marks slots that carry a node of the
    guess under verification (-1: none) in place of what stands in the canvas.
    """

    element: Int[Tensor, "b s c"]
    source: Int[Tensor, "b s"]
    coord: Int[Tensor, "b s axes"]
    needs: Int[Tensor, "b s"]
    node: Int[Tensor, "b s"] | None = None

    def take(self, index: Int[Tensor, "b m"]) -> Slots:
        """These slots in this order; -1 gives padding."""
        node = None if self.node is None else gather(self.node, index)
        element, source, coord, needs = (gather(x, index) for x in (self.element, self.source, self.coord, self.needs))
        return Slots(element, source, coord, needs, node)

    def row(self, row: int) -> Slots:
        """The slots of one row of the batch."""
        node = None if self.node is None else only(self.node, row)
        return Slots(
            only(self.element, row), only(self.source, row), only(self.coord, row), only(self.needs, row), node
        )


@dataclass(frozen=True, eq=False)
class Spawn:
    """Slots that are fed nothing: slot `first` + i begins in front of layer `layer` (from 0), as `matrix` times what
    slot `source`[:, i] has become by then. Sources stand in the forward from its beginning. Slots that begin later
    stand further behind, and none sees a slot that begins after it."""

    layer: int
    first: int
    source: Int[Tensor, "b m"]
    matrix: Float[Tensor, "d d"]


@dataclass(frozen=True, eq=False)
class Reads:
    """Read-outs: at `slot`, the distribution of `element`, by the head's `role` (several predictors of one element)."""

    slot: Int[Tensor, "b m"]
    element: Int[Tensor, "b m"]
    role: Int[Tensor, "b m"] | None = None

    def row(self, row: int) -> Reads:
        """The read-outs of one row of the batch."""
        role = None if self.role is None else only(self.role, row)
        return Reads(only(self.slot, row), only(self.element, row), role)


def slots_of(
    element: Sequence[int | Sequence[int]],
    rank: Sequence[int] | Tensor,
    source: int | Sequence[int] = VALUE,
    needs: Sequence[int] | Tensor | None = None,
    coord: Sequence[Sequence[int]] | Tensor | None = None,
) -> Slots:
    """Slots shared by the batch, from plain lists.

    `element`: what each slot carries, a number, several, or -1 for nothing. `rank` is that of each element, as in the
    plan. `needs` defaults to the highest rank among the elements whose value (or something derived from it) a slot
    carries; masks, noise and learned vectors need nothing. `coord` defaults to the number of the slot.
    """
    carried = [[e] if isinstance(e, int) else list(e) for e in element]
    width = max([len(c) for c in carried], default=1) or 1
    elements = torch.tensor([c + [-1] * (width - len(c)) for c in carried], dtype=torch.long).reshape(1, -1, width)
    sources = torch.as_tensor(source, dtype=torch.long).expand(len(carried))[None]
    ranks = torch.as_tensor(rank, dtype=torch.long).reshape(-1)
    if needs is None:
        tells = ((sources == VALUE) | (sources == DERIVED))[:, :, None] & (elements >= 0)
        highest = torch.where(tells, ranks[elements.clamp(min=0)], -1).amax(2) if len(ranks) else elements[..., 0]
    else:
        highest = torch.as_tensor(needs, dtype=torch.long).reshape(1, -1)
    place = torch.arange(len(carried))[:, None] if coord is None else torch.as_tensor(coord, dtype=torch.long)
    return Slots(elements, sources, place[None], highest)


def reads_at(slot: Sequence[int] | Tensor, element: Sequence[int] | Tensor, role: Sequence[int] | None = None) -> Reads:
    """Read-outs shared by the batch, from plain lists."""
    rows = [torch.as_tensor(x, dtype=torch.long).reshape(1, -1) for x in (slot, element)]
    return Reads(rows[0], rows[1], None if role is None else torch.as_tensor(role)[None])


def gather(x: Tensor, index: Int[Tensor, "b m"]) -> Tensor:
    """x[b, index[b, j]]; padding (-1) gives -1."""
    where, pad = index.clamp(min=0), index < 0
    if x.shape[1] == 0:  # nothing to pick from: all padding
        batch = max(x.shape[0], index.shape[0])
        return x.new_full((batch, index.shape[1], *x.shape[2:]), -1)
    out = x[0][where] if x.shape[0] == 1 else x[torch.arange(x.shape[0])[:, None], where]
    if bool(pad.any()):
        out = out.masked_fill(pad.reshape(*pad.shape, *[1] * (x.dim() - 2)), -1)
    return out


def ragged(chosen: Bool[Tensor, "b n"]) -> Int[Tensor, "b m"]:
    """Indices of the true entries of each row, padded with -1 to the longest row."""
    n = chosen.shape[1]
    order = torch.where(chosen, torch.arange(n), n).sort(1).values
    order = order[:, : int(chosen.sum(1).max())] if n else order
    return torch.where(order < n, order, -1)


def only(x: Tensor, row: int) -> Tensor:
    """One row, as a batch of one."""
    return x[row if x.shape[0] > 1 else 0][None]


def below_own(rows: Int[Tensor, "b2"], batch: int) -> Int[Tensor, "b2"]:
    """Rows to select where new ones, -1 each, stand behind `batch` own ones in the order in which they are named."""
    new = rows < 0
    return torch.where(new, batch + new.long().cumsum(0) - 1, rows)
