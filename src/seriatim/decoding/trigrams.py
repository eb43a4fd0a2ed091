"""What followed two tokens: a table counted from a corpus, which adapts to the text that is being written.

ADED (Liu et al. 2024) drafts from such a table: P(c | a, b), the likeliest 12 for each pair. While a text grows, its
last tri-grams are raised again and again, so that what this text repeats comes to the front. A search (`tree_search`)
turns the table into a draft tree.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

WIDTH = 12  # tokens that are kept behind a pair
ENTRIES = 2**18  # pairs that adaptation remembers; the oldest are forgotten first
CHUNK = 2**22  # tri-grams that are counted at once


@dataclass(frozen=True, eq=False)
class TrigramTable:
    """P(c | a, b) of a corpus, the likeliest successors of each pair.

    pair: a * vocab + b of every pair that occurs, ascending; start: where the successors of each begin in `token`, and
    at the end how many there are; token: successors, the likeliest first; chance: their shares among all successors of
    the pair, those that were cut off included.
    """

    vocab: int
    pair: Int[Tensor, "pairs"]
    start: Int[Tensor, "pairs_and_one"]
    token: Int[Tensor, "n"]
    chance: Float[Tensor, "n"]

    def successors(self, a: int, b: int) -> dict[int, float]:
        """What followed, and how often; the likeliest first."""
        pair, start, token, chance = self._arrays
        key = a * self.vocab + b
        i = pair.searchsorted(key)
        if i == len(pair) or pair[i] != key:
            return {}
        run = slice(start[i], start[i + 1])
        return dict(zip(token[run].tolist(), chance[run].tolist(), strict=True))

    @cached_property
    def _arrays(self) -> tuple[Any, ...]:
        """The same numbers where one is looked up in a tenth of the time."""
        return tuple(x.numpy() for x in (self.pair, self.start, self.token, self.chance))


def no_trigrams(vocab: int) -> TrigramTable:
    """The table of no corpus."""
    none = torch.zeros(0, dtype=torch.long)
    return TrigramTable(vocab, none, torch.zeros(1, dtype=torch.long), none.int(), torch.zeros(0))


def trigram_table(documents: Iterable[Sequence[int]], vocab: int, width: int = WIDTH, least: int = 1) -> TrigramTable:
    """Count a corpus, given as ids of documents that are independent of each other: no tri-gram spans two. Those that
    occur less often than `least` times are left out, but count as successors. Raises ValueError for ids outside the
    vocabulary, and for a vocabulary whose triples are too many for 64 bits."""
    if vocab < 1 or width < 1 or least < 1 or vocab**3 >= 2**63:
        raise ValueError(
            f"a table keeps at least 1 of 1 to {2**21 - 1:,} ids behind each pair, of tri-grams that occur at "
            f"least once; got {width} of {vocab:,}, and {least}"
        )
    codes, counts = torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long)
    waiting: list[Tensor] = []
    for ids in documents:
        x = torch.as_tensor(ids, dtype=torch.long)
        if x.numel() and not 0 <= int(x.min()) <= int(x.max()) < vocab:
            raise ValueError(f"ids of a corpus lie in 0..{vocab - 1}, got {int(x.min())}..{int(x.max())}")
        waiting.append((x[:-2] * vocab + x[1:-1]) * vocab + x[2:])
        if sum(map(len, waiting)) >= CHUNK:
            codes, counts, waiting = *_added(codes, counts, waiting), []
    codes, counts = _added(codes, counts, waiting)
    return _cut(codes, counts, vocab, width, least)


def _added(codes: Int[Tensor, "n"], counts: Int[Tensor, "n"], new: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Counts by code, with more codes counted in."""
    if not new:
        return codes, counts
    fresh, times = torch.unique(torch.cat([*new]), return_counts=True)
    both, where = torch.unique(torch.cat([codes, fresh]), return_inverse=True)
    return both, torch.zeros_like(both).index_add(0, where, torch.cat([counts, times]))


def _cut(codes: Int[Tensor, "n"], counts: Int[Tensor, "n"], vocab: int, width: int, least: int) -> TrigramTable:
    """The likeliest successors of each pair."""
    order = counts.argsort(descending=True, stable=True)
    order = order[(codes[order] // vocab).argsort(stable=True)]  # by pair, the most frequent first
    codes, counts = codes[order], counts[order]
    pair, where, size = torch.unique_consecutive(codes // vocab, return_inverse=True, return_counts=True)
    total = torch.zeros_like(pair).index_add(0, where, counts)
    place = torch.arange(len(codes)) - (size.cumsum(0) - size)[where]
    kept = (place < width) & (counts >= least)
    left = torch.zeros_like(pair).index_add(0, where, kept.long())
    start = torch.cat([left.new_zeros(1), left[left > 0].cumsum(0)])
    chance = (counts / total[where])[kept].float()
    return TrigramTable(vocab, pair[left > 0], start, (codes % vocab)[kept].int(), chance)


@dataclass(slots=True)
class Successors:
    """What may follow a pair, the likeliest first. score: as the table says, raised by adaptation (no distribution any
    more); total: of all scores."""

    token: list[int]
    score: list[float]
    total: float


NOTHING = Successors([], [], 0.0)


class Adapted:
    """A table that follows a text (ADED, section 3.1): each tri-gram of the text's last tokens gets `bonus`, up to
    `most`, whether or not the corpus had it. May be kept over many texts; the pairs it was longest without are
    forgotten beyond `entries`. bonus 0: the table as it is."""

    def __init__(self, table: TrigramTable, bonus: float = 0.04, most: float = 3.0, entries: int = ENTRIES):
        if bonus < 0 or most <= 0 or entries < 1:
            raise ValueError(f"a bonus is 0 or more, up to more than 0; got {bonus} up to {most}, of {entries} pairs")
        self.table, self.bonus, self.most, self.entries = table, bonus, most, entries
        self._raised: dict[int, dict[int, float]] = {}  # scores of pairs that were met
        self._sorted: dict[int, Successors] = {}  # of pairs that were looked up since they changed

    def reinforce(self, tokens: Sequence[int], times: int = 1) -> None:
        """Raise every tri-gram of these tokens, so many times."""
        vocab, raised = self.table.vocab, self._raised
        more = self.bonus * times
        if not more:
            return
        for a, b, c in zip(tokens, tokens[1:], tokens[2:], strict=False):
            pair = a * vocab + b
            scores = raised.pop(pair, None)
            if scores is None:
                scores = self.table.successors(a, b)
            scores[c] = min(scores.get(c, 0.0) + more, self.most)
            if len(scores) > 2 * WIDTH:
                scores = dict(sorted(scores.items(), key=lambda item: -item[1])[:WIDTH]) | {c: scores[c]}
            raised[pair] = scores  # at the end: what was met last is forgotten last
            self._sorted.pop(pair, None)
        while len(raised) > self.entries:
            pair = next(iter(raised))
            del raised[pair]
            self._sorted.pop(pair, None)

    def after(self, a: int, b: int) -> Successors:
        """What may follow two tokens."""
        pair = a * self.table.vocab + b
        found = self._sorted.get(pair)
        if found is None:
            if len(self._sorted) > self.entries:
                self._sorted.clear()
            found = self._sorted[pair] = self._look(pair, a, b)
        return found

    def _look(self, pair: int, a: int, b: int) -> Successors:
        scores = self._raised.get(pair)
        if scores is None:
            scores = self.table.successors(a, b)
        if not scores:
            return NOTHING
        best = sorted(scores.items(), key=lambda item: -item[1])[:WIDTH]
        values = [score for _, score in best]
        return Successors([token for token, _ in best], values, sum(values))
