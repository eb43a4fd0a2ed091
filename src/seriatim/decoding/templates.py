"""Templates of draft trees: the shape is fixed, and which tokens stand in it is found out anew at every step.

A template says of each node which node it stands below and which candidate of that node it is: the likeliest (0), the
second (1), ... Who drafts fills it depth by depth: token recycling takes row `token(parent)` of its matrix, Medusa the
ranking of the head that looks that far ahead. Where a row has no such candidate the node is left out (-1), and with it
everything below.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from seriatim.decoding.guess import children, depths, levels

Path = tuple[int, ...]


@dataclass(frozen=True)
class Template:
    """The shape of a draft tree, its nodes listed depth by depth.

    parent: the node each node stands below (-1: the last known token), as in `Guess.parent`; child: which candidate of
    its parent it is, from 0; the children of a node are different candidates, in ascending order. Raises ValueError for
    what is no such tree.
    """

    parent: tuple[int, ...]
    child: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.parent) != len(self.child):
            raise ValueError(f"{len(self.parent)} parents for {len(self.child)} candidates: each node has one of both")
        children(self.parent)  # raises where a parent does not come first
        for i in range(1, self.size):
            before, now = ((self.depths[j], self.parent[j], self.child[j]) for j in (i - 1, i))
            if now <= before:
                raise ValueError(
                    f"node {i} is candidate {now[2]} below node {now[1]}, behind candidate {before[2]} below node "
                    f"{before[1]}: nodes are listed depth by depth, children in the order of their parents, each once"
                )
        if self.child and min(self.child) < 0:
            raise ValueError(f"candidates are counted from 0, got {min(self.child)}")

    @property
    def size(self) -> int:
        return len(self.parent)

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """How many tokens behind the last known one each node stands (from 1)."""
        return depths(self.parent)

    @cached_property
    def depth(self) -> int:
        """Of the deepest node."""
        return max(self.depths, default=0)

    @cached_property
    def width(self) -> int:
        """How many candidates of a token it may ask for."""
        return max(self.child, default=-1) + 1

    @property
    def levels(self) -> tuple[tuple[int, int], ...]:
        """The nodes of each depth, as (first, end)."""
        return levels(self.parent)

    @cached_property
    def paths(self) -> tuple[Path, ...]:
        """The candidates that lead from the last known token to each node."""
        paths: list[Path] = []
        for p, c in zip(self.parent, self.child, strict=True):
            paths.append((*paths[p], c) if p >= 0 else (c,))
        return tuple(paths)

    def cut(self, depth: int) -> Template:
        """What is left of it down to a depth."""
        if depth >= self.depth:
            return self
        size = sum(d <= depth for d in self.depths)
        return Template(self.parent[:size], self.child[:size])

    def pruned(self, counts: Sequence[float], nodes: int) -> Template:
        """The `nodes` that were accepted most often; of equals the first. A node counts whenever a path through it was
        accepted, so none counts more than its parent, and what is kept hangs together. Raises ValueError for other
        counts."""
        if len(counts) != self.size:
            raise ValueError(f"{len(counts)} counts for {self.size} nodes: each has one")
        for i, p in enumerate(self.parent):
            if p >= 0 and counts[i] > counts[p]:
                raise ValueError(
                    f"node {i} counts {counts[i]:g} and its parent {p} only {counts[p]:g}: who reaches a node has "
                    "been at its parent"
                )
        best = sorted(range(self.size), key=lambda i: (-counts[i], i))[:nodes]
        return of_paths(self.paths[i] for i in best)


def of_paths(paths: Iterable[Sequence[int]]) -> Template:
    """The template whose nodes are at the ends of these paths of candidates, in any order. Raises ValueError where a
    path hangs in the air."""
    ordered = sorted({tuple(path) for path in paths}, key=lambda path: (len(path), path))
    index = {path: i for i, path in enumerate(ordered)}
    for path in ordered:
        if len(path) != 1 and path[:-1] not in index:
            raise ValueError(f"path {path} needs its beginning {path[:-1]} to be a node as well")
    parent = tuple(index[path[:-1]] if len(path) > 1 else -1 for path in ordered)
    return Template(parent, tuple(path[-1] for path in ordered))


def spread(*widths: Sequence[int]) -> Template:
    """The template in which the i-th node of a depth has so many children, its first candidates: one tuple for each
    depth, from that of the last known token, (its children,); zeros at the end of a tuple may be left out."""
    level: list[Path] = [()]
    paths: list[Path] = []
    for width in widths:
        if len(width) > len(level):
            raise ValueError(f"{len(width)} numbers of children for the {len(level)} nodes of a depth")
        level = [(*path, c) for path, n in zip(level, width, strict=False) for c in range(n)]
        paths += level
    return of_paths(paths)


def likeliest(chance: Sequence[Sequence[float]], nodes: int) -> Template:
    """The template of so many nodes that accepts most, where candidate i at depth d stands with chance[d - 1][i] once
    its parent stands: a node is worth the product along its path, so the best nodes are taken one after another (the
    greedy construction of Medusa, Cai et al. 2024, section 2.3.3, which is optimal: no node is worth more than its
    parent). No deeper than there are rows. Raises ValueError for more nodes than that gives."""
    if any(not 0 <= c <= 1 for row in chance for c in row):
        raise ValueError("chances are between 0 and 1")
    found: list[Path] = []
    waiting: list[tuple[float, int, Path]] = [(-1.0, 0, ())]
    while waiting and len(found) <= nodes:
        worth, depth, path = heapq.heappop(waiting)
        found.append(path)
        for i, c in enumerate(chance[depth] if depth < len(chance) else ()):
            heapq.heappush(waiting, (worth * c, depth + 1, (*path, i)))
    if len(found) <= nodes:
        raise ValueError(f"chances for {len(found) - 1} nodes, and {nodes} are asked for")
    return of_paths(found[1:])


RECYCLED = spread(
    (8,),
    (8, 4, 3, 2, 1, 1, 1, 1),
    (8, 3, 2, 1, 1, 1, 1, 1, 2, 1, 0, 0, 1, 0, 0, 1, 0, 1, 1),
    (5, 2, 1, 1, 1, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 1, 1),
    (3, 1, 1, 0, 0, 1, 0, 0, 0, 0, 1, 0, 1),
    (2, 0, 0, 1),
)  # fmt: skip
"""The 80 nodes that were released with Token Recycling (Luo et al. 2024), depth 6, widths 8, 21, 25, 15, 8, 3."""

MEDUSA = spread((10,), (10, 7, 3, 2, 1, 1, 1, 1, 1, 1), (10, 3, 2, 1, 1, 1, 1, 1, 0, 0, 2, 0, 0, 0, 0, 0, 0, 1), (2,))
"""The 63 nodes of depth 4 that Medusa takes unless it is told otherwise (Cai et al. 2024)."""

EAGLE = spread((4,), (3, 2, 2, 1), (3, 2, 2, 1), (3,), (2,))
"""The 25 nodes of depth 5 that EAGLE was released with (Li et al. 2024), and Chimera after it."""

CHANCE = (0.32, 0.094, 0.049, 0.034, 0.025, 0.02, 0.02, 0.014)
"""How often candidate i of a node stands once its parent does, where nothing better is known: the average of `VISITS`
over depths."""

VISITS = (
    838, 277, 141, 103, 74, 70, 71, 39, 341, 75, 36, 30, 26, 11, 10, 13, 94, 25, 17, 9,
    38, 15, 9, 31, 11, 14, 23, 23, 8, 151, 39, 22, 13, 8, 6, 5, 6, 27, 7, 6,
    14, 2, 5, 10, 2, 3, 5, 25, 9, 6, 10, 10, 3, 4, 79, 20, 8, 3, 2, 12,
    6, 7, 6, 6, 9, 9, 8, 4, 2, 42, 8, 7, 8, 1, 4, 4, 5, 20, 6, 2,
)  # fmt: skip
"""How often each node of `RECYCLED` was accepted by token recycling: 3,104 drafts of `zoo:text-base` (held-out files of
the standard library) and SmolLM2-135M-Instruct (built-in prompts of the bench), greedy and at temperature 0.7, in
outputs that do not repeat themselves. `Recycler.visits` counts the same for another model."""


@lru_cache(maxsize=80)
def standard(nodes: int) -> Template:
    """The so many nodes of `RECYCLED` that were accepted most often. Raises ValueError for fewer than 1 or more than
    there are."""
    if not 1 <= nodes <= RECYCLED.size:
        raise ValueError(f"a tree pruned from the released one has 1 to {RECYCLED.size} nodes, got {nodes}")
    return RECYCLED.pruned(VISITS, nodes)


TEMPLATES = {nodes: standard(nodes) for nodes in (8, 12, 16)}
"""Of the sizes that pay on a processor, where a forward over 8 to 16 tokens costs little more than one over one."""
