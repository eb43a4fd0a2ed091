"""Any subset given: what is known at once, then what is not, one after another (any-subset autoregressive models).

Of all orders of n elements only 2^n are left: any set of known ones, then the others from left to right (Shih et al.
2022, arXiv 2205.13554; Guo & Ermon 2025). So each conditional p(x_i | what is known, the unknown ones before i) is met
in one order only, and one forward scores any infilling exactly.

Two streams (XLNet, Yang et al. 2019, arXiv 1906.08237): values see what is known, and of the rest the values up to
their own rank; a query, which is a mask in place of an element, sees the values of lower rank and itself. Nobody sees a
query, so that several may read together without knowing of each other.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from seriatim.canvas import DELETED, Canvas
from seriatim.decoding.guess import Guess
from seriatim.factorization.base import Factorization
from seriatim.plan import MASK, VALUE, OrderError, Plan, Reads, Slots
from seriatim.slots import gather, ragged
from seriatim.view import INF, View, timed


class AnySubset(Factorization):
    """Known elements, then the unknown ones by rank: from left to right, unless the canvas says otherwise (ranks that
    are all different).

    A guess is a chain: its nodes stand for the next elements. Read is the element of each node, given the nodes before
    it, and none behind the last. Nodes that hold no token (-1) show nothing: a guess without any token reads so many
    elements at once, each given only what is known.
    """

    verifies = True

    def packed(self, canvas: Canvas) -> Plan:
        """[values; queries of what is not given]."""
        rank, there = _shared(canvas.rank, canvas.status != DELETED)
        value = torch.where(there, torch.arange(canvas.layout.size), -1)
        read = ragged((rank >= 0) & there)
        if not read.shape[1]:  # nothing to read: padding
            read = torch.full((len(read), 1), -1)
        element = torch.cat([value.expand(len(read), -1), read], 1)
        query = torch.arange(element.shape[1])[None] >= value.shape[1]
        slots, view = _labels(canvas, rank, element, query)
        slot = torch.where(read >= 0, torch.arange(value.shape[1], element.shape[1]), -1)
        return Plan(slots, {"all": view}, Reads(slot, read), rank, layout=canvas.layout)

    def step(self, canvas: Canvas, guess: Guess | None, cached: int | Tensor) -> Plan | None:
        """[values that are not cached yet; tokens of the guess; queries of what comes next]."""
        if canvas.done:
            return None
        if guess is not None and not guess.chain:
            raise OrderError("a draft in this order is a chain: its nodes stand for the next elements, one each")
        known, open_, rank = canvas.known, canvas.open, canvas.rank
        nodes = torch.full((1, 1), -1) if guess is None else guess.value.cpu()
        held = torch.as_tensor(cached).reshape(-1, 1)
        rank, known, open_, nodes, held = _shared(rank, known, open_, nodes, held)
        count = known.sum(1, keepdim=True)
        self._in_order(known, open_, rank, count, held)
        old = _by_rank(rank, known)
        fresh = torch.arange(old.shape[1])[None]
        fresh = torch.where((fresh >= held) & (fresh < count) & open_.any(1, keepdim=True), old, -1)
        ahead = _by_rank(rank, open_)[:, : nodes.shape[1]]
        nodes = nodes[:, : ahead.shape[1]]
        drafted = torch.where(nodes >= 0, ahead, -1)

        element = torch.cat([fresh, drafted, ahead], 1)
        live = element >= 0
        index = ragged(live)  # each row's slots without holes
        place = torch.where(live, live.long().cumsum(1) - 1, -1)
        query = torch.arange(element.shape[1])[None] >= element.shape[1] - ahead.shape[1]
        node = torch.arange(element.shape[1])[None] - fresh.shape[1]
        node = torch.where((node >= 0) & ~query, node, -1)
        element, query, node = (gather(x.expand(len(element), -1), index) for x in (element, query.long(), node))
        slots, view = _labels(canvas, rank, element, query > 0, None if guess is None else node)
        reads = Reads(place[:, -ahead.shape[1] :], ahead)
        kept = ragged((index >= 0) & (index < fresh.shape[1]))
        return Plan(slots, {"all": view}, reads, canvas.rank, layout=canvas.layout, kept=kept)

    def _in_order(self, known: Tensor, open_: Tensor, rank: Tensor, count: Tensor, held: Tensor) -> None:
        """Refuse a canvas that was not decided in this order, and a cache that belongs to another."""
        late = rank.masked_fill(~known, -1).amax(1) > rank.masked_fill(~open_, INF).amin(1)
        if bool(late.any()):
            raise OrderError(
                f"in row {int(late.nonzero()[0])} an element was decided before one of lower rank; elements known "
                "beforehand are given (`known`), the others decided one after another"
            )
        more = open_.any(1, keepdim=True) & (held > count)
        if bool(more.any()):
            raise OrderError(
                f"{held.flatten().tolist()} slots are cached, and {count.flatten().tolist()} elements are known: what "
                "was decided stays (no remasking in this order), and a step keeps values only"
            )


def _labels(
    canvas: Canvas,
    rank: Int[Tensor, "b E"],
    element: Int[Tensor, "b s"],
    query: Bool[Tensor, "#b s"],
    node: Int[Tensor, "b s"] | None = None,
) -> tuple[Slots, View]:
    """Slots that stand for these elements (-1: padding), and who sees whom."""
    there = element >= 0
    due = gather(rank.expand(len(element), -1), element)
    at = 2 * due + (~query).long()
    view = timed(at, at, torch.where(query, at, INF))  # a query dies as it is born: only it sees itself
    if not bool(there.all()):
        view = view.narrow(lane=torch.where(there, 0, -1))
    source = torch.where(query, MASK, VALUE).expand(len(element), -1)
    coord = canvas.layout.coord[element.clamp(min=0)]
    return Slots(element[..., None], source, coord, torch.where(query, -1, due), node), view


def _by_rank(rank: Int[Tensor, "b E"], chosen: Bool[Tensor, "b E"]) -> Int[Tensor, "b m"]:
    """The chosen elements of each row, by rank and then by number; -1 behind them."""
    order = rank.masked_fill(~chosen, INF).argsort(dim=1, stable=True)
    count = chosen.sum(1, keepdim=True)
    return torch.where(torch.arange(rank.shape[1]) < count, order, -1)[:, : int(count.max())]


def _shared(*labels: Tensor) -> tuple[Tensor, ...]:
    """Labels that are the same in all rows, as one row; else as many rows of each."""
    if all(x.shape[0] == 1 or bool((x == x[:1]).all()) for x in labels):
        return tuple(x[:1] for x in labels)
    rows = max(x.shape[0] for x in labels)
    return tuple(x.expand(rows, -1) for x in labels)
