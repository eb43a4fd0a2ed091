"""States as a cache: prefixes kept by each row, drafts dropped without a trace, costs, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from seriatim.backbones.mamba import Mamba, MambaConfig
from seriatim.backbones.state import StateCache
from seriatim.decoding.loop import generate
from seriatim.decoding.sample import SampleAll
from seriatim.decoding.target import Target
from seriatim.embed import TokenEmbed
from seriatim.factorization.line import Line, LinePlan, LineShape
from seriatim.factorization.static import AnyOrder, Blocks
from seriatim.heads.categorical import CategoricalHead
from seriatim.laws.case import randomise
from seriatim.layout import line
from seriatim.model import Model
from seriatim.plan import OrderError, Plan, plan_of
from seriatim.view import inclusive, timed

WIDTH = 16
CONFIG = MambaConfig(WIDTH, 2, head_dim=8, state=5, groups=2, chunk=4)


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def backbone() -> Mamba:
    return randomise(Mamba(CONFIG))  # type: ignore[arg-type, return-value]


def run(known: int, base: int = 0, parent: tuple[int, ...] | None = None) -> LinePlan:
    """Known slots behind `base` cached ones, then the nodes of a draft."""
    return LinePlan(LineShape(known, len(parent or ()), parent), base, 0, 1000)


def same(a: StateCache, b: Sequence[tuple[Tensor, Tensor]]) -> bool:
    """Bit for bit."""
    return all(
        torch.equal(x, y) for left, right in zip(a.states, b, strict=True) for x, y in zip(left, right, strict=True)
    )


# ---- what is kept and what is dropped --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "counts"),
    [
        (1, [1, 1]),
        (3, [3, 3]),
        ([0, 1], [2, 2]),
        (torch.tensor([[0, 1, -1], [0, 1, 2]]), [2, 3]),
        (torch.tensor([[-1, -1, -1, -1], [0, 1, 2, 3]]), [0, 4]),
    ],
)
@torch.no_grad()
def test_each_row_keeps_its_own_prefix_of_a_chain(keep: object, counts: list[int]) -> None:
    m = backbone()
    x = normal(2, 9, WIDTH)
    cache = m.new_cache(2)
    for start, plan, kept in ((0, run(3), 3), (3, run(4, 3), keep)):
        m(x[:, start : start + plan.size], plan, cache)
        cache.commit(kept, plan)  # type: ignore[arg-type]
    assert torch.as_tensor(cache.length).expand(2).tolist() == [3 + n for n in counts]
    for row, count in enumerate(counts):
        fresh, plan = m.new_cache(1), run(3 + count)
        m(x[row : row + 1, : 3 + count], plan, fresh)
        fresh.commit(3 + count, plan)
        for got, want in zip(cache.states, fresh.states, strict=True):
            close(got[0][row], want[0][0])
            close(got[1][row], want[1][0])


@pytest.mark.parametrize("nothing", [0, [], torch.full((2, 3), -1), torch.zeros(2, 0, dtype=torch.long)])
@pytest.mark.parametrize("parent", [None, (-1, 0, 0, 1)])
@pytest.mark.parametrize("kind", [torch.float64, torch.float32])
@torch.no_grad()
def test_a_dropped_draft_leaves_no_trace(nothing: object, parent: tuple[int, ...] | None, kind: torch.dtype) -> None:
    m = backbone().to(kind)
    x = normal(2, 12, WIDTH).to(kind)
    cache = m.new_cache(2)
    m(x[:, :4], run(4), cache)
    cache.commit(4, run(4))
    before = [(conv.clone(), state.clone()) for conv, state in cache.states]
    plan = run(2, 4, parent)
    m(x[:, 4 : 4 + plan.size], plan, cache)
    cache.commit(nothing, plan)  # type: ignore[arg-type]
    assert cache.length == 4
    assert same(cache, before)
    m(x[:, 4:6], run(2, 4), cache)  # and one that is abandoned for another
    m(x[:, 4:5], run(1, 4), cache)
    assert same(cache, before)


# ---- costs -----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_plain_steps_make_no_labels() -> None:
    m = backbone()
    cache, plan = m.new_cache(1), run(1)
    bare = set(plan.__dict__)
    m(normal(1, 1, WIDTH), plan, cache)
    cache.commit(1, plan)
    assert set(plan.__dict__) == bare


@torch.no_grad()
def test_a_cache_has_one_size_whatever_the_length() -> None:
    """And what it holds is all that is kept alive: a state is no view of a long forward."""
    m = backbone()
    cache = m.new_cache(2)
    want = 2 * 2 * 8 * (m.config.channels * 3 + 4 * 8 * 5)
    for plan, keep in ((run(1), 1), (run(200, 1), 200), (run(60, 201, (-1, -1)), 61), (run(1, 262), 1)):
        m(normal(2, plan.size, WIDTH), plan, cache)
        cache.commit(keep, plan)
        storage = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for both in cache.states for t in both}
        assert cache.nbytes() == want
        assert sum(storage.values()) < 1.5 * want


# ---- what is refused -------------------------------------------------------------------------------------------------


def pending(plan: Plan, batch: int = 2) -> StateCache:
    m = backbone()
    cache = m.new_cache(batch)
    with torch.no_grad():
        m(normal(batch, plan.size, WIDTH), plan, cache)
    return cache


@pytest.mark.parametrize(
    ("keep", "parent", "why"),
    [
        ([0, 2], None, "slot 2 stands behind slot 1, not behind slot 0"),
        ([1, 0], None, "slot 1 stands behind slot 0, not first"),
        ([0, 0], None, "slot 0 stands before everything that is pending, not behind slot 0"),
        ([0, 1, 2], (-1, -1), "slot 2 stands behind slot 0, not behind slot 1"),
        (3, (-1, -1), "slot 2 stands behind slot 0, not behind slot 1"),
        (torch.tensor([[0, 1], [0, 2]]), None, "slot 2 stands behind slot 1, not behind slot 0"),
        (7, None, "slot 6 cannot be kept of 3"),
        ([0, 3], (-1, 0), "slot 3 cannot be kept of 3"),
        (torch.zeros(3, 1, dtype=torch.long), None, "for 2 rows"),
    ],
)
def test_what_is_no_path_cannot_be_kept(keep: object, parent: tuple[int, ...] | None, why: str) -> None:
    plan = run(3, 0) if parent is None else run(1, 0, parent)
    cache = pending(plan)
    before = [(conv.clone(), state.clone()) for conv, state in cache.states]
    with pytest.raises(ValueError, match=why):
        cache.commit(keep, plan)  # type: ignore[arg-type]
    assert same(cache, before)


def test_a_commit_needs_a_forward() -> None:
    cache = backbone().new_cache(1)
    with pytest.raises(ValueError, match="cannot be kept of 0"):
        cache.commit(1, run(1))


def test_single_slots_are_not_forgotten() -> None:
    cache = pending(run(3))
    cache.commit(3, run(3))
    with pytest.raises(ValueError, match="cannot forget single slots"):
        cache.evict(torch.tensor([[0, 2]]))
    cache.evict(torch.tensor([[0, 1, 2], [-1, -1, -1]]))  # all or nothing: a row that nobody looks at any more
    assert cache.length.tolist() == [3, 0]  # type: ignore[union-attr]
    assert not cache.states[1][1][1].any() and cache.states[1][1][0].any()


def test_a_decider_that_needs_a_subset_is_told_so() -> None:
    class NeedsSubset(SampleAll):
        needs = frozenset({"subset"})

    model = Model(line(4), Line(1), TokenEmbed(3, WIDTH), Mamba(CONFIG), CategoricalHead(WIDTH, 3))
    with pytest.raises(ValueError, match=r"NeedsSubset needs a cache that can subset; that of Mamba cannot"):
        generate(Target(model), model.blank(1), NeedsSubset())


@pytest.mark.parametrize("order", [Blocks(2), AnyOrder()])
def test_orders_that_a_state_cannot_honour_are_refused_in_training_and_decoding(order: Blocks | AnyOrder) -> None:
    model = Model(line(4), order, TokenEmbed(3, WIDTH, mask=True), Mamba(CONFIG), CategoricalHead(WIDTH, 3))
    with pytest.raises(OrderError, match=r"slots 0 and 1 see each other.*need attention"):
        generate(Target(model), model.blank(1), SampleAll())
    plan = order.packed(model.blank(1)) or order.step(model.blank(1), None, 0)
    assert plan is not None
    with pytest.raises(OrderError, match=r"slots 0 and 1 see each other.*need attention"):
        model.hidden(plan, model.blank(1))


def test_a_state_sees_everything_or_the_forward_is_refused() -> None:
    m, x = backbone(), normal(1, 1, WIDTH)
    for first, second in (
        (timed([3], dies=[5]), timed([5])),  # a window has passed
        (timed([3], born=[7]), timed([5])),  # not born yet
    ):
        cache = m.new_cache(1)
        for view in (first, second):
            plan = plan_of(view, [0], [0], [])
            if view is second:
                with pytest.raises(OrderError, match="slot 0 does not see everything that was committed"):
                    m(x, plan, cache)
            else:
                m(x, plan, cache)
                cache.commit(1, plan)
    cache = pending(run(3))
    cache.commit(3, run(3))
    with pytest.raises(OrderError, match="does not see everything"):
        m(normal(2, 1, WIDTH), plan_of(timed([1]), [0], [0], []), cache)


def test_wrong_calls_are_named() -> None:
    m, x = backbone(), normal(2, 3, WIDTH)
    for more in ({"vector": x[:, 0]}, {"memory": x}):
        with pytest.raises(ValueError, match="a condition as a prefix only"):
            m(x, run(3), **more)
    with pytest.raises(ValueError, match="the cache has 1 rows, the slots have 2"):
        m(x, run(3), m.new_cache(1))
    with pytest.raises(ValueError, match="after 4 slots: pass the cache"):
        m(x, run(3, 4))
    with pytest.raises(ValueError, match="after 4 slots, but the cache holds 0"):
        m(x, run(3, 4), m.new_cache(2))
    skipping = replace(plan_of(inclusive(range(3)), [0], [0] * 3, []), layers=torch.tensor([[True] * 3, [False] * 3]))
    with pytest.raises(OrderError, match="skip layers"):
        m(x, skipping)
    with pytest.raises(OrderError, match="kind 'all', the plan has time"):
        m(x, plan_of({"time": inclusive(range(3))}, [0], [0] * 3, []))
    packed = plan_of(inclusive(range(3)).narrow(lane=[0, 0, 1]), [0], [0] * 3, [])
    with pytest.raises(OrderError, match="one sample a row"):
        m(x, packed, m.new_cache(2))


@pytest.mark.parametrize(
    ("sizes", "why"),
    [
        ({"depth": 0}, "depth is at least 1"),
        ({"kernel": 0}, "kernel is at least 1"),
        ({"head_dim": 5}, "does not divide into heads of 5"),
        ({"groups": 3}, "4 heads cannot share 3 groups"),
        ({"heads": 0}, "0 heads"),
    ],
)
def test_impossible_sizes_are_refused(sizes: dict[str, int], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        replace(CONFIG, **sizes)
