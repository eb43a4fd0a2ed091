"""Keys and values of prompts that were read, for others that begin alike (a system prompt, an earlier turn)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

LEAST = 16  # tokens that two prompts have in common, for a copy to be worth it
MOST = 64  # prompts that are looked through


class Prefixes:
    """The prompts that were used last, as far as they fit into so many bytes."""

    def __init__(self, room: float):
        self.room = room
        self.held: OrderedDict[tuple[int, ...], Any] = OrderedDict()

    @property
    def nbytes(self) -> int:
        return sum(cache.nbytes() for cache in self.held.values())

    def find(self, ids: Sequence[int], capacity: int, extra: int = 0) -> tuple[Any, int]:
        """A cache of its own with the longest beginning of these ids that is known, and its length (None and 0: no such
        thing); at least the last id is left to be read. capacity: columns to make room for; extra: entries in front of
        the first id."""
        best, length, ids = None, 0, tuple(ids)
        for known in self.held:
            shared = _common(known, ids)
            if shared > length:
                best, length = known, shared
        length = min(length, len(ids) - 1)
        if best is None or length < LEAST:
            return None, 0
        self.held.move_to_end(best)
        cache = self.held[best].prefix(extra + length, capacity)
        return (None, 0) if cache is None else (cache, length)

    def add(self, ids: Sequence[int], cache: Any) -> None:
        """Remember a cache of ids, which nobody changes from here on."""
        if not hasattr(cache, "prefix") or len(ids) < LEAST or cache.nbytes() > self.room:
            return
        ids = tuple(ids)
        for known in [k for k in self.held if _common(k, ids) == len(k)]:  # it says no more than the new one
            del self.held[known]
        self.held[ids] = cache
        while len(self.held) > MOST or self.nbytes > self.room:
            self.held.popitem(last=False)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many first ids are alike."""
    most = min(len(a), len(b))
    low, high = 0, most
    while low < high:  # slices compare fast
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low
