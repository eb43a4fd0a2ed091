"""Drafts in the target's states: what is drafted step by step, with a cache, is what the layer says of the whole text
afresh; and whatever is drafted, the text is that of plain decoding."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from seriatim.canvas import Canvas
from seriatim.decoding.feature_draft import FeatureDraft, chain
from seriatim.decoding.growth import Choices, Dynamic, Static
from seriatim.decoding.guess import Guess
from seriatim.decoding.loop import decode, generate, select_rows
from seriatim.decoding.sample import SampleAll
from seriatim.decoding.target import Target
from seriatim.decoding.templates import standard
from seriatim.decoding.verify import GreedyMatch, Walk
from seriatim.factorization.line import Line
from seriatim.laws.case import randomise
from seriatim.laws.drafts import untrained
from seriatim.layout import line
from seriatim.posttraining.chimera import Chimera, ChimeraConfig
from seriatim.posttraining.eagle import Eagle, EagleConfig
from seriatim.random import Keyed
from seriatim.systems.text.next_token import Config, NextToken

torch.set_num_threads(1)
VOCAB = 9
KINDS = {"eagle": (Eagle, EagleConfig()), "chimera": (Chimera, ChimeraConfig(heads=2))}
TREES = {"dynamic": Dynamic(7, 4, 3), "chain": Dynamic(3, 3, 1), "static": Static(standard(8))}


def system_of(prefix: int) -> NextToken:
    system = NextToken(Config(length=48, vocab=VOCAB, width=16, depth=2, heads=2), SimpleNamespace(special={}))  # type: ignore[arg-type]
    randomise(system.model, seed=4, std=0.35)
    system.model.factorization = Line(prefix=prefix)
    return system.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def system() -> NextToken:
    return system_of(1)


@pytest.fixture(scope="module", params=KINDS)
def part(request, system) -> Any:
    return untrained(*KINDS[request.param], system)[0]


class Watched(FeatureDraft):
    """Notes each draft, and the known tokens below which it stood."""

    def __init__(self, part: Any, tree: Any):
        super().__init__(part, tree)
        self.met: list[tuple[list[list[int]], Guess | None]] = []

    def propose(self, canvas: Canvas, target: Target, random: Any) -> Guess | None:
        guess = super().propose(canvas, target, random)
        lengths, ids = canvas.lengths().tolist(), canvas.value["token"].tolist()
        self.met.append(([row[:n] for row, n in zip(ids, lengths, strict=True)], guess))
        return guess


class Afresh:
    """What a part says behind a text and a path of drafted tokens, by one forward over all pairs for each of them."""

    def __init__(self, part: Any, system: NextToken, ids: Sequence[int]):
        self.part, self.system, self.ids = part, system, list(ids)
        self.h = system.states(torch.tensor([self.ids]))[:, :-1]
        self._of: dict[tuple[int, ...], Tensor] = {}  # path -> the estimate behind it

    def estimate(self, path: tuple[int, ...]) -> Tensor:
        if path not in self._of:
            states = [self.h, *(self.estimate(path[:i]) for i in range(len(path)))]
            ids = torch.tensor([[*self.ids, *path]])
            h = torch.cat(states, 1)
            e = self.system.model.embed.vectors(ids[:, self.part.looks_at(torch.arange(1, ids.shape[1]))])
            plan = chain(0, h.shape[1], self.part.places)
            self._of[path] = self.part.layer(self.part.enter(h, e), plan)[:, -1:]
        return self._of[path]

    def choices(self, path: tuple[int, ...], width: int) -> Choices:
        return self.part.choices(self.estimate(path), self.h[:, -1:], len(path) + 1, width)

    def draft(self, tree: Any, room: int) -> Guess | None:
        paths: list[tuple[int, ...]] = [()]

        def expand(token: Tensor, rows: Sequence[int]) -> Choices:
            nonlocal paths
            paths = [(*paths[r], t) for r, t in zip(rows, token[0].tolist(), strict=True)]
            found = [self.choices(path, tree.width) for path in paths]
            return Choices(torch.cat([f.log_prob for f in found], 1), torch.cat([f.token for f in found], 1))

        return tree.grow(self.choices((), tree.width), expand, [room])


def written(system: NextToken, proposer: Any, rows: list[list[int]], new: int, seed: int, greedy: bool = False):
    canvas = system._begun(rows, new)
    decider = GreedyMatch() if greedy else Walk()
    with torch.inference_mode():
        steps = list(decode(Target(system.model), canvas, decider, proposer, Keyed(seed)))
    return canvas.value["token"], steps


def plain(system: NextToken, rows: list[list[int]], new: int, seed: int) -> Tensor:
    return generate(Target(system.model), system._begun(rows, new), SampleAll(), random=Keyed(seed)).value["token"]


# ---- drafts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("prefix", [0, 1])
def test_a_draft_is_what_the_layer_says_of_the_whole_text_afresh(prefix, tree):
    system = system_of(prefix)
    for kind, config in KINDS.values():
        proposer = Watched(untrained(kind, config, system)[0], TREES[tree])
        written(system, proposer, [[1, 4, 2]], 24, seed=1)
        drafts = [(rows[0], guess) for rows, guess in proposer.met if guess is not None]
        assert len(drafts) >= 6 and proposer.met[0][1] is None  # nothing is known before the first forward
        for ids, guess in drafts:
            want = Afresh(proposer.part, system, ids).draft(TREES[tree], 27 - len(ids) - 1)
            assert want is not None
            assert guess.parents() == want.parents() and torch.equal(guess.value, want.value), ids


def test_rows_of_different_lengths_draft_as_each_alone(system, part):
    tree = TREES["static"]
    proposer = Watched(part, tree)
    rows = [[1, 4, 2], [3], [5, 5, 0, 8, 1], [7, 2]]
    written(system, proposer, rows, 14, seed=2)
    met = 0
    for texts, guess in proposer.met[1:]:
        for row, ids in enumerate(texts):
            room = len(rows[row]) + 14 - len(ids) - 1
            if guess is None or room < 1 or len(ids) < 2:
                continue
            want = Afresh(part, system, ids).draft(tree, room)
            assert want is not None
            mine = guess.value[row]
            assert torch.equal(mine[: want.size], want.value[0]) and bool((mine[want.size :] < 0).all()), (row, ids)
            met += 1
    assert met > 20


def test_rows_that_are_copied_dropped_and_admitted_take_their_states_along(system, part):
    """A new row drafts from its own text only, one that stays goes on."""
    tree = TREES["static"]
    proposer, canvas, target = Watched(part, tree), system._begun([[1, 4, 2], [3, 3, 0]], 20), Target(system.model)
    with torch.inference_mode():
        stream = decode(target, canvas, Walk(), proposer, Keyed(0))
        for _ in range(3):
            next(stream)
        new = system._begun([[6, 1, 7]], 20)
        new.row = torch.tensor([5])
        select_rows(target, canvas, torch.tensor([1, -1, 1]), new)
        proposer.met.clear()
        for _ in range(3):
            next(stream)
    first, *others = proposer.met
    assert first[1] is not None and bool((first[1].value[1] < 0).all()), "of a new row no state is known"
    for texts, guess in others:
        for row in range(3):
            want = Afresh(part, system, texts[row]).draft(tree, 23 - len(texts[row]) - 1)
            assert want is not None and guess is not None
            assert torch.equal(guess.value[row, : want.size], want.value[0])


def test_states_that_nobody_asked_about_are_read_when_somebody_does(system, part):
    """A drafter that was observing only, as beside others, drafts as one that drafted at every step."""
    tree = TREES["static"]

    class Seldom(Watched):
        turn = 0

        def propose(self, canvas, target, random):
            self.turn += 1
            return super().propose(canvas, target, random) if self.turn % 4 == 0 else None

    proposer = Seldom(part, tree)
    written(system, proposer, [[1, 4, 2]], 24, seed=1)
    assert len(proposer.met) >= 3
    for texts, guess in proposer.met:
        want = Afresh(part, system, texts[0]).draft(tree, 27 - len(texts[0]) - 1)
        assert want is None or (guess is not None and torch.equal(guess.value, want.value))


def test_a_drafter_that_joins_late_drafts_from_what_it_has_seen(system, part):
    """After an interruption the target goes on with its cache; the drafter starts anew, and the text is the same."""
    want = plain(system, [[1, 4, 2]], 24, seed=3)
    canvas, target = system._begun([[1, 4, 2]], 24), Target(system.model)
    with torch.inference_mode():
        stream = decode(target, canvas, Walk(), FeatureDraft(part, TREES["dynamic"]), Keyed(3))
        for _ in range(3):
            next(stream)
        late = Watched(part, TREES["dynamic"])
        list(decode(target, canvas, Walk(), late, Keyed(3)))
    assert torch.equal(canvas.value["token"], want)
    assert any(guess is not None for _, guess in late.met)


# ---- what is written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("rows", [[[1, 4, 2]], [[1, 4, 2], [5, 0, 3]], [[2], [1, 4, 2, 8, 8], [7, 2]]])
def test_the_text_is_that_of_plain_decoding(system, part, tree, rows):
    for seed in range(2):
        text, _ = written(system, FeatureDraft(part, TREES[tree]), rows, 20, seed)
        want = plain(system, rows, 20, seed)
        for row, (mine, theirs) in enumerate(zip(text.tolist(), want.tolist(), strict=True)):
            n = len(rows[row]) + 20
            assert mine[:n] == theirs[:n]


def test_given_tokens_further_on_are_passed_by(system, part):
    """Once their states are known, drafts go on behind them."""
    value = torch.randint(VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))
    given = torch.zeros(2, 24, dtype=torch.bool)
    given[:, :3] = given[0, 9:12] = given[1, 15] = True
    texts = []
    proposer = Watched(part, TREES["static"])
    for way in (proposer, None):
        canvas = system.model.canvas({"token": value.masked_fill(~given, 0)}, given, layout=line(24))
        with torch.inference_mode():
            list(decode(Target(system.model), canvas, Walk() if way else SampleAll(), way, Keyed(2)))
        texts.append(canvas.value["token"].tolist())
    assert texts[0] == texts[1]
    behind = [g for rows, g in proposer.met if g is not None and len(rows[0]) >= 13 and bool((g.value[0] >= 0).any())]
    assert behind


def test_drafts_stand_more_often_where_the_layer_is_right(system, part):
    """A layer that is given the truth: its choices are the greedy text itself, and every draft stands whole."""
    canvas = system._begun([[1, 4, 2]], 30)
    generate(Target(system.model), canvas, GreedyMatch())
    truth = canvas.value["token"][0].tolist()

    class Knowing(FeatureDraft):
        def propose(self, canvas, target, random):
            self.part = SimpleNamespace(
                places=part.places, layer=part.layer, looks_at=part.looks_at, enter=part.enter,
                choices=lambda f, last, depth, width: Choices(
                    torch.zeros(1, f.shape[1], 1), torch.full((1, f.shape[1], 1), truth[canvas.length + depth - 1])
                ),
            )  # fmt: skip
            return super().propose(canvas, target, random)

    text, steps = written(system, Knowing(part, Dynamic(4, 4, 1)), [[1, 4, 2]], 30, 0, greedy=True)
    assert text[0].tolist() == truth
    assert len(steps) == 7 and sum(int(s.accepted) for s in steps) == 23  # 1, then 5 at a time: four and one more


def test_a_draft_costs_one_forward_of_the_layer_for_each_depth(system, part):
    calls: list[int] = []

    class Counting(torch.nn.Module):
        new_cache = part.layer.new_cache

        def forward(self, x, plan, cache):
            calls.append(x.shape[1])
            return part.layer(x, plan, cache)

    counted = SimpleNamespace(
        places=part.places, layer=Counting(), looks_at=part.looks_at, enter=part.enter, choices=part.choices
    )
    _, steps = written(system, FeatureDraft(counted, Dynamic(4, 4, 1)), [[1, 4, 2]], 30, 0)
    per, kept = len(part.places), 33
    room = [33 - 3 - sum(int(s.accepted) + 1 for s in steps[: i + 1]) for i in range(len(steps))]
    assert len(calls) == sum(min(4, r - 1) for r in room if r >= 2)
    fed, at = 0, 0
    for r in room:
        if r >= 2:
            fed += calls[at]
            at += min(4, r - 1)
    assert fed <= per * (kept - 2) and fed >= per * (kept - 8)  # each known pair once
