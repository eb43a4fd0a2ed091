"""Draft trees that grow depth by depth: of fixed shape, or where the draft is sure.

Who drafts gives the likeliest tokens behind some nodes; how the tree grows from them is said here. A batch has one
tree, each row with tokens of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from seriatim.decoding.guess import Guess
from seriatim.decoding.ranking import ranked
from seriatim.decoding.templates import Template, of_paths


class Choices(NamedTuple):
    """What a draft holds likely behind some nodes: tokens, the likeliest first, and their log-probabilities."""

    log_prob: Float[Tensor, "b m w"]
    token: Int[Tensor, "b m w"]


def likeliest(logits: Float[Tensor, "b m v"], width: int) -> Choices:
    """The choices that logits make, by their places; fewer where there are fewer."""
    flat = logits.flatten(0, 1)
    place = ranked(flat, width)
    said = flat.gather(1, place).float() - flat.float().logsumexp(1, keepdim=True)
    return Choices(said.unflatten(0, logits.shape[:2]), place.unflatten(0, logits.shape[:2]))


Expand = Callable[[Int[Tensor, "b k"], Sequence[int]], Choices]
"""What is likely behind k nodes of one depth: their tokens, and behind which of the nodes that were expanded last each
stands (at first: 0, the last known token)."""


class Tree(Protocol):
    """How a draft tree grows. depth: how far it reaches at most; width: how many choices of a node it asks for."""

    @property
    def depth(self) -> int: ...

    @property
    def width(self) -> int: ...

    def grow(self, first: Choices, expand: Expand, deepest: Sequence[int]) -> Guess | None:
        """The tree below the last known tokens, where `first` is likely; None where nothing is. deepest: how far each
        row may reach (0: it drafts nothing)."""
        ...


@dataclass(frozen=True)
class Dynamic:
    """The `nodes` likeliest paths (EAGLE-2, Li et al. 2024, section 4).

    First the tree is expanded: at each depth the `width` likeliest paths get `width` children. Then the best of all
    that was looked at are kept; of equals the first, so that a parent is kept before its children. What a path is worth
    is its probability by the draft; in a batch, the sum over the rows: how many tokens it is expected to give.

    A path that already has `nodes` better ones is not followed: no child is worth more than its parent, so the tree is
    the same, and an uncertain draft costs fewer forwards.
    """

    nodes: int = 12
    depth: int = 5
    width: int = 4

    def __post_init__(self) -> None:
        if min(self.nodes, self.depth, self.width) < 1:
            raise ValueError(
                f"a draft tree has at least 1 node, depth and width, got nodes {self.nodes}, depth {self.depth}, width "
                f"{self.width}"
            )

    def grow(self, first: Choices, expand: Expand, deepest: Sequence[int]) -> Guess | None:
        score, token = first.log_prob[:, 0], first.token[:, 0]
        worth = _worth(score, deepest, 1)
        tokens, parent, depths, total = [token], [-1] * len(worth), [1] * len(worth), worth
        rows = [0] * len(worth)  # which of the nodes expanded last each node of this depth stands behind
        start = 0
        for depth in range(2, min(self.depth, max(deepest)) + 1):
            best = sorted(total, reverse=True)
            floor = best[self.nodes - 1] if len(best) >= self.nodes else -math.inf
            growing = [i for i in _best(worth, self.width) if worth[i] > floor]
            if not growing:
                break
            said = expand(token[:, growing], [rows[i] for i in growing])
            width = said.token.shape[2]
            score = (score[:, growing, None] + said.log_prob).flatten(1)
            token = said.token.flatten(1)
            worth = _worth(score, deepest, depth)
            tokens.append(token)
            parent += [start + i for i in growing for _ in range(width)]
            depths += [depth] * len(worth)
            start, rows, total = len(total), [i for i in range(len(growing)) for _ in range(width)], total + worth
        kept = sorted(i for i in _best(total, self.nodes) if total[i] > -math.inf)
        place = {-1: -1} | {node: i for i, node in enumerate(kept)}
        value = torch.cat(tokens, 1)[:, kept]
        return _guess(value, tuple(place[parent[i]] for i in kept), [depths[i] for i in kept], deepest)


@dataclass(frozen=True)
class Static:
    """A tree of fixed shape, whose nodes are the i-th likeliest behind their parents (EAGLE, Li et al. 2024)."""

    template: Template

    @property
    def depth(self) -> int:
        return self.template.depth

    @property
    def width(self) -> int:
        return self.template.width

    def grow(self, first: Choices, expand: Expand, deepest: Sequence[int]) -> Guess | None:
        template = _fitting(self.template, first.token.shape[2], max(deepest))
        value = first.token[:, 0, [c for p, c in zip(template.parent, template.child, strict=True) if p < 0]]
        rows = [0] * value.shape[1]
        above = 0  # the first node of the depth above
        for start, end in template.levels[1:]:
            parents = template.parent[start:end]
            growing = sorted(set(parents))
            said = expand(value[:, growing], [rows[i - above] for i in growing])
            rows = [growing.index(p) for p in parents]
            value = torch.cat([value, said.token[:, rows, template.child[start:end]]], 1)
            above = start
        return _guess(value, template.parent, template.depths, deepest)


@lru_cache(maxsize=64)
def _fitting(template: Template, width: int, depth: int) -> Template:
    """What is left of a template where there are so many choices and so much room."""
    template = template.cut(depth)
    if template.width <= width:
        return template
    return of_paths(path for path in template.paths if max(path) < width)


def _worth(score: Float[Tensor, "b n"], deepest: Sequence[int], depth: int) -> list[float]:
    """What the nodes of a depth are worth, as a logarithm."""
    if len(deepest) > 1:
        there = torch.tensor(deepest, device=score.device) >= depth
        score = score.masked_fill(~there[:, None], -torch.inf).logsumexp(0, keepdim=True)
    return [x if x == x else -math.inf for x in score[0].tolist()]  # NaN: a broken draft is worth nothing


def _best(worth: Sequence[float], count: int) -> list[int]:
    """The places of the largest numbers, the largest first; of equals the first."""
    return sorted(range(len(worth)), key=lambda i: -worth[i])[:count]


def _guess(
    value: Int[Tensor, "b n"], parent: tuple[int, ...], depths: Sequence[int], deepest: Sequence[int]
) -> Guess | None:
    """The nodes that rows have room for."""
    if not parent:
        return None
    if depths[-1] > min(deepest):
        there = torch.tensor(depths)[None] <= torch.tensor(deepest)[:, None]
        value = value.masked_fill(~there.to(value.device), -1)
    return Guess(value, None if parent == tuple(range(-1, len(parent) - 1)) else parent)
