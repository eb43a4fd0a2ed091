"""The book-keeping of the key-value cache against a list of entries a row.

Random sessions commit prefixes, paths and ragged choices, evict, replace, and select rows, in any order and past the
first capacity.
"""

from __future__ import annotations

import random as stdlib
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from seriatim.backbones.cache import KVCache
from seriatim.backbones.transformer import Transformer, TransformerConfig
from seriatim.canvas import Canvas, Set
from seriatim.decoding.guess import Guess
from seriatim.factorization.line import Line
from seriatim.layout import line
from seriatim.plan import Plan, plan_of
from seriatim.view import INF, inclusive, timed

SESSIONS = settings(max_examples=60, deadline=None, derandomize=True)
LAYERS, HEADS, DIM = 2, 2, 3


@dataclass
class Entry:
    """One committed slot of one row: keys and values of all layers, labels, and where it was computed."""

    kv: Tensor  # (layers, 2, heads, dim)
    at: int
    born: int
    dies: int
    ran: tuple[bool, ...]


class Session:
    """A cache and the same as plain lists, driven side by side."""

    def __init__(self, seed: int, batch: int, line_like: bool):
        self.rng, self.batch = stdlib.Random(seed), batch
        self.g = torch.Generator().manual_seed(seed)
        self.cache = KVCache(LAYERS, batch, HEADS, DIM, torch.float64, capacity=2)
        self.rows: list[list[Entry]] = [[] for _ in range(batch)]
        self.line_like, self.clock = line_like, 0

    def forward(self) -> None:
        """Leave some slots pending."""
        rng = self.rng
        self.n = rng.randrange(1, 5)
        self.plan = self._plan()
        self.cache.begin(self.plan)
        self.new = torch.randn(LAYERS, 2, self.batch, HEADS, self.n, DIM, dtype=torch.float64, generator=self.g)
        for layer in range(LAYERS):
            k, v = self.cache.append(layer, *self.new[layer])
            self.check_read(layer, k, v)

    def _plan(self) -> Plan:
        rng, n = self.rng, self.n
        if self.line_like:  # a run, while all rows are equally long; draft trees included
            length = self.cache.columns
            guess = None
            self.parents = tuple(rng.randrange(-1, i) for i in range(n - 1))
            if n > 1:
                guess = Guess(torch.zeros(self.batch, n - 1, dtype=torch.long), self.parents)
            canvas = Canvas(line(200), {"token": torch.zeros(self.batch, 200, dtype=torch.long)}, length + 1)
            return Line().step(canvas, guess, length)
        at = [[self.clock + rng.randrange(5) for _ in range(n)] for _ in range(self.batch)]
        born = [[a - rng.randrange(2) for a in row] for row in at]
        dies = [[a + rng.randrange(1, 9) if rng.random() < 0.5 else INF for a in row] for row in at]
        self.clock += 3
        plan = plan_of(timed(torch.tensor(at), torch.tensor(born), torch.tensor(dies)), range(n), range(n), [(0, 0)])
        if rng.random() < 0.3:
            plan = replace(plan, layers=torch.tensor([[rng.random() < 0.7 for _ in range(n)] for _ in range(LAYERS)]))
        return plan

    def keep(self, columns: list[list[int]]) -> None:
        """What the lists keep of the pending slots of each row."""
        settled = self.plan.views if self.plan.settled is None else self.plan.settled
        view = settled["all"]
        for b, chosen in enumerate(columns):
            for j in chosen:
                label = [int(x[b if len(x) > 1 else 0, j]) for x in (view.at, view.born, view.dies)]
                ran = (True,) * LAYERS if self.plan.layers is None else tuple(self.plan.layers[:, j].tolist())
                self.rows[b].append(Entry(self.new[:, :, b, :, j], *label, ran))

    def chosen(self) -> list[int]:
        """Some pending slots: along a line a path of its tree behind the known slot, else any."""
        rng, n = self.rng, self.n
        if not self.line_like:
            return sorted(rng.sample(range(n), rng.randrange(n + 1)))
        slot, path = rng.randrange(n), []
        while slot > 0:
            path.append(slot)
            slot = self.parents[slot - 1] + 1
        return [0, *path[::-1]]

    def commit(self) -> None:
        rng = self.rng
        how = rng.choice(["none", "prefix", "path", "ragged"])
        if how == "none":
            self.cache.commit(0, self.plan)
        elif how == "prefix":
            m = 1 if self.line_like else rng.randrange(self.n + 1)
            self.keep([list(range(m))] * self.batch)
            self.cache.commit(m, self.plan)
        elif how == "path":
            path = self.chosen()
            self.keep([path] * self.batch)
            self.cache.commit(path, self.plan)
        else:
            paths = [self.chosen() for _ in range(self.batch)]
            self.keep(paths)
            self.cache.commit(padded(paths, rng), self.plan)
            self.line_like = self.line_like and isinstance(self.cache.length, int)

    def evict(self) -> None:
        rng = self.rng
        chosen = [sorted(rng.sample(range(len(row)), rng.randrange(len(row) + 1))) for row in self.rows]
        self.rows = [[row[i] for i in keep] for row, keep in zip(self.rows, chosen, strict=True)]
        self.cache.evict(padded(chosen, rng))
        self.line_like = False

    def replace(self) -> None:
        """New content in old places, in each row."""
        self.forward()
        rng, where = self.rng, []
        for b, row in enumerate(self.rows):
            places = rng.sample(range(len(row)), min(rng.randrange(self.n + 1), len(row)))
            where.append(places + [-1] * (self.n - len(places)))
            for j, place in enumerate(places):
                row[place] = replace(row[place], kv=self.new[:, :, b, :, j])
        self.cache.replace(torch.tensor(where))

    def select(self) -> None:
        rng = self.rng
        fresh = not self.line_like
        rows = [rng.randrange(-1 if fresh else 0, self.batch) for _ in range(rng.randrange(1, 5))]
        self.rows = [[] if r < 0 else list(self.rows[r]) for r in rows]
        self.batch = len(rows)
        self.cache.select(torch.tensor(rows))

    # ---- what must agree ---------------------------------------------------------------------------------------------

    def check_read(self, layer: int, k: Tensor, v: Tensor) -> None:
        """A layer reads what each row holds, and behind all of it what is pending."""
        assert k.shape == v.shape == (self.batch, HEADS, self.cache.columns + self.n, DIM)
        assert torch.equal(k[:, :, -self.n :], self.new[layer, 0]) and torch.equal(
            v[:, :, -self.n :], self.new[layer, 1]
        )
        for b, row in enumerate(self.rows):
            for i, entry in enumerate(row):
                assert torch.equal(k[b, :, i], entry.kv[layer, 0]) and torch.equal(v[b, :, i], entry.kv[layer, 1])

    def check(self) -> None:
        """Lengths, labels, layers and bytes are those of the lists."""
        cache = self.cache
        held = [len(row) for row in self.rows]
        length = cache.length
        assert (length.tolist() if isinstance(length, Tensor) else [length] * self.batch) == held
        assert cache.columns == max(held)
        assert torch.isfinite(cache.buffer[..., : cache.columns + cache.pending, :]).all()
        labels = cache.labels("all")
        ran = sum(sum(e.ran) for row in self.rows for e in row)
        assert cache.nbytes() == ran * 2 * HEADS * DIM * 8
        for b, row in enumerate(self.rows):
            for layer in range(LAYERS):
                done = cache.computed(layer)
                got = [True] * len(row) if done is None else done[b if len(done) > 1 else 0, : len(row)].tolist()
                assert got == [e.ran[layer] for e in row]
            if labels is None:
                assert [(e.at, e.born, e.dies) for e in row] == [(i, i, INF) for i in range(len(row))]
                continue
            view = labels.row(b)
            assert view.size == cache.columns
            for name in ("at", "born", "dies"):
                assert getattr(view, name)[0, : len(row)].tolist() == [getattr(e, name) for e in row]
            lane = [0] * cache.columns if view.lane is None else view.lane[0].tolist()
            assert lane == [0] * len(row) + [-1] * (cache.columns - len(row))


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


@SESSIONS
@given(st.integers(0, 10**6), st.sampled_from([1, 3]), st.booleans())
def test_a_session_of_every_operation_equals_lists(seed, batch, line_like):
    session = Session(seed, batch, line_like)
    for _ in range(14):
        session.forward()
        session.commit()
        session.check()
        other = session.rng.random()
        if other < 0.2:
            session.select()
        elif other < 0.35 and not session.line_like:
            session.evict()
        elif other < 0.5:
            session.replace()
        elif other < 0.55:
            session.evict()
        session.check()


def test_a_plain_line_holds_no_labels_whatever_path_is_kept():
    """Prefixes, paths of trees and forks of rows leave it plain; the first ragged commit writes the labels out."""
    cache = KVCache(1, 2, 1, 2, torch.float32, capacity=4)
    model, canvas = Line(), Canvas(line(40), {"token": torch.zeros(2, 40, dtype=torch.long)}, 1)
    cache.commit(1, begun(cache, model.step(canvas, None, 0)))
    guess = Guess(torch.zeros(2, 4, dtype=torch.long), (-1, -1, 0, 1))
    canvas.apply([Set(torch.zeros(2, 1, dtype=torch.long))])
    cache.commit([0, 2, 4], begun(cache, model.step(canvas, guess, 1)))
    cache.select(torch.tensor([1, 0, 1]))
    assert cache.plain and cache.labels("all") is None and cache.length == 4
    canvas = Canvas(line(40), {"token": torch.zeros(3, 40, dtype=torch.long)}, 5)
    cache.commit(torch.tensor([[0, 1], [0, 2], [0, -1]]), begun(cache, model.step(canvas, guess, 4)))
    assert not cache.plain and cache.length.tolist() == [6, 6, 5]
    view = cache.labels("all")
    assert view.at[0].tolist() == [0, 1, 2, 3, 4, 5] and bool((view.dies[0] == INF).all())
    assert view.lane.tolist() == [[0] * 6, [0] * 6, [0] * 5 + [-1]]


def begun(cache: KVCache, plan: Plan) -> Plan:
    cache.begin(plan)
    kv = torch.zeros(cache.batch, cache.buffer.shape[3], plan.size, cache.buffer.shape[5])
    for layer in range(cache.buffer.shape[0]):
        cache.append(layer, kv, kv)
    return plan


def test_each_kind_of_layer_keeps_labels_of_its_own():
    cache = KVCache(2, 1, 1, 2, torch.float32, names=("near", "far"))
    views = {"near": inclusive([0, 1, 2]).narrow(window=2), "far": inclusive([0, 1, 2])}
    cache.commit([0, 2], begun(cache, plan_of(views, range(3), range(3), [(0, 0)])))
    assert cache.labels("near").dies.tolist() == [[2, 4]]
    assert cache.labels("far").dies.tolist() == [[INF, INF]]
    run = Line().step(Canvas(line(9), {"token": torch.zeros(1, 9, dtype=torch.long)}, 3), None, 2)
    cache.commit(1, begun(cache, run))
    assert cache.labels("near").at.tolist() == cache.labels("far").at.tolist() == [[0, 2, 2]]


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan():
    """What nobody wrote shows wherever it is read."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("does", "says"),
    [
        (lambda c, p: c.commit(4, p), "slot 3 cannot be kept: the last forward left 3 pending"),
        (lambda c, p: c.commit([0, 3], p), "slot 3 cannot be kept"),
        (lambda c, p: c.commit(torch.tensor([[0, 1], [5, -1]]), p), "slot 5 cannot be kept"),
        (lambda c, p: c.evict(torch.tensor([[0, 2]])), "column 2 cannot be retained of 2"),
        (lambda c, p: c.replace(torch.tensor([[0, 1, 0, 1]])), "4 entries cannot be replaced by 3 pending"),
        (lambda c, p: c.replace(torch.tensor([[0], [2]])), "column 2 is not held by every row"),
        (lambda c, p: c.select(torch.tensor([0, 2])), r"rows \[0, 2\] cannot be selected of 2"),
        (lambda c, p: c.select(torch.tensor([], dtype=torch.long)), "cannot be selected"),
    ],
)
def test_what_cannot_be_done_is_refused(does, says):
    cache = KVCache(1, 2, 1, 2, torch.float32)
    plan = plan_of(inclusive([0, 1, 2]), range(3), range(3), [(0, 0)])
    cache.commit(2, begun(cache, plan))
    begun(cache, plan)
    with pytest.raises(ValueError, match=says):
        does(cache, plan)


def test_empty_caches_are_refused():
    with pytest.raises(ValueError, match="at least one row and one column"):
        KVCache(1, 0, 1, 2, torch.float32)
    with pytest.raises(ValueError, match="at least one row and one column"):
        Transformer(TransformerConfig(8, 1, 2)).new_cache(1, capacity=0)
