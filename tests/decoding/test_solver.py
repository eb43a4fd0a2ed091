"""Denoising in place along any static order: a step is repeated until its noise is gone, whatever the cache holds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from seriatim.backbones.rope import RoPE
from seriatim.backbones.transformer import Transformer, TransformerConfig
from seriatim.canvas import Revise
from seriatim.decoding.kinds import PerKind
from seriatim.decoding.loop import decode, generate
from seriatim.decoding.sample import SampleAll
from seriatim.decoding.solver import SolverStep
from seriatim.decoding.target import Target
from seriatim.embed import VectorEmbed
from seriatim.factorization.base import Factorization
from seriatim.heads.categorical import CategoricalHead
from seriatim.heads.in_place import Cosine, InPlaceHead, Straight, noised, pure_noise
from seriatim.laws.case import randomise
from seriatim.layout import grid
from seriatim.model import Model
from seriatim.plan import NOISE, VALUE, plan_of
from seriatim.random import Keyed
from seriatim.view import timed

FRAMES, PIXELS, DIM, WIDTH = 4, 2, 2, 16


class WindowedFrames(Factorization):
    """Frames denoised one after another; each sees the values of the `window` frames before it."""

    def __init__(self, window):
        self.window = window

    def order(self, layout, random=None):
        return layout.coord[:, 0][None]

    def packed(self, canvas):
        layout, n = canvas.layout, canvas.layout.size
        frame, coord = layout.coord[:, 0], layout.coord.repeat(2, 1)
        at = torch.cat([2 * frame, 2 * frame + 1])
        dies = torch.cat([2 * frame + 1, 2 * (frame + self.window) + 1])
        carries, source = [*range(n)] * 2, [NOISE] * n + [VALUE] * n
        reads = [(i, i) for i in range(n) if canvas.rank[0, i] >= 0]
        return plan_of(timed(at, at, dies), canvas.rank[0], carries, reads, source, coord=coord, layout=layout)


def frames_model(window=1, path=None, predicts="velocity"):
    embed = VectorEmbed(DIM, WIDTH, noise=True, start=False)
    backbone = Transformer(TransformerConfig(WIDTH, 2, 2, rope=RoPE(axes=(4, 4))))
    head = InPlaceHead(WIDTH, DIM, path or Straight(), predicts)
    return randomise(Model(grid(FRAMES, PIXELS), WindowedFrames(window), embed, backbone, head), std=0.4)


def blank(model, rows=2):
    canvas = model.canvas({"token": torch.zeros(rows, FRAMES * PIXELS, DIM, dtype=torch.float64)})
    return pure_noise(canvas, "token", Keyed(5))


@pytest.mark.parametrize("window", [1, 2, 9])
def test_the_cache_is_invisible_where_frames_are_denoised_and_dropped(window):
    model, results, held, slots = frames_model(window), [], [], []
    for cached in (True, False):
        canvas, target = blank(model), Target(model, cached=cached)
        for step in decode(target, canvas, SolverStep(3), random=Keyed()):
            held += [target.cache.columns] if cached else []
            slots += [step.slots] if cached else []
        results.append(canvas.value["token"])
    assert (results[0] - results[1]).abs().max() < 1e-9
    now = [PIXELS * min(frame, window) for frame in range(FRAMES)]  # what is seen while a frame is denoised
    after = [PIXELS * min(frame, window - 1) for frame in range(FRAMES - 1)] + [0]  # and kept when it is done
    assert held == [n for pair in zip(now, now, after, strict=True) for n in pair]
    frame = [PIXELS] + [2 * PIXELS] * (FRAMES - 1)  # noise, and what the frame before became
    assert slots == [n for first in frame for n in (first, PIXELS, PIXELS)]


class DropsAtOnce(Target):
    """Forgets, in the first of several turns, what the others still look at."""

    def commit(self, keep, plan, repeats=False):
        super().commit(keep, plan)


def test_entries_dropped_before_the_last_turn_are_missed():
    model = frames_model(2)
    right, wrong = (generate(kind(model), blank(model), SolverStep(3)).value["token"] for kind in (Target, DropsAtOnce))
    assert (right - wrong)[:, : 2 * PIXELS].abs().max() < 1e-9
    assert (right - wrong)[:, 2 * PIXELS :].abs().max() > 1e-6


def test_a_half_denoised_canvas_is_taken_up_again():
    """By another target, whose cache is empty: in the middle of a frame."""
    model = frames_model(2)
    whole = generate(Target(model), blank(model), SolverStep(3))
    canvas = blank(model)
    first = Target(model)
    for turn, _ in enumerate(decode(first, canvas, SolverStep(3)), 1):
        if turn == 8:
            break
    assert canvas.level[0, 2 * PIXELS] == pytest.approx(1 / 3)
    again = generate(Target(model), canvas, SolverStep(3))
    assert (again.value["token"] - whole.value["token"]).abs().max() < 1e-9


def test_elements_at_different_levels_go_on_from_their_own():
    """Two of a frame are read together, one of them a step ahead: it is set while the other is revised."""
    model = frames_model(1)
    canvas = blank(model)
    ahead, level = torch.tensor([[1], [1]]), torch.tensor([[1 / 3], [1 / 3]])
    canvas.apply([Revise(ahead, canvas.noise["token"][:, 1:2], level)])
    step = next(iter(decode(Target(model), canvas, SolverStep(3))))
    assert [type(edit).__name__ for edit in step.edits] == ["Set", "Revise"]
    assert canvas.known[:, :2].tolist() == [[False, True]] * 2
    assert canvas.level[0, 0] == pytest.approx(2 / 3)


def test_one_step_of_velocity_on_the_straight_path_is_eulers():
    model = frames_model(1)
    canvas = blank(model)
    x = canvas.noise["token"][:, :PIXELS].clone()
    target = Target(model)
    with torch.inference_mode():
        rows = target.forward(target.plan(canvas), canvas)
    assert (rows.dist.towards(torch.full((2, 2), 0.75)) - (x + 0.25 * rows.dist.said)).abs().max() < 1e-12
    assert torch.equal(rows.dist.sample(Keyed(), None), rows.dist.towards(torch.zeros(2, 2)))


HEADS = [(Cosine(100), "noise"), (Cosine(100), "value"), (Straight(), "velocity")]


@pytest.mark.parametrize(("path", "predicts"), HEADS)
def test_the_loss_is_zero_for_what_was_put_there_and_only_for_that(path, predicts):
    model = frames_model(path=path, predicts=predicts)
    value = torch.randn(2, FRAMES * PIXELS, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    canvas = model.canvas({"token": value})
    level = torch.rand(2, FRAMES * PIXELS, generator=torch.Generator().manual_seed(2)).clamp(min=0.05)
    noised(canvas, "token", level, path, Keyed(3))
    reads = model.factorization.packed(canvas).reads
    dist = model.heads["token"].dist(torch.zeros(2, FRAMES * PIXELS, WIDTH).double(), reads, canvas)
    alpha, sigma = path.at(dist.level)
    noise = (canvas.noise["token"] - alpha[..., None] * value) / sigma[..., None]
    dist.said = {"noise": noise, "velocity": value - noise, "value": value}[predicts]
    assert dist.loss(value).max() < 1e-12
    assert (dist.towards(torch.zeros_like(level)) - value).abs().max() < 1e-9
    assert dist.loss(value + 0.1).min() > 1e-6
    assert torch.equal(model.losses(canvas) > 0, torch.ones(2, FRAMES * PIXELS, dtype=torch.bool))


def test_guidance_mixes_what_the_branches_predict():
    model = frames_model()
    canvas = blank(model)
    plan = model.factorization.step(canvas, None, 0)
    a, b = (model.dist(model.hidden(plan, canvas) * k, plan, canvas)[0] for k in (1, 2))
    mixed = a.mix([b], [1.5, -0.5])
    assert torch.equal(mixed.said, 1.5 * a.said - 0.5 * b.said)
    picked = mixed.take(torch.tensor([[1]]))
    assert torch.equal(picked.said, mixed.said[:, 1:]) and torch.equal(picked.x, mixed.x[:, 1:])


def test_what_does_not_fit_is_refused():
    model = frames_model()
    empty = model.canvas({"token": torch.zeros(1, FRAMES * PIXELS, DIM, dtype=torch.float64)})
    with pytest.raises(ValueError, match="the canvas has none"):
        generate(Target(model), empty, SolverStep(2))
    with pytest.raises(ValueError, match="at least one step"):
        SolverStep(0)
    with pytest.raises(ValueError, match="Straight ends in noise alone"):
        InPlaceHead(WIDTH, DIM, Straight(), "noise")
    with pytest.raises(ValueError, match="predicts noise, velocity or value, not 'score'"):
        InPlaceHead(WIDTH, DIM, predicts="score")
    with pytest.raises(ValueError, match="no decider for elements of kind 'token'; there are word"):
        generate(Target(model), blank(model), PerKind({"word": SampleAll()}))
    with pytest.raises(TypeError, match="has no log_prob"):
        model.log_prob(blank(model))
    canvas = blank(model)
    model.heads["token"] = CategoricalHead(WIDTH, 3).double()
    with pytest.raises(TypeError, match="Categorical cannot be denoised in place"):
        generate(Target(model), canvas, SolverStep(2))


def test_noise_keeps_its_place_whatever_is_known():
    """Draw 0 of each element: rows and elements meet the same noise in any company; what is given stays."""
    model = frames_model()
    value = {"token": torch.ones(2, FRAMES * PIXELS, DIM, dtype=torch.float64)}
    all_open = pure_noise(model.canvas(value), "token", Keyed(5))
    some = pure_noise(model.canvas(value, 3), "token", Keyed(5))
    assert torch.equal(some.noise["token"][:, 3:], all_open.noise["token"][:, 3:])
    assert bool(some.known[:, :3].all()) and not bool(some.known[:, 3:].any())
    lower = replace(Straight())
    assert lower.levels(4).tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert len(Cosine(100).levels(4)) == 5 and Cosine(100).levels(4)[0] == 1
