"""Typical acceptance (Medusa, Cai et al. 2024, section 2.3.1): keep what the model finds plausible, sampled or not."""

from __future__ import annotations

import math
from collections.abc import Iterable

from jaxtyping import Float
from torch import Tensor

from seriatim.decoding.verify import Round, Verifier
from seriatim.heads.dist import Categorical
from seriatim.random import Random


class Typical(Verifier):
    """Accept the longest path all of whose tokens are typical, of equally long ones the likeliest, then emit the
    likeliest token behind it. Draws nothing; a `Walk` is lossless, and this is not.

    A token is typical where p(x) > min(epsilon, alpha * exp(-H(p))), H the entropy: where the model is unsure, less
    will do. At epsilon = 0 everything possible is accepted; at temperature 0 it is greedy decoding.
    """

    def __init__(self, stop: Iterable[int] = (), epsilon: float = 0.09, alpha: float = 0.3):
        super().__init__(stop)
        if not 0 <= epsilon <= 1 or alpha < 0:
            raise ValueError(f"epsilon lies between 0 and 1 and alpha is not negative, got {epsilon} and {alpha}")
        self.epsilon, self.alpha = epsilon, alpha

    def verify(self, turn: Round, random: Random) -> None:
        said = turn.dist.log_probs()
        least, best = limits(turn.dist, self.epsilon, self.alpha).tolist(), turn.dist.mode().tolist()
        for r in turn.alive:
            for node in self._longest(turn, r, said[r], least[r]):
                if not turn.emit(r, turn.value[r][node], node):
                    break
            else:
                turn.emit(r, best[r][turn.node[r] + 1])

    def _longest(self, turn: Round, row: int, said: Float[Tensor, "n v"], least: list[float]) -> list[int]:
        """The nodes of the best path below the last known token."""
        nodes = [n for n, token in enumerate(turn.value[row]) if token >= 0]
        if not nodes:
            return []
        assert turn.guess is not None
        parent = turn.guess.parents()
        above = [parent[n] + 1 for n in nodes]
        found = said[above, [turn.value[row][n] for n in nodes]].tolist()
        length, likely = {-1: 0}, {-1: 0.0}
        for node, read, lp in zip(nodes, above, found, strict=True):
            if parent[node] in length and lp > least[read]:
                length[node], likely[node] = length[parent[node]] + 1, likely[parent[node]] + lp
        node, path = max(length, key=lambda n: (length[n], likely[n])), []
        while node >= 0:
            path.append(node)
            node = parent[node]
        return path[::-1]


def limits(dist: Categorical, epsilon: float, alpha: float) -> Float[Tensor, "b n"]:
    """The log-probability that a token must exceed to be typical."""
    least, scale = (math.log(x) if x > 0 else -math.inf for x in (epsilon, alpha))
    return (scale - dist.entropy()).clamp(max=least)
