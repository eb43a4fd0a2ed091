"""ARFlow: pictures behind noisier ones of their class; a state that carries the way of one picture."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from seriatim.data.base import load_data
from seriatim.data.together import Copies, OfOneClass
from seriatim.decoding.guidance import Guidance
from seriatim.decoding.loop import decode
from seriatim.decoding.solver import Noise, SolverStep, StochasticStep
from seriatim.decoding.target import Target
from seriatim.factorization.trajectory import Moments, Trajectory
from seriatim.heads.in_place import Denoised, InPlaceHead, Straight
from seriatim.laws.case import randomise
from seriatim.plan import OrderError
from seriatim.random import Generator, Keyed
from seriatim.systems.flow_trials import remembering
from seriatim.systems.image import arflow
from seriatim.systems.system import Sampling
from seriatim.tokenizers.patches import PatchConfig, PatchTokenizer

TINY = arflow.Config(width=16, depth=2, heads=2)


def model_of(**changes):
    return randomise(arflow.build(replace(TINY, **changes)), std=0.3)


def labels(n):
    return {"class": torch.arange(n) % 10}


def blank(model, n):
    canvas = model.blank(n)
    canvas.value["token"] = canvas.value["token"].to(model.embed.project.weight)
    return canvas


def sequence(model, count, n=2, seed=0):
    value = torch.randn(n, 16 * count, 4, generator=torch.Generator().manual_seed(seed)).double()
    return model.noised(model.canvas({"token": value}, layout=arflow.pictures(count, 4)), Keyed(1))


def says(model, canvas):
    plan = model.factorization.noisy(canvas)
    with torch.no_grad():
        return model.heads["token"].out(model.hidden(plan, canvas, None, model.encode(labels(canvas.batch))))


def way(model, decider, n=2, guidance=None):
    """What is said in each step of sampling, and the canvas as it stood; the cache in the end."""
    target, canvas, random, out = Target(model, labels(n), guidance), blank(model, n), Keyed(3), []
    proposer = Noise()
    with torch.inference_mode():
        proposer.propose(canvas, target, random)
        while (plan := target.plan(canvas)) is not None:
            rows = target.forward(plan, canvas)
            out.append((rows.dist.said, canvas.copy()))
            step = decider.decide(canvas, None, rows, random)
            target.commit(step.keep, plan, any(type(e).__name__ == "Revise" for e in step.edits))
            canvas.apply(step.edits)
    return out, target.cache


def as_pictures(model, steps):
    """The states that a picture went through, as a sequence of pictures."""
    n, count = steps[0][1].batch, len(steps)
    canvas = model.canvas({"token": torch.zeros(n, 16 * count, 4).double()}, layout=arflow.pictures(count, 4))
    canvas = model.at_levels(canvas, torch.ones(n, 16 * count), Keyed(0))
    canvas.noise["token"] = torch.cat([c.noise["token"] for _, c in steps], 1)
    canvas.level = torch.cat([c.level for _, c in steps], 1)
    return canvas


@pytest.mark.parametrize("decider", [SolverStep, StochasticStep])
def test_sampling_with_a_state_is_one_pass_over_all_that_a_picture_has_been(decider):
    model = model_of()
    steps, cache = way(model, decider(7))
    assert len(steps) == 7 and cache.length == 7 * 16
    packed = says(model, as_pictures(model, steps)).unflatten(1, (7, 16))
    for turn, (said, _) in enumerate(steps):
        assert (packed[:, turn] - said).abs().max() < 1e-9
    model.factorization = Moments(16)
    erased, cache = way(model, decider(7))
    assert (erased[0][0] - steps[0][0]).abs().max() < 1e-9 < 1e-3 < (erased[3][0] - steps[3][0]).abs().max()
    assert cache.length == 0


def test_the_state_is_as_large_after_forty_steps_as_after_one():
    sizes = [way(model_of(), SolverStep(steps))[1].nbytes() for steps in (1, 40)]
    assert sizes[0] == sizes[1] == 2 * 2 * 2 * 8 * 8 * 8  # layers, rows, heads, p, p, bytes


def test_pictures_see_noisier_ones_and_never_cleaner_ones():
    model = model_of()
    canvas = sequence(model, 3)
    before = says(model, canvas).unflatten(1, (3, 16))
    for picture in range(3):
        other = canvas.copy()
        other.noise["token"][:, 16 * picture : 16 * (picture + 1)] += 1.0
        moved = (says(model, other).unflatten(1, (3, 16)) - before).abs().amax((0, 2, 3))
        assert bool((moved[:picture] == 0).all()) and bool((moved[picture:] > 1e-6).all())


def test_levels_of_noise_fall_along_a_sequence_and_spread_over_their_range():
    model = model_of()
    level = sequence(model, 5, n=64).level.unflatten(1, (5, 16))
    assert bool((level == level[:, :, :1]).all()) and bool((level[:, :, 0].diff(dim=1) < 0).all())
    assert float(level.min()) < 0.02 and float(level.max()) > 0.98 and abs(float(level.mean()) - 0.5) < 0.03


def test_one_picture_is_a_plain_flow_whatever_the_gates_of_the_state():
    """Trained and sampled alike: nothing of the state is felt (SiT)."""
    model = model_of(pictures=1)
    assert type(model.factorization) is Moments
    before, canvas = says(model, sequence(model, 1)), sequence(model, 1)
    steps, _ = way(model, SolverStep(4))
    for said, then in steps:
        assert (says(model, then) - said).abs().max() < 1e-9
    with torch.no_grad():
        for layer in model.backbone.layers:
            layer.forget.normal_()
    assert torch.equal(says(model, canvas), before)
    model.losses_of(canvas, labels(2)).sum().backward()
    assert not any(layer.forget.grad.any() for layer in model.backbone.layers)
    model.factorization = Trajectory(16)
    assert (way(model, SolverStep(4))[0][2][0] - steps[2][0]).abs().max() > 1e-3


class Normal(InPlaceHead):
    """What is known of values of mean 2 and deviation 0.5, exactly."""

    def dist(self, h, reads, canvas):
        d = super().dist(h, reads, canvas)
        level = d.level[..., None]
        clean = 1 - level
        off = (d.x - clean * 2) / (clean**2 * 0.25 + level**2)
        return Denoised(2 + clean * 0.25 * off - level * off, d.x, d.level, d.path, "velocity")


def test_the_law_of_a_normal_variable_is_met():
    """8,000 numbers: five standard errors, and 2% for the steps."""
    model = model_of(width=8, depth=1)
    model.heads["token"] = Normal(8, 4, Straight(), "velocity").double()
    canvas = blank(model, 125)
    list(decode(Target(model, labels(125)), canvas, StochasticStep(100), Noise(), Keyed(3)))
    x = canvas.value["token"]
    assert abs(float(x.mean()) - 2) < 5 * 0.5 / 8000**0.5 + 0.02
    assert abs(float(x.std()) - 0.5) < 5 * 0.5 / 16000**0.5 + 0.01


def system_of(**changes):
    torch.manual_seed(0)
    system = arflow.ARFlow(replace(TINY, **changes), PatchTokenizer(PatchConfig(side=8, channels=1, patch=2))).eval()
    randomise(system.model, std=0.3).float()
    return system


def test_sequences_hold_pictures_of_one_class():
    data, system = load_data("digits", "image"), system_of()
    side = system.drawn_from(data.train)
    assert type(side) is OfOneClass and type(system_of(context="same").drawn_from(data.train)) is Copies
    assert system_of(pictures=1).drawn_from(data.train) is data.train
    batch = side.take(torch.arange(60), torch.Generator().manual_seed(0))
    canvas, condition = system.canvas(batch)
    assert canvas.batch == 12 and canvas.layout.size == 80
    assert torch.equal(condition["class"], data.train.labels[:60:5])
    one = system.canvas({"image": batch["image"][:, 2], "label": batch["label"]})[0]
    assert torch.equal(canvas.value["token"][:, 32:48], one.value["token"])
    loss, count = system.losses(batch, Generator(0), 0.1)
    assert int(count) == 12 * 80 and bool(loss.isfinite())
    with torch.no_grad():
        assert system.score(data.test, 20)[1] == 4 * 80 == system.score(system.drawn_from(data.test), 20)[1]


def test_pictures_are_drawn_in_as_many_forwards_as_steps():
    system = system_of()
    out = system.draw(torch.tensor([3, 5]), sampling=Sampling(steps=6, guidance=0.5), film=True)
    assert out.forwards == 6 and len(out.frames) == 6 and out.images.shape == (2, 1, 8, 8)
    assert torch.equal(out.frames[-1], out.images)
    guided, plain = (way(system_of().model.double(), SolverStep(3), guidance=g)[0] for g in (Guidance(0.0), None))
    assert (guided[2][0] - plain[2][0]).abs().max() < 1e-9


def test_a_known_part_stands_as_noisy_as_the_rest_until_it_is_decided():
    system = system_of()
    images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    keep = torch.zeros(8, 8, dtype=torch.bool)
    keep[:, :4] = True
    out = system.repaint(images, keep, torch.tensor([3, 5]), Sampling(steps=5), seed=1)
    assert torch.equal(out.images[..., :4], images[..., :4])
    known, value = keep[::2, ::2].flatten(), system.vectors(images)
    decider = system.keeping(SolverStep(4), {"token": value}, known)
    steps, _ = way(system.model, decider)
    noise = steps[0][1].noise["token"]
    for _, canvas in steps[1:]:
        level = canvas.level[:, :, None]
        path = ((1 - level) * value + level * noise)[:, known]
        assert (canvas.noise["token"][:, known] - path).abs().max() < 1e-6
    assert len({float(canvas.level[0, 0]) for _, canvas in steps}) == 4


def test_what_cannot_be_is_refused():
    for wrong in ({"pictures": 0}, {"context": "other"}, {"deviation": 0.0}):
        with pytest.raises(ValueError, match=r"sequence|deviation"):
            replace(TINY, **wrong)
    model = model_of()
    with pytest.raises(OrderError, match="one picture"):
        model.factorization.step(sequence(model, 2), None, 0)
    with pytest.raises(ValueError, match="16 elements each"):
        model.factorization.of(arflow.grid(3, 3))


@pytest.mark.slow
def test_figures_tell_what_is_remembered():
    class Trained:
        system, data, folder = system_of(), load_data("digits", "image"), None

    import seriatim.systems.flow_trials as trials

    seeds, trials.trained_seed = trials.trained_seed, lambda trained: 0
    try:
        figures = remembering(Trained, samples=20)
    finally:
        trials.trained_seed = seeds
    assert {"fd_s", "fd_s_25", "fd_s_50_free", "fd_s_50_erased", "fd_s_50_free_erased"} <= set(figures)
    assert type(Trained.system.model.factorization) is Trajectory
