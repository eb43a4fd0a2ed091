"""A batch of partly generated samples, changed only by edits.

While every row is a prefix of the same length (plain text generation), status, rank and place follow from one integer
and cost nothing; the first other edit writes them out. Given elements never change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from seriatim.layout import Layout, Segment
from seriatim.slots import below_own

GIVEN, DECIDED, GUESSED, UNKNOWN, DELETED = 0, 1, 2, 3, 4


class EditError(ValueError):
    """An edit that would change a given element, or does not fit the canvas."""


@dataclass(slots=True)
class Set:
    """Decide elements. `element` is (batch, n), -1 where a row decides nothing; None: the next ones of every row."""

    value: Tensor
    element: Int[Tensor, "b n"] | None = None


@dataclass(slots=True)
class Unset:
    """Make decided elements unknown again (remasking)."""

    element: Int[Tensor, "b n"]


@dataclass(slots=True)
class Revise:
    """Change the noise or the guess that stands in elements, without deciding them."""

    element: Int[Tensor, "b n"]
    value: Tensor
    level: Tensor | None = None


@dataclass(slots=True)
class Remember:
    """Keep vectors with elements, for steps that ask for more than what was decided: the hidden states from which they
    were drawn. `element` is (batch, n), -1 where nothing is kept; `memo` (batch, n, d)."""

    element: Int[Tensor, "b n"]
    memo: Tensor


@dataclass(slots=True)
class Insert:
    """A new element after element `after` (batch,) of each row (-1: at the front; -2: no insertion in this row), or
    several (batch, n) at once; those after the same element stand in the order given."""

    after: Int[Tensor, "b"] | Int[Tensor, "b n"]
    value: Tensor


@dataclass(slots=True)
class Delete:
    """Remove elements from the reading order; their numbers are not used again."""

    element: Int[Tensor, "b n"]


@dataclass(slots=True)
class Truncate:
    """End each row after `length` elements in reading order (end of text)."""

    length: Int[Tensor, "b"]


@dataclass(slots=True)
class Grow:
    """More elements: what the decided ones call for (the next word, an octree's children)."""

    segment: Segment


@dataclass(slots=True)
class Reorder:
    """Plan unknown elements for other steps: `rank` (batch, elements), -1 where nothing changes. What is known keeps
    its rank."""

    rank: Int[Tensor, "b E"]


Edit = Set | Unset | Revise | Remember | Insert | Delete | Truncate | Grow | Reorder


class Canvas:
    """Partly generated samples.

    layout: the elements; value: kind -> ids (batch, n) or vectors (batch, n, d); `status`, `rank` (the step that
    decides an element; given -1) and `place` (position in reading order) are (batch, elements). `row` identifies a
    sample whatever its batch mates. `noise` and `level` hold the present noisy content of elements and its noise level
    (1: pure noise, 0: clean), for methods that denoise in place; `memo` (batch, elements, d) what is remembered of
    elements, zero where nothing is. To be read: `length` is how many first elements are
    known in every row, and `given_length` how many were given, while rows are prefixes of one length; then None.
    """

    __slots__ = (
        "_place", "_rank", "_status", "given_length", "layout", "length", "level", "memo", "noise", "row", "value",
    )  # fmt: skip

    def __init__(
        self,
        layout: Layout,
        value: Mapping[str, Tensor],
        known: int | Tensor = 0,
        rank: Tensor | None = None,
        row: Tensor | None = None,
    ):
        """Values are copied. `known`: how many first elements are given, in all rows or (batch,) in each, or a boolean
        (batch, elements) of which. `rank` (batch or 1, elements): one after another if left out. `row` (batch,):
        0, 1, ... if left out."""
        batch = _check_values(layout, value)
        self.layout = layout
        self.value = {kind: x.clone() for kind, x in value.items()}
        self.row = torch.arange(batch) if row is None else row
        if self.row.shape != (batch,):
            raise ValueError(f"`row` names each of {batch} rows, got shape {tuple(self.row.shape)}")
        self.noise: dict[str, Tensor] = {}
        self.level: Tensor | None = None
        self.memo: Tensor | None = None
        self.length: int | None = None
        self._status = self._rank = self._place = None
        self.given_length = 0
        given = given_elements(layout, known, batch)
        if isinstance(known, int) and rank is None and not bool(layout.given.any()):
            self.length = self.given_length = known
            return
        if rank is None:
            rank = (~given).long().cumsum(1) - 1
        if rank.dim() != 2 or rank.shape[0] not in (1, batch) or rank.shape[1] != layout.size:
            raise ValueError(f"`rank` is ({batch} or 1, {layout.size}), got shape {tuple(rank.shape)}")
        self._status = torch.where(given, GIVEN, UNKNOWN)
        self._place = torch.arange(layout.size).expand(batch, -1).contiguous()
        self._rank = rank.expand(batch, -1).masked_fill(given, -1)

    # ---- reading ----------------------------------------------------------------------------------------------------

    @property
    def batch(self) -> int:
        return self.row.shape[0]

    @property
    def status(self) -> Int[Tensor, "b E"]:
        return self._status if self._status is not None else self._derive()[0]

    @property
    def rank(self) -> Int[Tensor, "b E"]:
        return self._rank if self._rank is not None else self._derive()[1]

    @property
    def place(self) -> Int[Tensor, "b E"]:
        return self._place if self._place is not None else self._derive()[2]

    @property
    def known(self) -> Tensor:
        """Boolean (batch, elements): given or decided."""
        return self.status <= DECIDED

    @property
    def open(self) -> Bool[Tensor, "b E"]:
        """Neither known nor deleted: still to be decided."""
        return (self.status == UNKNOWN) | (self.status == GUESSED)

    @property
    def done(self) -> bool:
        """No element is left unknown."""
        if self.length is not None:
            return self.length >= self.layout.size
        return not bool(self.open.any())

    def lengths(self) -> Int[Tensor, "b"]:
        """Elements known from the front of each row."""
        if self.length is not None:
            return torch.full((self.batch,), self.length)
        return self.known.long().cumprod(1).sum(1)

    def read(self, kind: str) -> list[Tensor]:
        """Each row's known values of a kind, in reading order."""
        elements = self.layout.elements(kind)
        place, alive = self.place[:, elements], self.known[:, elements]
        return [self.value[kind][b][place[b].argsort()][alive[b][place[b].argsort()]] for b in range(self.batch)]

    def _derive(self) -> tuple[Tensor, Tensor, Tensor]:
        assert self.length is not None
        e = torch.arange(self.layout.size).expand(self.batch, -1)
        status = torch.where(e < self.given_length, GIVEN, torch.where(e < self.length, DECIDED, UNKNOWN))
        rank = torch.where(e < self.given_length, -1, e - self.given_length)
        return status, rank, e

    def _write_out(self) -> None:
        if self.length is not None:
            self._status, self._rank, self._place = (x.contiguous().clone() for x in self._derive())
            self.length = None

    # ---- editing ----------------------------------------------------------------------------------------------------

    def apply(self, edits: Sequence[Edit]) -> Canvas:
        """Carry out edits in order, in place; refuses to touch given elements."""
        for edit in edits:
            if type(edit) is Set and edit.element is None:
                self._append(edit.value)
                continue
            self._write_out()
            _EDITS[type(edit)](self, edit)  # type: ignore[operator]
        return self

    def _append(self, value: Tensor) -> None:
        """The next elements of every row (the hot path)."""
        start = self.length
        if start is None:
            raise EditError("rows have different lengths here: name the elements to set")
        kinds = self.layout.kinds
        if len(kinds) > 1:
            raise EditError(f"elements are of several kinds here ({', '.join(kinds)}): name the elements to set")
        n = value.shape[1]
        if start + n > self.layout.size:
            n = self.layout.size - start
            value = value[:, :n]
        self.value[kinds[0]].narrow(1, start, n).copy_(value)
        self.length = start + n

    def _touch(self, element: Tensor, verb: str) -> Tensor:
        """Check that no given element is meant; the boolean of places that are meant at all."""
        if element.dim() != 2 or element.shape[0] != self.batch or element.is_floating_point():
            raise EditError(f"elements are integers ({self.batch}, n), got {tuple(element.shape)} {element.dtype}")
        if element.numel() and int(element.max()) >= self.layout.size:
            raise EditError(f"element {int(element.max())} cannot be {verb}: the layout has {self.layout.size}")
        live = element >= 0
        status = self.status.gather(1, element.clamp(min=0))
        for state, adjective in ((GIVEN, "given"), (DELETED, "deleted")):
            if bool((wrong := live & (status == state)).any()):
                b, i = wrong.nonzero()[0].tolist()
                raise EditError(f"element {int(element[b, i])} of row {b} is {adjective} and cannot be {verb}")
        return live

    def _put(self, store: dict[str, Tensor], element: Tensor, value: Tensor, live: Tensor) -> None:
        if value.shape[:2] != element.shape:
            raise EditError(f"{tuple(element.shape)} elements take as many values, got {tuple(value.shape)}")
        kinds = self.layout.kind[element[live]].unique()
        if kinds.numel() > 1:
            names = ", ".join(self.layout.kinds[int(k)] for k in kinds)
            raise EditError(f"one edit holds one kind of element, got {names}")
        if kinds.numel():
            kind = self.layout.kinds[int(kinds[0])]
            if kind not in store:  # the first noise or guess of this kind: shaped like what is written
                store[kind] = value.new_zeros(self.batch, self.layout.count(kind), *value.shape[2:])
            b, i = live.nonzero(as_tuple=True)
            store[kind][b, self.layout.index[element[b, i]]] = value[b, i].to(store[kind].dtype)

    def _mark(self, element: Tensor, live: Tensor, status: int) -> None:
        b, i = live.nonzero(as_tuple=True)
        self.status[b, element[b, i]] = status

    def _set(self, edit: Set) -> None:
        assert edit.element is not None
        live = self._touch(edit.element, "set")
        self._put(self.value, edit.element, edit.value, live)
        self._mark(edit.element, live, DECIDED)

    def _unset(self, edit: Unset) -> None:
        self._mark(edit.element, self._touch(edit.element, "unset"), UNKNOWN)

    def _revise(self, edit: Revise) -> None:
        live = self._touch(edit.element, "revised")
        self._put(self.noise, edit.element, edit.value, live)
        self._mark(edit.element, live, GUESSED)
        if edit.level is not None:
            if self.level is None:
                self.level = torch.zeros(self.batch, self.layout.size, device=edit.level.device)
            b, i = live.nonzero(as_tuple=True)
            self.level[b, edit.element[b, i]] = edit.level.expand(edit.element.shape)[b, i]

    def _remember(self, edit: Remember) -> None:
        live = self._touch(edit.element, "remembered")
        if edit.memo.shape[:2] != edit.element.shape:
            raise EditError(f"{tuple(edit.element.shape)} elements take as many vectors, got {tuple(edit.memo.shape)}")
        if self.memo is None:
            self.memo = edit.memo.new_zeros(self.batch, self.layout.size, edit.memo.shape[2])
        b, i = live.nonzero(as_tuple=True)
        self.memo = self.memo.index_put((b, edit.element[b, i]), edit.memo[b, i].to(self.memo))

    def _insert(self, edit: Insert) -> None:
        kind = self.layout.kinds[0]
        after, value = (x if edit.after.dim() == 2 else x[:, None] for x in (edit.after, edit.value))
        n, old = after.shape[1], self.layout.size
        self._grow(Grow(Segment(kind, torch.zeros(n, self.layout.coord.shape[1], dtype=torch.long))))
        here, place = after > -2, self.place
        behind = torch.where(after >= 0, place.gather(1, after.clamp(min=0)), -1)
        earlier = torch.arange(n)[:, None] > torch.arange(n)
        before = (behind[:, None] < behind[:, :, None]) | (earlier & (behind[:, None] == behind[:, :, None]))
        there = behind + 1 + (before & here[:, None]).sum(2)
        place[:, :old] += (here[:, None] & (place[:, :old, None] > behind[:, None])).sum(2)
        spare = old + here.sum(1, keepdim=True) + (~here).long().cumsum(1) - 1
        place[:, old:] = torch.where(here, there, spare)
        self.value[kind][:, old:] = value.to(self.value[kind].dtype)
        self.rank[:, old:] = _last(self.rank[:, :old]) + 1
        self.status[:, old:] = torch.where(here, DECIDED, DELETED)

    def _delete(self, edit: Delete) -> None:
        self._mark(edit.element, self._touch(edit.element, "deleted"), DELETED)

    def _truncate(self, edit: Truncate) -> None:
        alive = self.status != DELETED
        order = self.place.argsort(1)
        read = alive.gather(1, order).long()
        before = torch.empty_like(order).scatter_(1, order, read.cumsum(1) - read)
        gone = alive & (before >= edit.length[:, None])
        if bool((gone & (self.status == GIVEN)).any()):
            raise EditError("a given element cannot be cut off")
        self.status[gone] = DELETED

    def _grow(self, edit: Grow) -> None:
        n, kind = len(edit.segment), edit.segment.kind
        if kind not in self.value:
            raise EditError(f"no values for kind {kind!r}; this canvas holds {', '.join(self.value)}")
        start = self.layout.size
        self.layout = Layout((*self.layout.segments, edit.segment))
        more = torch.arange(start, start + n).expand(self.batch, -1)
        assert self._status is not None and self._rank is not None and self._place is not None
        self._status = torch.cat([self._status, torch.full_like(more, UNKNOWN)], 1)
        self._rank = torch.cat([self._rank, _last(self._rank) + 1 + more - start], 1)
        self._place = torch.cat([self._place, more], 1)
        for store in (self.value, self.noise):
            if kind in store:
                store[kind] = torch.cat([store[kind], store[kind].new_zeros(self.batch, n, *store[kind].shape[2:])], 1)
        if self.level is not None:
            self.level = torch.cat([self.level, self.level.new_zeros(self.batch, n)], 1)
        if self.memo is not None:
            self.memo = torch.cat([self.memo, self.memo.new_zeros(self.batch, n, self.memo.shape[2])], 1)

    def _reorder(self, edit: Reorder) -> None:
        if edit.rank.shape != (self.batch, self.layout.size):
            raise EditError(f"ranks are {(self.batch, self.layout.size)}, got {tuple(edit.rank.shape)}")
        self._rank = torch.where((edit.rank >= 0) & self.open, edit.rank, self.rank)

    # ---- rows -------------------------------------------------------------------------------------------------------

    def select(self, rows: Int[Tensor, "b2"], new: Canvas | None = None) -> Canvas:
        """These rows, in this order: keep, copy (beams, best of n) or drop them; -1 admits the next row of `new`.
        A new canvas."""
        fresh = rows < 0
        admitted = int(fresh.sum())
        if admitted != (0 if new is None else new.batch):
            raise ValueError(f"{admitted} rows (-1) are to be admitted, {0 if new is None else new.batch} stand ready")
        if rows.dim() != 1 or rows.numel() == 0 or int(rows.max()) >= self.batch:
            raise ValueError(f"rows {rows.tolist()} cannot be selected of {self.batch}")
        canvas = Canvas.__new__(Canvas)
        canvas.layout, canvas.given_length = self.layout, self.given_length
        if new is None:
            stores = [self.row, self.level, self.memo, self._status, self._rank, self._place]
            row, *rest = [None if x is None else x[rows] for x in stores]
            canvas.length = self.length
            canvas.value = {k: v[rows] for k, v in self.value.items()}
            canvas.noise = {k: v[rows] for k, v in self.noise.items()}
        else:
            _check_alike(self, new)
            where = below_own(rows, self.batch)
            pairs = [(self.row, new.row), (self.level, new.level), (self.memo, new.memo), (self.status, new.status)]
            pairs += [(self.rank, new.rank), (self.place, new.place)]
            row, *rest = [_rows_of_both(a, b, where, self.batch) for a, b in pairs]
            canvas.length = None
            canvas.value = {k: torch.cat([v, new.value[k]])[where] for k, v in self.value.items()}
            noise = {k: _rows_of_both(self.noise.get(k), new.noise.get(k), where, self.batch) for k in self.value}
            canvas.noise = {k: v for k, v in noise.items() if v is not None}
        assert row is not None
        canvas.row = row
        canvas.level, canvas.memo, canvas._status, canvas._rank, canvas._place = rest
        return canvas

    def become(self, other: Canvas) -> None:
        """Take over everything from another canvas, in place: whoever holds this one follows."""
        for name in Canvas.__slots__:
            setattr(self, name, getattr(other, name))

    def copy(self) -> Canvas:
        return self.select(torch.arange(self.batch))


_EDITS = {
    Set: Canvas._set,
    Unset: Canvas._unset,
    Revise: Canvas._revise,
    Remember: Canvas._remember,
    Insert: Canvas._insert,
    Delete: Canvas._delete,
    Truncate: Canvas._truncate,
    Grow: Canvas._grow,
    Reorder: Canvas._reorder,
}


def _last(rank: Int[Tensor, "b E"]) -> Int[Tensor, "b 1"]:
    """The last step that decides an element of each row; -1 where there are none."""
    return rank.amax(1, keepdim=True) if rank.shape[1] else rank.new_full((len(rank), 1), -1)


def _check_values(layout: Layout, value: Mapping[str, Tensor]) -> int:
    """Shapes of the values against the layout; the batch size."""
    if not value:
        raise ValueError("a canvas needs the values of at least one kind")
    batch = next(iter(value.values())).shape[0]
    if batch == 0:
        raise ValueError("a canvas needs at least one row; the batch is empty")
    for kind in layout.kinds:
        if kind not in value:
            raise ValueError(f"no values for kind {kind!r}; got {', '.join(value)}")
        shape = tuple(value[kind].shape)
        if len(shape) < 2 or shape[:2] != (batch, layout.count(kind)):
            raise ValueError(f"values of {kind!r} must be ({batch}, {layout.count(kind)}, ...), got {shape}")
        if value[kind].is_floating_point() and not bool(torch.isfinite(value[kind]).all()):
            raise ValueError(f"values of {kind!r} contain NaN or infinity")
    return batch


def given_elements(layout: Layout, known: int | Tensor, batch: int) -> Bool[Tensor, "b E"]:
    """Which elements of each row are given: the first `known` (one number, or one a row), or those that it marks, and
    all elements of given segments."""
    if isinstance(known, int):
        known = torch.full((1,), known)
    if known.dtype != torch.bool and known.dim() == 1 and known.shape[0] in (1, batch):
        if not 0 <= int(known.min()) <= int(known.max()) <= layout.size:
            raise ValueError(f"{known.tolist()} first elements are given, but the layout has {layout.size}")
        known = torch.arange(layout.size) < known[:, None]
    if known.dtype != torch.bool or known.dim() > 2 or known.shape[-1] != layout.size:
        raise ValueError(
            f"`known` is a number, one a row ({batch},), or a boolean ({batch}, {layout.size}); got "
            f"{tuple(known.shape)} {known.dtype}"
        )
    if known.dim() == 2 and known.shape[0] not in (1, batch):
        raise ValueError(f"`known` has {known.shape[0]} rows, the values have {batch}")
    return (known | layout.given).expand(batch, -1)


def _rows_of_both(a: Tensor | None, b: Tensor | None, where: Int[Tensor, "n"], batch: int) -> Tensor | None:
    """Rows of a (the first `batch` numbers) and of b (the others); one that is missing is all zeros."""
    if a is None and b is None:
        return None
    if a is None:
        assert b is not None
        a = b.new_zeros(batch, *b.shape[1:])
    if b is None:
        b = a.new_zeros(int(where.max()) + 1 - batch, *a.shape[1:])
    return torch.cat([a, b])[where]


def _check_alike(canvas: Canvas, new: Canvas) -> None:
    """Can rows of one join the other?"""
    if new.layout.size != canvas.layout.size or new.layout.kinds != canvas.layout.kinds:
        raise ValueError(
            f"rows of a layout of {new.layout.size} elements ({', '.join(new.layout.kinds)}) cannot join a canvas of "
            f"{canvas.layout.size} ({', '.join(canvas.layout.kinds)}); end shorter samples by Truncate"
        )
    for kind, value in canvas.value.items():
        if new.value[kind].shape[1:] != value.shape[1:] or new.value[kind].dtype != value.dtype:
            raise ValueError(
                f"values of {kind!r} are {tuple(value.shape[1:])} {value.dtype} here, those of the new rows "
                f"{tuple(new.value[kind].shape[1:])} {new.value[kind].dtype}"
            )
