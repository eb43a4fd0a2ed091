"""Attention inside of chunks, a state between them: which views are chunks, what their sum is, and what is kept."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from seriatim.backbones.chunked import Chunked, ChunkedConfig, mixed
from seriatim.laws.case import randomise
from seriatim.plan import OrderError, plan_of
from seriatim.scan import chunks_of
from seriatim.view import earlier, full, inclusive, own_rank, timed, tree, two_stream


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(slots, heads=2, dim=3):
    q, k, v = (normal(2, slots, heads, dim, seed=i) for i in range(3))
    return q, k, v, F.logsigmoid(normal(2, slots, heads, seed=3))


# ---- which views are chunks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("view", "chunk", "parent"),
    [
        (full(3), [0, 0, 0], (-1,)),
        (inclusive([0, 0, 1, 1, 1, 2]), [0, 0, 1, 1, 1, 2], (-1, 0, 1)),
        (inclusive([1, 0, 1, 0]), [1, 0, 1, 0], (-1, 0)),
        (own_rank([0, 0, 1]), [1, 1, 0], (-1, -1)),
        (tree([-1, 0, 0, 1]), [0, 1, 2, 3], (-1, 0, 0, 1)),
    ],
)
def test_chunks_are_read_off_a_view(view, chunk, parent):
    found = chunks_of(view)
    assert found.chunk.tolist() == chunk and found.parent == parent
    assert torch.equal(found.slots.flatten()[found.place], torch.arange(view.size))


def test_blocks_in_two_streams_are_a_tree_of_chunks():
    """Queries of a block go on from the values of the block before it, as these values' successors do."""
    found = chunks_of(two_stream([0, 0, 1, 1, 0, 0, 1, 1], [True] * 4 + [False] * 4))
    assert found.chunk.tolist() == [0, 0, 2, 2, 1, 1, 3, 3]
    assert found.parent == (-1, -1, 1, 1)


@pytest.mark.parametrize(
    ("view", "why"),
    [
        (inclusive([0, 1, 2]).narrow(window=2), "sees slot"),
        (timed([0, 0, 1], dies=[9, 1, 9]), "sees slot"),
        (inclusive([0, 0, 1]).narrow(lane=[0, 0, -1]), "one lane"),
        (inclusive(torch.tensor([[0, 1], [0, 0]])), "same in all rows"),
    ],
)
def test_other_views_are_refused(view, why):
    with pytest.raises(ValueError, match=why):
        chunks_of(view)


def test_strictly_earlier_ranks_are_chunks_of_one_slot_each_or_refused():
    assert chunks_of(earlier([0, 1, 2])).parent == (-1, 0, 1)
    with pytest.raises(ValueError, match="sees slot"):
        chunks_of(earlier([0, 0, 1]))


# ---- their sum -------------------------------------------------------------------------------------------------------


def explicit(q, k, v, log, chunk, before):
    """The same as one weight for each pair of slots: softmax inside a chunk, products that fade between chunks."""
    z = int(chunk.max()) + 1
    means = torch.stack([log[:, chunk == i].mean(1) for i in range(z)], 1)  # b z h
    out = torch.zeros_like(v)
    for i, mine in enumerate(chunk.tolist()):
        same = chunk == mine
        here = (q[:, i, None] * k[:, same]).sum(-1).softmax(1)
        out[:, i] += (here[..., None] * v[:, same]).sum(1)
        first = int(same.nonzero()[0])
        into = log[:, first : i + 1].sum(1)
        for j, other in enumerate(chunk.tolist()):
            if other < mine:
                fade = (into + means[:, other + 1 : mine].sum(1)).exp()
                out[:, i] += (fade * (q[:, i] * k[:, j]).sum(-1))[..., None] * v[:, j]
        if before is not None:
            fade = (into + means[:, :mine].sum(1)).exp()
            out[:, i] += fade[..., None] * torch.einsum("bhp,bhpv->bhv", q[:, i], before)
    return out


@pytest.mark.parametrize("rank", [[0, 0, 1, 1, 2, 2], [0, 0, 0, 1, 2, 2], [0]])
@pytest.mark.parametrize("started", [False, True])
def test_the_state_is_the_sum_over_all_pairs_of_slots(rank, started):
    parts = inputs(len(rank))
    before = normal(2, 2, 3, 3, seed=7) if started else None
    got, _ = mixed(*parts, chunks_of(inclusive(rank)), before)
    assert (got - explicit(*parts, torch.tensor(rank), before)).abs().max() < 1e-12


def test_shut_gates_forget_everything_and_open_ones_sum():
    rank = [0, 0, 1, 1, 2, 2]
    q, k, v, log = inputs(6)
    chunks = chunks_of(inclusive(rank))
    alone, _ = mixed(q, k, v, log, chunks_of(own_rank(rank)))
    assert torch.equal(mixed(q, k, v, torch.full_like(log, -1e9), chunks)[0], alone)
    summed, after = mixed(q, k, v, torch.zeros_like(log), chunks)
    total = torch.einsum("bshp,bshv->bhpv", k, v)
    assert (after[-1] - total).abs().max() < 1e-12
    last = torch.einsum("bshp,bhpv->bshv", q[:, 4:], torch.einsum("bshp,bshv->bhpv", k[:, :4], v[:, :4]))
    assert (summed[:, 4:] - alone[:, 4:] - last).abs().max() < 1e-12


def test_one_chunk_is_softmax_attention():
    q, k, v, log = inputs(5)
    out, _ = mixed(q, k, v, log, chunks_of(full(5)))
    want = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), scale=1.0).transpose(1, 2)
    assert (out - want).abs().max() < 1e-12


# ---- layers and what they keep ---------------------------------------------------------------------------------------


def layers():
    return randomise(Chunked(ChunkedConfig(8, 2, 2, vector=8)))


def plan(rank):
    n = len(rank)
    return plan_of(inclusive(rank), [0] * n, range(n), [], needs=[-1] * n)


def test_chunk_by_chunk_with_a_state_is_all_at_once():
    model, x, c = layers(), normal(2, 6, 8), normal(2, 8, seed=1)
    whole = model(x, plan([0, 0, 1, 1, 2, 2]), None, c)
    cache, parts = model.new_cache(2), []
    with torch.no_grad():
        for z in range(3):
            one = plan([2 * z, 2 * z])
            parts.append(model(x[:, 2 * z : 2 * z + 2], one, cache, c))
            cache.commit(2, one)
            size = cache.nbytes()
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-12
    assert cache.length == 6 and size == 2 * 2 * 2 * 4 * 4 * 8  # layers, rows, heads, p, p, bytes: whatever the length


def test_a_path_of_whole_chunks_is_kept_or_nothing():
    model, x, c = layers(), normal(2, 6, 8), normal(2, 8, seed=1)
    both = plan_of(two_stream([0, 0, 1, 1, 0, 0], [False] * 2 + [True] * 4), [0] * 6, range(6), [], needs=[-1] * 6)
    cache, fresh = model.new_cache(2), model.new_cache(2)
    with torch.no_grad():
        model(x, both, cache, c)
        cache.commit([], both)
        assert cache.length == 0
        model(x, both, cache, c)
        with pytest.raises(ValueError, match="no path of whole chunks"):
            cache.commit([0], both)
        model(x, both, cache, c)
        with pytest.raises(ValueError, match="no path of whole chunks"):
            cache.commit([0, 1, 4, 5], both)
        model(x, both, cache, c)
        cache.commit([0, 1], both)
        one = plan([0, 0])
        model(x[:, :2], one, fresh, c)
        fresh.commit(2, one)
    for (_, got), (_, want) in zip(cache.states, fresh.states, strict=True):
        assert (got - want).abs().max() < 1e-12


def test_rows_that_keep_nothing_stay_where_they_were():
    model, x, c = layers(), normal(2, 2, 8), normal(2, 8, seed=1)
    cache, one = model.new_cache(2), plan([0, 0])
    with torch.no_grad():
        model(x, one, cache, c)
        cache.commit(torch.tensor([[0, 1], [-1, -1]]), one)
    assert cache.length.tolist() == [2, 0]
    assert bool(cache.states[0][1][0].any()) and not bool(cache.states[0][1][1].any())
    cache.select(torch.tensor([1, 0, -1]))
    assert cache.length.tolist() == [0, 2, 0]


def test_what_cannot_be_is_refused():
    for wrong in ({}, {"vector": 4}, {"vector": 8, "qk_norm": "rms"}, {"vector": 8, "kv_heads": 1}):
        with pytest.raises(ValueError, match=r"vector|norms and heads"):
            ChunkedConfig(8, 1, 2, **wrong)
    window = plan_of(inclusive([0, 1, 2]).narrow(window=2), [0] * 3, range(3), [], needs=[-1] * 3)
    model = layers()
    with pytest.raises(OrderError, match="layers of kind 'all'"):
        model(normal(1, 3, 8), window, None, normal(1, 8))
    with pytest.raises(OrderError, match="layers of kind 'all'"):
        window.check(model.mixers)
