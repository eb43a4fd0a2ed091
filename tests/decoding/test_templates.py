"""Templates: the released ones node by node, the best of so many nodes, and shapes that hang together."""

from __future__ import annotations

import hashlib
import itertools
import random as stdlib

import pytest
import torch

from seriatim.decoding.guess import Guess
from seriatim.decoding.templates import (
    MEDUSA,
    RECYCLED,
    TEMPLATES,
    VISITS,
    Template,
    likeliest,
    of_paths,
    spread,
    standard,
)
from seriatim.view import tree

RELEASED = [RECYCLED, MEDUSA]
SMALL = of_paths([(0,), (1,), (0, 0), (0, 2), (1, 0), (0, 2, 1)])


def digest(template: Template) -> str:
    return hashlib.sha256(repr(sorted(template.paths)).encode()).hexdigest()[:16]


def arbitrary(seed: int, nodes: int = 12, width: int = 4) -> Template:
    """A template of random shape."""
    rng = stdlib.Random(seed)
    paths: list[tuple[int, ...]] = [()]
    while len(paths) <= nodes:
        path = (*rng.choice(paths), rng.randrange(width))
        if path not in paths:
            paths.append(path)
    return of_paths(paths[1:])


# ---- the released ones -----------------------------------------------------------------------------------------------


def test_the_released_templates_have_their_nodes():
    """By a digest of the sorted lists of candidates that were published."""
    widths = [[t.depths.count(d + 1) for d in range(t.depth)] for t in RELEASED]
    assert widths == [[8, 21, 25, 15, 8, 3], [10, 28, 23, 2]]
    assert [t.size for t in RELEASED] == [80, 63]
    assert [t.width for t in RELEASED] == [8, 10]
    assert [digest(t) for t in RELEASED] == ["9a154c9c63b0822c", "cf80c6f8f8b8d6e6"]


@pytest.mark.parametrize("template", [*RELEASED, *map(arbitrary, range(8))])
def test_masks_places_and_paths_are_those_of_a_builder_that_compares_beginnings(template):
    """The released builders find a node's ancestors as the entries that begin its own list of candidates."""
    paths = [(), *template.paths]
    naive = torch.tensor([[a == b[: len(a)] for a in paths] for b in paths])
    mask = tree([-1, *(p + 1 for p in template.parent)]).mask()[0]
    assert torch.equal(mask, naive)
    assert template.depths == tuple(len(p) for p in paths[1:])
    guess = Guess(torch.zeros(1, template.size, dtype=torch.long), template.parent)
    leaves = [paths[n + 1] for n, below in guess.children().items() if not below]
    assert sorted(leaves) == sorted(p for p in paths if not any(len(q) > len(p) and q[: len(p)] == p for q in paths))


# ---- the best of so many nodes ---------------------------------------------------------------------------------------


def hanging_together(paths: tuple[tuple[int, ...], ...], nodes: int):
    """All templates of so many of these nodes."""
    for some in itertools.combinations(paths, nodes):
        if all(len(p) == 1 or p[:-1] in some for p in some):
            yield some


@pytest.mark.parametrize("seed", range(4))
def test_pruning_keeps_the_nodes_that_were_accepted_most_often(seed):
    template, rng = arbitrary(seed, 9, 3), stdlib.Random(seed)
    counts = [0] * template.size
    for _ in range(200):  # walks from the root, as verification makes them
        node = -1
        while (below := [i for i, p in enumerate(template.parent) if p == node]) and rng.random() < 0.7:
            node = rng.choice(below)
            counts[node] += 1
    of = dict(zip(template.paths, counts, strict=True))
    for nodes in (1, 4, 7):
        kept = template.pruned(counts, nodes)
        best = max(sum(of[p] for p in some) for some in hanging_together(template.paths, nodes))
        assert kept.size == nodes
        assert sum(of[p] for p in kept.paths) == best


def test_of_equal_counts_the_first_nodes_are_kept():
    assert SMALL.pruned([1] * 6, 3).paths == ((0,), (1,), (0, 0))
    assert SMALL.pruned([3, 3, 0, 3, 0, 3], 4).paths == ((0,), (1,), (0, 2), (0, 2, 1))


def test_counts_that_no_acceptance_gives_are_refused():
    with pytest.raises(ValueError, match="5 counts for 6 nodes"):
        SMALL.pruned([1] * 5, 3)
    with pytest.raises(ValueError, match="node 2 counts 2 and its parent 0 only 1"):
        SMALL.pruned([1, 1, 2, 0, 0, 0], 3)


@pytest.mark.parametrize("nodes", [1, 3, 5])
def test_the_likeliest_template_accepts_most_of_all_of_its_size(nodes):
    chance = ((0.5, 0.3, 0.1), (0.6, 0.2), (0.7,))
    worth = {}
    for d in (1, 2, 3):
        for path in itertools.product(*(range(len(row)) for row in chance[:d])):
            worth[path] = torch.tensor([chance[i][c] for i, c in enumerate(path)], dtype=torch.float64).prod().item()
    found = likeliest(chance, nodes)
    best = max(sum(worth[p] for p in some) for some in hanging_together(tuple(worth), nodes))
    assert sum(worth[p] for p in found.paths) == pytest.approx(best, rel=1e-12)
    assert found.size == nodes


def test_no_more_nodes_than_there_are_chances_for():
    assert likeliest([(0.5,)] * 3, 3).paths == ((0,), (0, 0), (0, 0, 0))
    with pytest.raises(ValueError, match="chances for 3 nodes, and 4 are asked for"):
        likeliest([(0.5,)] * 3, 4)
    with pytest.raises(ValueError, match="between 0 and 1"):
        likeliest([(1.5,)], 1)


def test_the_standard_ones_are_prunings_of_the_released_one_and_grow_into_each_other():
    RECYCLED.pruned(VISITS, 1)  # the counts are such as acceptance gives
    assert set(TEMPLATES) == {8, 12, 16}
    for nodes, template in TEMPLATES.items():
        assert template.size == nodes
        assert set(template.paths) <= set(RECYCLED.paths)
    assert set(TEMPLATES[8].paths) < set(TEMPLATES[12].paths) < set(TEMPLATES[16].paths)
    assert standard(80) == RECYCLED
    for nodes in (0, 81):
        with pytest.raises(ValueError, match=f"1 to 80 nodes, got {nodes}"):
            standard(nodes)


# ---- shapes ----------------------------------------------------------------------------------------------------------


def test_paths_may_come_in_any_order_and_lead_back_to_the_same_template():
    paths = list(SMALL.paths)
    stdlib.Random(0).shuffle(paths)
    assert of_paths(paths) == SMALL
    assert SMALL.parent == (-1, -1, 0, 0, 1, 3)
    assert SMALL.child == (0, 1, 0, 2, 0, 1)
    assert SMALL.levels == ((0, 2), (2, 5), (5, 6))
    assert (SMALL.size, SMALL.depth, SMALL.width) == (6, 3, 3)
    with pytest.raises(ValueError, match="needs its beginning"):
        of_paths([(0,), (1, 0)])


def test_a_template_is_cut_at_a_depth():
    assert SMALL.cut(3) is SMALL
    assert SMALL.cut(2).paths == SMALL.paths[:5]
    assert SMALL.cut(0) == SMALL.cut(-3) == Template((), ())
    assert Template((), ()).depth == Template((), ()).width == 0


def test_numbers_of_children_make_a_template():
    assert spread((2,), (1, 1)).paths == ((0,), (1,), (0, 0), (1, 0))
    assert spread((2,), (0, 2)) == of_paths([(0,), (1,), (1, 0), (1, 1)])
    with pytest.raises(ValueError, match="3 numbers of children for the 2 nodes"):
        spread((2,), (1, 1, 1))


@pytest.mark.parametrize(
    ("parent", "child", "message"),
    [
        ((-1, 0), (0,), "2 parents for 1 candidates"), ((0, -1), (0, 0), "parents come before"),
        ((-1, 0, -1), (0, 0, 1), "depth by depth"), ((-1, -1), (1, 0), "depth by depth"),
        ((-1, -1), (0, 0), "each once"), ((-1, -1, 1, 0), (0, 1, 0, 0), "in the order of their parents"),
        ((-1,), (-1,), "counted from 0"),
    ],
)  # fmt: skip
def test_what_is_no_template_is_refused(parent, child, message):
    with pytest.raises(ValueError, match=message):
        Template(parent, child)
