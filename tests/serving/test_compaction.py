"""As few rows move as can be: beside brute force over all places where a batch may stand."""

from __future__ import annotations

import itertools
import random as stdlib

import pytest
import torch

from seriatim.backbones.cache import KVCache
from seriatim.serving.compaction import compacted, moves


def fewest(stays, new, first, room):
    """By trying every run of places."""
    many = sum(stays) + new
    places = [first + i for i, stay in enumerate(stays) if stay]
    return min(sum(not start <= p < start + many for p in places) for start in range(room - many + 1))


@pytest.mark.parametrize("rows", range(1, 7))
def test_the_fewest_rows_move(rows):
    for stays in itertools.product((False, True), repeat=rows):
        for new in range(4):
            for first, room in ((0, rows), (0, rows + 3), (2, rows + 2), (1, rows + 4)):
                many = sum(stays) + new
                if not many or many > room:
                    continue
                got = compacted(stays, new, first, room)
                assert len(got) == many and got.count(-1) == new
                assert sorted(r for r in got if r >= 0) == [i for i, stay in enumerate(stays) if stay]
                assert moves(got) <= fewest(stays, new, first, room)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="5 rows do not fit into a room of 4"):
        compacted((True, True), 3, 0, 4)


@pytest.mark.parametrize("seed", range(20))
def test_a_cache_moves_what_it_is_told_and_nothing_else(seed):
    """Rows keep their entries wherever they stand, and those that stay are not copied: their memory is the same."""
    rng = stdlib.Random(seed)
    cache = KVCache(2, 3, 1, 4, torch.float32, capacity=8)
    cache.reserve(8, 8)
    cache._rows[:] = torch.nan  # as fresh memory may be
    content = [None] * 3  # of each row
    for _ in range(30):
        stays = [rng.random() < 0.7 for _ in content]
        new = rng.randint(0 if any(stays) else 1, 8 - sum(stays))
        rows = compacted(stays, new, *cache.window)
        fresh = []
        for _ in range(new):
            one = KVCache(2, 1, 1, 4, torch.float32, capacity=8)
            one.columns = rng.randint(1, 6)
            one.buffer[:] = torch.randn(one.buffer.shape)
            fresh.append(one)
        coming = iter(fresh)
        content = [content[r] if r >= 0 else next(coming) for r in rows]
        before, room = cache.window[0], cache._rows.data_ptr()
        cache.select(torch.tensor(rows), fresh)
        assert cache._rows.data_ptr() == room, "all stands in the room that was reserved"
        still = sum(1 for i, r in enumerate(rows) if r >= 0 and cache.window[0] + i == before + r)
        assert still == sum(r >= 0 for r in rows) - moves(rows)
        assert torch.isfinite(cache.buffer[..., : cache.columns, :]).all(), "what is masked is finite"
        lengths = torch.as_tensor(cache.length).expand(cache.batch).tolist()
        for b, one in enumerate(content):
            if one is None:
                assert lengths[b] == 0
                continue
            assert lengths[b] == one.columns
            assert torch.equal(cache.buffer[:, :, b, :, : one.columns], one.buffer[:, :, 0, :, : one.columns])
