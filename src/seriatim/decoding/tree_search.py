"""Searches that make a draft tree of a table of tri-grams: by Monte-Carlo tree search (ADED), best first, by a beam.

Each is asked for a tree of at most `nodes` below a text that ends in tokens a, b, and depends on the table alone: what
is drafted involves no randomness.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch

from seriatim.canvas import Canvas
from seriatim.decoding.guess import Guess, room
from seriatim.decoding.loop import Step
from seriatim.decoding.target import Target
from seriatim.decoding.trigrams import Adapted
from seriatim.model import Rows
from seriatim.random import Random

GOLDEN = 0.6180339887498949  # multiples of it, without whole parts, cover the unit interval evenly


class Trie:
    """A draft tree: tokens and the nodes they stand below (-1: the root), parents first, each child once."""

    def __init__(self, most: int):
        self.most = most
        self.parent: list[int] = []
        self.token: list[int] = []
        self._index: dict[tuple[int, int], int] = {}

    def add(self, path: Sequence[int]) -> bool:
        """Put in a path of tokens from the root, as far as there is room. Was there room?"""
        node = -1
        for token in path:
            below = self._index.get((node, token))
            if below is None:
                if len(self.token) == self.most:
                    return False
                below = self._index[node, token] = len(self.token)
                self.parent.append(node)
                self.token.append(token)
            node = below
        return True

    def follow(self, tokens: Sequence[int]) -> int:
        """How many of these tokens the tree has, one below the other."""
        node = -1
        for count, token in enumerate(tokens):
            below = self._index.get((node, token))
            if below is None:
                return count
            node = below
        return len(tokens)


class Search(Protocol):
    """Makes a tree of at most `nodes`, no deeper than `depth`."""

    def __call__(self, table: Adapted, a: int, b: int, nodes: int, depth: int) -> Trie: ...


# ---- by path probability ---------------------------------------------------------------------------------------------


def best_first(table: Adapted, a: int, b: int, nodes: int, depth: int) -> Trie:
    """The nodes of largest path probability, one after another: the tree that the table itself expects most of."""
    trie = Trie(nodes)
    waiting: list[tuple[float, int, int, int, int, tuple[int, ...]]] = []
    order = 0

    def put(worth: float, a: int, b: int, path: tuple[int, ...]) -> None:
        nonlocal order
        found = table.after(a, b)
        total = max(found.total, 1.0)
        for token, score in zip(found.token, found.score, strict=True):
            order += 1  # of equals the one that was found first
            heapq.heappush(waiting, (worth * score / total, order, b, token, len(path) + 1, (*path, token)))

    put(-1.0, a, b, ())
    while waiting and len(trie.token) < nodes:
        worth, _, a, b, length, path = heapq.heappop(waiting)
        trie.add(path)
        if length < depth:
            put(worth, a, b, path)
    return trie


def beam(table: Adapted, a: int, b: int, nodes: int, depth: int) -> Trie:
    """At every depth equally many nodes, those of largest path probability among the children of those above."""
    trie, width = Trie(nodes), max(nodes // depth, 1)
    level: list[tuple[float, int, int, tuple[int, ...]]] = [(1.0, a, b, ())]
    for _ in range(min(depth, nodes)):
        below: list[tuple[float, int, int, tuple[int, ...]]] = []
        for worth, a, b, path in level:
            found = table.after(a, b)
            total = max(found.total, 1.0)
            pairs = zip(found.token, found.score, strict=True)
            below += [(worth * score / total, b, token, (*path, token)) for token, score in pairs]
        level = sorted(below, key=lambda node: -node[0])[:width]
        for *_, path in level:
            trie.add(path)
    return trie


# ---- Monte-Carlo tree search -----------------------------------------------------------------------------------------


@dataclass
class _Nodes:
    """The tree that is searched, as one list a property; node 0 is the root."""

    before: list[int]
    token: list[int]
    parent: list[int] = field(default_factory=lambda: [-1])
    depth: list[int] = field(default_factory=lambda: [0])
    prior: list[float] = field(default_factory=lambda: [0.0])
    visits: list[int] = field(default_factory=lambda: [0])
    value: list[float] = field(default_factory=lambda: [0.0])
    below: list[range | None] = field(default_factory=lambda: [None])  # None: not expanded

    def expand(self, node: int, table: Adapted) -> range:
        """All successors become children, the likeliest first."""
        found = table.after(self.before[node], self.token[node])
        n, size = len(found.token), len(self.token)
        self.before += [self.token[node]] * n
        self.token += found.token
        self.parent += [node] * n
        self.depth += [self.depth[node] + 1] * n
        self.prior += found.score
        self.visits += [0] * n
        self.value += [0.0] * n
        self.below += [None] * n
        children = self.below[node] = range(size, size + n)
        return children

    def path(self, node: int) -> list[int]:
        """Tokens from the root."""
        tokens: list[int] = []
        while node > 0:
            tokens.append(self.token[node])
            node = self.parent[node]
        return tokens[::-1]


@dataclass(frozen=True)
class MonteCarlo:
    """Monte-Carlo tree search (ADED, section 3.2, and its code): walk down by

        value / visits + (c1 + ln((N + c2 + 1) / c2)) P sqrt(N) / (1 + visits)

    (N visits and P score of the child; unvisited children first), expand, follow the table at random down to `depth`,
    and give every node on the way 1 + the scores that were met. The paths of the most visited nodes, each extended by
    its best successor, make the tree. Roll-outs draw from an even sequence, so that the same text has the same draft.

    iterations: the release has 150, for trees of 64 nodes. value: a step from (a, b) to c meets the score of c, the
    "last" token of the pair (b, c). The released code looks up the "first", b behind (a, b): it is nearly always 0, so
    all nodes are worth the same and P alone decides. Raises ValueError for other settings.
    """

    iterations: int = 40
    c1: float = 32.0
    c2: float = 8.0
    paths: int = 24
    value: Literal["last", "first"] = "last"

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.paths < 1 or self.c1 < 0 or self.c2 <= 0:
            raise ValueError(
                "a search has 1 or more iterations and paths, c1 of 0 or more and c2 above 0; got "
                f"{self.iterations}, {self.paths}, {self.c1} and {self.c2}"
            )
        if self.value not in ("last", "first"):
            raise ValueError(f"a step is worth the score of its 'last' or 'first' token, not {self.value!r}")

    def __call__(self, table: Adapted, a: int, b: int, nodes: int, depth: int) -> Trie:
        tree, trie = self.search(table, a, b, depth), Trie(nodes)
        visited = [i for i in range(1, len(tree.token)) if tree.visits[i]]
        visited.sort(key=lambda i: -tree.visits[i])  # of equals the one that was found first
        for node in visited[: self.paths]:
            path = tree.path(node)
            found = table.after(tree.before[node], tree.token[node])
            if not trie.add(path + found.token[:1] if len(path) < depth else path):
                break
        return trie

    def search(self, table: Adapted, a: int, b: int, depth: int) -> _Nodes:
        """The searched tree; its nodes end one above `depth`, which is left to the extension."""
        tree, deepest, even = _Nodes([a], [b]), max(depth - 1, 1), 0.5
        for _ in range(self.iterations):
            node = 0
            while tree.below[node]:
                node = self._select(tree, node)
            score = 1.0
            if tree.below[node] is None and tree.depth[node] < deepest:
                children = tree.expand(node, table)
                node = children[0] if children else node
            score += self._on_the_way(tree, node, table)
            p, q = tree.before[node], tree.token[node]
            for _ in range(deepest - tree.depth[node]):
                found = table.after(p, q)
                if not found.token:
                    break
                even = (even + GOLDEN) % 1.0
                token, own = _drawn(found.token, found.score, even * found.total)
                score += self._met(table, p, q, own)
                p, q = q, token
            while node >= 0:
                tree.visits[node] += 1
                tree.value[node] += score
                node = tree.parent[node]
        return tree

    def _select(self, tree: _Nodes, node: int) -> int:
        """The child that is worth most."""
        n = tree.visits[node]
        weight = (self.c1 + math.log((n + self.c2 + 1) / self.c2)) * math.sqrt(n)
        prior, visits, value = tree.prior, tree.visits, tree.value
        best, most = -1, -math.inf
        for child in tree.below[node] or ():
            v = visits[child]
            if not v:  # the likeliest of those that nobody has visited
                return child
            worth = value[child] / v + weight * prior[child] / (1 + v)
            if worth > most:
                best, most = child, worth
        return best

    def _on_the_way(self, tree: _Nodes, node: int, table: Adapted) -> float:
        """The scores that are met from the root down to a node."""
        met = 0.0
        while node > 0:
            above = tree.parent[node]
            met += self._met(table, tree.before[above], tree.token[above], tree.prior[node])
            node = above
        return met

    def _met(self, table: Adapted, a: int, b: int, score: float) -> float:
        """What a step from (a, b) to a successor of this score counts."""
        if self.value == "last":
            return score
        found = table.after(a, b)
        return found.score[found.token.index(b)] if b in found.token else 0.0


def _drawn(tokens: Sequence[int], scores: Sequence[float], place: float) -> tuple[int, float]:
    """The token whose share of the scores, one behind another, holds this place."""
    for token, score in zip(tokens, scores, strict=True):
        place -= score
        if place < 0:
            return token, score
    return tokens[-1], scores[-1]


# ---- the proposer ----------------------------------------------------------------------------------------------------


class SearchedDraft:
    """Drafts the tree that a search finds in a table of tri-grams below the last two tokens of each row.

    Before each draft the table adapts to the last `window` tokens of the row; a text that is met for the first time
    counts as if the window had passed over all of it. Rows of a batch share the table, each has a tree of its own.
    """

    def __init__(self, table: Adapted, search: Search, nodes: int = 12, depth: int = 4, window: int = 16):
        if nodes < 1 or depth < 1 or window < 3:
            raise ValueError(
                f"a draft tree has 1 or more nodes and depths, a window 3 or more tokens; got {nodes}, {depth} and "
                f"{window}"
            )
        self.table, self.search, self.nodes, self.depth, self.window = table, search, nodes, depth, window
        self._canvas: Canvas | None = None
        self._met: set[int] = set()  # rows whose text was read from its beginning

    def propose(self, canvas: Canvas, target: Target, random: Random) -> Guess | None:
        if canvas is not self._canvas:
            self._canvas, self._met = canvas, set()
        kind = canvas.layout.kinds[0]
        known = [canvas.length] * canvas.batch if canvas.length is not None else canvas.lengths().tolist()
        tries: list[Trie] = []
        for row, (name, n, left) in enumerate(zip(canvas.row.tolist(), known, room(canvas), strict=True)):
            if left < 2 or n < 2:
                tries.append(Trie(0))
                continue
            new = name not in self._met
            self._met.add(name)
            text = canvas.value[kind][row, 0 if new else max(n - self.window, 0) : n].tolist()
            self.table.reinforce(text, self.window - 2 if new else 1)
            tries.append(self.search(self.table, text[-2], text[-1], self.nodes, min(self.depth, left - 1)))
        parent, value = together(tries)
        if not parent:
            return None
        chain = parent == tuple(range(-1, len(parent) - 1))
        return Guess(torch.tensor(value).to(canvas.value[kind].device), None if chain else parent)

    def observe(self, canvas: Canvas, rows: Rows, step: Step) -> None:
        """What was accepted is read from the text, before the next draft."""


def together(tries: Sequence[Trie]) -> tuple[tuple[int, ...], list[list[int]]]:
    """The parents of one tree that holds the trees of all rows, child by child, and the token that each row has at each
    of its nodes (-1: none)."""
    if len(tries) == 1:
        return tuple(tries[0].parent), [tries[0].token]
    parent: list[int] = []
    index: dict[tuple[int, int], int] = {}
    tokens: list[dict[int, int]] = []
    for trie in tries:
        born: dict[int, int] = {}  # how many children of each node of this row there are so far
        place: list[int] = []  # of its nodes in the common tree
        for above in trie.parent:
            common = place[above] if above >= 0 else -1
            child = born[common] = born.get(common, -1) + 1
            node = index.setdefault((common, child), len(parent))
            if node == len(parent):
                parent.append(common)
            place.append(node)
        tokens.append(dict(zip(place, trie.token, strict=True)))
    return tuple(parent), [[own.get(i, -1) for i in range(len(parent))] for own in tokens]


def drafting_seconds(
    table: Adapted, search: Search, text: Sequence[int], nodes: int = 12, depth: int = 4, window: int = 16
) -> list[float]:
    """How long each draft takes while this text is written token by token, adaptation included, in seconds."""
    seconds = []
    for n in range(3, len(text) + 1):
        start = time.perf_counter()
        table.reinforce(text[max(n - window, 0) : n])
        search(table, text[n - 2], text[n - 1], nodes, depth)
        seconds.append(time.perf_counter() - start)
    return seconds


def accepted_along(
    table: Adapted, search: Search, text: Sequence[int], nodes: int = 12, depth: int = 4, window: int = 16
) -> list[int]:
    """Tokens that each forward gives (those drafted that stand, and one more) while a model writes this very text; what
    is drafted depends on the text alone, so no model is asked. The first two tokens are given."""
    given, n = [], 2
    while (left := len(text) - n) > 0:
        table.reinforce(text[max(n - window, 0) : n])
        tree = search(table, text[n - 2], text[n - 1], nodes, min(depth, left - 1)) if left > 1 else Trie(0)
        given.append(tree.follow(text[n : n + left - 1]) + 1)
        n += given[-1]
    return given
