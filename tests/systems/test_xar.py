"""xAR: cells by flow matching behind noisy cells; what is sampled, and by whom a cell is seen."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from seriatim.data.digits import digits
from seriatim.decoding.guidance import Guidance
from seriatim.decoding.loop import decode, generate
from seriatim.decoding.solver import Noise, SolverStep
from seriatim.decoding.target import Target
from seriatim.factorization.cells import cells
from seriatim.laws.case import randomise
from seriatim.random import Generator, Keyed
from seriatim.systems.flow_trials import EXAMPLES, behind_noise, context_losses
from seriatim.systems.image import xar
from seriatim.systems.system import Sampling, evenly
from seriatim.tokenizers.patches import PatchConfig, PatchTokenizer
from seriatim.training.loop import Recipe, fit

TINY = xar.Config(width=16, depth=2, heads=2)
GROUP = cells(4, 4, 2, 2)


def model_of(seed=0, **changes):
    return randomise(xar.build(replace(TINY, **changes)), seed, std=0.3)


def vectors(n, seed=0):
    return torch.randn(n, 16, 4, generator=torch.Generator().manual_seed(seed)).double()


def labels(n):
    return {"class": torch.arange(n) % 10}


def says(model, canvas, label, packed=False):
    plan = model.factorization.packed(canvas) if packed else model.factorization.noisy(canvas)
    with torch.no_grad():
        return model.heads["token"].out(model.hidden(plan, canvas, None, model.encode(label))[:, :16])


def sampled(model, n, decider, guidance=None, seed=3, cached=True):
    """Samples, and what was said in each step with the canvas as it stood."""
    canvas = model.blank(n)
    canvas.value["token"] = canvas.value["token"].double()
    target, met = Target(model, labels(n), guidance, cached=cached), []
    proposer, random = Noise(), Keyed(seed)
    with torch.inference_mode():
        while not canvas.done:
            proposer.propose(canvas, target, random)
            plan = target.plan(canvas)
            rows = target.forward(plan, canvas)
            met.append((rows.element, rows.dist.said, canvas.copy()))
            step = decider.decide(canvas, None, rows, random)
            target.commit(step.keep, plan, any(type(e).__name__ == "Revise" for e in step.edits))
            canvas.apply(step.edits)
    return canvas.value["token"], met


def test_a_fresh_model_says_that_nothing_moves():
    model, canvas = xar.build(TINY), None
    canvas = model.noised(model.canvas({"token": vectors(2).float()}), Keyed(1))
    assert float(says(model, canvas, labels(2)).abs().max()) == 0


@pytest.mark.parametrize("x", ["cell", "subsample"])
def test_what_decoding_reads_is_what_one_stream_of_training_reads_behind_cells_at_level_0(x):
    model = model_of(x=x)
    order = model.factorization.group
    _, met = sampled(model, 3, SolverStep(3))
    for element, said, canvas in met:
        drawn = canvas.copy()
        drawn.noise["token"] = torch.where(canvas.known[..., None], canvas.value["token"], canvas.noise["token"])
        drawn.level = torch.where(canvas.known, 0.0, canvas.level)
        mine = element[0]
        assert torch.equal(order[mine], order[mine[:1]].expand(4))
        assert (says(model, drawn, labels(3))[:, mine] - said).abs().max() < 1e-9


def test_a_little_noise_can_be_told_of_the_context():
    low, high = model_of(context_level=0.0), model_of(context_level=0.05)
    a, b = (sampled(m, 2, SolverStep(2))[0] for m in (low, high))
    assert torch.equal(a[:, GROUP == 0], b[:, GROUP == 0])
    assert (a - b)[:, GROUP > 0].abs().amax((0, 2)).min() > 1e-4


def test_guidance_grows_with_the_cell_and_none_is_conditional():
    model = model_of()
    plain, guided, none = (
        sampled(model, 2, SolverStep(2), g)[0] for g in (None, Guidance(2.0, "linear"), Guidance(0.0))
    )
    assert (plain - none).abs().max() < 1e-9
    assert (plain - guided)[:, GROUP == 0].abs().max() < 1e-9
    assert (plain - guided)[:, GROUP == 1].abs().max() > 1e-3
    fresh = sampled(model, 2, SolverStep(2), Guidance(2.0, "linear"), cached=False)[0]
    assert (guided - fresh).abs().max() < 1e-9


def test_the_weight_of_guidance_is_linear_over_cells():
    """Of what is said in each step: conditional + w (i / 3) (conditional - null)."""
    model = model_of()
    _, met = sampled(model, 2, SolverStep(1), Guidance(2.0, "linear"))
    gone = torch.ones(2, dtype=torch.bool)
    for cell, (element, said, canvas) in enumerate(met):
        plan = model.factorization.step(canvas, None, 0)
        full, null = (
            model.dist(model.hidden(plan, canvas, None, model.encode(labels(2), drop)), plan, canvas)[0].said
            for drop in (None, gone)
        )
        assert torch.equal(GROUP[element[0]], torch.full((4,), cell))
        assert (said - (full + 2 * cell / 3 * (full - null))).abs().max() < 1e-9


def test_slots_of_a_cell_may_stand_in_any_order():
    """Tokens of a cell together with their places: what is said is permuted alike."""
    model = model_of()
    canvas = model.noised(model.canvas({"token": vectors(2)}), Keyed(1))
    plan = model.factorization.noisy(canvas)
    order = GROUP.argsort(stable=True).view(4, 4)
    shuffled = torch.stack(
        [cell[torch.randperm(4, generator=torch.Generator().manual_seed(int(cell[0])))] for cell in order]
    )
    other = plan.take(shuffled.flatten()[None])
    condition = model.encode(labels(2))
    with torch.no_grad():
        a, b = (model.hidden(p, canvas, None, condition) for p in (plan, other))
    assert (a[:, shuffled.flatten()] - b).abs().max() < 1e-12
    assert not torch.equal(plan.slots.element, other.slots.element)


class OneLevel(type(model_of())):
    """Wrong on purpose: one level for the whole picture, so that no context is cleaner than what is denoised."""

    def at_levels(self, canvas, level, random):
        return super().at_levels(canvas, level[:, :1].expand_as(level), random)


def context_level(model):
    noisy = model.noised(model.canvas({"token": vectors(64)}), Generator(0))
    return noisy.level[:, GROUP == 0].mean(1) - noisy.level[:, GROUP == 3].mean(1)


def test_every_cell_has_a_level_of_its_own():
    model = model_of()
    assert context_level(model).abs().median() > 0.1
    model.__class__ = OneLevel
    assert context_level(model).abs().max() == 0


def test_fresh_weights_learn_a_cell_from_the_cells_before_it():
    """Pictures of one vector in every place: later cells cost less than the first."""
    torch.manual_seed(0)
    model = xar.build(replace(TINY, width=32))

    def draw(n, generator):
        x = torch.randn(n, 1, 4, generator=generator).expand(-1, 16, -1).contiguous()
        return model.canvas({"token": x}), {"class": torch.zeros(n, dtype=torch.long)}

    fit(model, draw, Recipe(100, 32, 1e-2, weight_decay=0.0))
    canvas, label = draw(256, torch.Generator().manual_seed(1))
    with torch.no_grad():
        losses = model.losses(canvas, label, random=Generator(5)).mean(0)
    first, last = float(losses[GROUP == 0].mean()), float(losses[GROUP == 3].mean())
    assert last < 0.75 * first


def system_of():
    torch.manual_seed(0)
    system = xar.XAR(TINY, PatchTokenizer(PatchConfig(side=8, channels=1, patch=2))).eval()
    randomise(system.model, std=0.3).float()
    return system


def test_pictures_are_drawn_with_a_film_of_their_cells_and_noise():
    system = system_of()
    out = system.draw(torch.tensor([3, 5]), sampling=Sampling(steps=2), film=True)
    assert out.images.shape == (2, 1, 8, 8) and bool(torch.isfinite(out.images).all())
    assert out.forwards == 8
    assert torch.equal(out.decided[0], 2 * GROUP.view(4, 4) + 2)
    first, second = out.frames[0], out.frames[1]
    assert bool((first[:, :, 4:] == 0).all() and (first[:, :, :4, :4] != 0).any())  # noise of the first cell
    assert not torch.equal(first[:, :, :4, :4], second[:, :, :4, :4])


def test_settings_follow_from_the_data_and_the_tokenizer():
    known = xar.XAR.known(PatchTokenizer(PatchConfig(side=8, channels=1, patch=2)), digits())
    assert (known["side"], known["dim"], known["classes"]) == (4, 4, 10) and known["deviation"] > 0
    with pytest.raises(ValueError, match="do not tile"):
        xar.build(replace(TINY, cell=3))
    with pytest.raises(ValueError, match="x is cell or subsample"):
        replace(TINY, x="scale")


def test_the_trial_of_contexts_feeds_wrong_values_and_asks_for_the_true_ones():
    """Beside the loss of training in two streams, number for number; and a wrong context costs the later cells only."""
    system, data = system_of(), digits()
    system.model.noisy_context = False
    true, wrong = (behind_noise(system, data.test, s) for s in (0.0, 1.0))
    canvas, label = system.canvas(data.test.take(evenly(len(data.test), EXAMPLES)))
    noisy = system.model.noised(canvas, Generator(0))
    with torch.no_grad():
        losses = system.model.losses_of(noisy, label)
        other = noisy.copy()
        other.value["token"] = other.value["token"] + 1
        moved = context_losses(system.model, noisy, other, label) - losses
    assert true == pytest.approx(float(losses[:, GROUP > 0].mean()), rel=1e-4)
    assert abs(wrong - true) > 1e-4 * true
    assert float(moved[:, GROUP == 0].abs().max()) < 1e-4 < float(moved[:, GROUP > 0].abs().amin(0).max())


def test_generation_needs_noise_to_begin_with():
    model = model_of()
    with pytest.raises(ValueError, match="hold"):
        generate(Target(model, labels(1)), model.blank(1), SolverStep(2))
    steps = list(decode(Target(model, labels(1)), model.blank(1), SolverStep(2), Noise()))
    assert len(steps) == 8
