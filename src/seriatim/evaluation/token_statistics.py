"""How far ids are from random: entropies of single ids and of pairs, and how far both are from uniform.

ELM (Liu et al. 2024, arXiv 2410.16257, section 4.1) measures ids of pictures so: they are much closer to uniform than
words, so that losses stay high, and samples are good all the same. Counts of pairs are dense only where there are many
more pairs than cells: compare equally many ids of equally large vocabularies, beside ids that are drawn uniformly.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from seriatim.evaluation.pictures import ACCENT, INK, write_beside


@dataclass(frozen=True)
class TokenStatistics:
    """Of a sequence of ids: how many there are of them, and the entropies, in nats, of an id, of a pair of neighbours,
    and of an id given the one before it."""

    vocab: int
    single: float
    pair: float
    following: float

    @property
    def single_from_uniform(self) -> float:
        """KL divergence of single ids from uniform ones, nats."""
        return math.log(self.vocab) - self.single

    @property
    def pair_from_uniform(self) -> float:
        """KL divergence of pairs from uniform ones, nats."""
        return 2 * math.log(self.vocab) - self.pair

    @property
    def randomness(self) -> float:
        """The entropy of an id given the one before it, as a share of the largest: 1 for uniform ids."""
        return self.following / math.log(self.vocab)


def statistics_of(pairs: Float[Tensor, "v v"]) -> TokenStatistics:
    """Of how often each id (row) is followed by each (column), as counts or probabilities. Raises ValueError for what
    are no such numbers."""
    if pairs.dim() != 2 or pairs.shape[0] != pairs.shape[1] or len(pairs) < 2:
        raise ValueError(f"pairs of at least two ids are counted in a square, got {tuple(pairs.shape)}")
    total = float(pairs.sum())
    if not bool((pairs >= 0).all()) or not 0 < total < math.inf:
        raise ValueError("counts of pairs are not negative, and not all zero")
    p = pairs.double() / total
    both = _entropy(p.flatten())
    return TokenStatistics(len(pairs), _entropy(p.sum(0)), both, both - _entropy(p.sum(1)))


def token_statistics(ids: Int[Tensor, "n m"], vocab: int) -> TokenStatistics:
    """Of n sequences of m ids below `vocab`; pairs are neighbours in one sequence. Raises ValueError for other ids, or
    sequences without pairs."""
    if ids.dim() != 2 or ids.shape[1] < 2 or not len(ids):
        raise ValueError(f"ids are (sequences, at least 2 places), got {tuple(ids.shape)}")
    if int(ids.min()) < 0 or int(ids.max()) >= vocab:
        raise ValueError(f"ids lie in 0..{vocab - 1}, got {int(ids.min())}..{int(ids.max())}")
    cell = (ids[:, :-1] * vocab + ids[:, 1:]).flatten()
    return statistics_of(torch.bincount(cell, minlength=vocab**2).view(vocab, vocab))


def commonest(ids: Int[Tensor, "*n"], vocab: int) -> Int[Tensor, "*n"]:
    """The same ids by frequency, the commonest first, all from the last of `vocab` ids on taken as one."""
    values, where, count = ids.unique(return_inverse=True, return_counts=True)
    rank = count.argsort(descending=True, stable=True).argsort()
    return rank[where].clamp(max=vocab - 1)


def _entropy(p: Float[Tensor, "n"]) -> float:
    return float(torch.special.entr(p).sum())


def save_token_statistics(found: Mapping[str, TokenStatistics], path: str | os.PathLike[str], title: str = "") -> Path:
    """Bars: how far single ids and pairs of each kind are from uniform, in nats."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.6 + 1.3 * len(found), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes, places = figure.subplots(), range(len(found))
    for shift, colour, name, values in (
        (-0.2, INK, "single ids", [s.single_from_uniform for s in found.values()]),
        (0.2, ACCENT, "pairs", [s.pair_from_uniform for s in found.values()]),
    ):
        bars = axes.bar([k + shift for k in places], values, 0.38, label=name, color=colour)
        axes.bar_label(bars, fmt="%.2f", fontsize=7)
    axes.set_xticks(list(places), list(found), fontsize=8)
    axes.set_ylabel("KL from uniform, nats")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    axes.set_title(title, fontsize=9)
    return write_beside(path, lambda file: figure.savefig(file, format="png", dpi=130))
