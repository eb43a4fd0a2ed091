"""Blocks whose ends are found on the way: where they end, and what a cache around them does."""

from __future__ import annotations

import pytest
import torch

from seriatim.canvas import DECIDED, Canvas, EditError, Reorder, Set
from seriatim.decoding.blocks import Delimited, InBlocks, beginning
from seriatim.decoding.sample import Above, Select
from seriatim.heads.dist import Categorical
from seriatim.layout import line
from seriatim.model import Rows
from seriatim.random import Keyed
from seriatim.systems.decoders import Ask
from seriatim.systems.system import Sampling
from seriatim.systems.unmasking import adablock_dllm as ada

END = 1  # of three tokens


def blank(size, known=0, rows=1):
    """All unknown behind the first ones, in one block."""
    rank = torch.where(torch.arange(size) < known, -1, 0)[None]
    return Canvas(line(size), {"token": torch.zeros(rows, size, dtype=torch.long)}, known, rank)


def said(likely, sure):
    """Laws in which `likely` tokens have the probabilities `sure`, the other two half of the rest each."""
    likely, sure = torch.tensor([likely]), torch.tensor([sure], dtype=torch.float64)
    p = ((1 - sure) / 2)[..., None].repeat(1, 1, 3).scatter(2, likely[..., None], sure[..., None])
    return Categorical(p.log())


def scripted(canvas, decider, law):
    """Decode with laws that never change; the element numbers of each step, and the block of every element."""
    taken = []
    while not canvas.done:
        element = torch.where(canvas.open, torch.arange(canvas.layout.size), -1)
        dist = Categorical(law.logits.expand(canvas.batch, -1, -1))
        step = decider.decide(canvas, None, Rows(dist, element, dist.logits, said=dist), Keyed(0))
        edit = step.edits[-1]
        assert isinstance(edit, Set)
        taken.append(edit.element[0][edit.element[0] >= 0].tolist())
        canvas.apply(step.edits)
    return taken, canvas.rank[0].tolist()


def lengths(rank):
    """Of the blocks in order; they must tile the text."""
    mine = [r for r in rank if r >= 0]
    assert mine == sorted(mine) and set(mine) == set(range(mine[-1] + 1))
    return [mine.count(r) for r in range(mine[-1] + 1)]


def blocks(likely, sure, *, known=0, threshold=0.3, default=4, window=1.0, ids=(END,), tau=0.0):
    law = said([0] * known + likely, [0.5] * known + sure)
    decider = InBlocks(Select(commit=Above(tau)), Delimited(ids, threshold, default, window))
    return lengths(scripted(blank(known + len(likely), known), decider, law)[1])


O = 0  # not an end  # noqa: E741


@pytest.mark.parametrize(("likely", "sure", "want"), [
    ([O, O, END, O, O, O, END, O], [0.9] * 8, [3, 4, 1]),  # equally sure: the first
    ([O, O, END, O, O, O, END, O], [0.9, 0.9, 0.5, 0.9, 0.9, 0.9, 0.8, 0.9], [7, 1]),  # the surest
    ([END, END, O, O, O, O], [0.9, 0.8, 0.9, 0.9, 0.9, 0.9], [1, 1, 4]),  # an end at once: blocks of 1
    ([O, END, O, O, O, O], [0.9] * 6, [2, 4]),
    ([O] * 6, [0.9] * 6, [4, 2]),  # no end: as usual, and what is left
    ([O, END, O, O, O, O], [0.9, 0.34, 0.9, 0.9, 0.9, 0.9], [2, 4]),
    ([END], [0.9], [1]), ([O], [0.9], [1]),
])  # fmt: skip
def test_blocks_end_with_the_surest_end(likely, sure, want):
    assert blocks(likely, sure) == blocks(likely, sure, known=3) == want


def test_an_end_counts_from_its_threshold_on():
    likely, sure = [O, END, O, O, O, O], [0.9, 0.5, 0.9, 0.9, 0.9, 0.9]
    assert blocks(likely, sure, threshold=0.5) == [2, 4]
    assert blocks(likely, sure, threshold=0.5001) == blocks(likely, sure, threshold=float("inf")) == [4, 2]
    assert blocks(likely, sure, ids=()) == [4, 2]


def test_ends_are_looked_for_in_a_share_of_all_tokens_rounded_down():
    """Of 10 tokens a quarter are 2, and those are counted from each block's beginning."""
    likely = [O, O, END, O, O, END, O, O, O, O]
    assert blocks(likely, [0.9] * 10, window=0.25) == [4, 2, 4]
    assert blocks(likely, [0.9] * 10, window=0.3) == [3, 3, 4]


def test_the_forward_that_ends_a_block_decides_its_first_tokens():
    """What the threshold allows, and nothing behind the end; with none, one token a step and not one step more."""
    likely, sure = [O, O, END, O, O, O], [0.95, 0.5, 0.7, 0.99, 0.99, 0.99]
    wide = InBlocks(Select(commit=Above(0.6)), Delimited((END,), 0.3, 4, 1.0))
    assert scripted(blank(6), wide, said(likely, sure))[0] == [[0, 2], [1], [3, 4, 5]]
    single = InBlocks(Select(steps=6), Delimited((END,), 0.3, 4, 1.0))
    assert [len(x) for x in scripted(blank(6), single, said(likely, sure))[0]] == [1] * 6


def test_blocks_tile_any_text_and_are_no_longer_than_allowed():
    g = torch.Generator().manual_seed(0)
    for _ in range(200):
        n, default = int(torch.randint(1, 30, (), generator=g)), int(torch.randint(1, 9, (), generator=g))
        window = float(torch.rand((), generator=g))
        likely = torch.randint(3, (n,), generator=g).tolist()
        sure = (1 / 3 + 2 / 3 * torch.rand(n, generator=g)).tolist()
        found = blocks(likely, sure, default=default, window=window, tau=0.6, known=2)
        assert sum(found) == n and max(found) <= max(default, int(window * n))


def test_what_is_known_keeps_its_rank():
    canvas = blank(4, 1)
    canvas.apply([Set(torch.tensor([[2]]), torch.tensor([[1]])), Reorder(torch.tensor([[5, 5, -1, 5]]))])
    assert canvas.rank[0].tolist() == [-1, 0, 0, 5] and canvas.status[0, 1] == DECIDED
    with pytest.raises(EditError, match="ranks are"):
        canvas.apply([Reorder(torch.tensor([5]))])


def test_a_block_begins_where_nothing_of_it_is_decided_and_no_end_is_known():
    canvas = blank(4, rows=4)
    canvas.apply([Set(torch.zeros(4, 4).long(), torch.tensor([[-1] * 4, [0] + [-1] * 3, [-1] * 4, [0, 1, 2, 3]]))])
    canvas.apply([Reorder(torch.tensor([[-1] * 4, [-1] * 4, [-1, -1, 1, 1], [-1] * 4]))])
    assert beginning(canvas).tolist() == [True, False, False, False]


@pytest.mark.parametrize(("default", "window"), [(0, 0.5), (4, 1.5), (4, -0.1)])
def test_rules_that_mean_nothing_are_refused(default, window):
    with pytest.raises(ValueError, match="at least 1 token"):
        Delimited((END,), 0.3, default, window)


# ---- with a model ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cache", "slots"), [
    ("none", lambda n, start, length: n), ("prefix", lambda n, start, length: n - start),
    ("dual", lambda n, start, length: length),
])  # fmt: skip
def test_a_cache_goes_around_the_blocks_that_were_found(cache, slots):
    """At the first step of a block everything is computed; then, of a block found at `start`, what the cache leaves."""
    case, seen = ada.case(), set()
    for seed in range(4):
        options = ada.Options(block=4, window=0.5, sure=0.2, threshold=None, cache=cache)
        way = ada.delimited(Ask(case.systems[0], Sampling(), (), None, options), (2,))
        canvas, steps = case.write(case.systems[0], Sampling(), way, seed=seed)
        n, found, start, at = canvas.layout.size, lengths(canvas.rank[0].tolist()), 3, 0
        for length in found:
            assert [step.slots for step in steps[at : at + length]] == [n] + [slots(n, start, length)] * (length - 1)
            start, at = start + length, at + length
        seen |= set(found)
    assert at == len(steps) and len(seen) > 3, "the model finds blocks of several lengths"
