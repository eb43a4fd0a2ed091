"""Law 6 where batches are as they come: what a row becomes under keyed noise depends on nothing but the row.

Not on its company, its place in the batch, padding, the lengths, orders, drafts and ends of other rows, nor on when it
was admitted or who left. Each row is compared with the same row generated alone.
"""

from __future__ import annotations

import random as stdlib
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from seriatim.backbones.rope import RoPE
from seriatim.backbones.transformer import Transformer, TransformerConfig
from seriatim.canvas import Canvas
from seriatim.conditions.condition import ClassCondition, MemoryCondition, PerElementCondition
from seriatim.decoding.filters import Warper
from seriatim.decoding.guess import Guess
from seriatim.decoding.guidance import Guidance
from seriatim.decoding.loop import decode, generate, select_rows
from seriatim.decoding.sample import SampleAll
from seriatim.decoding.target import Branch, Target
from seriatim.decoding.verify import GreedyMatch, Walk
from seriatim.embed import TokenEmbed
from seriatim.factorization.base import Factorization
from seriatim.factorization.line import Line
from seriatim.factorization.static import Blocks
from seriatim.heads.categorical import CategoricalHead
from seriatim.laws.case import randomise
from seriatim.layout import line
from seriatim.model import Model
from seriatim.random import Forced, Keyed
from support.orders import AnyRank

VOCAB, WIDTH, LENGTH, MEMORY = 7, 16, 12, 5
BACKBONE = TransformerConfig(WIDTH, 2, 4, kv_heads=2, rope=RoPE(50.0))


def conditional() -> Model:
    """A class as prefix and adaptive norm, a memory, and a feature at every element."""
    config = replace(BACKBONE, vector=WIDTH, memory=MEMORY)
    conditions = {
        "class": ClassCondition(4, WIDTH, ("prefix", "vector")),
        "text": MemoryCondition(MEMORY),
        "sketch": PerElementCondition(3, WIDTH),
    }
    embed = TokenEmbed(VOCAB, WIDTH, mask=True)
    head = CategoricalHead(WIDTH, VOCAB)
    return randomise(Model(line(LENGTH), Line(1), embed, Transformer(config), head, conditions), std=0.6)


def plain(order: Factorization | None = None, prefix: int = 1) -> Model:
    embed = TokenEmbed(VOCAB, WIDTH, mask=True, positions=(LENGTH + 2,))
    head = CategoricalHead(WIDTH, VOCAB)
    return randomise(Model(line(LENGTH), order or Line(prefix), embed, Transformer(BACKBONE), head), std=0.6)


def condition_of(row: int) -> dict[str, Tensor]:
    """The raw conditions of a row, whoever stands beside it."""
    g = torch.Generator().manual_seed(100 + row)
    return {
        "class": torch.tensor([row % 4]),
        "text": torch.randn(1, 3, MEMORY, generator=g, dtype=torch.float64),
        "sketch": torch.randn(1, LENGTH, 3, generator=g, dtype=torch.float64),
    }


def stacked(conditions: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([c[name] for c in conditions]) for name in conditions[0]}


def prompt_of(row: int) -> Tensor:
    return torch.randint(VOCAB, (1, LENGTH), generator=torch.Generator().manual_seed(row))


def text_of(canvas: Canvas, row: int) -> list[int]:
    """What the sample that is called `row` has become."""
    at = canvas.row.tolist().index(row)
    return canvas.read("token")[at].tolist()


def canvas_of(model: Model, rows: list[int], known: dict[int, int]) -> Canvas:
    ids = torch.cat([prompt_of(r) for r in rows])
    return model.canvas({"token": ids}, torch.tensor([known[r] for r in rows]), row=torch.tensor(rows))


def alone(model: Model, row: int, known: int, target=None, decider=None) -> list[int]:
    """The row by itself, along the plain path."""
    canvas = model.canvas({"token": prompt_of(row)}, known, row=torch.tensor([row]))
    generate(target or Target(model), canvas, decider or SampleAll(), random=Keyed(5))
    return text_of(canvas, row)


class Drafts:
    """Random trees with other tokens in each row; now and then nothing."""

    def __init__(self, seed: int):
        self.rng = stdlib.Random(seed)

    def propose(self, canvas, target, random) -> Guess | None:
        nodes = self.rng.randrange(5)
        if not nodes:
            return None
        value = torch.tensor([[self.rng.randrange(-1, VOCAB) for _ in range(nodes)] for _ in range(canvas.batch)])
        parent = tuple(self.rng.randrange(-1, i) for i in range(nodes))
        for row in value if canvas.length is None else ():
            for i, p in enumerate(parent):
                row[i] = -1 if p >= 0 and row[p] < 0 else row[i]
        return Guess(value if canvas.length is None else value.clamp(min=0), parent)

    def observe(self, canvas, rows, step) -> None:
        """Learns nothing."""


# ---- a line ----------------------------------------------------------------------------------------------------------

KNOWN = {0: 1, 1: 4, 2: 2, 3: 7, 4: 1}


@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize("cached", [True, False], ids=["cached", "recomputed"])
def test_prompts_of_different_lengths(prefix, cached):
    model = plain(prefix=prefix)
    want = {r: alone(model, r, KNOWN[r]) for r in KNOWN}
    assert len({tuple(text) for text in want.values()}) == len(KNOWN)
    for rows in ([0, 1, 2, 3, 4], [3, 0], [4, 2, 1, 0]):
        canvas = generate(Target(model, cached=cached), canvas_of(model, rows, KNOWN), SampleAll(), random=Keyed(5))
        assert {r: text_of(canvas, r) for r in rows} == {r: want[r] for r in rows}


def test_given_elements_may_be_any_prefix_by_mask_or_by_length():
    """Three ways to say what is given are one, and ranks count from the first element that is not."""
    model, ids = plain(), torch.cat([prompt_of(r) for r in range(3)])
    lengths = torch.tensor([2, 5, 1])
    by_mask = torch.arange(LENGTH) < lengths[:, None]
    one, two = model.canvas({"token": ids}, lengths), model.canvas({"token": ids}, by_mask)
    assert torch.equal(one.status, two.status) and torch.equal(one.rank, two.rank)
    assert one.rank[1].tolist() == [-1] * 5 + list(range(LENGTH - 5))
    same = model.canvas({"token": ids}, torch.tensor([3, 3, 3]))
    assert torch.equal(same.rank, model.canvas({"token": ids}, 3).rank)


def test_rows_that_end_early():
    """A stop id ends its row; the others go on, and what stands behind the end is no part of the text."""
    model, stop = plain(), (3,)
    texts = {}
    for r in KNOWN:
        canvas = model.canvas({"token": prompt_of(r)}, KNOWN[r], row=torch.tensor([r]))
        generate(Target(model), canvas, SampleAll(stop), random=Keyed(5))
        texts[r] = text_of(canvas, r)
    assert len({len(t) for t in texts.values()}) > 2
    for rows in ([0, 1, 2, 3, 4], [4, 3, 2]):
        canvas = generate(Target(model), canvas_of(model, rows, KNOWN), SampleAll(stop), random=Keyed(5))
        assert {r: text_of(canvas, r) for r in rows} == {r: texts[r] for r in rows}
    equal = model.canvas({"token": torch.cat([prompt_of(r) for r in KNOWN])}, 1, row=torch.arange(len(KNOWN)))
    generate(Target(model), equal, SampleAll(stop), random=Keyed(5))  # plain until the first one ends
    for r in KNOWN:
        canvas = model.canvas({"token": prompt_of(r)}, 1, row=torch.tensor([r]))
        generate(Target(model), canvas, SampleAll(stop), random=Keyed(5))
        assert text_of(equal, r) == text_of(canvas, r)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("start", ["equal", "different"])
def test_different_accepted_lengths(seed, start):
    """Drafts are accepted here and not there; a `Walk` emits the very string of plain sampling in every row."""
    model, stop = plain(), (3,) if seed % 2 else ()
    known = dict.fromkeys(KNOWN, 2) if start == "equal" else KNOWN
    if start == "equal":
        ids = torch.cat([prompt_of(r) for r in known])
        canvas = model.canvas({"token": ids}, 2, row=torch.tensor(list(known)))
    else:
        canvas = canvas_of(model, list(known), known)
    target, accepted = Target(model), torch.zeros(len(known), dtype=torch.long)
    for step in decode(target, canvas, Walk(stop), Drafts(seed), Keyed(5)):
        accepted += step.accepted
    assert int(accepted.sum()) > 0 and len(accepted.unique()) > 1
    for r in known:
        assert text_of(canvas, r) == alone(model, r, known[r], decider=SampleAll(stop))


def test_greedy_drafts_of_different_lengths():
    model = plain()
    greedy = Warper(temperature=0)
    want = {r: alone(model, r, KNOWN[r], Target(model, warp=greedy)) for r in KNOWN}
    canvas = canvas_of(model, list(KNOWN), KNOWN)
    generate(Target(model, warp=greedy), canvas, GreedyMatch(), Drafts(3))
    assert {r: text_of(canvas, r) for r in KNOWN} == want


# ---- admission -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("drafts", [False, True], ids=["one by one", "drafted"])
@pytest.mark.parametrize("seed", range(3))
def test_rows_come_and_go_on_a_running_batch(guided, drafts, seed):
    """Continuous batching: one `decode` stream; finished rows leave, waiting ones are admitted in their place, rows are
    shuffled; each becomes what it becomes alone."""
    model, stop, rng = conditional(), (3,), stdlib.Random(seed)
    waiting = list(range(9))
    known = {r: 1 + r % 5 for r in waiting}
    guidance = Guidance(0.7, "linear") if guided else None

    def target_for(rows: list[int]) -> Target:
        return Target(model, stacked([condition_of(r) for r in rows]), guidance)

    want = {r: alone(model, r, known[r], target_for([r]), SampleAll(stop)) for r in waiting}
    first, waiting = waiting[:3], waiting[3:]
    canvas, target = canvas_of(model, first, known), target_for(first)
    decider = Walk(stop) if drafts else SampleAll(stop)
    done: dict[int, list[int]] = {}
    while len(done) < len(want):
        for _ in decode(target, canvas, decider, Drafts(seed) if drafts else None, Keyed(5)):
            rows, new, ended = [], [], (~canvas.open.any(1)).tolist()
            for i, name in enumerate(canvas.row.tolist()):
                if ended[i]:
                    done[name] = text_of(canvas, name)
                elif name not in done:
                    rows.append(i)
            rng.shuffle(rows)
            while waiting and (len(rows) + len(new) < 3 or rng.random() < 0.1):
                new.append(waiting.pop(0))
            at = [rng.randrange(len(rows) + 1) for _ in new]
            for place in at:
                rows.insert(place, -1)
            if rows and rows != list(range(canvas.batch)):
                fresh = canvas_of(model, new, known) if new else None
                raw = stacked([condition_of(r) for r in new]) if new else None
                select_rows(target, canvas, torch.tensor(rows), fresh, raw)
            if not rows and not waiting:
                break
        for name in canvas.row.tolist():
            done.setdefault(name, text_of(canvas, name))
    assert done == want


def test_a_stream_that_has_ended_takes_up_new_rows():
    """All rows are finished; new ones take their places on the same target, and the same cache is used again."""
    model = plain()
    canvas, target = canvas_of(model, [0, 1], KNOWN), Target(model)
    generate(target, canvas, SampleAll(), random=Keyed(5))
    cache = target.cache
    select_rows(target, canvas, torch.tensor([-1, -1, 0]), canvas_of(model, [2, 3], KNOWN))
    generate(target, canvas, SampleAll(), random=Keyed(5))
    assert target.cache is cache
    for r in (0, 2, 3):
        assert text_of(canvas, r) == alone(model, r, KNOWN[r])


def test_copies_of_a_row_share_its_past():
    """Forked in the middle: with noise of its own name each copy goes on as the original does."""
    model = plain()
    want = alone(model, 1, KNOWN[1])
    canvas, target = canvas_of(model, [0, 1], KNOWN), Target(model)
    for i, _ in enumerate(decode(target, canvas, SampleAll(), random=Keyed(5))):
        if i == 2:
            select_rows(target, canvas, torch.tensor([1, 1, 1]))
    assert [row.tolist() for row in canvas.read("token")] == [want] * 3


def test_another_canvas_starts_with_an_empty_cache():
    """A target that is used again does not remember the canvas before."""
    model = plain()
    target = Target(model)
    texts = [alone(model, r, KNOWN[r], target) for r in (3, 0, 3)]
    assert texts == [alone(model, r, KNOWN[r]) for r in (3, 0, 3)]


@pytest.mark.parametrize(
    ("rows", "new", "says"),
    [
        ([0, -1], 0, r"1 rows \(-1\) are to be admitted, 0 stand ready"),
        ([0, 1], 1, r"0 rows \(-1\) are to be admitted, 1 stand ready"),
        ([0, 2], 0, "cannot be selected of 2"),
        ([], 0, "cannot be selected of 2"),
    ],
)
def test_rows_that_are_not_there_are_refused(rows, new, says):
    model = plain()
    canvas = canvas_of(model, [0, 1], KNOWN)
    with pytest.raises(ValueError, match=says):
        select_rows(Target(model), canvas, torch.tensor(rows).long(), canvas_of(model, [2], KNOWN) if new else None)


def test_rows_of_another_shape_are_not_admitted():
    model = plain()
    canvas = canvas_of(model, [0, 1], KNOWN)
    shorter = Canvas(line(3), {"token": torch.zeros(1, 3, dtype=torch.long)}, 1)
    with pytest.raises(ValueError, match=r"a layout of 3 elements .* cannot join a canvas of 12"):
        select_rows(Target(model), canvas, torch.tensor([0, -1]), shorter)
    floats = Canvas(line(LENGTH), {"token": torch.zeros(1, LENGTH)}, 1)
    with pytest.raises(ValueError, match=r"torch.int64 here, those of the new rows .* torch.float32"):
        select_rows(Target(model), canvas, torch.tensor([0, -1]), floats)
    cond = conditional()
    target = Target(cond, condition_of(0))
    with pytest.raises(ValueError, match="takes the conditions: class, text, sketch; got: none"):
        select_rows(target, canvas_of(cond, [0], KNOWN), torch.tensor([0, -1]), canvas_of(cond, [1], KNOWN))
    longer = {**condition_of(1), "sketch": torch.zeros(1, LENGTH + 1, 3, dtype=torch.float64)}
    with pytest.raises(ValueError, match=rf"per_element of \({LENGTH}, \d+\), \({LENGTH + 1}, \d+\); pad them"):
        select_rows(target, canvas_of(cond, [0], KNOWN), torch.tensor([0, -1]), canvas_of(cond, [1], KNOWN), longer)


def test_a_row_with_a_longer_memory_is_admitted_as_if_alone():
    """Each row attends to its own places only."""
    model = conditional()
    longer = {**condition_of(1), "text": normal_memory(4)}
    want = generate(Target(model, longer), canvas_of(model, [1], KNOWN), SampleAll(), random=Keyed(3))
    target, canvas = Target(model, condition_of(0)), canvas_of(model, [0], KNOWN)
    select_rows(target, canvas, torch.tensor([0, -1]), canvas_of(model, [1], KNOWN), longer)
    generate(target, canvas, SampleAll(), random=Keyed(3))
    assert torch.equal(canvas.value["token"][1], want.value["token"][0])


def normal_memory(places: int) -> Tensor:
    return torch.randn(1, places, MEMORY, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def test_conditions_of_another_number_of_rows_are_refused():
    model = conditional()
    with pytest.raises(ValueError, match="conditions of 1 samples were given for a canvas of 2"):
        generate(Target(model, condition_of(0)), canvas_of(model, [0, 1], KNOWN), SampleAll())


# ---- orders that differ by row ---------------------------------------------------------------------------------------


def shuffled(row: int) -> tuple[Tensor, Tensor]:
    """Which elements of a row are given, and the rank of the others; some ranks are shared."""
    g = torch.Generator().manual_seed(row)
    given = torch.randperm(LENGTH, generator=g) < 1 + 2 * row
    rank = torch.full((LENGTH,), -1)
    rank[~given] = torch.randperm(int((~given).sum()), generator=g) // (1 + row % 2)
    return given, rank


def canvas_in_order(rows: list[int]) -> Canvas:
    given, rank = (torch.stack(x) for x in zip(*(shuffled(r) for r in rows), strict=True))
    return Canvas(line(LENGTH), {"token": torch.cat([prompt_of(r) for r in rows])}, given, rank, torch.tensor(rows))


@torch.no_grad()
def test_rows_in_different_orders():
    """Forced: decoding over the cache equals one packed pass, row by row. Free: each row is what it is alone."""
    model, rows = plain(AnyRank()), [2, 0, 3, 1]
    ids = torch.cat([prompt_of(r) for r in rows])
    for cached in (True, False):
        forced = Forced(ids)
        steps = list(decode(Target(model, cached=cached), canvas_in_order(rows), SampleAll(), random=forced))
        packed = model.log_prob(canvas_in_order(rows))
        assert (forced.log_prob - packed).abs().max() < 1e-10
        assert len(steps) == max(int(shuffled(r)[1].max()) + 1 for r in rows)
    canvas = generate(Target(model), canvas_in_order(rows), SampleAll(), random=Keyed(5))
    for i, r in enumerate(rows):
        own = canvas_in_order([r])
        assert torch.allclose(model.log_prob(canvas_in_order([r])), packed[i])
        generate(Target(model), own, SampleAll(), random=Keyed(5))
        assert text_of(own, r) == text_of(canvas, r)


def test_rows_in_different_orders_are_dropped_and_copied_on_the_way():
    model, rows = plain(AnyRank()), [2, 0, 3, 1]
    want = {r: generate(Target(model), canvas_in_order([r]), SampleAll(), random=Keyed(5)) for r in rows}
    canvas, target = canvas_in_order(rows), Target(model)
    for i, _ in enumerate(decode(target, canvas, SampleAll(), random=Keyed(5))):
        if i == 1:
            select_rows(target, canvas, torch.tensor([2, 0, 2]))
    assert canvas.row.tolist() == [3, 2, 3]
    for i, r in enumerate(canvas.row.tolist()):
        assert canvas.read("token")[i].tolist() == text_of(want[r], r)


# ---- branches --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def logits_of(model: Model, row: int, ids: Tensor, given: int, known: int, drop: set[str], masked: Tensor) -> Tensor:
    """Logits behind the first `known` elements of a row, `given` of them from the start, when conditions are dropped
    and elements shown as masks: by one forward without a cache, put together here from the embedding table up."""
    c = model.encode(condition_of(row), {name: torch.ones(1, dtype=torch.bool) for name in drop})
    shown = torch.where(masked[:known, None], model.embed.mask, model.embed.table[ids[0, :known]])
    x = torch.cat([c.prefix[0], shown])[None]
    x[:, given:] += c.per_element[:, given : known + 1]  # slot i stands before element i
    plan = model.factorization.step(model.canvas({"token": ids}, known), None, 0)
    h = model.backbone(x, plan, None, c.vector, c.memory)
    return model.heads["token"].logits(h[:, -1])[0]


class Recorder(SampleAll):
    """Keeps the logits of every step and row."""

    def __init__(self):
        super().__init__()
        self.met = []

    def decide(self, canvas, guess, rows, random):
        self.met.append({name: rows.dist.logits[i, -1] for i, name in enumerate(canvas.row.tolist())})
        return super().decide(canvas, guess, rows, random)


MARKED = torch.arange(LENGTH) % 3 == 1
BRANCHES = {
    "classifier-free guidance": (Branch(Guidance(1.5)),),
    "a prompt masked": (Branch(Guidance(1.5), frozenset(), "given"),),
    "nothing but a masked history": (Branch(Guidance(0.5, "linear"), None, "earlier"),),
    "marked elements": (Branch(Guidance(-0.5), frozenset({"text"}), MARKED),),
    "three branches": (Branch(Guidance(1.0), frozenset({"text"})), Branch(Guidance(2.0, "cosine"))),
}


def hidden_elements(branch: Branch, given: int) -> Tensor:
    e = torch.arange(LENGTH)
    return (
        {"given": e < given, "earlier": e >= 0}.get(branch.hide, e < 0)
        if not isinstance(branch.hide, Tensor)
        else branch.hide
    )


@pytest.mark.parametrize("name", BRANCHES)
@pytest.mark.parametrize("cached", [True, False], ids=["cached", "recomputed"])
def test_branches_are_mixed_step_by_step_as_written(name, cached):
    """Over a ragged batch: (1 + sum w) full - sum w branch, each with its own view of the canvas and its own cache."""
    model, branches, rows = conditional(), BRANCHES[name], [0, 1, 2]
    known = {0: 1, 1: 4, 2: 2}
    target = Target(model, stacked([condition_of(r) for r in rows]), branches, cached=cached)
    canvas, decider = canvas_of(model, rows, known), Recorder()
    generate(target, canvas, decider, random=Keyed(5))
    nothing = torch.zeros(LENGTH, dtype=torch.bool)
    for r in rows:
        ids = torch.tensor([text_of(canvas, r)])
        total = LENGTH - known[r]
        for i in range(total):
            n = known[r] + i
            want = logits_of(model, r, ids, known[r], n, set(), nothing)
            full, names = want, set(model.conditions)
            for branch in branches:
                drop = names if branch.drop is None else set(branch.drop)
                other = logits_of(model, r, ids, known[r], n, drop, hidden_elements(branch, known[r]))
                want = want + branch.guidance.weight(i / (total - 1)) * (full - other)
            assert (decider.met[i][r] - want).abs().max() < 1e-9, (r, i)


@pytest.mark.parametrize("name", BRANCHES)
def test_guided_drafts_are_verified_by_the_guided_law(name):
    """Trees over all branches: the string of plain guided sampling, also where the history of a branch is masked, and
    where guidance grows along the draft."""
    model, rows, known, branches = conditional(), [0, 1, 2], {0: 1, 1: 4, 2: 2}, BRANCHES[name]
    texts = []
    for decider, proposer in ((SampleAll(), None), (Walk(), Drafts(1))):
        target = Target(model, stacked([condition_of(r) for r in rows]), branches)
        canvas = canvas_of(model, rows, known)
        generate(target, canvas, decider, proposer, Keyed(5))
        texts.append([text_of(canvas, r) for r in rows])
    assert texts[0] == texts[1]


def test_guidance_by_progress_is_that_of_the_row():
    """A ramp follows how far each row is, not how far the batch is."""
    model, rows, known = conditional(), [0, 1, 2], {0: 1, 1: 8, 2: 5}
    guidance = Guidance(3.0, "linear")
    want = [alone(model, r, known[r], Target(model, condition_of(r), guidance)) for r in rows]
    target = Target(model, stacked([condition_of(r) for r in rows]), guidance)
    canvas = generate(target, canvas_of(model, rows, known), SampleAll(), random=Keyed(5))
    assert [text_of(canvas, r) for r in rows] == want


def test_a_masked_history_in_two_streams():
    """Blocks: the branch sees earlier blocks as masks, over its own cache; scale 0 is the full branch alone."""
    model = plain(Blocks(3))
    free = Target(model)
    for hide in ("earlier", "given"):
        texts = {}
        for scale in (0.0, 2.0):
            for cached in (True, False):
                target = Target(model, guidance=(Branch(Guidance(scale), hide=hide),), cached=cached)
                texts[scale, cached] = alone(model, 3, 4, target)
        assert (
            texts[2.0, True] == texts[2.0, False] != texts[0.0, True] == texts[0.0, False] == alone(model, 3, 4, free)
        )


def test_branches_that_cannot_be_are_refused():
    model = conditional()
    with pytest.raises(ValueError, match="no condition style to drop; got class, text, sketch"):
        Target(model, condition_of(0), (Branch(Guidance(1.0), frozenset({"style"})),))
    with pytest.raises(ValueError, match="hides 'given' or 'earlier' elements or marked ones, not 'later'"):
        Target(model, condition_of(0), (Branch(Guidance(1.0), hide="later"),))
    with pytest.raises(ValueError, match="marked by a boolean"):
        Target(model, condition_of(0), (Branch(Guidance(1.0), hide=torch.arange(LENGTH)),))
    with pytest.raises(ValueError, match="this model is unconditional"):
        Target(plain(), guidance=Guidance(1.0))
    bare = Model(line(LENGTH), Line(1), TokenEmbed(VOCAB, WIDTH), Transformer(BACKBONE), CategoricalHead(WIDTH, VOCAB))
    with pytest.raises(ValueError, match="has no mask: use mask=True"):
        generate(Target(bare, guidance=(Branch(Guidance(1.0), hide="earlier"),)), bare.blank(1), SampleAll())
