"""Exact laws by enumeration, many outcomes at once: every row of a batch follows a path of choices of its own.

`enumerate_law` (seriatim.random) replays one outcome after another; here a batch carries hundreds. Rows must not
depend on each other, so a batch that leaks between rows gives a wrong law.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from seriatim.random import Key

ROUNDING = 1e-14  # what is less probable may be 0 in a batch of another size: impossible


class Paths:
    """A source of randomness that replays one path of choices a row (rows are named 0, 1, ...), then first choices.

    `weight` is the probability of each row's path. A row that is `close`d draws on, but what it draws is not
    enumerated: its outcome stands.
    """

    def __init__(self, paths: Sequence[Sequence[int]]):
        self.paths = paths
        self.weight = [1.0] * len(paths)
        self.branch: list[list[tuple[int, int]]] = [[] for _ in paths]  # (choice taken, number of possible choices)
        self.closed = [False] * len(paths)

    def close(self, rows: Sequence[bool]) -> None:
        """The outcomes of these rows stand."""
        self.closed = [a or b for a, b in zip(self.closed, rows, strict=True)]

    def _choose(self, row: int, p: Sequence[float]) -> int:
        options = [i for i, x in enumerate(p) if x > ROUNDING]
        if not options:
            raise ValueError("a distribution without any possible outcome was drawn from")
        if self.closed[row] or len(options) == 1:  # no choice: padding may add such draws
            return options[0]
        branch, path = self.branch[row], self.paths[row]
        i = path[len(branch)] if len(branch) < len(path) else 0
        branch.append((i, len(options)))
        self.weight[row] *= p[options[i]]
        return options[i]

    def categorical(self, logits: Tensor, key: Key) -> Tensor:
        p = torch.softmax(logits.double(), -1).tolist()
        b, n = logits.shape[:2]
        live = [[True] * n] * b
        if isinstance(key.element, Tensor):
            live = (key.element >= 0).expand(b, n).tolist()
        return torch.tensor(
            [
                [self._choose(row, x) if a else 0 for x, a in zip(ps, alive, strict=True)]
                for row, ps, alive in zip(key.row.tolist(), p, live, strict=True)
            ]
        )

    def heads(self, probability: Tensor, key: Key) -> Tensor:
        counts = []
        for row, coins in zip(key.row.tolist(), probability.double().clamp(0, 1).tolist(), strict=True):
            count = 0
            while count < len(coins) and self._choose(row, (1 - coins[count], coins[count])):
                count += 1
            counts.append(count)
        return torch.tensor(counts)

    def uniform(self, shape: Sequence[int], key: Key, device: torch.device | str = "cpu") -> Tensor:
        raise TypeError("a uniform number cannot be enumerated; toss coins by `heads`, or draw by `categorical`")

    def normal(self, shape: Sequence[int], key: Key, device: torch.device | str = "cpu") -> Tensor:
        raise TypeError("a normal number cannot be enumerated")


def enumerate_rows(run: Callable[[Paths, int], Sequence[Hashable]], batch: int = 512) -> dict[Hashable, float]:
    """The exact law of what `run(random, rows)` returns for each row, over every outcome of its draws.

    Paths beyond those given take first choices; the others that were possible on the way wait their turn."""
    parts: dict[Hashable, list[float]] = {}
    waiting: list[list[int]] = [[]]
    while waiting:
        paths, waiting = waiting[-batch:], waiting[:-batch]
        random = Paths(paths)
        outcomes = run(random, len(paths))
        for row, outcome in enumerate(outcomes):
            parts.setdefault(outcome, []).append(random.weight[row])
            taken = [i for i, _ in random.branch[row]]
            for depth in range(len(paths[row]), len(taken)):
                waiting += [[*taken[:depth], other] for other in range(1, random.branch[row][depth][1])]
    return {outcome: math.fsum(weights) for outcome, weights in parts.items()}
