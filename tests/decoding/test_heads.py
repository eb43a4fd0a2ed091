"""Drafts by heads: they start from the state behind the newest token, fill the tree as the papers say, follow rows, and
typical acceptance keeps what its rule says."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from seriatim.canvas import Canvas
from seriatim.decoding.features import kept_states, last_states, last_tokens
from seriatim.decoding.filters import Warper
from seriatim.decoding.guess import Guess
from seriatim.decoding.heads import HydraHeads, MedusaHeads, PrefixedHydraHeads, shaped
from seriatim.decoding.loop import Step, decode, select_rows
from seriatim.decoding.sample import SampleAll
from seriatim.decoding.target import Target
from seriatim.decoding.templates import MEDUSA, Template, of_paths, spread
from seriatim.decoding.typical import Typical, limits
from seriatim.decoding.verify import GreedyMatch, Walk
from seriatim.factorization.line import run
from seriatim.heads.dist import Categorical
from seriatim.laws.case import randomise
from seriatim.laws.drafts import untrained
from seriatim.model import Rows
from seriatim.posttraining.heads import Hydra, HydraConfig, Medusa, MedusaConfig
from seriatim.random import Keyed
from seriatim.systems.text.next_token import Config, NextToken

torch.set_num_threads(1)
GREEDY = Warper(temperature=0)
PROMPTS = [[1, 0, 5, 2], [3], [0, 6, 2, 2, 0, 1, 4], [1, 1]]


@pytest.fixture(scope="module")
def system() -> NextToken:
    made = NextToken(Config(length=64, vocab=7, width=16, depth=2, heads=2), SimpleNamespace(special={}))
    randomise(made.model, 4, std=0.4)
    return made.eval().requires_grad_(False)


def plain(system: NextToken, rows: list[list[int]], new: int) -> list[list[int]]:
    out = []
    for row in rows:
        canvas = system._begun([row], new)
        for _ in decode(Target(system.model, warp=GREEDY), canvas, SampleAll()):
            pass
        out.append(canvas.value["token"][0].tolist())
    return out


def written(canvas: Canvas) -> list[list[int]]:
    return [row.tolist() for row in canvas.read("token")]


# ---- states ----------------------------------------------------------------------------------------------------------


class Watching(MedusaHeads):
    """Notes what stands after each step, by row."""

    def __init__(self, part, base, template, rows: int):
        super().__init__(part, base, template)
        self.seen: list[list[torch.Tensor]] = [[] for _ in range(rows)]
        self.checked = 0

    def observe(self, canvas: Canvas, rows: Rows, step: Step) -> None:
        states, count = kept_states(rows, step)
        counts = torch.as_tensor(count).expand(len(states)).tolist()
        last = last_states(rows, step)
        for r, n in enumerate(counts):
            self.seen[r] += list(states[r, :n])
            if n:
                assert torch.equal(last[r], self.seen[r][-1])
        super().observe(canvas, rows, step)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("prompts", ["alike", "ragged"])
def test_states_that_stand_are_those_of_a_fresh_forward_row_by_row(system, rows, prompts):
    given = PROMPTS[:rows] if prompts == "ragged" else [PROMPTS[0]] * rows
    part, base = untrained(Medusa, MedusaConfig(heads=3), system)
    proposer = Watching(part, base, spread((5,), (3, 2), (1,)), rows)
    canvas = system._begun(given, 12)
    target = Target(system.model)
    accepted = 0
    for step in decode(target, canvas, Walk(), proposer, Keyed(3)):
        accepted += int(torch.as_tensor(step.accepted).sum())
    assert accepted > 0
    for r, text in enumerate(written(canvas)):
        want = base.states(torch.tensor([text]))[0]
        got = torch.stack(proposer.seen[r])
        start = len(got) - len(want)  # a learned start stands in front; of the last tokens nobody asks
        assert start <= 1 and len(got) >= len(given[r])
        assert torch.allclose(got[1:], want[: len(got) - 1], atol=1e-9)


def test_the_newest_token_of_each_row(system):
    assert last_tokens(system._begun([[1, 2, 3]] * 2, 4)).tolist() == [3, 3]
    assert last_tokens(system._begun(PROMPTS, 4)).tolist() == [2, 3, 4, 1]


@pytest.mark.parametrize(("keep", "slot", "want"), [
    (2, None, [[0, 1], [0, 1]]),
    ([0, 3], None, [[0, 3], [0, 3]]),
    (torch.tensor([[0, 2, 4], [1, -1, -1]]), None, [[0, 2, 4], [1]]),
    (None, None, [[0, 1, 2, 3, 4]] * 2),
    (None, slice(4, None), [[0, 1, 2, 3, 4]] * 2),
    (None, torch.tensor([[1], [3]]), [[0, 1], [0, 1, 2, 3]]),
])  # fmt: skip
def test_what_a_step_keeps_in_all_its_forms(keep, slot, want):
    h = torch.arange(10.0).view(2, 5, 1) % 5
    rows, step = Rows(None, None, h, slot), Step((), keep)
    states, count = kept_states(rows, step)
    counts = torch.as_tensor(count).expand(2).tolist()
    assert [states[r, :n, 0].tolist() for r, n in enumerate(counts)] == want
    assert last_states(rows, step)[:, 0].tolist() == [row[-1] for row in want]


# ---- trees -----------------------------------------------------------------------------------------------------------


def test_medusa_fills_a_node_with_the_candidate_of_its_depth_whatever_its_parent(system):
    part, base = untrained(Medusa, MedusaConfig(heads=3), system)
    h = torch.randn(2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    template = of_paths([(0,), (2,), (0, 1), (2, 0), (2, 3), (0, 1, 4), (2, 3, 0)])
    value = MedusaHeads(part, base, template).fill(template, h, system._begun([[1], [2]], 9))
    order = part.output(part(h)).argsort(-1, descending=True)
    for row in range(2):
        assert value[row].tolist() == [int(order[row, len(p) - 1, p[-1]]) for p in template.paths]


def test_hydra_fills_a_node_by_the_teacher_forced_head_behind_its_own_path(system):
    """Level by level with what was put together before equals each path by itself."""
    part, base = untrained(Hydra, HydraConfig(heads=3, layers=2), system)
    h = torch.randn(2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    template = of_paths([(0,), (2,), (0, 1), (2, 0), (2, 3), (0, 1, 4), (2, 3, 0), (2, 3, 1)])
    canvas = system._begun([[1, 5], [2, 0]], 9)
    value = HydraHeads(part, base, template).fill(template, h, canvas)
    for row, newest in enumerate((5, 0)):
        for node, path in enumerate(template.paths):
            above = [template.paths.index(path[:n]) for n in range(1, len(path))]
            tokens = [newest, *value[row, above].tolist()]
            ids = torch.tensor([[0, *tokens, 0, 0]])  # a text whose first state is h
            states = torch.cat([h[row][None, None], torch.zeros(1, ids.shape[1] - 1, 16, dtype=torch.float64)], 1)
            said = part.output(part.reads(base, states, ids))[0, 0, len(path) - 1]
            assert value[row, node] == said.argsort(descending=True)[path[-1]]
    assert value[0].tolist() != value[1].tolist()


@pytest.mark.parametrize("kind", [MedusaHeads, HydraHeads])
def test_the_released_tree_of_63_nodes_is_drafted_whole(system, kind):
    """As many children below each node as the template says, all different."""
    heads = {MedusaHeads: (Medusa, MedusaConfig), HydraHeads: (Hydra, HydraConfig)}[kind]
    part, base = untrained(heads[0], heads[1](heads=4), _wide())
    proposer = kind(part, base, MEDUSA)
    assert proposer.template == MEDUSA and proposer.template.size == 63
    h = torch.randn(1, 16, dtype=torch.float64)
    value = proposer.fill(MEDUSA, h, _wide()._begun([[1, 5]], 9))[0]
    children = Guess(value[None], MEDUSA.parent).children()
    for node, below in children.items():
        assert len({int(value[c]) for c in below}) == len(below) == sum(p == node for p in MEDUSA.parent)


def _wide() -> NextToken:
    made = NextToken(Config(length=64, vocab=40, width=16, depth=1, heads=2), SimpleNamespace(special={}))
    randomise(made.model, 4, std=0.4)
    return made.eval()


def test_rows_and_masks_of_the_released_tree_are_those_of_its_paths():
    """Which candidate a node takes (10 a head, behind the base's own), how deep it stands, and whom it sees."""
    listed = [[0], [0, 0], [1], [0, 1], [2], [0, 0, 0], [1, 0], [0, 2], [3], [0, 3], [4], [0, 4], [2, 0], [0, 5],
              [0, 0, 1], [5], [0, 6], [6], [0, 7], [0, 1, 0], [1, 1], [7], [0, 8], [0, 0, 2], [3, 0], [0, 9], [8], [9],
              [1, 0, 0], [0, 2, 0], [1, 2], [0, 0, 3], [4, 0], [2, 1], [0, 0, 4], [0, 0, 5], [0, 0, 0, 0], [0, 1, 1],
              [0, 0, 6], [0, 3, 0], [5, 0], [1, 3], [0, 0, 7], [0, 0, 8], [0, 0, 9], [6, 0], [0, 4, 0], [1, 4], [7, 0],
              [0, 1, 2], [2, 0, 0], [3, 1], [2, 2], [8, 0], [0, 5, 0], [1, 5], [1, 0, 1], [0, 2, 1], [9, 0], [0, 6, 0],
              [0, 0, 0, 1], [1, 6], [0, 7, 0]]  # fmt: skip
    paths = sorted(map(tuple, listed), key=lambda p: (len(p), p))
    assert MEDUSA.paths == tuple(paths)
    taken = [10 * (d - 1) + c + 1 for d, c in zip(MEDUSA.depths, MEDUSA.child, strict=True)]
    assert taken == [p[-1] + 10 * (len(p) - 1) + 1 for p in paths]
    from seriatim.decoding.heads import _independent

    assert _independent(MEDUSA).tolist() == [t - 1 for t in taken], "the width of the template is 10"
    from seriatim.factorization.line import LineShape

    seen = LineShape(1, 63, MEDUSA.parent).view.mask()[0]
    assert bool(seen[:, 0].all()) and bool(seen[0, 1:].sum() == 0)
    for i, p in enumerate(paths):
        assert [j for j in range(63) if seen[i + 1, j + 1]] == [j for j, q in enumerate(paths) if p[: len(q)] == q]


def test_nodes_that_cannot_be_drafted_are_left_out_of_the_tree(system):
    part, base = untrained(Medusa, MedusaConfig(heads=2, draft_vocab=3), system)
    tree = MedusaHeads(part, base, of_paths([(0,), (3,), (0, 2), (3, 0), (0, 2, 0)])).template
    assert tree.paths == ((0,), (0, 2))


def test_a_draft_over_some_tokens_is_of_these_and_lossless(system):
    part, base = untrained(Hydra, HydraConfig(heads=2, draft_vocab=3), system)
    part.output.draft_only(base, torch.tensor([6, 1, 4]))
    proposer, canvas = HydraHeads(part, base, spread((2,), (2, 1))), system._begun([PROMPTS[0]], 16)
    drafted: set[int] = set()

    class Noted(GreedyMatch):
        def decide(self, canvas, guess, rows, random):
            drafted.update(() if guess is None else guess.value.flatten().tolist())
            return super().decide(canvas, guess, rows, random)

    for _ in decode(Target(system.model, warp=GREEDY), canvas, Noted(), proposer):
        pass
    assert drafted <= {1, 4, 6} and len(drafted) > 1
    assert written(canvas) == plain(system, [PROMPTS[0]], 16)


def test_the_shape_follows_what_was_measured(system):
    part = SimpleNamespace(chance=((0.9, 0.05), (0.8, 0.1)), ahead=2)
    assert shaped(part, 3).paths == ((0,), (0, 0), (0, 1))
    part.chance = ((0.5, 0.45), (0.1, 0.1))
    assert shaped(part, 3).paths == ((0,), (1,), (0, 0))
    assert shaped(part, 1000).size == 2 + 4, "there are no more"
    assert shaped(SimpleNamespace(chance=(), ahead=1), 12).size == 8
    with pytest.raises(ValueError, match="at least 1 node"):
        shaped(part, 0)


# ---- whole texts -----------------------------------------------------------------------------------------------------


class Oracle(MedusaHeads):
    """Is told the true future."""

    def __init__(self, part, base, texts: list[list[int]], template: Template):
        super().__init__(part, base, template)
        self.texts = texts

    def fill(self, template, state, canvas):
        out = torch.zeros(canvas.batch, template.size, dtype=torch.long)
        for row, known in enumerate(canvas.lengths().tolist()):
            for node, path in enumerate(template.paths):
                text = self.texts[int(canvas.row[row])]
                true = text[known + len(path) - 1] if known + len(path) - 1 < len(text) else 0
                out[row, node] = (true + path[-1]) % 7
        return out


@pytest.mark.parametrize("rows", [1, 4])
def test_with_oracle_heads_every_round_emits_its_depth_and_one_more(system, rows):
    texts = plain(system, PROMPTS[:rows], 16)
    part, base = untrained(Medusa, MedusaConfig(heads=3), system)
    proposer = Oracle(part, base, texts, of_paths([(0,), (1,), (0, 0), (0, 0, 0), (1, 0)]))
    canvas = system._begun(PROMPTS[:rows], 16)
    steps = list(decode(Target(system.model, warp=GREEDY), canvas, GreedyMatch(), proposer))
    assert written(canvas) == texts
    assert len(steps) == 1 + math.ceil(15 / 4), "one plain step, then 4 tokens a round"
    assert all((torch.as_tensor(s.accepted) == 3).all() for s in steps[1:-1])


@pytest.mark.parametrize("prefix", [False, True])
def test_untrained_heads_write_the_greedy_text_in_a_ragged_batch(system, prefix):
    part, base = untrained(Hydra, HydraConfig(heads=3, prefix=prefix), system)
    proposer = (PrefixedHydraHeads if prefix else HydraHeads)(part, base, spread((3,), (2, 1), (1, 1)))
    canvas = system._begun(PROMPTS, 14)
    steps = list(decode(Target(system.model, warp=GREEDY), canvas, GreedyMatch(), proposer))
    assert written(canvas) == plain(system, PROMPTS, 14)
    assert sum(int(s.accepted.sum()) for s in steps) > 0


def test_the_prefix_layer_remembers_accepted_states_alone_row_by_row(system):
    """After ragged rounds, the state that heads start from is that of the layer over all accepted ones at once."""
    part, base = untrained(Hydra, HydraConfig(heads=3, prefix=True), system)
    proposer = PrefixedHydraHeads(part, base, spread((3,), (2, 1), (1, 1)))
    canvas = system._begun(PROMPTS, 14)
    kept = [[] for _ in PROMPTS]
    checked = 0
    original = proposer.behind

    def behind(rows, step):
        states, count = kept_states(rows, step)
        for r, n in enumerate(torch.as_tensor(count).expand(len(states)).tolist()):
            kept[r] += list(states[r, :n])
        return original(rows, step)

    proposer.behind = behind  # type: ignore[method-assign]
    for _ in decode(Target(system.model), canvas, Walk(), proposer, Keyed(1)):
        for r, states in enumerate(kept):
            want = part.passed(torch.stack(states)[None], run(0, len(states)))[0, -1]
            assert torch.allclose(proposer._state[r], want, atol=1e-9)
            checked += 1
    assert checked > 12 and len({len(states) for states in kept}) > 1


@pytest.mark.parametrize("prefix", [False, True])
def test_rows_that_are_copied_dropped_and_admitted_go_on_as_alone(system, prefix):
    texts = plain(system, PROMPTS, 14)
    part, base = untrained(Hydra, HydraConfig(heads=2, prefix=prefix), system)
    proposer = (PrefixedHydraHeads if prefix else HydraHeads)(part, base, spread((3,), (2, 1)))
    canvas, target = system._begun(PROMPTS[:2], 14), Target(system.model, warp=GREEDY)
    stream = decode(target, canvas, GreedyMatch(), proposer)
    for _ in range(3):
        next(stream)
    size = canvas.layout.size
    other = system.model.canvas(
        {"token": torch.nn.functional.pad(torch.tensor([PROMPTS[2]]), (0, size - len(PROMPTS[2])))},
        len(PROMPTS[2]), layout=canvas.layout, row=torch.tensor([7]),
    )  # fmt: skip
    select_rows(target, canvas, torch.tensor([1, -1, 0, 0]), other)
    for _ in stream:
        pass
    for text, want in zip(written(canvas), (texts[1], texts[2], texts[0], texts[0]), strict=True):
        n = min(len(text), len(want))
        assert n > 14 and text[:n] == want[:n]


def test_another_canvas_starts_afresh(system):
    part, base = untrained(Hydra, HydraConfig(heads=2, prefix=True), system)
    proposer = PrefixedHydraHeads(part, base, spread((3,), (2, 1)))
    for prompt in PROMPTS[:2]:
        canvas = system._begun([prompt], 10)
        for _ in decode(Target(system.model, warp=GREEDY), canvas, GreedyMatch(), proposer):
            pass
        assert written(canvas) == plain(system, [prompt], 10)


# ---- typical acceptance ----------------------------------------------------------------------------------------------


def decided(logits: torch.Tensor, guess: Guess | None, epsilon: float, alpha: float, system: NextToken) -> list[int]:
    """What typical acceptance emits of a tree, where the model says this of each node."""
    canvas = system._begun([[1, 2]], 12)
    hidden = torch.zeros(1, logits.shape[1], 1)
    step = Typical((), epsilon, alpha).decide(canvas, guess, Rows(Categorical(logits), None, hidden), Keyed(0))
    return step.edits[0].value[0].tolist()


def test_limits_are_the_hand_computed_ones():
    p = torch.tensor([[[0.5, 0.25, 0.25, 0.0], [1.0, 0.0, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]]], dtype=torch.float64)
    entropy = [1.5 * math.log(2), 0.0, 2 * math.log(2)]
    got = limits(Categorical(p.log()), 0.09, 0.3).exp()[0].tolist()
    assert got == pytest.approx([min(0.09, 0.3 * math.exp(-h)) for h in entropy])
    assert got[2] == pytest.approx(0.075) and got[1] == pytest.approx(0.09)
    assert limits(Categorical(p.log()), 1.0, 1.0).exp()[0].tolist() == pytest.approx([2**-1.5, 1.0, 0.25])


@pytest.mark.parametrize(("epsilon", "alpha", "want"), [
    (0.0, 0.3, [2, 1, 0, 5]),  # everything that is possible: the longest path, and the likeliest token behind it
    (1.0, 1.0, [0, 1, 3]),  # p > exp(-H): 0.5 > 0.354 but not 0.25; then 0.5 of the same law, no third
    (1.0, 2.0, [0]),  # no token is that plausible: the likeliest one
])  # fmt: skip
def test_the_longest_typical_path_is_kept_then_the_likeliest_token(system, epsilon, alpha, want):
    def law(first: int, second: int, third: int) -> torch.Tensor:
        p = torch.full((7,), 0.0, dtype=torch.float64)
        p[first], p[second], p[third] = 0.5, 0.25, 0.25
        return p.log()

    #        root          0: token 0     1: token 2    2: (0) 1      3: (1) 1      4: (3) 0
    said = [law(0, 2, 4), law(1, 2, 3), law(3, 1, 2), law(3, 0, 1), law(6, 0, 1), law(5, 0, 1)]
    guess = Guess(torch.tensor([[0, 2, 1, 1, 0]]), (-1, -1, 0, 1, 3))
    assert decided(torch.stack(said)[None], guess, epsilon, alpha, system) == want


def test_of_equally_long_typical_paths_the_likelier_is_kept(system):
    p = torch.tensor([0.2, 0.5, 0.3, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64).log()
    guess = Guess(torch.tensor([[2, 1, 0]]), (-1, -1, -1))
    assert decided(p.expand(1, 4, 7), guess, 0.1, 0.3, system) == [1, 1]
    assert decided(p.expand(1, 1, 7), None, 0.1, 0.3, system) == [1]


def test_typical_acceptance_at_temperature_0_is_greedy_decoding(system):
    part, base = untrained(Medusa, MedusaConfig(heads=3), system)
    canvas = system._begun(PROMPTS, 14)
    proposer = MedusaHeads(part, base, spread((3,), (2, 1), (1,)))
    for _ in decode(Target(system.model, warp=GREEDY), canvas, Typical(), proposer):
        pass
    assert written(canvas) == plain(system, PROMPTS, 14)


@pytest.mark.parametrize(("epsilon", "alpha"), [(-0.1, 0.3), (1.1, 0.3), (0.1, -1.0)])
def test_limits_that_mean_nothing_are_refused(epsilon, alpha):
    with pytest.raises(ValueError, match="between 0 and 1 and alpha is not negative"):
        Typical((), epsilon, alpha)
