"""Labels put together, narrowed, taken apart and laid over a cache mean the same as the masks they stand for."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask

from seriatim.view import (
    ALWAYS,
    INF,
    NEVER,
    TIMED,
    View,
    full,
    inclusive,
    join,
    own_rank,
    timed,
    tree,
    two_stream,
    visible,
)

LOWER = torch.ones(4, 4, dtype=torch.bool).tril()


def pairs(mask: torch.Tensor) -> set[tuple[int, int]]:
    """Who sees whom, besides itself (first row of the batch)."""
    return {(q, k) for q, k in mask[0].nonzero().tolist() if q != k}


# ---- then: one after the other ---------------------------------------------------------------------------------------


def test_then_sees_everything_of_the_first_that_is_still_alive():
    prompt_then_answer = full(2).then(inclusive(range(2)))
    assert torch.equal(prompt_then_answer.mask()[0], LOWER | (torch.arange(4) < 2) & (torch.arange(4)[:, None] < 2))


def test_then_does_not_see_what_died():
    scales_then_text = own_rank([0, 1, 1]).then(inclusive([0]))
    assert pairs(scales_then_text.mask()) == {(1, 2), (2, 1)}


def test_then_starts_after_the_last_birth_of_the_first():
    """A slot that is born late (a compressed frame) is there for whatever comes next."""
    compressed = timed([0], born=[7])
    assert pairs(compressed.then(inclusive([0])).mask()) == {(1, 0)}


def test_then_shifts_clocks_that_do_not_start_at_zero():
    early, late = inclusive([5, 6]), inclusive([-3, 40])
    assert torch.equal(early.then(late).mask()[0], LOWER)


def test_then_is_associative_in_what_is_seen():
    a, b, c = inclusive([0, 1]), own_rank([0, 0]), two_stream([0, 0], [True, False])
    assert torch.equal(a.then(b).then(c).mask(), a.then(b.then(c)).mask())


def test_nothing_before_or_behind_changes_nothing():
    view = inclusive([0, 1])
    nothing = inclusive([])
    assert torch.equal(view.then(nothing).mask(), view.mask())
    assert torch.equal(nothing.then(view).mask(), view.mask())


# ---- narrow ----------------------------------------------------------------------------------------------------------


def test_a_window_keeps_the_last_clock_times():
    assert pairs(inclusive(range(4)).narrow(window=2).mask()) == {(1, 0), (2, 1), (3, 2)}


def test_a_window_counts_clock_times_and_not_slots():
    frames = inclusive([0, 0, 1, 1, 2, 2]).narrow(window=2)
    assert frames.mask()[0, 5].tolist() == [False, False, True, True, True, True]


def test_lanes_keep_apart():
    columns = inclusive([0, 0, 1, 1]).narrow(lane=[0, 1, 0, 1])
    assert pairs(columns.mask()) == {(2, 0), (3, 1)}


def test_narrowing_twice_keeps_both_lanes():
    """A packed sample inside which only rows meet."""
    sample, row = [0, 0, 0, 1, 1, 1], [0, 0, 1, 0, 1, 1]
    view = full(6).narrow(lane=sample).narrow(lane=row)
    assert pairs(view.mask()) == {(0, 1), (1, 0), (4, 5), (5, 4)}


def test_what_is_out_of_one_lane_stays_out():
    view = full(3).narrow(lane=[0, -1, 0]).narrow(lane=[0, 0, -1])
    assert pairs(view.mask()) == set()


def test_narrowing_never_shows_more():
    view = two_stream([0, 0, 1, 1], [True, False, True, False])
    for narrow in (view.narrow(window=2), view.narrow(lane=[0, 1, 0, 1]), view.narrow(lane=[0] * 4, window=1)):
        assert not (narrow.mask() & ~view.mask()).any()


# ---- relations between groups ----------------------------------------------------------------------------------------


def test_relations_overrule_the_clock():
    view = timed([0, 1, 2], group=[0, 1, 2], relation=[[TIMED, NEVER, ALWAYS], [NEVER] * 3, [TIMED, NEVER, TIMED]])
    assert pairs(view.mask()) == {(0, 2), (2, 0)}


def test_lanes_overrule_relations():
    view = timed([0, 0], lane=[0, 1], group=[0, 0], relation=[[ALWAYS]])
    assert pairs(view.mask()) == set()


def test_joined_views_without_groups_are_group_0():
    view = join([inclusive([0]), timed([1], group=[1], relation=[[TIMED, TIMED], [NEVER, TIMED]])])
    assert pairs(view.mask()) == set()


def test_equal_relations_can_be_joined_and_different_ones_cannot():
    one, same, other = (timed([0], group=[0], relation=[[r]]) for r in (TIMED, TIMED, ALWAYS))
    assert join([one, same]).size == 2
    with pytest.raises(ValueError, match="state one relation for all groups"):
        join([one, other])


# ---- rows of a decoding step -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "view",
    [
        inclusive([0, 1, 1, 2, 2, 3]),
        own_rank([0, 1, 1, 2, 2, 3]),
        tree([-1, 0, 0, 1, 2, 2]),
        timed(range(6), group=[0, 0, 1, 1, 2, 2], relation=[[1, 0, 0], [1, 1, 0], [2, 0, 1]]),
        timed([[0, 1, 2, 3, 4, 5], [0, 0, 1, 1, 2, 2]], lane=[[0] * 6, [0, 1, 0, 1, 0, -1]]),
    ],
    ids=["scales", "markov", "tree", "groups", "two rows"],
)
def test_new_slots_over_cached_ones_see_what_they_see_in_one_pass(view):
    cached, new = view.take(torch.tensor([[0, 1, 2]])), view.take(torch.tensor([[3, 4, 5]]))
    assert torch.equal(new.over(cached), view.mask()[:, 3:])
    assert torch.equal(new.over(None), new.mask())


@pytest.mark.parametrize(
    "view",
    [
        timed([0, 1, 2], group=[0, 1, 2], relation=[[TIMED, NEVER, ALWAYS], [NEVER] * 3, [TIMED, NEVER, TIMED]]),
        timed([1, 0], lane=[0, 1], group=[0, 0], relation=[[ALWAYS]]),
        timed([0, 1], relation=[[ALWAYS]]),
        timed([0, 1], group=[0, 1]),
        timed([0, 1, 2], dies=[[INF, INF, INF], [1, INF, INF]], lane=[[0, 0, -1]]),
    ],
    ids=["always", "lanes first", "no groups", "no relation", "mixed rows"],
)
def test_flex_attention_reads_every_label(view):
    rule = view.block_mask().mask_mod
    assert torch.equal(create_mask(rule, view.batch, 1, view.size, view.size, device="cpu")[:, 0], view.mask())


def test_the_cache_may_have_lanes_that_the_new_slots_do_not_have():
    cached = inclusive([0, 1, 2]).take(torch.tensor([[0, -1, 2]]))
    assert inclusive([3]).over(cached)[0].tolist() == [[True, False, True, True]]


# ---- take ------------------------------------------------------------------------------------------------------------


def test_take_permutes_the_mask():
    view = two_stream([0, 0, 1, 1], [True, False, True, False])
    order = torch.tensor([[3, 1, 0, 2]])
    assert torch.equal(view.take(order).mask()[0], view.mask()[0][order[0]][:, order[0]])


def test_nobody_sees_padding_and_padding_sees_nobody():
    view = full(3).take(torch.tensor([[2, -1, 0, -1]]))
    assert pairs(view.mask()) == {(0, 2), (2, 0)}
    assert view.mask()[0].diagonal().all()  # so that a softmax over a padded row is finite


def test_take_may_differ_by_row():
    taken = inclusive(range(3)).take(torch.tensor([[0, 2], [1, -1]]))
    assert taken.at.tolist() == [[0, 2], [1, 0]]
    assert pairs(taken.mask()[1:]) == set()


def test_taking_only_padding_from_nothing():
    nothing = inclusive([]).take(torch.tensor([[-1, -1]]))
    assert pairs(nothing.mask()) == set()


def test_one_row_of_a_batch():
    view = timed([[0, 1], [1, 0]], lane=[[0, 0], [0, 0]])
    assert pairs(view.row(0).mask()) == {(1, 0)}
    assert pairs(view.row(1).mask()) == {(0, 1)}
    assert view.row(1).batch == 1


# ---- batches ---------------------------------------------------------------------------------------------------------


def test_rows_have_labels_of_their_own():
    view = inclusive(torch.tensor([[0, 1, 2], [2, 1, 0]]))
    assert torch.equal(view.mask()[1], view.mask()[0].T)


def test_shared_and_row_wise_labels_mix():
    """Ranks shared by the batch, deaths by row: joined, taken and masked alike."""
    view = timed([0, 1, 2], dies=[[INF, INF, INF], [1, INF, INF]])
    assert view.batch == 2
    assert pairs(view.mask()[1:]) == {(2, 1)}
    assert torch.equal(join([view, inclusive([3])]).mask()[:, :3, :3], view.mask())
    assert torch.equal(view.take(torch.tensor([[0, 1, 2]])).mask(), view.mask())


def test_visible_leaves_out_that_a_slot_sees_itself():
    strictly = timed([0, 1], born=[1, 2])
    assert visible(strictly, strictly)[0].tolist() == [[False, False], [True, False]]


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: timed([0, 1], born=[0]), "`at` labels 2 slots, but `born` labels 1"),
        (lambda: timed([0, 1], lane=[0, 0, 0]), "`at` labels 2 slots, but `lane` labels 3"),
        (lambda: timed(torch.zeros(1, 1, 1)), r"labels are \(slots\) or \(batch, slots\)"),
        (lambda: timed([0], group=[2], relation=[[1, 1], [1, 1]]), "group 2 has no row in a relation of 2 groups"),
        (lambda: timed([0], group=[0], relation=[[1, 1]]), "a relation is a square table"),
        (lambda: inclusive([0]).narrow(window=0), "a window is at least 1, got 0"),
        (lambda: inclusive([0, 1]).narrow(lane=[0]), "1 lanes for 2 slots"),
        (lambda: tree([-1, 1]), "node 1 has parent 1; parents come before their children"),
        (lambda: tree([-1, 0, 5]), "node 2 has parent 5"),
        (lambda: join([]), "there are no views to join"),
    ],
)
def test_labels_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_view_moves_between_devices():
    view = timed([0, 1], lane=[0, 0], group=[0, 0], relation=[[TIMED]]).to("meta")
    fields = (getattr(view, name) for name in View.__slots__)
    assert {x.device.type for x in fields} == {"meta"}
