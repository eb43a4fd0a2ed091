"""Keys and values, remembered in two phases.

A forward leaves its entries *pending*, right behind the committed ones; `commit` keeps some of them in a given order
and forgets the rest. All layers live in one buffer. While the entries are one run that every later slot sees, the
cache is *plain* and holds no labels; the first commit that breaks this writes the labels of each kind of layer out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from jaxtyping import Int
from torch import Tensor

from seriatim.plan import Plan
from seriatim.view import INF, View, join

Keep = int | Sequence[int] | Tensor


class Cache(Protocol):
    """Committed entries, then the pending ones of the last forward.

    `can` names what is possible beyond keeping a path of what is pending: subset, evict, replace. It is asked when
    parts are joined, never found out by failing.
    """

    can: frozenset[str]
    length: int | Tensor

    def begin(self, plan: Plan) -> None:
        """A forward of this plan starts: drop what is pending, make room."""
        ...

    def labels(self, view: str) -> View | None:
        """Labels of the committed entries in one kind of layer; None while plain."""
        ...

    def commit(self, keep: Keep, plan: Plan) -> None:
        """Keep pending slots in this order: the first n, a list of slots, or (batch, m) padded with -1."""
        ...

    def evict(self, retain: Int[Tensor, "b m"]) -> None:
        """Keep only these committed entries."""
        ...

    def select(self, rows: Int[Tensor, "b2"]) -> None:
        """Keep, copy, reorder rows."""
        ...

    def nbytes(self) -> int:
        """Bytes held by committed entries."""
        ...


class KVCache:
    """Keys and values of all layers, (layers, 2, batch, heads, columns, head_dim) in one buffer that grows by doubling.

    Rows of different lengths are kept left-aligned; the columns behind a shorter row carry lane -1.
    """

    can = frozenset({"subset", "evict", "replace"})

    def __init__(self, layers: int, batch: int, heads: int, head_dim: int, dtype: torch.dtype, device, capacity=256, names=("all",)):
        self.names = tuple(names)  # the kinds of layer, each with labels of its own
        self.buffer = torch.empty(layers, 2, batch, heads, capacity, head_dim, dtype=dtype, device=device)
        self.columns = 0  # committed
        self.pending = 0
        self.rows: Tensor | None = None  # committed entries of each row, once they differ
        self._labels: dict[str, View] | None = None
        self._layers: Tensor | None = None  # [layer, column]: was it computed there?
        self._split()

    def _split(self) -> None:
        self.keys, self.values = [b[0] for b in self.buffer], [b[1] for b in self.buffer]

    @property
    def length(self) -> int | Tensor:
        """Committed entries: one number, or one a row."""
        return self.columns if self.rows is None else self.rows

    @property
    def device(self) -> torch.device:
        return self.buffer.device

    @property
    def plain(self) -> bool:
        """Every entry is seen by everything later; no labels are held."""
        return self._labels is None

    def begin(self, plan: Plan) -> None:
        n = plan.size
        if self.columns + n > self.buffer.shape[4]:
            more = max(self.columns + n, 2 * self.buffer.shape[4])
            wide = self.buffer.new_empty(*self.buffer.shape[:4], more, self.buffer.shape[5])
            wide[..., : self.columns, :] = self.buffer[..., : self.columns, :]
            self.buffer = wide
            self._split()
        self.pending = n

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write the pending keys and values (batch, heads, slots, head_dim) of a layer; all that can be read there."""
        start, end = self.columns, self.columns + self.pending
        keys, values = self.keys[layer], self.values[layer]
        keys[:, :, start:end] = k
        values[:, :, start:end] = v
        return keys[:, :, :end], values[:, :, :end]

    def labels(self, view: str) -> View | None:
        return None if self._labels is None else self._labels[view]

    def computed(self, layer: int) -> Tensor | None:
        """Which committed columns were computed in a layer (boolean); None: all."""
        return None if self._layers is None else self._layers[layer]

    def commit(self, keep: Keep, plan: Plan) -> None:
        if isinstance(keep, Tensor):
            self._commit_ragged(keep, plan)
        else:
            n = keep if isinstance(keep, int) else len(keep)
            if n > self.pending:
                raise ValueError(f"{n} slots cannot be kept of {self.pending} pending ones")
            if not (self.plain and plan.plain):
                index = torch.arange(n) if isinstance(keep, int) else torch.tensor(keep, dtype=torch.long)
                self._note(index[None], plan)
            if not isinstance(keep, int):
                self._gather(keep)
            self.columns += n
            if self.rows is not None:
                self.rows = self.rows + n
        self.pending = 0

    def _gather(self, keep: Sequence[int]) -> None:
        """Bring a path together, moving only what is out of place."""
        still = 0
        while still < len(keep) and keep[still] == still:
            still += 1
        if still < len(keep):
            source = torch.tensor([self.columns + i for i in keep[still:]], device=self.buffer.device)
            start = self.columns + still
            self.buffer[..., start : start + len(keep) - still, :] = self.buffer.index_select(4, source)

    def _commit_ragged(self, keep: Int[Tensor, "b m"], plan: Plan) -> None:
        batch = self.buffer.shape[2]
        keep = keep.expand(batch, -1)
        count = (keep >= 0).sum(1)
        rows = torch.full((batch,), self.columns) if self.rows is None else self.rows
        same = bool((rows + count == (rows + count)[0]).all()) and self.rows is None and bool((count == count[0]).all())
        self._note(keep, plan)
        b, j = (keep >= 0).nonzero(as_tuple=True)
        source = self.columns + keep[b, j]
        nth = (keep >= 0).long().cumsum(1)[b, j] - 1
        moved = self.buffer[:, :, b, :, source]
        self.buffer[:, :, b, :, rows[b] + nth] = moved
        self.rows = None if same else rows + count
        self.columns = int((rows + count).max())
        self._trim()

    def _note(self, keep: Int[Tensor, "b m"], plan: Plan) -> None:
        """Write the labels of committed slots behind those of the cached ones, row by row."""
        settled = plan.settled if plan.settled is not None else plan.views
        labels = {name: view.take(keep) for name, view in settled.items()}
        if self._labels is None:
            start = torch.arange(self.columns)[None]
            self._labels = dict.fromkeys(labels, View(start, start, torch.full_like(start, INF)))
        if self.rows is not None or bool((keep < 0).any()):
            rows = torch.full((keep.shape[0],), self.columns) if self.rows is None else self.rows
            labels = {name: _pack(self._labels[name], new, rows, keep) for name, new in labels.items()}
            self._labels = labels
        else:
            self._labels = {name: join([self._labels[name], new]) for name, new in labels.items()}
        if plan.layers is not None or self._layers is not None:
            layers = self.buffer.shape[0]
            old = torch.ones(layers, self.columns, dtype=torch.bool) if self._layers is None else self._layers
            new = torch.ones(layers, plan.size, dtype=torch.bool) if plan.layers is None else plan.layers
            if keep.shape[0] > 1 and not bool((keep == keep[:1]).all()):
                raise ValueError("slots that skip layers cannot be kept by rows of different lengths")
            self._layers = torch.cat([old, new[:, keep[0].clamp(min=0)]], 1)

    def _trim(self) -> None:
        if self._labels is not None:
            index = torch.arange(self.columns)[None]
            self._labels = {k: v if v.size == self.columns else v.take(index) for k, v in self._labels.items()}

    def evict(self, retain: Int[Tensor, "b m"]) -> None:
        """Keep only these committed columns (-1: padding), in this order."""
        batch = self.buffer.shape[2]
        index = retain.expand(batch, -1)
        where = index.clamp(min=0)
        m = index.shape[1]
        rows = torch.arange(batch)[:, None]
        self.buffer[..., :m, :] = self.buffer[:, :, rows, :, where].permute(2, 3, 0, 4, 1, 5)
        if self._labels is None:
            start = torch.arange(self.columns)[None]
            self._labels = dict.fromkeys(self.names, View(start, start, torch.full_like(start, INF)))
        self._labels = {name: view.take(retain) for name, view in self._labels.items()}
        if self._layers is not None:
            self._layers = self._layers[:, where[0]]
        count = (retain >= 0).sum(1)
        self.rows = None if bool((count == m).all()) else count.expand(batch)
        self.columns = m

    def replace(self, where: Int[Tensor, "b m"], plan: Plan) -> None:
        """The first pending entries overwrite these committed columns (-1: leaves the pending entry out)."""
        b, j = (where.expand(self.buffer.shape[2], -1) >= 0).nonzero(as_tuple=True)
        self.buffer[:, :, b, :, where.expand(self.buffer.shape[2], -1)[b, j]] = self.buffer[
            :, :, b, :, self.columns + j
        ]
        self.pending = 0

    def select(self, rows: Int[Tensor, "b2"]) -> None:
        self.buffer = self.buffer[:, :, rows].contiguous()
        self._split()
        self.rows = None if self.rows is None else self.rows[rows]
        if self._labels is not None:
            pick = lambda x: None if x is None else x if x.shape[0] == 1 else x[rows]  # noqa: E731
            self._labels = {
                k: View(pick(v.at), pick(v.born), pick(v.dies), pick(v.lane), pick(v.group), v.relation)  # type: ignore[arg-type]
                for k, v in self._labels.items()
            }

    def nbytes(self) -> int:
        layers, two, batch, heads, _, dim = self.buffer.shape
        entries = batch * self.columns if self.rows is None else int(self.rows.sum())
        per_layer = layers * entries
        if self._layers is not None:
            per_layer = int(self._layers[:, : self.columns].sum()) * batch
        return per_layer * two * heads * dim * self.buffer.element_size()


def _pack(old: View, new: View, rows: Int[Tensor, "b"], keep: Int[Tensor, "b m"]) -> View:
    """New labels right behind the old ones of each row; -1 lanes fill the rest."""
    batch = keep.shape[0]
    both = join([old, new])
    start = torch.where(keep >= 0, torch.arange(old.size, old.size + keep.shape[1]), -1)
    held = torch.where(torch.arange(old.size) < rows[:, None], torch.arange(old.size), -1)
    order = torch.cat([held, start], 1)
    live = order >= 0
    width = int(live.sum(1).max())
    rank = torch.where(live, torch.arange(order.shape[1]), order.shape[1]).sort(1).indices[:, :width]
    index = order.gather(1, rank).expand(batch, -1)
    return both.take(index)
