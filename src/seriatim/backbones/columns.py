"""What every cache can do, and the arithmetic of its columns, row by row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from seriatim.plan import Plan
from seriatim.view import View

Keep = int | Sequence[int] | Tensor


class Cache(Protocol):
    """Committed entries, then the pending ones of the last forward.

    `can` names what is possible beyond keeping a path of what is pending: subset, evict, replace. It is asked when
    parts are joined, never found out by failing. `length` counts the committed entries: one number, or one a row.
    """

    can: frozenset[str]

    @property
    def length(self) -> int | Tensor: ...

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
        """Keep only these committed entries, in this order (-1: padding)."""
        ...

    def select(self, rows: Int[Tensor, "b2"], new: Sequence[Any] = ()) -> None:
        """Keep, copy, reorder rows; -1 is the next row of caches of the same kind (`new`), or one that holds nothing.
        What is pending is dropped."""
        ...

    def join(self, others: Sequence[Any]) -> None:
        """Take in the rows of other caches of the same kind, below one's own. What is pending is dropped."""
        ...

    def compressed(self, codec: Any, capacity: int) -> Any:
        """An empty cache of this one's kind and size that keeps what is committed in the form of a codec
        (`backbones.compressed.Codec`), with room for `capacity` slots. Raises ValueError where there is none."""
        ...

    def nbytes(self) -> int:
        """Bytes held by committed entries."""
        ...


def as_rows(keep: Keep) -> Int[Tensor, "b m"]:
    if isinstance(keep, Tensor):
        return keep
    return (torch.arange(keep) if isinstance(keep, int) else torch.tensor(keep, dtype=torch.long))[None]


def packed(columns: int, held: Int[Tensor, "b"], keep: Int[Tensor, "b m"]) -> Int[Tensor, "b w"]:
    """Where the entries of each row stand in [old columns, kept slots], live ones first, -1 behind them."""
    old = torch.where(torch.arange(columns) < held[:, None], torch.arange(columns), -1)
    new = torch.where(keep >= 0, torch.arange(columns, columns + keep.shape[1]), -1)
    both = torch.cat([old, new.expand(len(held), -1)], 1)
    order = (both < 0).long().argsort(dim=1, stable=True)
    return both.gather(1, order)[:, : int((both >= 0).sum(1).max())]


def picked(layers: Bool[Tensor, "L b c"], index: Int[Tensor, "b m"]) -> Bool[Tensor, "L b m"]:
    where = index.clamp(min=0).expand(layers.shape[0], len(index), -1)
    return layers.expand(-1, len(index), -1).gather(2, where)


def of_rows(view: View, rows: Int[Tensor, "b"]) -> View:
    """The labels of these rows of a batch; what the batch shares stays shared."""

    def pick(x: Tensor) -> Tensor:
        return x if x.shape[0] == 1 else x[rows]

    lane = None if view.lane is None else pick(view.lane)
    group = None if view.group is None else pick(view.group)
    return View(pick(view.at), pick(view.born), pick(view.dies), lane, group, view.relation)
