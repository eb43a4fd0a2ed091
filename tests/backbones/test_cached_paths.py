"""What the key-value cache is for: decoding over it equals fresh forwards, whatever was drafted, kept and dropped.

Draft trees are verified node by node against a forward over the text that leads to each node.
"""

from __future__ import annotations

import random as stdlib
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from seriatim.backbones.rope import RoPE
from seriatim.backbones.transformer import Transformer, TransformerConfig
from seriatim.canvas import Canvas, Set, Truncate
from seriatim.decoding.guess import Guess
from seriatim.decoding.loop import Step, decode, select_rows
from seriatim.decoding.sample import SampleAll
from seriatim.decoding.target import Target
from seriatim.embed import TokenEmbed
from seriatim.factorization.base import Factorization
from seriatim.factorization.line import Line
from seriatim.heads.categorical import CategoricalHead
from seriatim.laws.case import randomise
from seriatim.layout import line
from seriatim.model import Model
from seriatim.plan import Plan, plan_of
from seriatim.random import Forced
from seriatim.view import earlier, inclusive

TEXTS = settings(max_examples=40, deadline=None, derandomize=True)
VOCAB, WIDTH, LENGTH = 5, 16, 14
CONFIG = TransformerConfig(WIDTH, 2, 4, kv_heads=2, rope=RoPE(50.0))


def next_token(prefix: int = 1, positions: bool = False, order: Factorization | None = None) -> Model:
    places = (LENGTH + prefix,) if positions else ()
    embed = TokenEmbed(VOCAB, WIDTH, positions=places)
    return randomise(
        Model(line(LENGTH), order or Line(prefix), embed, Transformer(CONFIG), CategoricalHead(WIDTH, VOCAB))
    )


def fresh_logits(model: Model, text: list[int]) -> Tensor:
    """What is read behind a text, by one forward without a cache."""
    ids = torch.zeros(1, LENGTH, dtype=torch.long)
    ids[0, : len(text)] = torch.tensor(text)
    canvas = Canvas(line(LENGTH), {"token": ids}, len(text))
    plan = model.factorization.step(canvas, None, 0)
    h = model.hidden(plan, canvas)
    return model.heads["token"].logits(h[:, -1])[0]


def padded(rows: list[list[int]], rng: stdlib.Random) -> Tensor:
    """Rows of different lengths with -1 behind them, or between."""
    width = max(len(row) for row in rows) + rng.randrange(2)
    out = []
    for row in rows:
        row = list(row)
        while len(row) < width:
            row.insert(rng.randrange(len(row) + 1) if rng.random() < 0.3 else len(row), -1)
        out.append(row)
    return torch.tensor(out, dtype=torch.long).reshape(len(rows), width)


class Tree:
    """Proposes a random tree with random tokens; rows may have fewer nodes."""

    def __init__(self, rng: stdlib.Random):
        self.rng = rng

    def propose(self, canvas, target, random) -> Guess | None:
        rng = self.rng
        nodes = rng.randrange(0, 7)
        if nodes == 0:
            return None
        parent = tuple(rng.randrange(-1, i) for i in range(nodes))
        if rng.random() < 0.3:
            parent = tuple(range(-1, nodes - 1))
        value = torch.randint(
            VOCAB, (canvas.batch, nodes), generator=torch.Generator().manual_seed(rng.randrange(10**6))
        )
        if canvas.batch > 1 and canvas.length is None:
            for row in value:
                gone: set[int] = set()
                for i, p in enumerate(parent):
                    if p in gone or rng.random() < 0.2:
                        gone.add(i)
                        row[i] = -1
        return Guess(value, None if parent == tuple(range(-1, nodes - 1)) and rng.random() < 0.5 else parent)

    def observe(self, canvas, rows, step) -> None:
        """Learns nothing."""


class RandomPath:
    """Accepts an arbitrary path of the tree in each row and emits an arbitrary token behind it, after comparing every
    read-out with a fresh forward."""

    def __init__(self, model: Model, rng: stdlib.Random, ragged: bool):
        self.model, self.rng, self.ragged = model, rng, ragged
        self.compared = 0

    def decide(self, canvas, guess, rows, random) -> Step:
        texts = [row.tolist() for row in canvas.read("token")]
        alive = canvas.open.any(1).tolist()
        parents = () if guess is None else guess.parents()
        slot = rows.slot
        known = rows.hidden.shape[1] - len(parents)
        ends = slot[:, 0].tolist() if isinstance(slot, Tensor) else [known - 1] * canvas.batch
        drafts = [[] for _ in range(canvas.batch)] if guess is None else guess.value.tolist()
        keeps, tokens = [], []
        for b in range(canvas.batch):
            if not alive[b]:
                keeps.append([]), tokens.append([])
                continue
            self.compare(rows, b, -1, texts[b])
            paths = {-1: []}
            for i, p in enumerate(parents):
                if drafts[b][i] >= 0 and p in paths:
                    paths[i] = [*paths[p], i]
                    self.compare(rows, b, i, texts[b] + [drafts[b][j] for j in paths[i]])
            path = self.rng.choice(list(paths.values())) if self.ragged or b == 0 else path
            keeps.append([*range(ends[b] + 1), *(known + i for i in path)])
            tokens.append([*(drafts[b][i] for i in path), self.rng.randrange(VOCAB)])
        return self.step(canvas, texts, keeps, tokens)

    def compare(self, rows, b: int, node: int, text: list[int]) -> None:
        if len(text) < LENGTH:  # a draft may reach past the end, where nothing is read
            gap = rows.dist.logits[b, node + 1] - fresh_logits(self.model, text)
            assert gap.abs().max() < 1e-10, (b, node, text)
            self.compared += 1

    def step(self, canvas, texts, keeps, tokens) -> Step:
        if canvas.length is not None and len({len(t) for t in tokens}) == 1:
            keep = keeps[0] if all(k == keeps[0] for k in keeps) else padded(keeps, self.rng)
            return Step((Set(torch.tensor(tokens)),), keep)
        width = max(len(t) for t in tokens)
        value = torch.tensor([t + [0] * (width - len(t)) for t in tokens])
        element = [
            [e if e < LENGTH and j < len(t) else -1 for j, e in enumerate(range(len(text), len(text) + width))]
            for text, t in zip(texts, tokens, strict=True)
        ]
        edits = [Set(value, torch.tensor(element))]
        if self.rng.random() < 0.15:  # a row ends early
            ends = torch.full((canvas.batch,), LENGTH)
            row = self.rng.randrange(canvas.batch)
            ends[row] = min(len(texts[row]) + len(tokens[row]), LENGTH)
            edits.append(Truncate(ends))
        return Step(tuple(edits), padded(keeps, self.rng))


@TEXTS
@given(st.integers(0, 10**6), st.sampled_from([0, 1, 2]), st.booleans())
def test_any_path_of_any_tree_equals_a_fresh_forward(seed, prefix, positions):
    """Batch 1: after any accepted paths, every read-out of the next tree is that of the plain text."""
    rng, model = stdlib.Random(seed), next_token(prefix, positions)
    canvas = model.canvas({"token": torch.randint(VOCAB, (1, LENGTH))}, rng.randrange(1, 4))
    target, decider = Target(model), RandomPath(model, rng, ragged=False)
    for _ in decode(target, canvas, decider, Tree(rng)):
        pass
    assert target.cache.plain and decider.compared >= 3


@TEXTS
@given(st.integers(0, 10**6), st.sampled_from([0, 1, 2]), st.booleans())
def test_any_paths_of_three_rows_equal_fresh_forwards(seed, prefix, positions):
    """Rows accept different paths, lack nodes, have prompts of different lengths, end early, are forked, reordered and
    dropped between steps."""
    rng, model = stdlib.Random(seed), next_token(prefix, positions)
    known = torch.tensor([rng.randrange(1, 5) for _ in range(3)])
    canvas = model.canvas({"token": torch.randint(VOCAB, (3, LENGTH))}, 2 if rng.random() < 0.3 else known)
    target, decider = Target(model), RandomPath(model, rng, ragged=True)
    for _ in decode(target, canvas, decider, Tree(rng)):
        if rng.random() < 0.25:
            rows = torch.tensor([rng.randrange(canvas.batch) for _ in range(rng.randrange(1, 5))])
            select_rows(target, canvas, rows)
    assert decider.compared >= 3


@torch.no_grad()
def test_a_dropped_draft_leaves_no_trace():
    """Bit for bit: the next forward is that of a cache which never saw the draft."""
    model = next_token()
    canvas = model.canvas({"token": torch.randint(VOCAB, (2, LENGTH))}, 6)
    guess = Guess(torch.tensor([[1, 2, 3], [3, 2, 1]]), (-1, -1, 0))
    for labelled in (False, True):
        said = []
        for drafts in (0, 3):
            target = Target(model)
            plan = target.plan(canvas)
            target.forward(plan, canvas)
            keep = torch.tensor([[0, 1, 2, 3], [0, 1, -1, -1]]) if labelled else 4
            target.commit(keep, plan)
            for _ in range(drafts):
                target.forward(target.plan(canvas, guess), canvas, guess)
                target.commit(0, plan)
            said.append(target.forward(target.plan(canvas), canvas).dist.logits)
        assert torch.equal(*said)


class Window(Factorization):
    """A line whose slots are seen for `reach` clock times only."""

    def __init__(self, reach: int):
        self.reach = reach

    def packed(self, canvas: Canvas) -> Plan:
        n = canvas.layout.size
        reads = [(s, s + 1) for s in range(n - 1) if canvas.rank[0, s + 1] >= 0]
        return plan_of(inclusive(range(n)).narrow(window=self.reach), canvas.rank[0], range(n), reads)


@torch.no_grad()
def test_a_sliding_window_is_evicted_and_nobody_misses_it():
    model = next_token(0, order=Window(4))
    ids = torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    forced, target = Forced(ids), Target(model)
    held = [target.cache.columns for _ in decode(target, model.canvas({"token": ids}, 3), SampleAll(), random=forced)]
    assert (forced.log_prob - model.log_prob(model.canvas({"token": ids}, 3))).abs().max() < 1e-10
    assert max(held) == 3  # the three slots that the next one still sees, besides itself
    wide = next_token(0, order=Window(LENGTH))
    assert (
        model.log_prob(model.canvas({"token": ids}, 3)) - wide.log_prob(wide.canvas({"token": ids}, 3))
    ).abs().max() > 1e-3


@torch.no_grad()
def test_slots_that_skip_layers_are_not_seen_there_whatever_the_rows_keep():
    """Over a cache with other slots in each row, every layer sees the same as in one pass over what was kept."""
    depth, n = 3, 4
    config = TransformerConfig(WIDTH, depth, 4, kv_heads=2)
    g = torch.Generator().manual_seed(3)
    model = randomise(
        Model(line(9), Line(1), TokenEmbed(VOCAB, WIDTH), Transformer(config), CategoricalHead(WIDTH, VOCAB))
    )
    backbone = model.backbone
    cache = backbone.new_cache(2)
    texts: list[list[tuple[Tensor, Tensor, int]]] = [[], []]  # of each row: vector, layers, clock
    for turn in range(5):
        x = torch.randn(2, n, WIDTH, generator=g, dtype=torch.float64)
        layers = torch.rand(depth, n, generator=g) < 0.6
        clock = [turn] * n  # drafts that do not see each other
        plan = replace(plan_of(earlier(clock), range(n), range(n), [(0, 0)]), layers=layers)
        got = backbone(x, plan, cache)
        for b, text in enumerate(texts):
            both = [*text, *((x[b, i], layers[:, i], clock[i]) for i in range(n))]
            alone = plan_of(earlier([c for _, _, c in both]), range(len(both)), range(len(both)), [(0, 0)])
            alone = replace(alone, layers=torch.stack([run for _, run, _ in both], 1))
            want = backbone(torch.stack([v for v, _, _ in both])[None], alone)[0, -n:]
            assert (got[b] - want).abs().max() < 1e-10
        keep = [[0, 1, 3], [2]] if turn % 2 else [[1], [0, 2]]
        cache.commit(padded(keep, stdlib.Random(turn)), plan)
        for b, chosen in enumerate(keep):
            texts[b] += [(x[b, i], layers[:, i], clock[i]) for i in chosen]


# ---- caches that are joined ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("windows", [{}, {"local": 4}], ids=["all", "windows"])
@pytest.mark.parametrize("stop", [(), (2, 5, 7)], ids=["", "rows end"])
def test_rows_of_joined_caches_go_on_as_they_would_alone(windows, stop):
    """Rows that were remembered apart, of equal and of other lengths, then computed together, until one after the other
    ends; in layers that see everything, and in layers that see the last few places."""
    from seriatim.backbones.layer import TransformerConfig
    from seriatim.backbones.rope import RoPE
    from seriatim.backbones.transformer import Transformer
    from seriatim.decoding.loop import decode
    from seriatim.decoding.sample import SampleAll
    from seriatim.decoding.target import Target
    from seriatim.embed import TokenEmbed
    from seriatim.factorization.line import Line
    from seriatim.heads.categorical import CategoricalHead
    from seriatim.layout import line
    from seriatim.model import Model
    from seriatim.random import Keyed

    torch.manual_seed(0)
    embed = TokenEmbed(13, 16)
    head = CategoricalHead(16, 13, tied=embed.table)
    config = TransformerConfig(16, 2, 2, rope=RoPE(), kinds=("all", "local") if windows else ("all",))
    model = Model(line(30), Line(windows=windows), embed, Transformer(config), head).double().eval()
    for p in model.parameters():
        p.data.mul_(8 if p.dim() > 1 else 1)
    lengths = (3, 9, 9, 1)
    text = torch.randint(13, (4, 30))
    with torch.inference_mode():
        for order in ((0, 1, 2, 3), (1, 2), (3, 0)):
            canvases = [model.canvas({"token": text[b : b + 1]}, lengths[b], row=torch.tensor([b])) for b in order]
            targets = [Target(model) for _ in order]
            for canvas, target in zip(canvases, targets, strict=True):
                target.prefill(canvas, 4, shared=True)
            known = torch.tensor([lengths[b] for b in order])
            both = model.canvas({"token": text[list(order)]}, known, row=torch.tensor(order))
            together = Target(model)
            together.plan(both)
            together.cache = targets[0].cache
            together.cache.join([t.cache for t in targets[1:]])
            for _ in decode(together, both, SampleAll(stop), random=Keyed(3)):
                pass
            alone = []
            for canvas in canvases:
                for _ in decode(Target(model), canvas, SampleAll(stop), random=Keyed(3)):
                    pass
                alone.append(canvas.read("token")[0].tolist())
            assert [row.tolist() for row in both.read("token")] == alone
