"""Does a decoder write what plain decoding writes? Greedy: string by string. Sampling: a test of two samples.

In 16-bit formats the same row has another last bit when more rows are computed beside it, so that two tokens of nearly
equal logits may change places. There a text may part from the plain one where the logits of the two tokens differ by
less than two steps of the format; a larger gap is a fault. In float32 and float64 texts must be equal. Where weights
are integers, products of few and of many rows are two algorithms: there the gap may also be as large as what two plain
forwards, step by step and in one pass, differ by.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

STEPS = 2  # of the number format, between the logits of two tokens that may change places
ERROR = 0.001  # how often a decoder that is right is called wrong by the test of two samples
DEPTH = 3  # first tokens of a text that the test looks at
LEAST, SHARE = 20, 0.05  # outcomes of a cell, both samples together: so many, and such a share of a prompt's

Outcome = tuple[int, ...]  # which prompt, then the first tokens of what was written


# ---- greedy ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Divergence:
    """Where two texts part: after `at` equal tokens of an answer to prompt number `prompt`. steps: of the number format
    between the logits of the two tokens there; infinite where one text ends and the other goes on. noise: the same of
    the difference that another plain forward finds between that gap and its own; 0 where none was asked."""

    prompt: int
    at: int
    steps: float
    noise: float = 0.0


def first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    """How many first tokens are equal, or None where all are."""
    if list(ours) == list(theirs):
        return None
    return next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))


def divergences(
    ours: Sequence[Sequence[int]],
    theirs: Sequence[Sequence[int]],
    logits: Callable[[int, Sequence[int]], Float[Tensor, " v"]],
    dtype: torch.dtype,
    again: Callable[[int, Sequence[int]], Float[Tensor, " v"]] | None = None,
) -> list[Divergence]:
    """Every pair of texts that part. logits: of what follows when so much of an answer to a prompt (its number) is
    written, computed as plain decoding computes them; dtype: the format the model computes in; again: the same logits
    by another plain forward, whose rounding is to count as noise."""
    found = []
    for n, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        at = first_difference(a, b)
        if at is None:
            continue
        steps, noise = math.inf, 0.0
        if at < min(len(a), len(b)):
            x, y = logits(n, a[:at]).double()[[a[at], b[at]]].tolist()
            step = step_of(max(abs(x), abs(y)), dtype)
            steps = abs(x - y) / step
            if again is not None:
                x2, y2 = again(n, a[:at]).double()[[a[at], b[at]]].tolist()
                noise = abs((x2 - y2) - (x - y)) / step
        found.append(Divergence(n, at, steps, noise))
    return found


def step_of(size: float, dtype: torch.dtype) -> float:
    """The distance of neighbouring numbers of a format, at numbers of this size."""
    info = torch.finfo(dtype)
    return info.eps * 2.0 ** math.floor(math.log2(max(size, info.tiny)))


def allowed(found: Sequence[Divergence], dtype: torch.dtype) -> bool:
    """May texts part like this in this format without a fault of the decoder?"""
    return not found or (torch.finfo(dtype).bits == 16 and all(d.steps < max(STEPS, d.noise) for d in found))


# ---- sampling --------------------------------------------------------------------------------------------------------
def two_samples(ours: Sequence[Outcome], theirs: Sequence[Outcome]) -> float:
    """The p-value of the hypothesis that both samples have one law: below `ERROR`, they do not.

    Chi-square tests of homogeneity (Pearson 1900) on the first one, two, ... `DEPTH` tokens, each within every prompt,
    with Bonferroni's correction. Rare outcomes share a cell with their neighbours in lexicographic order: many small
    cells would hide a difference in few. The samples are independent (other seeds); of each prompt both hold equally
    many. With 10,000 texts on four prompts, 7% of the mass in a wrong place are found.
    """
    if Counter(o[0] for o in ours) != Counter(o[0] for o in theirs) or not ours:
        raise ValueError("two samples are compared that hold equally many texts of each prompt, and at least one")
    depth = max(len(o) for o in itertools.chain(ours, theirs)) - 1
    values = [_homogeneity([o[: k + 1] for o in ours], [o[: k + 1] for o in theirs]) for k in range(1, depth + 1)]
    return min(1.0, len(values) * min(values, default=1.0))


def _homogeneity(ours: Sequence[Outcome], theirs: Sequence[Outcome]) -> float:
    """The p-value of one test."""
    a, b = Counter(ours), Counter(theirs)
    statistic, freedom = 0.0, 0
    for _, group in itertools.groupby(sorted(a.keys() | b.keys()), key=lambda outcome: outcome[0]):
        cells = _cells([(a[o], b[o]) for o in group])
        statistic += sum((x - y) ** 2 / (x + y) for x, y in cells)  # as both samples are equally large
        freedom += len(cells) - 1
    if not freedom:
        return 1.0
    half = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))  # the chi-square distribution's upper tail


def _cells(counts: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Counts in both samples, rare outcomes joined; the choice looks at their sums only, as a test of them may."""
    least = max(LEAST, SHARE * sum(map(sum, counts)))
    cells = [c for c in counts if sum(c) >= least]
    joined = (0, 0)
    for x, y in counts:
        if x + y < least:
            joined = (joined[0] + x, joined[1] + y)
            if sum(joined) >= least:
                cells.append(joined)
                joined = (0, 0)
    if sum(joined) and cells:
        cells[-1] = (cells[-1][0] + joined[0], cells[-1][1] + joined[1])
    elif sum(joined):
        cells.append(joined)
    return cells
