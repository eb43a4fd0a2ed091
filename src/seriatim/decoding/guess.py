"""Provisional content under verification: a chain, a draft tree, a Jacobi window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from seriatim.canvas import Canvas
from seriatim.heads.dist import Categorical


class Transfer(NamedTuple):
    """A map from the state of a token in front of a layer to that of one further on (hidden transfer)."""

    layer: int
    matrix: Float[Tensor, "d d"]


@dataclass(slots=True, eq=False)
class Guess:
    """Nodes of a draft below the last known element, parents before children.

    value (batch, nodes): token of each node, -1 where a row has fewer. `parent` holds the parent's index (-1: the last
    known element), the same for all rows; None is a chain. `q` is the law each node was drawn from, given everything
    drawn before it: for siblings drawn without replacement, without the earlier ones (None: the draft involves no
    randomness, so each node's law is all on its token). `siblings` says how children of one node were drawn:
    "independent" (with replacement) or "distinct" (without). `spawn`: from the state of the last known element, and
    from that of each node, the states of the elements behind are guessed on the way through the layers, the j-th behind
    by the j-th of these maps; they are read by who drafts next, and forgotten. `masks`: behind the last known element,
    and behind each node, so many masks stand in a block, which see each other and what that one sees; they, too, are
    read by who drafts next, and forgotten. A guess asks for one or the other.
    """

    value: Int[Tensor, "b n"]
    parent: tuple[int, ...] | None = None
    q: Categorical | None = None
    siblings: str = "independent"
    spawn: tuple[Transfer, ...] = ()
    masks: int = 0

    @property
    def size(self) -> int:
        return self.value.shape[1]

    @property
    def chain(self) -> bool:
        return self.parent is None

    def parents(self) -> tuple[int, ...]:
        return self.parent if self.parent is not None else tuple(range(-1, self.size - 1))

    def depths(self) -> tuple[int, ...]:
        """How many elements behind the last known one each node stands (from 1)."""
        return depths(self.parents())

    def children(self) -> dict[int, tuple[int, ...]]:
        """Nodes below each node (-1: the root), in order."""
        return children(self.parents())

    def laws(self, rows: Sequence[int], nodes: Sequence[int], like: Float[Tensor, "n v"]) -> Float[Tensor, "n v"]:
        """The probabilities from which a node of each of these rows was drawn, in the number format of `like`."""
        r, n = torch.tensor(rows), torch.tensor(nodes)
        if self.q is None:
            token = self.value[r, n].clamp(min=0)[:, None].to(like.device)
            return torch.zeros_like(like).scatter(-1, token, 1.0)
        q = type(self.q)(self.q.logits[r, n][:, None])
        return q.probs()[:, 0].to(like.dtype)


@lru_cache(maxsize=512)
def spawning(parent: tuple[int, ...], count: int) -> tuple[int, ...]:
    """A tree in which each node, and the root, also has a chain of `count` nodes of its own below it: these stand
    behind all others, the first of all chains, then the second of all chains, and so on."""
    n = len(parent)
    for j in range(count):
        parent += tuple(range(-1, n)) if j == 0 else tuple(range(n + (j - 1) * (n + 1), n + j * (n + 1)))
    return parent


@lru_cache(maxsize=512)
def depths(parent: tuple[int, ...]) -> tuple[int, ...]:
    """How many steps below the root (from 1) each node stands."""
    depth: list[int] = []
    for p in parent:
        depth.append(1 if p < 0 else depth[p] + 1)
    return tuple(depth)


@lru_cache(maxsize=512)
def levels(parent: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """The nodes of each depth as (first, end), for a tree listed depth by depth."""
    depth = depths(parent)
    first = [i for i in range(len(depth)) if i == 0 or depth[i] > depth[i - 1]]
    return tuple(pairwise([*first, len(depth)]))


@lru_cache(maxsize=512)
def children(parent: tuple[int, ...]) -> dict[int, tuple[int, ...]]:
    """Nodes below each node (-1: the root), in order. Shared: not to be changed."""
    below: dict[int, list[int]] = {i: [] for i in range(-1, len(parent))}
    for i, p in enumerate(parent):
        if not -1 <= p < i:
            raise ValueError(f"node {i} has parent {p}; parents come before their children (or -1 for the root)")
        below[p].append(i)
    return {node: tuple(nodes) for node, nodes in below.items()}


def branching(widths: Sequence[int]) -> tuple[int, ...]:
    """Parents of a tree in which every node at depth i has widths[i] children, depth by depth. (1, 1, 1) is a chain of
    three, (4, 1, 1) four chains of three."""
    if any(w < 1 for w in widths):
        raise ValueError(f"every depth of a tree has a width of at least 1, got {tuple(widths)}")
    parent: list[int] = []
    level = [-1]
    for width in widths:
        below = [p for p in level for _ in range(width)]
        level = list(range(len(parent), len(parent) + len(below)))
        parent += below
    return tuple(parent)


def room(canvas: Canvas) -> list[int]:
    """How many elements each row of a line has to decide from its front to the next given one, or to its end. A draft
    is worth one less: the verifier adds one."""
    size = canvas.layout.size
    if canvas.length is not None:
        return [size - canvas.length] * canvas.batch
    start, element = canvas.lengths(), torch.arange(size)
    closed = torch.where(canvas.open | (element < start[:, None]), size, element)
    return (closed.amin(1) - start).tolist() if size else [0] * canvas.batch


def moved(before: Int[Tensor, "b"], now: Int[Tensor, "b2"]) -> Int[Tensor, "b2"] | None:
    """Where the rows of a batch, known by their names (`Canvas.row`), stood before; -1: it is new. None: as before."""
    if before is now or torch.equal(before, now):
        return None
    where = {row: i for i, row in reversed(list(enumerate(before.tolist())))}
    return torch.tensor([where.get(row, -1) for row in now.tolist()])
