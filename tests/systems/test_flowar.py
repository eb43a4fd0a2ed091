"""FlowAR: maps that double, each drawn as a whole behind the coarser ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from seriatim.data.digits import digits
from seriatim.decoding.loop import generate
from seriatim.decoding.sample import SampleAll
from seriatim.decoding.target import Target
from seriatim.heads.flow_map import MapFlow, MapFlowHead
from seriatim.laws.case import randomise
from seriatim.maps import area_down, bicubic_up
from seriatim.random import Generator, Key, Keyed
from seriatim.systems.image import flowar
from seriatim.systems.system import Sampling
from seriatim.tokenizers.conv import map_to_rows, rows_to_map
from seriatim.tokenizers.kl import KLConfig, KLTokenizer
from seriatim.tokenizers.patches import PatchConfig, PatchTokenizer
from support.gaussian import Normal, expected, sampled_law

TINY = flowar.Config(width=16, depth=2, heads=2, flow_width=16, flow_depth=1, flow_steps=3)
SCALE = torch.tensor([0, *[1] * 4, *[2] * 16])


def model_of(**changes):
    return randomise(flowar.build(replace(TINY, **changes)), std=0.3)


def labels(n):
    return {"class": torch.arange(n) % 10}


def maps(n, seed=0):
    finest = torch.randn(n, 4, 4, 4, generator=torch.Generator().manual_seed(seed)).double()
    return torch.cat([map_to_rows(area_down(finest, (s, s))) for s in (1, 2, 4)], 1)


def states(model, values, label):
    canvas = model.canvas({"token": values})
    plan = model.factorization.packed(canvas).check()
    with torch.no_grad():
        return model.hidden(plan, canvas, None, model.encode(label))


def test_each_map_is_fed_the_one_before_it_enlarged():
    model, x = model_of(), maps(2)
    canvas = model.canvas({"token": x})
    plan = model.factorization.packed(canvas)
    with torch.no_grad():
        fed = model.embed(canvas, plan, None, None)
        up = map_to_rows(bicubic_up(rows_to_map(x[:, 1:5], (2, 2)), (4, 4)))
        want = model.embed.project(up) + model.embed.position[5:] + model.embed.scale[2]
    assert (fed[:, 5:] - want).abs().max() < 1e-12


def test_feeds_in_decoding_are_those_of_training_where_the_maps_are_the_true_ones():
    model, x = model_of(), maps(2)
    packed = states(model, x, labels(2))
    target, canvas = Target(model, labels(2)), model.canvas({"token": torch.zeros_like(x)})
    canvas.value["token"] = x.clone()
    met = []
    with torch.inference_mode():
        while (plan := target.plan(canvas)) is not None:
            rows = target.forward(plan, canvas)
            met.append(rows.hidden)
            step = SampleAll().decide(canvas, None, rows, Keyed(0))
            element = step.edits[0].element
            step.edits[0].value = x[:, element[0]]
            target.commit(step.keep, plan)
            canvas.apply(step.edits)
    assert (torch.cat(met, 1) - packed).abs().max() < 1e-9


def test_a_scale_depends_on_coarser_scales_and_the_class_only():
    model, x = model_of(), maps(2)
    before = states(model, x, labels(2))
    for e in range(21):
        other = x.clone()
        other[:, e] += 1.0
        moved = (states(model, other, labels(2)) - before).abs().amax((0, 2)) > 1e-9
        assert torch.equal(moved, SCALE[e] < SCALE), e
    moved = (states(model, x, {"class": torch.tensor([5, 6])}) - before).abs().amax(2)
    assert bool((moved > 1e-6).all())


def test_a_fresh_model_draws_noise():
    model = flowar.build(TINY)
    canvas = generate(Target(model, labels(2)), model.blank(2), SampleAll(), random=Keyed(4))
    noise = Keyed(4).normal((2, 21, 4), Key(canvas.row, torch.arange(21)[None]))
    assert torch.equal(canvas.value["token"], noise)


def test_one_scale_alone_is_flow_matching_given_the_class():
    """Every place has the state of its own, of class and place; loss and samples are those of the flow behind it."""
    model = model_of(scales=(4,))
    x, e = maps(3)[:, 5:], torch.arange(16)[None]
    head: MapFlowHead = model.heads["token"]
    h = states(model, x, labels(3))
    assert (h - states(model, x + 1, labels(3))).abs().max() == 0
    plan, key = head.plan(e), Key(torch.arange(3), e)
    with torch.no_grad():
        losses = model.losses(model.canvas({"token": x}), labels(3), random=Keyed(2))
        t = Keyed(2).uniform((3, 16), key)[:, :1].expand(-1, 16).double()
        noise = Keyed(2).normal((3, 16, 4), key._replace(draw=4)).double()
        said = head.net(torch.lerp(noise, x, t[..., None]), t, head.net.told(h, plan), plan)
        assert (losses - (said - (x - noise)).square().mean(-1)).abs().max() < 1e-5
        y = Keyed(3).normal((3, 16, 4), key).double()
        for i in range(3):
            y = y + head.net(y, i / 3, head.net.told(h, plan), plan) / 3
    canvas = model.canvas({"token": torch.zeros_like(x)})
    drawn = generate(Target(model, labels(3)), canvas, SampleAll(), random=Keyed(3)).value["token"]
    assert (drawn - y).abs().max() < 1e-9


class Known(MapFlow):
    """Knows the law of pyramids: says what is to be expected of a map, given the coarser ones."""

    __slots__ = ("given",)

    def velocities(self):
        mean, cov = self.given

        def velocity(x, t):
            flat = x.flatten(1)
            value = expected(mean, cov, flat, t, 1 - t)
            return ((value - flat) / (1 - t)).view_as(x)

        return velocity


class Oracle(MapFlowHead):
    law: Normal

    def dist(self, h, reads, canvas):
        dist = Known(self, h[None], plan=self.plan(reads.element))
        known = canvas.known[0].nonzero()[:, 0]
        dist.given = self.law.given(reads.element[0], known, canvas.value["token"][:, known].double())
        return dist


@pytest.mark.parametrize("blind", [False, True])
def test_a_normal_pyramid_is_drawn_with_the_covariance_of_its_scales(blind):
    """Coarse maps are means of the finest; the law of all of them together comes out, unless maps do not know the
    coarser ones."""
    model = model_of(side=2, dim=2, scales=(1, 2))
    finest = Normal(4, 2, seed=3)
    down = torch.cat([torch.eye(2, dtype=torch.float64).repeat(1, 4) / 4, torch.eye(8, dtype=torch.float64)])
    law = Normal(5, 2)
    law.mean, law.cov = down @ finest.mean, down @ finest.cov @ down.T
    head = model.heads["token"]
    head.__class__, head.law = Oracle, law
    if blind:
        head.law = Normal(5, 2)
        head.law.mean, head.law.cov = law.mean, law.cov.clone()
        head.law.cov[:2, 2:] = head.law.cov[2:, :2] = 0
    found = []
    for steps in (40, 80):
        head.config = replace(head.config, steps=steps, sampler="euler")
        found.append(sampled_law(model, SampleAll(), condition={"class": torch.tensor(1)}))
    assert (found[1][0] - law.mean).abs().max() < 1e-5
    gap = (2 * found[1][1] - found[0][1] - law.cov).abs()
    assert bool(gap.max() < 0.01) != blind
    assert float(gap[:2, 2:].max() > 0.05) == blind


@pytest.mark.parametrize("kind", ["patches", "kl"])
def test_any_tokenizer_of_vectors_will_do(kind):
    torch.manual_seed(0)
    patches = PatchTokenizer(PatchConfig(side=8, channels=1, patch=2))
    tokenizer = patches if kind == "patches" else KLTokenizer(KLConfig(side=8, dim=3, width=8, halvings=1)).eval()
    known = flowar.FlowAR.known(tokenizer, digits())
    assert known["side"] == 4 and known["dim"] == (4 if kind == "patches" else 3)
    system = flowar.FlowAR(replace(TINY, scales=(), **known), tokenizer).eval()
    randomise(system.model, std=0.3).float()
    batch = digits().test.take(torch.arange(4))
    canvas, label = system.canvas(batch)
    assert canvas.layout.size == 21
    assert (canvas.value["token"][:, 0] - canvas.value["token"][:, 5:].mean(1)).abs().max() < 1e-5
    assert bool(torch.isfinite(system.model.losses(canvas, label, random=Generator(0))).all())
    out = system.draw(torch.tensor([3, 5]), sampling=Sampling(guidance=0.5), film=True)
    assert out.images.shape == (2, 1, 8, 8) and out.forwards == 3
    if kind == "patches":
        assert torch.equal(out.frames[2], out.images)
        coarse = out.frames[0].unfold(2, 2, 2).unfold(3, 2, 2)
        assert (coarse - coarse[:, :, :1, :1]).abs().max() < 1e-6  # one vector in all places


def test_scales_are_halvings_and_grow():
    assert flowar.Config(side=16).scales == (1, 2, 4, 8, 16)
    assert flowar.Config(side=6).scales == (1, 3, 6)
    assert flowar.Config(side=4, scales=[1, 4]).scales == (1, 4)
    for wrong in ((1, 2), (2, 2, 4), (4, 2)):
        with pytest.raises(ValueError, match="scales grow up to"):
            flowar.Config(side=4, scales=wrong)
