"""Keys and values, remembered in two phases.

A forward leaves its entries *pending*, right behind the committed ones; `commit` keeps some of them in a given order
and forgets the rest. All layers live in one buffer. While the entries are one run that every later slot sees, the
cache is *plain* and holds no labels; the first commit that breaks this writes the labels of each kind of layer out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from seriatim.backbones.columns import Keep, as_rows, of_rows, packed, picked
from seriatim.plan import Plan
from seriatim.slots import below_own
from seriatim.view import INF, View, below, join


class Entry(NamedTuple):
    """Keys and values of one layer, up to the end of what is pending: all that a compiled step knows of a cache."""

    keys: Tensor
    values: Tensor

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """As `KVCache.append`."""
        self.keys[:, :, -k.shape[2] :].copy_(k)
        self.values[:, :, -v.shape[2] :].copy_(v)
        return self.keys, self.values


class KVCache:
    """Keys and values of all layers, (layers, 2, batch, heads, columns, head_dim) in one buffer that grows by doubling.

    Rows of different lengths are kept left-aligned; the columns behind a shorter row carry lane -1. The rows stand in a
    window of those that there is room for (`reserve`), so that few entries move when some go and others come.
    """

    can = frozenset({"subset", "evict", "replace"})

    def __init__(
        self,
        layers: int,
        batch: int,
        heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        capacity: int = 256,
        names: Sequence[str] = ("all",),
    ):
        """`names`: the kinds of layer, each with labels of its own. `capacity`: columns to start with."""
        if batch < 1 or capacity < 1:
            raise ValueError(f"a cache needs at least one row and one column, got batch {batch}, capacity {capacity}")
        self.names = tuple(names)
        # empty: every forward writes its columns in all rows, so what is masked is finite wherever it is read
        self._place(torch.empty(layers, 2, batch, heads, capacity, head_dim, dtype=dtype, device=device))
        self.layers = tuple(range(layers))  # that there is room for
        self.at = list(range(layers))  # where each of them stands in the buffer; -1: nowhere
        self.first = 0  # place of the first column along a line, while plain: those before it were shed
        self.columns = 0  # committed, in the longest row
        self.pending = 0
        self._held: Int[Tensor, "b"] | None = None  # committed columns of each row, once they differ
        self.plain = True  # every entry is seen by everything later: no labels are held
        self._labels: dict[str, View] = {}
        self.skips = False  # some committed entries were not computed in every layer
        self._layers: Bool[Tensor, "L b c"] | None = None  # was this column computed in this layer?
        self._kept: dict[str, tuple[Tensor, Any]] = {}
        self._windows: Mapping[str, int] = {}  # kinds of layer that see the last so many places only
        self._new: Sequence[Tensor] = ()  # where the present forward writes: keys and values of each layer
        self._all: Sequence[Tensor] = ()  # what it can read

    def _place(self, rows: Tensor, first: int = 0, batch: int | None = None) -> None:
        """Stand in `batch` rows of these, from the first on (None: in all)."""
        self._rows, self._first = rows, first
        self.buffer = rows.narrow(2, first, rows.shape[2] if batch is None else batch)
        self._flat = self.buffer.flatten(0, 1)

    def reserve(self, rows: int, columns: int) -> None:
        """Have room for so many rows of so many columns."""
        size = [*self._rows.shape]
        size[2], size[4] = max(size[2], rows), max(size[4], columns)
        if size == [*self._rows.shape]:
            return
        room = self._rows.new_empty(size)
        held, batch = self.buffer[..., : self.columns, :], self.batch
        room[:, :, :batch, :, : self.columns] = held
        self._place(room, 0, batch)
        self.pending, self._new, self._all = 0, (), ()

    @property
    def length(self) -> int | Tensor:
        return self.columns if self._held is None else self._held

    @property
    def batch(self) -> int:
        return self.buffer.shape[2]

    @property
    def device(self) -> torch.device:
        return self.buffer.device

    @property
    def dtype(self) -> torch.dtype:
        return self.buffer.dtype

    def compressed(self, codec: Any, capacity: int) -> Any:
        """This cache, which holds nothing yet, as the place of what a compressed one has not compressed yet."""
        return codec.over(self, capacity)

    # ---- a forward --------------------------------------------------------------------------------------------------

    def begin(self, plan: Plan) -> None:
        start, n = self.columns, plan.size
        end = start + n
        if end > self.buffer.shape[4]:
            self._resize(max(end, 2 * self.buffer.shape[4]))
        self._windows, self.pending = plan.windows, n
        self.reach(n)
        if plan.layers is not None or plan.route is not None:
            self._flat.narrow(3, start, n).zero_()  # layers that skip a slot write nothing there

    def reach(self, slots: int) -> None:
        """From here on the present forward has its first `slots` slots; those that begin later are still to come."""
        # the views of all layers at once: to slice keys and values layer by layer costs as much as a small layer
        seen = self._flat.narrow(3, 0, self.columns + slots)
        self._all, self._new = seen.unbind(), seen.narrow(3, self.columns, slots).unbind()

    def hold(self, layers: Sequence[int]) -> None:
        """Have room for these layers only: entries of others are forgotten, and layers that come back are empty. What
        is pending is dropped."""
        layers = tuple(layers)
        if layers == self.layers:
            return
        buffer = self.buffer.new_zeros(len(layers), *self.buffer.shape[1:])
        for n, layer in enumerate(layers):
            if layer in self.layers:
                buffer[n] = self.buffer[self.at[layer]]
        self.at = [layers.index(i) if i in layers else -1 for i in range(len(self.at))]
        self.layers, self.pending = layers, 0
        self._place(buffer)

    @property
    def window(self) -> tuple[int, int]:
        """The first of the rows that are in use, and how many there is room for."""
        return self._first, self._rows.shape[2]

    def prefix(self, columns: int, capacity: int) -> KVCache | None:
        """The first columns of the only row, in a cache of their own with room for so many; None where they were not
        all computed, or some were shed."""
        if not self.plain or self.first or self.skips or self.batch != 1 or columns > self.columns:
            return None
        layers, _, _, heads, _, dim = self.buffer.shape
        out = KVCache(layers, 1, heads, dim, self.dtype, self.device, max(capacity, columns, 1), self.names)
        out.buffer[..., :columns, :] = self.buffer[..., :columns, :]
        out.columns = columns
        return out

    def _resize(self, capacity: int, start: int = 0) -> None:
        """Another number of columns, in which stands what is committed from column `start` on."""
        size = [*self._rows.shape]
        size[4] = capacity
        room = self._rows.new_empty(size)
        rows = room.narrow(2, self._first, self.batch)
        rows[..., : self.columns - start, :] = self.buffer[..., start : self.columns, :]
        self._place(room, self._first, self.batch)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write the pending keys and values (batch, heads, slots, head_dim) of a layer; all that can be read there."""
        i = 2 * self.at[layer]
        if k.requires_grad:
            return self._append_differentiably(i, k, v)
        self._new[i].copy_(k)
        self._new[i + 1].copy_(v)
        return self._all[i], self._all[i + 1]

    def entry(self, layer: int) -> Entry:
        """The present forward's keys and values of one layer."""
        i = 2 * self.at[layer]
        return Entry(self._all[i], self._all[i + 1])

    def _append_differentiably(self, i: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients flow through what is pending, not through what is remembered (truncated backpropagation)."""
        start = self.columns
        with torch.no_grad():
            self._new[i].copy_(k)
            self._new[i + 1].copy_(v)
            old = [self._all[j][:, :, :start].clone() for j in (i, i + 1)]
        return torch.cat([old[0], k.to(old[0].dtype)], 2), torch.cat([old[1], v.to(old[1].dtype)], 2)

    def kept(self, name: str, source: Tensor) -> Any:
        """What was kept under this name of this very tensor; None where it was of another, or nothing."""
        of, value = self._kept.get(name, (None, None))
        return value if of is source else None

    def keep(self, name: str, source: Tensor, value: Any) -> Any:
        """Remember what follows from a condition that stays the same over the steps; returns it."""
        self._kept[name] = source, value
        return value

    def labels(self, view: str) -> View | None:
        if not self.plain:
            return self._labels[view]
        return self._seen(view) if view in self._windows else None

    def _seen(self, view: str) -> View:
        """The labels that go without saying while the cache is plain."""
        return self.places(view, self.first, self.first + self.columns)

    def places(self, view: str, start: int, end: int) -> View:
        """The labels of these places of a line, in the windows of the present forward."""
        place = torch.arange(start, end)[None]
        seen = View(place, place, torch.full_like(place, INF))
        return seen.narrow(window=self._windows[view]) if view in self._windows else seen

    def computed(self, layer: int) -> Bool[Tensor, "b c"] | None:
        """Which committed columns were computed in a layer; None: all."""
        return None if self._layers is None else self._layers[layer]

    # ---- committing -------------------------------------------------------------------------------------------------

    def commit(self, keep: Keep, plan: Plan) -> None:
        if type(keep) is int and keep <= self.pending and self.plain and plan.plain:
            self.columns += keep
            self.pending = 0
            return
        if isinstance(keep, Tensor) and self.batch == 1:
            keep = [i for i in keep[0].tolist() if i >= 0]
        if isinstance(keep, int):
            count, last = keep, keep - 1
        elif not isinstance(keep, Tensor):
            count, last = len(keep), max(keep, default=-1)
        else:
            count, last = keep.shape[1], int(keep.max()) if keep.numel() else -1
        if last >= self.pending:
            raise ValueError(f"slot {last} cannot be kept: the last forward left {self.pending} pending slots")
        if count:
            if isinstance(keep, Tensor) or self._held is not None:
                self._commit_rows(as_rows(keep).expand(self.batch, -1), plan)
            else:
                self._commit_all(keep, count, plan)
        self.pending = 0

    def _commit_all(self, keep: int | Sequence[int], count: int, plan: Plan) -> None:
        """The same slots in every row."""
        if not (self.plain and plan.plain):
            self._note(as_rows(keep), plan)
        if not isinstance(keep, int):
            self._gather(keep)
        self.columns += count

    def _gather(self, keep: Sequence[int]) -> None:
        """Bring a path together, moving only what is out of place."""
        still = 0
        while still < len(keep) and keep[still] == still:
            still += 1
        if still < len(keep):
            source = torch.tensor([self.columns + i for i in keep[still:]], device=self.device)
            start = self.columns + still
            self.buffer[..., start : start + len(keep) - still, :] = self.buffer.index_select(4, source)

    def _commit_rows(self, keep: Int[Tensor, "b m"], plan: Plan) -> None:
        """Other slots in each row: bring them right behind what the row holds."""
        live = keep >= 0
        count = live.sum(1)
        held = torch.full((self.batch,), self.columns) if self._held is None else self._held
        self._note(keep, plan)
        b, j = live.nonzero(as_tuple=True)
        place = held[b] + live.long().cumsum(1)[b, j] - 1
        b, source, place = (x.to(self.device) for x in (b, self.columns + keep[b, j], place))
        self.buffer[:, :, b, :, place] = self.buffer[:, :, b, :, source]
        self._hold(held + count)

    def _hold(self, held: Int[Tensor, "b"]) -> None:
        """Rows hold so many columns now."""
        self.columns = int(held.max())
        self._held = None if bool((held == self.columns).all()) else held

    def _note(self, keep: Int[Tensor, "b m"], plan: Plan) -> None:
        """Write the labels of slots about to be committed behind those of the cached ones, row by row."""
        views = plan.views if plan.settled is None else plan.settled
        old = self._written_out()
        order = None
        if self._held is not None or bool((keep < 0).any()):
            held = torch.full((self.batch,), self.columns) if self._held is None else self._held
            order = packed(self.columns, held, keep)
        labels = {}
        for name in self.names:
            both = join([old[name], views[name].take(keep)])
            labels[name] = both if order is None else both.take(order)
        self._labels = labels
        if plan.layers is not None or self._layers is not None:
            depth = self.buffer.shape[0]
            before = torch.ones(depth, 1, self.columns, dtype=torch.bool) if self._layers is None else self._layers
            new = torch.ones(depth, plan.size, dtype=torch.bool) if plan.layers is None else plan.layers.cpu()
            new = new[:, keep.clamp(min=0)]
            rows = max(before.shape[1], new.shape[1])
            self.skips = True
            layers = torch.cat([before.expand(-1, rows, -1), new.expand(-1, rows, -1)], 2)
            self._layers = layers if order is None else picked(layers, order)

    def _written_out(self) -> dict[str, View]:
        """The labels, made up where they went without saying."""
        self._labels, self.plain = self._said(), False
        return self._labels

    def _said(self) -> dict[str, View]:
        """The labels, those too that go without saying."""
        return {name: self._seen(name) for name in self.names} if self.plain else self._labels

    # ---- changing what is committed ---------------------------------------------------------------------------------

    def evict(self, retain: Int[Tensor, "b m"]) -> None:
        """Keep only these committed columns, in this order; -1 is padding."""
        retain = retain.expand(self.batch, -1)
        if retain.numel() and int(retain.max()) >= self.columns:
            raise ValueError(f"column {int(retain.max())} cannot be retained of {self.columns}")
        retain = retain.gather(1, (retain < 0).long().argsort(dim=1, stable=True))  # padding last
        held = (retain >= 0).sum(1)
        retain = retain[:, : int(held.max())]
        labels = self._written_out()
        where = retain.clamp(min=0).to(self.device)
        rows = torch.arange(self.batch, device=self.device)[:, None]
        kept = self.buffer[:, :, rows, :, where]  # (batch, columns, layers, 2, heads, head_dim)
        self.buffer[..., : retain.shape[1], :] = kept.permute(2, 3, 0, 4, 1, 5)
        self._labels = {name: view.take(retain) for name, view in labels.items()}
        if self._layers is not None:
            self._layers = picked(self._layers.expand(-1, self.batch, -1), retain)
        self._hold(held)
        self.pending = 0

    def shed(self, count: int | Int[Tensor, "b"], capacity: int) -> None:
        """Forget the first columns, so many of all rows (while plain; it stays so) or of each, and give back what is
        not needed of more than `capacity` columns."""
        start = 0
        if isinstance(count, int):
            start, self.first = count, self.first + count
        else:
            column = count[:, None] + torch.arange(self.columns)
            held = torch.as_tensor(self.length).expand(self.batch)[:, None]
            self.evict(torch.where(column < held, column, -1))
        self._resize(max(capacity, self.columns - start), start)
        self.columns -= start
        self.pending, self._new, self._all = 0, (), ()

    def replace(self, where: Int[Tensor, "b m"]) -> None:
        """Pending entry j overwrites committed column where[:, j] (-1: is left out); the labels stay."""
        where = where.expand(self.batch, -1)
        if where.shape[1] > self.pending:
            raise ValueError(f"{where.shape[1]} entries cannot be replaced by {self.pending} pending ones")
        held = torch.full((self.batch,), self.columns) if self._held is None else self._held
        if bool((where >= held[:, None]).any()):
            raise ValueError(f"column {int(where.max())} is not held by every row that replaces it")
        b, j = (where >= 0).nonzero(as_tuple=True)
        place, source = where[b, j].to(self.device), (self.columns + j).to(self.device)
        b = b.to(self.device)
        self.buffer[:, :, b, :, place] = self.buffer[:, :, b, :, source]
        self.pending = 0

    def select(self, rows: Int[Tensor, "b2"], new: Sequence[KVCache] = ()) -> None:
        fresh = rows < 0
        if rows.numel() == 0 or int(rows.max()) >= self.batch:
            raise ValueError(f"rows {rows.tolist()} cannot be selected of {self.batch}")
        if any(part.skips or part.layers != self.layers for part in (self, *new) if new):
            raise ValueError("caches whose entries were not computed in every layer cannot be joined")
        held = [torch.as_tensor(part.length).expand(part.batch) for part in (self, *new)]
        where = below_own(rows, self.batch) if new else rows.clamp(min=0)
        count = torch.cat(held)[where].masked_fill(fresh & (not new), 0)
        columns = int(count.max())
        if bool(fresh.any()) or not self.plain:
            self._labels, self.plain = self._labels_of([self, *new], held, where, count), False
        with torch.inference_mode(self._rows.is_inference() or torch.is_inference_mode_enabled()):
            self._move(rows, columns)
            self._fill(fresh, new, columns)
        if self._layers is not None:
            self._layers = (self._layers if self._layers.shape[1] == 1 else self._layers[:, where])[:, :, :columns]
        self._hold(count)
        self.pending = 0

    def _labels_of(
        self, parts: Sequence[KVCache], held: Sequence[Tensor], where: Int[Tensor, "b2"], count: Int[Tensor, "b2"]
    ) -> dict[str, View]:
        """The labels of these rows of all caches, which hold so many columns."""
        wide = torch.arange(max(part.columns for part in parts))
        index = [torch.where(wide < n[:, None], wide, -1) for n in held]
        taken = [{n: v.take(i) for n, v in p._said().items()} for p, i in zip(parts, index, strict=True)]
        place = torch.arange(int(count.max())).expand(len(where), -1)
        place = torch.where(place < count[:, None], place, -1)
        return {n: of_rows(below([views[n] for views in taken]), where).take(place) for n in self.names}

    def _fill(self, fresh: Bool[Tensor, "b2"], new: Sequence[KVCache], columns: int) -> None:
        """Write what other caches hold into the rows that are fresh; what is masked is finite wherever it is read: no
        row has written the columns behind its longest mate."""
        self.buffer[..., self.columns : columns, :] = 0
        rows = iter(fresh.nonzero()[:, 0].tolist())
        for part in new:
            for one, row in zip(part.buffer.unbind(2), rows, strict=False):
                mine = self.buffer[:, :, row]
                mine[..., : part.columns, :] = one[..., : part.columns, :]
                mine[..., part.columns : columns, :] = 0
        for row in rows:
            self.buffer[:, :, row, :, :columns] = 0

    def _move(self, rows: Int[Tensor, "b2"], columns: int) -> None:
        """Bring old rows where they are to stand (-1: anything may stand there), in the window of the room in which
        most of them stand already. Where there are more rows than room, in a larger one."""
        many, kept = len(rows), rows >= 0
        target, room = torch.arange(many), self._rows.shape[2]
        columns = max(columns, 1)
        if many > room or columns > self._rows.shape[4]:
            size = [*self._rows.shape]
            size[2], size[4] = max(many, room), max(columns, size[4])
            wide = self._rows.new_empty(size)
            mine = self.buffer[:, :, rows.clamp(min=0).to(self.device), :, : self.columns]
            wide[:, :, :many, :, : self.columns] = mine
            return self._place(wide, 0, many)
        start = (self._first + rows - target)[kept]
        start = start[(start >= 0) & (start + many <= room)]
        first = int(start.mode().values) if start.numel() else 0
        source, target = self._first + rows, first + target
        moving = kept & (source != target)
        if bool(moving.any()):
            source, target = source[moving].to(self.device), target[moving].to(self.device)
            self._rows[:, :, target, :, :columns] = self._rows[:, :, source, :, :columns]
        self._place(self._rows, first, many)

    def join(self, others: Sequence[KVCache]) -> None:
        parts = [self, *others]
        if any(part.skips or part.layers != self.layers for part in parts):
            raise ValueError("caches whose entries were not computed in every layer cannot be joined")
        held = torch.cat([torch.as_tensor(part.length).expand(part.batch) for part in parts])
        columns, size = int(held.max()), [*self.buffer.shape]
        size[2], size[4] = len(held), max(part.buffer.shape[4] for part in parts)
        if not all(part.plain and part.first == self.first for part in parts) or bool((held != columns).any()):
            index = torch.where((place := torch.arange(columns)) < held[:, None], place, -1)
            rows = index.split([part.batch for part in parts])
            taken = [{n: v.take(i) for n, v in p._written_out().items()} for p, i in zip(parts, rows, strict=True)]
            self._labels = {name: below([views[name] for views in taken]) for name in self.names}
        buffer, row = self.buffer.new_empty(size), 0
        for part in parts:
            mine = buffer[:, :, row : row + part.batch]
            mine[..., : part.columns, :] = part.buffer[..., : part.columns, :]
            mine[..., part.columns : columns, :] = 0  # what is masked is finite wherever it is read
            row += part.batch
        self._place(buffer)
        self._hold(held)
        self.pending = 0

    def nbytes(self) -> int:
        layers, two, batch, heads, _, dim = self.buffer.shape
        held = torch.full((batch,), self.columns) if self._held is None else self._held
        if self._layers is None:
            entries = layers * int(held.sum())
        else:
            live = torch.arange(self.columns) < held[:, None]
            entries = int((self._layers & live).sum())
        return entries * two * heads * dim * self.buffer.element_size()
