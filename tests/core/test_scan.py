"""What a recurrence honours: a view is taken exactly when each slot sees one path, and refused by name otherwise."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seriatim.canvas import Canvas
from seriatim.decoding.guess import Guess
from seriatim.factorization.line import Line
from seriatim.factorization.static import AnyOrder, Blocks
from seriatim.layout import line
from seriatim.plan import OrderError, plan_of
from seriatim.scan import CHAIN, Scan, scan_of
from seriatim.view import View, earlier, full, inclusive, join, local, own_rank, timed, two_stream

drawn = settings(deadline=None, max_examples=150, derandomize=True)


def forest(parent: list[int]) -> torch.Tensor:
    """Who sees whom along parents."""
    mask = torch.eye(len(parent), dtype=torch.bool)
    for u in range(len(parent)):
        v = parent[u]
        while v >= 0:
            mask[u, v] = True
            v = parent[v]
    return mask


def parents(scan: Scan, size: int, row: int = 0) -> list[int]:
    if scan.parent is None:
        return list(range(-1, size - 1))
    return scan.parent[row].tolist()


def is_forest(mask: torch.Tensor) -> bool:
    """By definition: the slots that a slot sees are seen by one another in turn, and nobody sees back."""
    for u in range(len(mask)):
        path = sorted(mask[u].nonzero()[:, 0].tolist(), key=lambda v: int(mask[v].sum()))
        for i, v in enumerate(path):
            if mask[v].nonzero()[:, 0].tolist() != sorted(path[: i + 1]):
                return False
    return True


small = st.integers(0, 4)


@st.composite
def views(draw: st.DrawFn) -> View:
    n = draw(st.integers(1, 6))
    rank = draw(st.lists(small, min_size=n, max_size=n))
    if draw(st.booleans()):
        rank = sorted(rank)
    made = draw(
        st.sampled_from(
            [
                inclusive(range(n)),
                inclusive(rank),
                earlier(rank),
                own_rank(rank),
                timed(rank, dies=[r + draw(small) for r in rank]),
                two_stream(rank, [draw(st.booleans()) for _ in rank]),
            ]
        )
    )
    if draw(st.booleans()):
        made = made.narrow(lane=draw(st.lists(st.integers(-1, 2), min_size=n, max_size=n)))
    return made


@drawn
@given(views())
def test_a_view_is_honoured_exactly_or_refused(view: View) -> None:
    """Against the definition, for views of all kinds: neither is a path refused nor anything else taken."""
    mask = view.mask()[0]
    if not is_forest(mask):
        with pytest.raises(ValueError, match="cannot honour"):
            scan_of(view)
        return
    scan = scan_of(view)
    assert torch.equal(forest(parents(scan, view.size)), mask)
    if not scan.tree:  # array order will do: in each lane the live slots see all before them
        lane = torch.zeros(view.size) if scan.lane is None else scan.lane[0]
        order = torch.ones_like(mask).tril() & (lane[:, None] == lane) & (lane >= 0)
        assert torch.equal(order | torch.eye(view.size, dtype=torch.bool), mask)
    if scan.lane is None and not scan.tree:
        assert scan is CHAIN


@drawn
@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=5, max_size=5))
def test_any_mask_is_honoured_exactly_or_refused(rows: list[list[bool]]) -> None:
    """Masks that no constructor makes, by a relation between five groups."""
    relation = [[2 if cell and i >= j else 0 for j, cell in enumerate(row)] for i, row in enumerate(rows)]
    view = timed([0] * 5, group=range(5), relation=relation)
    if is_forest(view.mask()[0]):
        assert torch.equal(forest(parents(scan_of(view), 5)), view.mask()[0])
    else:
        with pytest.raises(ValueError, match="cannot honour"):
            scan_of(view)


def test_packed_samples_and_padding_stay_in_array_order() -> None:
    lane = torch.tensor([[0, 0, -1, 0, 1, 1], [3, -1, 3, 1, 1, -1]])
    view = inclusive(range(6)).narrow(lane=lane)
    scan = scan_of(view)
    assert not scan.tree
    assert scan.parent is not None and scan.parent.tolist() == [[-1, 0, -1, 1, -1, 4], [-1, -1, 0, -1, 3, -1]]


def test_a_lane_that_returns_is_not_taken_for_a_new_sample() -> None:
    scan = scan_of(inclusive(range(4)).narrow(lane=[0, 1, 0, 1]))
    assert scan.tree
    assert parents(scan, 4) == [-1, -1, 0, 1]


trees = st.integers(1, 9).flatmap(lambda n: st.tuples(*[st.integers(-1, i - 1) for i in range(n)]))


def joins_a_trunk(parent: list[int], live: list[bool], trunk: int) -> bool:
    """Columns below `trunk` are a chain, those behind go on from one another or from its end."""
    last = -1
    for u in range(trunk):
        if live[u]:
            if parent[u] != last:
                return False
            last = u
    return all(parent[u] >= trunk or parent[u] == last for u in range(trunk, len(parent)) if live[u])


@drawn
@given(trees, trees, st.integers(0, 4), st.lists(st.booleans(), min_size=13, max_size=13))
def test_the_trunk_is_the_longest_that_every_row_shares(
    left: tuple[int, ...], right: tuple[int, ...], known: int, alive: list[bool]
) -> None:
    """Rows with padding in the trunk, each with a tree behind its own last known slot."""
    size = min(len(left), len(right))
    rows, live = [], []
    for nodes, here in ((left, alive), (right, alive[::-1])):
        there = here[:known] + [True] * size
        before, row = -1, []
        for u in range(known):
            row.append(before if there[u] else -1)
            before = u if there[u] else before
        rows.append(row + [before if p < 0 else known + p for p in nodes[:size]])
        live.append(there)
    scan = Scan(torch.where(torch.tensor(live), 0, -1), torch.tensor(rows), tree=True)
    fitting = [
        m for m in range(known + size + 1) if all(joins_a_trunk(p, a, m) for p, a in zip(rows, live, strict=True))
    ]
    assert scan.trunk == max(fitting)


# ---- plans -----------------------------------------------------------------------------------------------------------

SCAN = {"all": "scan"}


def test_plans_that_a_state_cannot_honour_are_refused_with_the_reason() -> None:
    blank = Canvas(line(6), {"token": torch.zeros(1, 6, dtype=torch.long)})
    with pytest.raises(OrderError, match=r"slots 0 and 1 see each other.*two streams"):
        Blocks(2).packed(blank).check(SCAN)
    step = AnyOrder().step(blank, None, 0)
    assert step is not None
    with pytest.raises(OrderError, match="slots 0 and 1 see each other"):
        step.check(SCAN)
    ranks, reads = range(4), [(i, i + 1) for i in range(3)]
    for view, why in (
        (inclusive(range(4)).narrow(window=2), "slot 2 sees slot 1, but not slot 0, which slot 1 sees"),
        (local(4, 1), "slots 0 and 1 see each other"),
        (full(4), "see each other"),
        (join([timed([0, 5]), timed([9, 9])]), "slots 2 and 3 see each other"),
        (timed([0, 0, 2, 3], [1, 1, 2, 3]), "slot 2 sees slots 0 and 1, of which neither sees the other"),
    ):
        plan = plan_of(view, ranks, list(range(4)), reads)
        with pytest.raises(OrderError, match=why):
            plan.check(SCAN)
        with pytest.raises(OrderError, match=why):
            plan.scan("all")
    with pytest.raises(OrderError, match="kind 'other'"):
        plan_of(full(4), ranks, list(range(4)), reads).scan("other")


def test_draft_trees_do_not_peek_in_a_scan_whatever_their_order() -> None:
    """Depth first: the node of one branch stands before a shallower one of another, but is not on its path."""
    canvas = Canvas(line(9), {"token": torch.zeros(1, 9, dtype=torch.long)}, 3)
    guess = Guess(torch.zeros(1, 5, dtype=torch.long), (-1, 0, 1, -1, 3))
    plan = Line(1).step(canvas, guess, 2)
    assert plan is not None
    assert plan.check(SCAN) is plan
    assert plan.scan("all").parent is not None and parents(plan.scan("all"), 7) == [-1, 0, 1, 2, 3, 1, 5]


def test_a_scan_in_array_order_makes_no_mask() -> None:
    """Half a million slots in two hundred packed samples: a mask would take 250 GB."""
    lane = torch.arange(2**19) // 2700
    scan = scan_of(inclusive(range(2**19)).narrow(lane=lane))
    assert not scan.tree
