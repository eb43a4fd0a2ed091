"""Draft trees that grow: the likeliest paths as EAGLE-2's released routine finds them, and fixed shapes."""

from __future__ import annotations

import random as stdlib
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from seriatim.decoding.growth import Choices, Dynamic, Static, likeliest
from seriatim.decoding.guess import Guess
from seriatim.decoding.templates import standard

torch.set_num_threads(1)
VOCAB = 9


class Draft:
    """A draft of random logits, or of few different ones (`coarse`: many paths are equally likely). What it says behind
    a node depends on the whole path; every row of a batch has logits of its own."""

    def __init__(self, seed: int, rows: int = 1, coarse: bool = False, sharp: float = 2.0):
        self.seed, self.rows, self.coarse, self.sharp = seed, rows, coarse, sharp
        self.asked: list[int] = []  # how many nodes each call expands
        self._paths: list[list[tuple[int, ...]]] = [[()]] * rows

    def said(self, row: int, path: tuple[int, ...]) -> Tensor:
        """Log-probabilities behind a path."""
        g = torch.Generator().manual_seed(hash((self.seed, row, path)) % 2**40)
        x = torch.randn(VOCAB, generator=g, dtype=torch.float64) * self.sharp
        return torch.log_softmax(x.round() if self.coarse else x, -1).float()

    def choices(self, width: int) -> Choices:
        # of equals the first, as the released routine's topk finds them on these sizes
        rows = [[self.said(r, p).sort(descending=True, stable=True) for p in self._paths[r]] for r in range(self.rows)]
        best = torch.stack([torch.stack([s.values[:width] for s in row]) for row in rows])
        return Choices(best, torch.stack([torch.stack([s.indices[:width] for s in row]) for row in rows]))

    def first(self, width: int) -> Choices:
        self._paths = [[()]] * self.rows
        return self.choices(width)

    def expand(self, width: int):
        def ask(token: Tensor, rows: Sequence[int]) -> Choices:
            self.asked.append(len(rows))
            assert token.shape == (self.rows, len(rows))
            self._paths = [
                [(*self._paths[r][above], int(t)) for above, t in zip(rows, token[r].tolist(), strict=True)]
                for r in range(self.rows)
            ]
            return self.choices(width)

        return ask

    def grow(self, tree: Dynamic | Static, deepest: Sequence[int] | None = None) -> Guess:
        guess = tree.grow(self.first(tree.width), self.expand(tree.width), deepest or [tree.depth] * self.rows)
        assert guess is not None
        return guess


def released(draft: Draft, nodes: int, depth: int, width: int) -> list[tuple[int, ...]]:
    """The paths that EAGLE-2's released routine keeps, in its order, by its own bookkeeping: scores of all candidates
    in one list, depth by depth; the best of a depth are expanded, then the best of all are kept."""

    def top(scores: Tensor, n: int) -> list[int]:
        return scores.sort(descending=True, stable=True).indices[:n].tolist()

    root = draft.said(0, ())
    level = top(root, width)
    paths = [(t,) for t in level]
    scores = root[level]
    every, all_paths = [scores], list(paths)
    for _ in range(depth - 1):
        candidates, found = [], []
        for path, score in zip(paths, scores, strict=True):
            said = draft.said(0, path)
            best = top(said, width)
            candidates.append(said[best] + score)
            found += [(*path, t) for t in best]
        level_scores = torch.cat(candidates)
        every.append(level_scores)
        all_paths += found
        chosen = top(level_scores, width)
        paths, scores = [found[i] for i in chosen], level_scores[chosen]
    return [all_paths[i] for i in sorted(top(torch.cat(every), nodes))]


def paths_of(guess: Guess, row: int = 0) -> list[tuple[int, ...]]:
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(guess.value[row].tolist(), guess.parents(), strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    return paths


# ---- the likeliest paths ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coarse", [False, True])
def test_nodes_are_those_of_the_released_routine_on_random_logits(coarse):
    rng = stdlib.Random(0)
    for seed in range(60):
        nodes, depth, width = rng.randint(1, 24), rng.randint(1, 5), rng.randint(1, 5)
        draft = Draft(seed, coarse=coarse, sharp=rng.choice((0.7, 2.0, 5.0)))
        guess = draft.grow(Dynamic(nodes, depth, width))
        assert paths_of(guess) == released(draft, nodes, depth, width), (seed, nodes, depth, width)


def test_what_is_kept_holds_all_its_ancestors_and_lists_them_first():
    for seed in range(40):
        guess = Draft(seed, coarse=True, sharp=1.0).grow(Dynamic(11, 4, 4))
        assert guess.size == 11
        assert all(p < i for i, p in enumerate(guess.parents()))
        assert list(guess.depths()) == sorted(guess.depths())


def test_paths_that_have_enough_better_ones_are_not_followed():
    asked = []
    for seed in range(20):
        draft = Draft(seed, sharp=0.3)
        draft.grow(Dynamic(4, 5, 4))
        asked.append(sum(draft.asked))
    assert max(asked) <= 3  # the routine as released expands 16


def test_a_tree_of_width_one_is_a_chain():
    guess = Draft(1).grow(Dynamic(8, 6, 1))
    assert guess.chain and guess.size == 6
    assert Draft(1).grow(Dynamic(3, 6, 1)).size == 3


def test_a_sure_draft_is_deep_and_an_unsure_one_broad():
    deep = [max(Draft(s, sharp=9.0).grow(Dynamic(8, 6, 4)).depths()) for s in range(20)]
    broad = [max(Draft(s, sharp=0.5).grow(Dynamic(8, 6, 4)).depths()) for s in range(20)]
    assert sum(deep) / 20 > 4.5 and sum(broad) / 20 < 2.5


def test_no_row_reaches_further_than_it_may():
    draft = Draft(3, rows=3, sharp=6.0)
    guess = draft.grow(Dynamic(10, 5, 3), [5, 2, 0])
    depth = torch.tensor(guess.depths())
    assert max(guess.depths()) > 2
    assert bool((guess.value[0] >= 0).all())
    assert torch.equal(guess.value[1] >= 0, depth <= 2)
    assert bool((guess.value[2] < 0).all())


def test_a_batch_has_the_tree_that_is_expected_to_give_it_most():
    """Over its common shape: no node that was looked at and left out is worth more, summed over the rows."""
    for seed in range(20):
        draft, rows = Draft(seed, rows=3), range(3)
        guess = draft.grow(Dynamic(7, 3, 3))

        def worth(shape: tuple[int, ...], draft=draft, rows=rows) -> float:
            total = 0.0
            for r in rows:
                path, p = (), 0.0
                for child in shape:
                    said = draft.said(r, path).sort(descending=True, stable=True)
                    p, path = p + float(said.values[child]), (*path, int(said.indices[child]))
                total += float(torch.tensor(p).exp())
            return total

        shapes = []
        for node, parent in enumerate(guess.parents()):
            before = shapes[parent] if parent >= 0 else ()
            said = draft.said(0, paths_of(guess)[parent] if parent >= 0 else ())
            shapes.append(
                (*before, said.sort(descending=True, stable=True).indices.tolist().index(guess.value[0, node]))
            )
        least = min(worth(shape) for shape in shapes)
        nearby = [(*s, c) for s in [(), *shapes] for c in range(3) if len(s) < 2]
        assert all(worth(s) <= least + 1e-6 for s in nearby if s not in shapes)
        assert paths_of(guess, 1) != paths_of(guess, 2)


def test_a_draft_that_knows_nothing_drafts_nothing():
    nothing = Choices(torch.full((1, 1, 2), float("nan")), torch.zeros(1, 1, 2, dtype=torch.long))
    assert Dynamic(4, 1, 2).grow(nothing, lambda *_: nothing, [3]) is None


def test_impossible_trees_are_refused():
    for wrong in ({"nodes": 0}, {"depth": 0}, {"width": 0}):
        with pytest.raises(ValueError, match="at least 1 node, depth and width"):
            Dynamic(**wrong)


# ---- fixed shapes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nodes", [1, 5, 12])
def test_a_fixed_shape_holds_the_likeliest_behind_each_node(nodes):
    template = standard(nodes)
    draft = Draft(5, rows=2)
    guess = draft.grow(Static(template))
    assert guess.parents() == template.parent
    for row in range(2):
        paths = paths_of(guess, row)
        for path, child in zip(paths, template.child, strict=True):
            best = draft.said(row, path[:-1]).sort(descending=True, stable=True).indices
            assert path[-1] == int(best[child])
    assert sum(draft.asked) == len({p for p in template.parent if p >= 0})


def test_a_fixed_shape_is_cut_where_there_is_no_room_or_no_choice():
    guess = Draft(5).grow(Static(standard(12)), [2])
    assert max(guess.depths()) == 2
    few = Choices(torch.tensor([[[-0.1, -2.0]]]), torch.tensor([[[1, 0]]]))
    guess = Static(standard(12)).grow(few, lambda token, rows: Choices(*(x.expand(1, len(rows), 2) for x in few)), [4])
    assert guess is not None and max(len([p for p in guess.parents() if p == n]) for n in range(-1, guess.size)) == 2


# ---- what is likely --------------------------------------------------------------------------------------------------


def test_choices_are_the_largest_logits_with_their_log_probabilities():
    logits = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(0))
    found = likeliest(logits, 5)
    want = torch.log_softmax(logits, -1).topk(5, -1)
    assert torch.equal(found.token, want.indices)
    assert torch.allclose(found.log_prob, want.values, atol=1e-6)
    assert likeliest(logits[..., :3], 5).token.shape == (2, 3, 3)
