"""Groups of a grid: partitions, and who sees whom."""

from __future__ import annotations

import itertools

import pytest
import torch

from seriatim.factorization.cells import cells, subsample
from seriatim.factorization.groups import Groups
from seriatim.layout import grid
from seriatim.plan import MASK, NOISE, OrderError, Plan
from seriatim.view import full

KINDS = (cells, subsample)
SIZES = [(4, 4, 2, 2), (4, 6, 2, 3), (6, 4, 3, 1), (4, 4, 1, 1), (4, 4, 4, 4), (3, 5, 1, 5)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_a_partition_is_a_permutation_into_equal_groups_that_inverts(kind, size):
    rows, columns, height, width = size
    group = kind(*size)
    assert group.shape == (rows * columns,)
    assert group.bincount().tolist() == [height * width] * (rows * columns // (height * width))
    order = group.argsort(stable=True)
    assert torch.equal(order[order.argsort()], torch.arange(rows * columns))
    picture = torch.randn(rows * columns)
    assert torch.equal(picture[order][order.argsort()], picture)


def test_cells_are_neighbours_and_subsamples_lie_a_stride_apart():
    assert cells(4, 4, 2, 2).view(4, 4).tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]
    assert subsample(4, 4, 2, 2).view(4, 4).tolist() == [[0, 1, 0, 1], [2, 3, 2, 3], [0, 1, 0, 1], [2, 3, 2, 3]]
    assert cells(2, 4, 1, 2).view(2, 4).tolist() == [[0, 0, 1, 1], [2, 2, 3, 3]]
    assert subsample(2, 4, 1, 2).view(2, 4).tolist() == [[0, 1, 0, 1], [2, 3, 2, 3]]


@pytest.mark.parametrize("kind", KINDS)
def test_the_ends_of_a_partition_are_raster_order_and_the_whole(kind):
    assert torch.equal(kind(3, 4, 1, 1), torch.arange(12))
    assert torch.equal(kind(3, 4, 3, 4), torch.zeros(12, dtype=torch.long))


@pytest.mark.parametrize("size", [(4, 4, 3, 2), (4, 4, 2, 8), (0, 4, 1, 1), (4, 4, 0, 1)])
def test_groups_that_do_not_tile_the_grid_are_refused(size):
    with pytest.raises(ValueError, match="do not tile"):
        cells(*size)


def plan_of(order, packed=True, given=0):
    from seriatim.canvas import Canvas

    layout = grid(4, 4)
    group, known = order.of(layout), torch.arange(16) < given
    rank = torch.where(known, -1, group)
    canvas = Canvas(layout, {"token": torch.zeros(1, 16, 2)}, known[None], rank[None])
    return order.packed(canvas) if packed else order.noisy(canvas)


@pytest.mark.parametrize("kind", KINDS)
def test_two_streams_hide_the_values_of_a_group_from_its_noise(kind):
    """Clean i sees clean <= i; noised i sees clean < i and itself: skip-causal (ACDiT)."""
    group = kind(4, 4, 2, 2)
    plan = plan_of(Groups(group)).check(due=torch.ones(1, 16, dtype=torch.bool))
    mask, e, source = plan.views["all"].mask()[0], plan.slots.element[0, :, 0], plan.slots.source[0]
    for q, k in itertools.product(range(32), repeat=2):
        i, j = int(group[e[q]]), int(group[e[k]])
        clean_q, clean_k = source[q] != NOISE, source[k] != NOISE
        want = (j <= i if clean_q else j < i) if clean_k else (not clean_q and j == i)
        assert bool(mask[q, k]) == want, (q, k)


@pytest.mark.parametrize("kind", KINDS)
def test_one_stream_shows_the_noise_of_earlier_groups(kind):
    group = kind(4, 4, 2, 2)
    plan = plan_of(Groups(group), packed=False).check(due=torch.ones(1, 16, dtype=torch.bool))
    assert torch.equal(plan.views["all"].mask()[0], group[:, None] >= group)
    assert plan.slots.source.unique().tolist() == [NOISE]


def test_given_elements_are_context_and_are_not_read():
    order = Groups(cells(4, 4, 2, 2))
    for packed in (True, False):
        plan = plan_of(order, packed, given=3).check()
        assert sorted(plan.reads.element[plan.reads.element >= 0].tolist()) == list(range(3, 16))
        given = (plan.slots.element[0, :, 0] < 3).nonzero()[:, 0]
        assert plan.slots.source[0, given].unique().tolist() == [0]


def test_frames_are_groups_of_layouts_of_any_length():
    order = Groups(source=MASK)
    for frames in (1, 3, 7):
        assert torch.equal(order.of(grid(frames, 2, 2)), torch.arange(frames).repeat_interleave(4))
    with pytest.raises(ValueError, match="groups 16 elements, and the layout has 8"):
        Groups(cells(4, 4, 2, 2)).of(grid(2, 4))
    with pytest.raises(ValueError, match="without holes"):
        Groups(torch.tensor([0, 2]))


class PeeksAtItsOwnValues(Groups):
    """Wrong on purpose."""

    def packed(self, canvas):
        plan = super().packed(canvas)
        return Plan(plan.slots, {"all": full(plan.size)}, plan.reads, plan.rank, layout=plan.layout)


def test_a_group_that_sees_its_own_values_is_refused():
    with pytest.raises(OrderError, match="peeks"):
        plan_of(PeeksAtItsOwnValues(cells(4, 4, 2, 2))).check()


def test_a_step_computes_the_values_of_the_group_before_and_the_noise_of_its_own():
    order = Groups(cells(4, 4, 2, 2))
    plans = plan_of(order).steps()
    assert [p.size for p in plans] == [4, 8, 8, 8]
    assert [p.kept.shape[1] for p in plans] == [0, 4, 4, 0]
