"""Ends of text that wait, and texts that are cut behind their end."""

from __future__ import annotations

import itertools

import pytest
import torch

from seriatim.canvas import DECIDED, DELETED, Canvas, Set, Truncate
from seriatim.decoding.ending import EndOfText, LateEnds
from seriatim.decoding.learned import TRUSTED, Trusted
from seriatim.decoding.loop import Step, decode
from seriatim.decoding.policy import OutsideBlock
from seriatim.decoding.sample import Above, Select
from seriatim.decoding.target import Target
from seriatim.decoding.unmask import Unmask
from seriatim.heads.dist import Categorical
from seriatim.laws.unmasking import plain
from seriatim.layout import line
from seriatim.model import Rows
from seriatim.posttraining.drafting import Base
from seriatim.posttraining.parallel import Filter, FilterConfig
from seriatim.random import Keyed
from seriatim.systems.decoders import Ask
from seriatim.systems.system import Sampling
from seriatim.systems.unmasking import eoser_ass, learn2pd

END = 2  # of three tokens


def blank(size, known=0):
    rank = torch.where(torch.arange(size) < known, -1, 0)[None]
    return Canvas(line(size), {"token": torch.zeros(1, size, dtype=torch.long)}, known, rank)


def law(likely, sure):
    """`likely` tokens have the probabilities `sure`, the other two half of the rest each."""
    likely, sure = torch.tensor([likely]), torch.tensor([sure], dtype=torch.float64)
    p = ((1 - sure) / 2)[..., None].repeat(1, 1, 3).scatter(2, likely[..., None], sure[..., None])
    return Categorical(p.log())


def read(canvas, dist):
    """What a forward says that never changes its mind."""
    return Rows(dist, torch.where(canvas.open, torch.arange(canvas.layout.size), -1), dist.logits, said=dist)


class Greedy(Categorical):
    def sample(self, random, key):
        return self.mode()


# ---- ends that wait --------------------------------------------------------------------------------------------------


def test_the_factor_grows_evenly_with_the_steps():
    late = LateEnds((END,), 0.4, steps=4)
    assert [late.progress(d, 8) for d in (0, 2, 4, 6)] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert LateEnds((END,), 0.4, steps=100).progress(3, 7) == 0.5  # one token a step
    assert LateEnds((END,), 0.4, steps=1).progress(0, 7) == 1


def test_under_powers_it_grows_with_the_tokens_that_a_step_leaves_decided():
    late = LateEnds((END,), 0.01, 1, "powers")
    assert [late.progress(2**i - 1, 128) for i in range(7)] == [(2 ** (i + 1) - 1) / 128 for i in range(7)]
    assert all(0 < late.progress(d, n) <= 1 for n in range(1, 70) for d in range(n))


def test_an_end_waits_while_others_are_less_sure_and_keeps_its_value():
    dist = law([END, 0, END, 1], [0.9, 0.5, 0.8, 0.4])
    taken = {}
    for least in (1.0, 0.5, 0.0):
        canvas, order = blank(4), []
        select = Select(steps=4, scorer=LateEnds((END,), least, 4))
        while not canvas.done:
            step = select.decide(canvas, None, read(canvas, Greedy(dist.logits)), Keyed(0))
            order += step.edits[0].element[0][step.edits[0].element[0] >= 0].tolist()
            canvas.apply(step.edits)
        taken[least] = order
        assert canvas.value["token"][0].tolist() == [END, 0, END, 1]
    # factors at least=0.5 are 0.5, 2/3, 5/6, 1: 0.9 -> 0.45, 0.6, 0.75, 0.9 against 0.5 and 0.4
    assert taken == {1.0: [0, 2, 1, 3], 0.5: [1, 0, 2, 3], 0.0: [1, 3, 0, 2]}


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling()], ids=["greedy", "sampled"])
def test_what_is_drawn_for_an_element_does_not_depend_on_how_long_ends_wait(sampling):
    """The first step draws candidates for all; whichever are decided, they are these."""
    case, values = eoser_ass.case(), []
    for least in (1.0, 0.0):
        way = eoser_ass.waiting(Ask(case.systems[0], sampling, (), None, eoser_ass.Options("powers", 1, least)), (END,))
        _, (step,) = case.write(case.systems[0], sampling, way, most=1, seed=5)
        values.append((step.edits[0].value, step.edits[0].element.max()))
    assert torch.equal(values[0][0], values[1][0])


def test_a_factor_of_one_changes_no_score():
    score = torch.rand(1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x, element = torch.tensor([[END, 0, END, 1]]), torch.arange(4)[None]
    assert torch.equal(LateEnds((END,), 1.0, 4)(blank(4), element, x, score), score)
    with pytest.raises(ValueError, match="from 0 to 1"):
        LateEnds((END,), 1.5, 4)


@pytest.mark.parametrize(("length", "count", "want"), [
    (128, 4, (15, 16, 32, 65)), (128, 1, (128,)), (100, 2, (31, 69)), (13, 3, (1, 2, 10)), (2, 1, (2,)), (1, 1, (1,)),
])  # fmt: skip
def test_the_largest_steps_are_blocks(length, count, want):
    assert eoser_ass.parted(length, count, "powers") == want


def test_lengths_of_blocks_add_up():
    for n, count in itertools.product(range(1, 140), range(1, 8)):
        for kind in ("powers", "linear"):
            most = max(n.bit_length() - 1, 1) if kind == "powers" else n
            if count <= most:
                lengths = eoser_ass.parted(n, count, kind)
                assert sum(lengths) == n and len(lengths) == count and min(lengths) > 0
            else:
                with pytest.raises(ValueError, match="blocks are asked for"):
                    eoser_ass.parted(n, count, kind)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_steps_double_over_the_whole_text_whatever_the_blocks(count):
    """13 tokens: 1, 2 and 10."""
    case = eoser_ass.case()
    way = eoser_ass.waiting(Ask(case.systems[0], Sampling(), (), None, eoser_ass.Options(blocks=count)), (END,))
    canvas, steps = case.write(case.systems[0], Sampling(), way)
    assert [int((s.edits[0].element >= 0).sum()) for s in steps] == [1, 2, 10]
    assert sorted(set(canvas.rank[0].tolist())) == [-1, *range(count)]


# ---- texts that are cut ----------------------------------------------------------------------------------------------


class Decides:
    """Sets these elements to these values."""

    def __init__(self, **of):
        self.element, self.value = torch.tensor([of["element"]]), torch.tensor([of["value"]])

    def decide(self, canvas, guess, rows, random):
        return Step((Set(self.value, self.element),))


def cut(canvas, dist, floor, element=(0,), value=(0,)):
    """Where a row ends when a step decides these (its size: it is not cut)."""
    way = EndOfText(Decides(element=list(element), value=list(value)), (END,), floor)
    step = way.decide(canvas, None, read(canvas, dist), Keyed(0))
    (*_, last) = step.edits
    length = int(last.length) if isinstance(last, Truncate) else canvas.layout.size
    before = canvas.status == DECIDED
    canvas.apply(step.edits)
    assert bool((canvas.status == DECIDED)[before].all()), "what was decided is never cut off"
    assert (canvas.status[0, length:] == DELETED).all() and (canvas.status[0, :length] != DELETED).all()
    return length


def test_a_row_is_cut_behind_the_first_end_that_is_decided():
    dist = law([0] * 6, [0.9] * 6)
    assert cut(blank(6), dist, 2.0, [4, 2], [END, END]) == cut(blank(6), dist, 2.0, [4, 2], [0, END]) == 3
    assert cut(blank(6), dist, 2.0, [4], [0]) == 6
    canvas = blank(6)
    canvas.apply([Set(torch.tensor([[0]]), torch.tensor([[4]]))])
    assert cut(canvas, dist, 2.0, [2], [END]) == 5, "but not what was decided before"


def test_where_none_is_decided_it_is_cut_behind_the_surest_that_is_expected():
    likely, sure = [0, 0, END, 0, END, 0], [0.9, 0.9, 0.5, 0.99, 0.7, 0.9]
    assert cut(blank(6), law(likely, sure), 0.0) == 5
    assert cut(blank(6), law(likely, sure), 0.699) == 5
    assert cut(blank(6), law(likely, sure), 0.701) == 6, "below the floor"
    assert cut(blank(6), law(likely, sure), 0.0, [0, 1], [0, END]) == 2, "one that is decided goes first"
    assert cut(blank(6), law(likely, sure), 0.0, [4], [0]) == 5, "what was just decided is expected no more"
    sure[4] = 0.5
    assert cut(blank(6), law(likely, sure), 0.0) == 3, "the first of equals"


def test_an_end_that_was_given_ends_nothing():
    canvas = blank(6, 2)
    canvas.value["token"][0, 1] = END
    assert cut(canvas, law([0] * 6, [0.9] * 6), 2.0, [3], [0]) == 6


def test_canvases_only_shrink_and_what_no_row_has_any_more_is_not_computed():
    """Forwards of a model: as many slots as are left; with a cache around the block no more."""
    system, shrunk = learn2pd.case().systems[0], 0
    for cache in ("none", "dual"):
        for seed in range(6):
            options = learn2pd.Options(threshold=1.0, floor=0.0 if seed % 2 else 0.4, cache=cache)
            way = learn2pd.filtered(
                Ask(system, Sampling(), (END,), None, options), Filter(FilterConfig(4), Base(system))
            )
            canvas = system.blocked(system.begun([1, 0, 1], 13), way.block)
            left, decided = canvas.layout.size, torch.zeros(canvas.layout.size, dtype=torch.bool)
            target = Target(system.model, **way.target)
            for step in decode(target, canvas, way.decider, random=Keyed(seed)):
                assert step.slots == left if cache == "none" else step.slots <= left
                now, known = int((canvas.status != DELETED).sum()), canvas.known[0]
                ended = isinstance(step.edits[0], Truncate)  # the text is complete: what stands behind goes
                assert now <= left and (ended or bool(known[decided].all()))
                shrunk, left, decided = shrunk + (now < left), now, known.clone()
            assert canvas.done
    assert shrunk > 8


def test_a_cut_row_is_read_as_a_shorter_text():
    """Rows of unequal lengths beside each other are as each alone."""
    system = learn2pd.case().systems[0]
    both, long, short = (system.begun([1, 0, 1], n) for n in (13, 13, 5))
    both = both.select(torch.tensor([0, 0]))
    both.apply([Truncate(torch.tensor([16, 8]))])
    laws = []
    for canvas in (both, long, short):
        target = Target(system.model)
        laws.append(target.forward(target.plan(canvas), canvas).dist.log_probs())
    assert torch.allclose(laws[0][0], laws[1][0], atol=1e-12)
    assert torch.allclose(laws[0][1, 3:8], laws[2][0, 3:], atol=1e-12)


def test_a_cache_policy_outlives_a_cut():
    """What is cut off is forgotten; from the next block on, forwards are those of a shorter text."""
    system = learn2pd.case().systems[0]
    canvas = system.blocked(system.begun([1, 0, 1], 13), 4)
    target, slots = Target(system.model, policy=OutsideBlock(True)), []
    for n, step in enumerate(decode(target, canvas, plain(system, 4).decider, random=Keyed(1))):
        slots.append(step.slots)
        if n == 5:
            canvas.apply([Truncate(torch.tensor([12]))])
    assert slots == [16, 4, 4, 4, 16, 4, 4, 4, 12]
    canvas.apply([Truncate(torch.tensor([12]))])
    assert canvas.done


# ---- what a filter accepts -------------------------------------------------------------------------------------------


def accepting(*logits):
    return lambda sure: torch.tensor([logits], dtype=sure.dtype).expand(len(sure), -1)


def test_all_that_a_filter_accepts_is_decided_and_by_confidence_one_where_it_accepts_nothing():
    dist = law([0] * 4, [0.9, 0.5, 0.8, 0.4])
    for logits, want in (((-9, 9, -9, 9), [1, 3]), ((-9,) * 4, [0]), ((9,) * 4, [0, 1, 2, 3])):
        canvas = blank(4)
        select = Select(commit=TRUSTED, scorer=Trusted(accepting(*logits), 4, 0.96))
        step = Unmask(select).decide(canvas, None, read(canvas, dist), Keyed(0))
        assert [i for i in step.edits[0].element[0].tolist() if i >= 0] == want


def test_a_filter_sees_its_block_and_nothing_else():
    """Places from the block's beginning, 1 where nothing is to be decided; whatever other blocks say."""
    seen = []

    def filter(sure):
        seen.append(sure)
        return sure

    canvas = blank(9, 1)
    canvas.rank[0] = torch.tensor([-1, 0, 0, 0, 0, 1, 1, 1, 1])
    canvas.apply([Set(torch.tensor([[0]]), torch.tensor([[2]]))])
    for other in (0.4, 0.9):
        dist = law([0] * 9, [0.5, 0.6, 0.5, 0.7, 0.8, *[other] * 4])
        greedy = Greedy(dist.logits)
        Unmask(Select(commit=TRUSTED, scorer=Trusted(filter, 4, 0.96))).decide(
            canvas, None, read(canvas, greedy), Keyed(0)
        )
    assert torch.allclose(seen[0], torch.tensor([[0.6, 1, 0.7, 0.8]], dtype=torch.float64))
    assert torch.equal(seen[0], seen[1])
    with pytest.raises(ValueError, match="blocks of 3 tokens"):
        Unmask(Select(commit=TRUSTED, scorer=Trusted(filter, 3, 0.96))).decide(
            canvas, None, read(canvas, greedy), Keyed(0)
        )


def test_where_guesses_never_change_a_higher_threshold_never_needs_fewer_forwards():
    g = torch.Generator().manual_seed(0)
    for _ in range(8):
        sure = (1 / 3 + 2 / 3 * torch.rand(8, generator=g)).tolist()
        weight = torch.randn(8, 8, generator=g, dtype=torch.float64)
        dist, needed = Greedy(law([0] * 8, sure).logits), []
        for threshold in (0.0, 0.3, 0.5, 0.7, 0.9, 0.96, 1.0):
            canvas, n = blank(8), 0
            # scores follow the guesses alone, which do not change
            scorer = Trusted(lambda x, w=weight: (w.diagonal() * 3).expand(len(x), -1), 8, threshold)
            way = Unmask(Select(commit=TRUSTED, scorer=scorer))
            while not canvas.done:
                canvas.apply(way.decide(canvas, None, read(canvas, dist), Keyed(0)).edits)
                n += 1
            needed.append(n)
        assert needed == sorted(needed) and needed[0] == 1 and needed[-1] == 8


def test_a_scorer_goes_by_confidence():
    with pytest.raises(ValueError, match="goes by confidence"):
        Select("entropy", scorer=LateEnds((END,), 0.4, 4), commit=Above(0.1))
