"""What deciding several tokens at once must cost, whatever the model: of a law that is known, by enumeration.

Tokens that are decided together, each by its own marginal, do not know of each other; what that costs is their total
correlation given what is known (in nats), and a model whose marginals are true still errs. `ceiling` is how often it
does not: the probability that all steps together end in an outcome that is possible. For some laws it has a closed
form.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from functools import cache
from itertools import combinations

Law = Mapping[tuple[Hashable, ...], float]


def uniform(outcomes: Iterable[tuple[Hashable, ...]]) -> dict[tuple[Hashable, ...], float]:
    """All outcomes equally likely."""
    listed = list(outcomes)
    return dict.fromkeys(listed, 1 / len(listed))


def entropy(chances: Iterable[float]) -> float:
    """In nats."""
    return math.fsum(p * math.log(1 / p) for p in chances if p > 0)


def marginals(law: Law) -> list[dict[Hashable, float]]:
    """The law of each element by itself."""
    out: list[dict[Hashable, float]] = [defaultdict(float) for _ in next(iter(law))]
    for outcome, p in law.items():
        for own, value in zip(out, outcome, strict=True):
            own[value] += p
    return out


def total_correlation(law: Law) -> float:
    """The divergence, in nats, of a law from the product of its marginals: what one step for all costs."""
    return math.fsum(entropy(own.values()) for own in marginals(law)) - entropy(law.values())


def ceiling(law: Law, sizes: Sequence[int]) -> float:
    """How likely true marginals end in a possible outcome, `sizes` elements decided at each step, which ones at random.

    Exact; the cost grows with outcomes times sets of elements. Raises ValueError where sizes do not add up."""
    n = len(next(iter(law)))
    if sum(sizes) != n or min(sizes) < 1:
        raise ValueError(f"{n} elements are decided by steps of at least 1 that add up to that, got {tuple(sizes)}")

    @cache
    def rest(left: frozenset[tuple[Hashable, ...]], unknown: tuple[int, ...], turn: int) -> float:
        if len(left) == 1 or all(size == 1 for size in sizes[turn:]):
            return 1.0
        whole = math.fsum(law[x] for x in left)
        own = marginals({x: law[x] / whole for x in left})
        total = []
        for chosen in combinations(unknown, sizes[turn]):
            groups: dict[tuple[Hashable, ...], list[tuple[Hashable, ...]]] = defaultdict(list)
            for x in left:
                groups[tuple(x[i] for i in chosen)].append(x)
            still = tuple(i for i in unknown if i not in chosen)
            for values, some in groups.items():
                p = math.prod(own[i][v] for i, v in zip(chosen, values, strict=True))
                total.append(p * rest(frozenset(some), still, turn + 1))
        return math.fsum(total) / math.comb(len(unknown), sizes[turn])

    return rest(frozenset(law), tuple(range(n)), 0)


# ---- closed forms ----------------------------------------------------------------------------------------------------


def permuted(sizes: Sequence[int]) -> float:
    """The ceiling of all permutations of n, the given one among them: at each step no two may be alike."""
    left, out = sum(sizes), 1.0
    for size in sizes:
        out *= math.prod((left - j) / left for j in range(size))
        left -= size
    return out


def one_changed(sizes: Sequence[int]) -> float:
    """The ceiling where exactly one of n elements is replaced, each as likely: at each step one or none may be."""
    left, out, none = sum(sizes), 0.0, 1.0
    for size in sizes:
        out += none * size / left * (1 - 1 / left) ** (size - 1)
        none *= (1 - 1 / left) ** size
        left -= size
    return out


def correlation_permuted(n: int) -> float:
    """Total correlation of a permutation: n ln n - ln n!."""
    return n * math.log(n) - math.lgamma(n + 1)


def correlation_one_changed(n: int) -> float:
    """Total correlation where one of n is replaced: n h(1/n) - ln n, h the entropy of a coin."""
    return n * entropy((1 / n, 1 - 1 / n)) - math.log(n)
