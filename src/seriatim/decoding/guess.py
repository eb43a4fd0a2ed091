"""Provisional content under verification: a chain, a draft tree, a Jacobi window."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from seriatim.heads.dist import Categorical


@dataclass(slots=True, eq=False)
class Guess:
    """Nodes of a draft below the last known element, parents before children.

    value (batch, nodes): token of each node, -1 where a row has fewer. `parent` holds the parent's index (-1: the last
    known element), the same for all rows; None is a chain. `q` is the law each node was drawn from, given everything
    before it (None: the draft involves no randomness). `siblings` says how children of one node were drawn:
    "independent" (with replacement) or "distinct" (without).
    """

    value: Int[Tensor, "b n"]
    parent: tuple[int, ...] | None = None
    q: Categorical | None = None
    siblings: str = "independent"

    @property
    def size(self) -> int:
        return self.value.shape[1]

    @property
    def chain(self) -> bool:
        return self.parent is None

    def parents(self) -> tuple[int, ...]:
        return self.parent if self.parent is not None else tuple(range(-1, self.size - 1))

    def depths(self) -> list[int]:
        """How many elements behind the last known one each node stands (from 1)."""
        depth: list[int] = []
        for p in self.parents():
            depth.append(1 if p < 0 else depth[p] + 1)
        return depth

    def children(self) -> dict[int, list[int]]:
        """Nodes below each node (-1: the root), in order."""
        below: dict[int, list[int]] = {i: [] for i in range(-1, self.size)}
        for i, p in enumerate(self.parents()):
            below[p].append(i)
        return below

    def row_probs(self, row: int) -> Float[Tensor, "n v"]:
        """The proposal's probabilities of each node of a row."""
        if self.q is None:
            raise ValueError("this draft has no proposal law: it was made without randomness")
        return torch.exp(self.q.log_probs()[row])
