"""Beam search against exhaustive search, with end tokens, length penalty, batches; caches that follow their rows."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from seriatim.decoding.beam import Beam
from seriatim.decoding.draft import NGram
from seriatim.decoding.filters import Warper
from seriatim.decoding.loop import decode, generate, select_rows
from seriatim.decoding.target import Target
from seriatim.factorization.line import Line
from seriatim.factorization.static import AnyOrder
from seriatim.laws.tabular import tabular, true_law
from seriatim.layout import line
from seriatim.random import Keyed

V, L = 3, 4
MODEL = tabular(line(L), Line(1), V, 1)
LAW = true_law(MODEL, L)


def log_prob(text):
    """Of a text and whatever follows it, by the packed form."""
    return math.log(math.fsum(p for x, p in LAW.items() if x[: len(text)] == tuple(text)))


def texts(stop):
    """All texts that end with their first end token, or at full length."""
    for n in range(1, L + 1):
        for text in itertools.product(range(V), repeat=n):
            if stop not in text[:-1] and (n == L or text[-1] == stop):
                yield text


def beams(width, batch=1, model=MODEL, warp=None, **kinds):
    beam = Beam(width, **kinds)
    canvas = generate(Target(model, warp=warp), model.blank(batch), beam)
    return beam, canvas, [tuple(x.tolist()) for x in canvas.read("token")]


def test_a_wide_beam_is_exhaustive_search():
    beam, canvas, got = beams(V**L)
    assert got == sorted(LAW, key=lambda x: -LAW[x])
    assert max(abs(float(s.exp()) - LAW[x]) for s, x in zip(beam.log_prob, got, strict=True)) < 1e-12
    assert torch.equal(beam.score, beam.log_prob)


@pytest.mark.parametrize("penalty", [0.0, 0.6, 1.0])
def test_with_end_tokens_and_a_length_penalty_too(penalty):
    """Ended texts stay candidates; ranked by log-probability / length ** penalty."""
    beam, canvas, got = beams(V**L, stop=(2,), penalty=penalty)
    score = {x: log_prob(x) / len(x) ** penalty for x in texts(2)}
    assert got == sorted(score, key=lambda x: -score[x])
    assert max(abs(float(s) - score[x]) for s, x in zip(beam.score, got, strict=True)) < 1e-12
    assert max(abs(float(s) - log_prob(x)) for s, x in zip(beam.log_prob, got, strict=True)) < 1e-12
    assert canvas.done


@pytest.mark.parametrize("stop", [(), (2,)])
@pytest.mark.parametrize("width", [1, 2, 3, 5])
def test_a_narrow_beam_keeps_the_best_of_each_step(width, stop):
    """Brute force of the algorithm itself."""
    alive, ended = [()], []
    for _ in range(L):
        pool = [(log_prob((*t, v)), (*t, v)) for t in alive for v in range(V)] + ended
        best = sorted(pool, reverse=True)[:width]
        ended = [(s, t) for s, t in best if t[-1] in stop]
        alive = [t for _, t in best if t[-1] not in stop]
    want = sorted(best, reverse=True)
    beam, _, got = beams(width, stop=stop)
    assert got == [t for _, t in want]
    assert max(abs(float(a) - s) for a, (s, _) in zip(beam.score, want, strict=True)) < 1e-12


def test_a_beam_of_one_is_greedy(transformer, plain):
    model = transformer()
    _, canvas, _ = beams(1, 2, model)
    assert torch.equal(canvas.value["token"], plain(Target(model, warp=Warper(temperature=0)), 2, Keyed(0)))


@pytest.mark.parametrize("stop", [(), (1,)])
def test_samples_of_a_batch_are_searched_apart(transformer, stop):
    """Prompts side by side end as each alone, best first, four rows of each name."""
    model = transformer(14, seed=1)
    x = torch.randint(7, (3, 14), generator=torch.Generator().manual_seed(0))
    x[:, :3] = torch.where(x[:, :3] == 1, 0, x[:, :3])
    beam = Beam(4, stop)
    canvas = generate(Target(model), model.canvas({"token": x}, 3), beam)
    assert canvas.row.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    for row in range(3):
        alone = Beam(4, stop)
        one = generate(Target(model), model.canvas({"token": x[row : row + 1]}, 3), alone)
        assert [t.tolist() for t in one.read("token")] == [t.tolist() for t in canvas.read("token")][
            4 * row : 4 * row + 4
        ]
        assert float((alone.log_prob - beam.log_prob[4 * row : 4 * row + 4]).abs().max()) < 1e-9
        assert bool((alone.score[1:] <= alone.score[:-1]).all())


@pytest.mark.parametrize("stop", [(), (1,)])
def test_scores_are_those_of_a_fresh_forward(transformer, stop):
    """The cache follows its rows: log-probabilities of the texts, each scored in one pass."""
    model = transformer(12, seed=1)
    beam = Beam(6, stop)
    canvas = generate(Target(model), model.blank(1), beam)
    for text, got in zip(canvas.read("token"), beam.log_prob, strict=True):
        padded = torch.cat([text, torch.zeros(12 - len(text), dtype=torch.long)])[None]
        with torch.no_grad():
            losses = model.losses(model.canvas({"token": padded}))
        assert abs(float(-losses[0, : len(text)].sum()) - float(got)) < 1e-9


def test_a_cache_that_does_not_follow_is_caught_by_that(transformer):
    model = transformer(12, seed=1)

    class Lazy(Target):
        def select(self, rows, batch, condition=None, caches=()):
            cache = self.cache
            super().select(torch.zeros_like(rows) if len(rows) == batch else rows, batch, condition)
            assert cache is self.cache

    beam = Beam(6)
    canvas = generate(Lazy(model), model.blank(1), beam)
    with torch.no_grad():
        want = model.log_prob(model.canvas({"token": canvas.value["token"]}))
    assert float((want - beam.log_prob).abs().max()) > 0.1


def test_impossible_tokens_never_enter_a_beam():
    """With two possible tokens there are 2, 4, 8 texts, however wide the beam."""
    beam, canvas, got = beams(100, warp=Warper(top_k=2))
    assert len(got) == 2**L and bool(beam.log_prob.isfinite().all())
    counts = []
    for _ in decode(Target(MODEL, warp=Warper(top_k=2)), c := MODEL.blank(1), Beam(5)):
        counts.append(c.batch)
    assert counts == [2, 4, 5, 5]


def test_another_canvas_starts_anew():
    beam = Beam(3)
    first = generate(Target(MODEL), MODEL.blank(1), beam).value["token"]
    score = beam.score
    again = generate(Target(MODEL), MODEL.blank(1), beam).value["token"]
    assert torch.equal(first, again) and torch.equal(score, beam.score)


@pytest.mark.parametrize("wrong", [{"width": 0}, {"width": 2, "penalty": -1.0}])
def test_impossible_beams_are_refused(wrong):
    with pytest.raises(ValueError):
        Beam(**wrong)


def test_orders_that_decide_several_at_once_are_refused():
    model = tabular(line(3), AnyOrder(), 3)
    with pytest.raises(ValueError, match="one element a step"):
        generate(Target(model), model.blank(1), Beam(2))
    x = torch.tensor([[1, 1, 0, 0]])
    with pytest.raises(ValueError, match="no proposer"):
        generate(Target(MODEL), MODEL.canvas({"token": x}, 2), Beam(2), NGram(1, sizes=(1,)))


# ---- rows that come, go and change places ----------------------------------------------------------------------------

X = torch.randint(7, (4, 14), generator=torch.Generator().manual_seed(0))
X[X == 1] = 0


def searched(model, row):
    """The texts and log-probabilities of one sample, searched by itself."""
    beam = Beam(3, stop=(1,))
    canvas = generate(Target(model), model.canvas({"token": X[row : row + 1]}, 3), beam)
    return dict(zip(map(tuple, map(torch.Tensor.tolist, canvas.read("token"))), beam.log_prob.tolist(), strict=True))


def running(model, rows, changes):
    """A search of these samples, whose rows are selected after some steps: {step: (rows, admitted sample)}."""
    beam, target = Beam(3, stop=(1,)), Target(model)
    canvas = model.canvas({"token": X[rows]}, 3, row=torch.tensor(rows))
    for turn, _ in enumerate(decode(target, canvas, beam)):
        if turn in changes:
            pick, new = changes[turn](canvas)
            if new is not None:
                new = model.canvas({"token": X[new : new + 1]}, 3, row=torch.tensor([new]))
            select_rows(target, canvas, torch.tensor(pick), new)
    found = {row: {} for row in canvas.row.tolist()}
    for row, text, lp in zip(canvas.row.tolist(), canvas.read("token"), beam.log_prob.tolist(), strict=True):
        found[row][tuple(text.tolist())] = lp
    return found


def agree(found, model):
    for row, texts in found.items():
        want = searched(model, row)
        assert texts.keys() == want.keys()
        assert max(abs(texts[text] - want[text]) for text in want) < 1e-9


def test_rows_that_change_places_keep_their_scores(transformer):
    """Also rows of one sample, whose names do not tell them apart."""
    model = transformer(14, seed=1)
    back = lambda canvas: (list(reversed(range(canvas.batch))), None)  # noqa: E731
    agree(running(model, [0, 1], {1: back, 2: back, 5: back}), model)
    agree(running(model, [2], {0: back, 3: back}), model)


def test_a_sample_that_is_admitted_is_searched_like_any_other(transformer):
    model = transformer(14, seed=1)
    join = lambda canvas: ([-1, *range(canvas.batch)], 3)  # noqa: E731
    found = running(model, [0, 1], {2: join})
    assert found.keys() == {0, 1, 3}
    agree(found, model)


def test_a_sample_that_goes_leaves_the_others_as_they_are(transformer):
    model = transformer(14, seed=1)
    drop = lambda canvas: ((canvas.row != 1).nonzero()[:, 0].tolist(), None)  # noqa: E731
    found = running(model, [0, 1, 2], {2: drop})
    assert found.keys() == {0, 2}
    agree(found, model)
