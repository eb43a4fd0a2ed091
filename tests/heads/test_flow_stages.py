"""Flows in stages: the algebra of their ends and jumps, and the law of what comes out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from seriatim.backbones.transformer import Transformer, TransformerConfig
from seriatim.canvas import Canvas, Set
from seriatim.decoding.sample import SampleAll
from seriatim.embed_pyramid import PlaceTable, PyramidEmbed
from seriatim.factorization.static import Scales
from seriatim.heads.flow_map import MapFlowConfig, MapFlowHead
from seriatim.heads.flow_stages import (
    Cells,
    StagedFlow,
    StagedFlowConfig,
    StagedFlowHead,
    Stages,
    jump,
    pyramid_noise,
    staged,
    zero_sum,
)
from seriatim.laws.case import randomise
from seriatim.layout import grid, pyramid
from seriatim.maps import area_down, nearest_up
from seriatim.model import Model
from seriatim.objectives.staged import Staged
from seriatim.plan import Reads
from seriatim.random import Generator, Key, Keyed
from seriatim.systems.image.e_car import Enlarged
from support.gaussian import Normal, sampled_law

SMALL = StagedFlowConfig(16, 1, steps=3, heads=2)


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def head_of(sides=(1, 2, 4), dim=4, patch=2, stages=None, **changes):
    head = StagedFlowHead(12, dim, pyramid(sides), stages or Stages.even(len(sides)), patch, replace(SMALL, **changes))
    return randomise(head, std=0.3)


# ---- the algebra -----------------------------------------------------------------------------------------------------


def test_down_undoes_up():
    x = draw(2, 3, 4, 4)
    assert torch.equal(area_down(nearest_up(x, (8, 8)), (4, 4)), x)


def test_noise_of_a_jump_sums_to_zero_in_each_block():
    """By its 4x4 covariance: unit variance, -1/3 between two of a block."""
    units = torch.eye(4, dtype=torch.float64).view(4, 1, 2, 2)
    matrix = zero_sum(units).flatten(1).T
    want = torch.full((4, 4), -1 / 3, dtype=torch.float64) + 4 / 3 * torch.eye(4, dtype=torch.float64)
    assert (matrix @ matrix.T - want).abs().max() < 1e-12
    assert zero_sum(draw(2, 3, 4, 4)).unfold(2, 2, 2).unfold(3, 2, 2).sum((-2, -1)).abs().max() < 1e-12


@pytest.mark.parametrize("s", [0.2, 1 / 3, 2 / 3])
def test_after_a_jump_noise_is_independent_and_the_mean_is_the_enlarged_signal(s):
    """(1 - s)^2 I for the noise of four neighbours, from that of the coarse value and that of the jump; s Up(Down x)
    for the mean."""
    e = Stages((0.0, s)).ends[0]
    up = (1 + s) / 2 * (1 - e) * torch.ones(4, 1, dtype=torch.float64)
    own = jump(torch.zeros(4, 1, 1, 1).double(), s, torch.eye(4, dtype=torch.float64).view(4, 1, 2, 2)).flatten(1).T
    want = (1 - s) ** 2 * torch.eye(4, dtype=torch.float64)
    assert (up @ up.T + own @ own.T - want).abs().max() < 1e-12
    x = draw(1, 2, 4, 4)
    mean = jump(e * area_down(x, (2, 2)), s, torch.zeros(1, 2, 4, 4).double())
    assert (mean - s * nearest_up(area_down(x, (2, 2)), (4, 4))).abs().max() < 1e-12
    drawn = jump((1 - e) * draw(40_000, 1, 1, 1), s, draw(40_000, 1, 2, 2, seed=1)).flatten(1)
    cov = drawn.T @ drawn / len(drawn)
    assert (cov - want).abs().max() < 5 * (2 / 40_000) ** 0.5 * (1 - s) ** 2  # 5 deviations


def test_training_and_sampling_share_their_noise():
    """Where a stage begins in training is a jump from where the one before ended, by some noise of unit variance."""
    cells, stages = Cells((1, 2, 4), 2), Stages.even(3)
    x, noise = draw(3, 16, 4), draw(3, 16, 4, seed=1)
    starts, ends = staged(x, noise, cells, stages)
    noises = pyramid_noise(cells.values(noise, 2), 3)
    for k in (1, 2):
        fresh = (noises[k] - nearest_up(noises[k - 1], tuple(noises[k].shape[2:])) / 2) / (3**0.5 / 2)
        assert area_down(fresh, tuple(noises[k - 1].shape[2:])).abs().max() < 1e-12
        end = cells.values(ends[:, cells.span(k - 1)], k - 1)
        begun = jump(end, stages.starts[k], fresh / (4 / 3) ** 0.5)
        assert (cells.elements(begun) - starts[:, cells.span(k)]).abs().max() < 1e-9
    assert torch.equal(ends[:, cells.span(2)], x)
    assert (starts[:, cells.span(0)] - cells.elements(noises[0])).abs().max() < 1e-12


def test_stages_end_where_the_next_begins():
    assert Stages.even(1) == Stages() and Stages().ends == (1.0,)
    assert torch.allclose(torch.tensor(Stages.even(3).ends), torch.tensor([0.5, 0.8, 1.0]))
    for wrong in ((), (0.1,), (0.0, 0.5, 0.5), (0.0, 1.0)):
        with pytest.raises(ValueError, match="stages start at"):
            Stages(wrong)
    for sides, patch in (((1, 3), 1), ((), 1), ((1, 2), 0)):
        with pytest.raises(ValueError, match="twice as large"):
            Cells(sides, patch)


# ---- the head --------------------------------------------------------------------------------------------------------


def test_one_stage_is_plain_flow_matching():
    """The same losses at the same times and noise, and the same samples, as a flow over the map."""
    mine = head_of((4,), patch=1)
    plain = MapFlowHead(12, 4, grid(4, 4), MapFlowConfig(16, 1, steps=3, heads=2)).double()
    plain.load_state_dict(mine.state_dict())
    h, x, e = draw(2, 16, 12), draw(2, 16, 4, seed=1), torch.arange(16)[None]
    reads, key = Reads(e, e), Key(torch.arange(2), e)
    canvas = Canvas(pyramid((4,)), {"token": x})
    plan = plain.plan(e)
    with torch.no_grad():
        drawn = mine.dist(h, reads, canvas).sample(Keyed(0), key)
        assert (drawn - plain.dist(h, reads, canvas).sample(Keyed(0), key)).abs().max() < 1e-9
        noise, t = draw(2, 16, 4, seed=2), torch.tensor([[0.3], [0.8]]).double().expand(2, 16)
        canvas.noise, canvas.level = {"token": noise}, 1 - t
        said = plain.net(torch.lerp(noise, x, t[..., None]), t, plain.net.told(h, plan), plan)
        loss = mine.dist(h, reads, canvas).loss(x)
    assert (loss - (said - (x - noise)).square().mean(-1)).abs().max() < 1e-9


def test_a_stage_is_drawn_as_a_whole_and_steps_are_split():
    head, seen = head_of(split=(4, 1, 2)), []
    head.watch = lambda stage, step, x: seen.append((stage, step))
    canvas = Canvas(pyramid((1, 2, 4)), {"token": torch.zeros(2, 21, 4, dtype=torch.float64)})
    for k in range(3):
        span = head.cells.span(k)
        e = torch.arange(span.start, span.stop)[None]
        with torch.no_grad():
            x = head.dist(draw(2, e.shape[1], 12), Reads(e, e), canvas).sample(Keyed(k), Key(canvas.row, e))
        canvas.apply([Set(x, e.expand(2, -1))])
    assert seen == [(k, i) for k, n in enumerate((4, 1, 2)) for i in range(-1, n)]
    part = torch.arange(5, 9)[None]
    with pytest.raises(ValueError, match="not filled in"):
        head.dist(draw(2, 4, 12), Reads(part, part), canvas).sample(Keyed(0), Key(canvas.row, part))
    for wrong in ({"split": (1, 2)}, {"stages": Stages.even(2)}, {"dim": 3}):
        with pytest.raises(ValueError):
            head_of(**wrong)
    with pytest.raises(ValueError, match="at least 1 step"):
        head_of(split=(0, 1, 1))


# ---- the law of what is drawn ----------------------------------------------------------------------------------------


class Known(StagedFlow):
    """Knows the law of pictures: says which velocity is to be expected of what stands there."""

    __slots__ = ()

    def velocities(self):
        (a, b, mean), n = self.head.maps[self.stage], self.states.shape[2] * self.head.dim
        cov, eye = self.head.law.cov, torch.eye(n, dtype=torch.float64)
        s, e = self.head.stages.starts[self.stage], self.head.stages.ends[self.stage]

        def velocity(x, t):
            signal, noise = (1 - t) * s * a + t * e * b, (1 - t) * (1 - s) + t * (1 - e)
            moved, slower = e * b - s * a, (1 - e) - (1 - s)
            both = moved @ cov @ signal.T + slower * noise * eye
            gain = both @ torch.linalg.inv(signal @ cov @ signal.T + noise**2 * eye)
            return (moved @ mean + (x.flatten(1) - signal @ mean) @ gain.T).view_as(x)

        return velocity


class Oracle(StagedFlowHead):
    def dist(self, h, reads, canvas):
        return Known(self, h[None], plan=self.plan(reads.element), canvas=canvas, element=reads.element)


def maps_of(cells, dim):
    """What each stage shows of the numbers of the finest map: the enlarged coarser map, and its own."""
    n = cells.sides[-1] ** 2 * dim
    clean = cells.pyramid(torch.eye(n, dtype=torch.float64).view(n, -1, dim))
    out = []
    for k, x in enumerate(clean):
        up = nearest_up(clean[k - 1], tuple(x.shape[2:])) if k else x * 0
        out.append([cells.elements(y).flatten(1).T for y in (up, x)])
    return out


@pytest.mark.parametrize(
    ("sides", "patch", "wrong"),
    [((1, 2, 4), 1, False), ((1, 2), 2, False), ((2,), 1, False), ((1, 2, 4), 1, True), ((1, 2), 2, True)],
)
def test_normal_pictures_come_out_of_all_stages_with_their_mean_and_covariance(sides, patch, wrong):
    """Exactly, as steps become small; not so where a jump adds noise that does not sum to zero."""
    dim, count = patch**2, len(sides)
    law, layout, total = Normal(sides[-1] ** 2, dim, seed=2), pyramid(sides), sum(n * n for n in sides)
    head = Oracle(8, dim, layout, Stages.even(count), patch, StagedFlowConfig(8, 1, heads=2)).double()
    head.law = law
    head.maps = [(a, b, law.mean) for a, b in maps_of(head.cells, dim)]
    embed = PyramidEmbed(None, dim, 8, Enlarged(patch), PlaceTable(total), count)
    backbone = Transformer(TransformerConfig(8, 1, 2))
    model = Model(layout, Scales(), embed.double(), backbone.double(), head)
    found = []
    with pytest.MonkeyPatch.context() as patched:
        if wrong:
            patched.setattr("seriatim.heads.flow_stages.zero_sum", lambda noise: noise)
        for steps in (40, 80, 160):
            head.config = replace(head.config, steps=steps)
            found.append(sampled_law(model, SampleAll()))
    first = head.cells.span(count - 1).start * dim
    mean, cov = ([y[first:] if y.dim() == 1 else y[first:, first:] for y in ys] for ys in zip(*found, strict=True))
    for values, want in ((mean, law.mean), (cov, law.cov)):
        a, b = 2 * values[1] - values[0], 2 * values[2] - values[1]
        gap = float(((4 * b - a) / 3 - want).abs().max())  # as steps become infinitely small
        if values is cov and wrong:
            assert gap > 0.02
        elif values is cov or not wrong:
            assert gap < 2e-3, gap


# ---- training --------------------------------------------------------------------------------------------------------


def model_of(sides=(1, 2, 4), patch=2):
    dim, total = patch**2, sum(n * n for n in sides)
    embed = PyramidEmbed(None, dim, 12, Enlarged(patch), PlaceTable(total), len(sides))
    head = head_of(sides, dim, patch)
    return randomise(Staged(pyramid(sides), Scales(), embed, Transformer(TransformerConfig(12, 2, 2)), head), std=0.3)


def test_what_training_sees_is_what_stages_leave_behind():
    model, x = model_of(), draw(4, 21, 4)
    noised = model.noised(model.canvas({"token": x}), Generator(0))
    head = model.heads["token"]
    finest = head.cells.span(2)
    assert torch.equal(noised.value["token"][:, finest], x[:, finest])
    for k in range(3):
        level = noised.level[:, head.cells.span(k)]
        assert torch.equal(level, level[:, :1].expand_as(level)) and len(level[:, 0].unique()) == 4
    other = x.clone()
    other[:, :5] += 1.0  # coarser maps are made here
    again = model.noised(model.canvas({"token": other}), Generator(0))
    assert torch.equal(noised.value["token"], again.value["token"])


def test_the_velocity_of_a_stage_ignores_later_maps():
    model, x = model_of(), draw(2, 21, 4)
    canvas = model.noised(model.canvas({"token": x}), Generator(0))
    with torch.no_grad():
        before = Model.losses(model, canvas)
    for k in range(3):
        other = canvas.copy()
        other.value["token"][:, model.heads["token"].cells.span(k)] += 1.0
        other.noise["token"][:, model.heads["token"].cells.span(k)] -= 0.5
        with torch.no_grad():
            moved = (Model.losses(model, other) - before).abs().amax(0) > 1e-9
        stage = torch.tensor([0] + [1] * 4 + [2] * 16)
        assert torch.equal(moved, stage >= k)


def test_a_loss_needs_its_beginning():
    model = model_of()
    canvas = model.canvas({"token": draw(2, 21, 4)})
    with pytest.raises(TypeError, match="train a `Staged` model"):
        Model.losses(model, canvas)
    with pytest.raises(TypeError, match="no likelihood"):
        model.losses(canvas, strict=True)
