"""ACDiT: two streams, of which one is modulated; what stands in the cache, and what is read behind it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from seriatim.conditions.clock import NoiseClock
from seriatim.decoding.guidance import Guidance
from seriatim.decoding.loop import decode
from seriatim.decoding.solver import MultiStep, Noise, SolverStep
from seriatim.decoding.target import Target
from seriatim.factorization.cells import cells
from seriatim.factorization.groups import Groups
from seriatim.laws.case import randomise
from seriatim.layout import grid
from seriatim.random import Generator, Keyed
from seriatim.systems.image import acdit
from seriatim.systems.system import Sampling
from seriatim.tokenizers.patches import PatchConfig, PatchTokenizer
from seriatim.training.loop import Recipe, fit

TINY = acdit.Config(width=16, depth=2, heads=2, train_steps=100)
GROUP = cells(4, 4, 2, 2)


def model_of(seed=0, **changes):
    return randomise(acdit.build(replace(TINY, **changes)), seed, std=0.3)


def labels(n, shift=0):
    return {"class": (torch.arange(n) + shift) % 10}


def blank(model, n, layout=None):
    canvas = model.blank(n, layout=layout)
    canvas.value["token"] = canvas.value["token"].double()
    return canvas


def says(model, canvas, label, size=16):
    """What one pass reads of all blocks, each behind clean blocks."""
    plan = model.factorization.packed(canvas)
    with torch.no_grad():
        return model.heads["token"].out(model.hidden(plan, canvas, None, model.encode(label))[:, :size])


def met(model, canvas, decider, label):
    """What is said in each step of decoding, and the canvas as it stood."""
    target, proposer, random, out = Target(model, label), Noise(), Keyed(3), []
    with torch.inference_mode():
        while not canvas.done:
            proposer.propose(canvas, target, random)
            plan = target.plan(canvas)
            rows = target.forward(plan, canvas)
            out.append((rows.element[0], rows.dist.said, canvas.copy()))
            step = decider.decide(canvas, None, rows, random)
            target.commit(step.keep, plan, any(type(e).__name__ == "Revise" for e in step.edits))
            canvas.apply(step.edits)
    return out


@pytest.mark.parametrize("decider", [SolverStep, MultiStep])
@pytest.mark.parametrize("block", [(2, 2), (1, 4), (1, 2), (4, 4)])
def test_one_pass_of_training_reads_what_cached_sampling_reads_at_any_time(decider, block):
    model = model_of(block=block)
    steps = met(model, blank(model, 3), decider(3), labels(3))
    assert len(steps) == 3 * 16 // (block[0] * block[1])
    for element, said, canvas in steps:
        assert (says(model, canvas, labels(3))[:, element] - said).abs().max() < 1e-9


class Modulated(NoiseClock):
    """Wrong on purpose: clean blocks hear time and class, too."""

    def __init__(self, width):
        super().__init__(width, 0.0)


def test_keys_and_values_of_clean_blocks_know_neither_time_nor_class_nor_guidance():
    model = model_of()
    value = torch.randn(2, 16, 4, generator=torch.Generator().manual_seed(0)).double()

    def clean(label, level):
        canvas = model.at_levels(model.canvas({"token": value}), torch.full((2, 16), level), Keyed(1))
        plan = model.factorization.packed(canvas)
        cache = model.new_cache(2, 64)
        with torch.no_grad():
            model.hidden(plan, canvas, cache, model.encode(label))
        return cache.buffer[..., 16:32, :].clone()

    first = clean(labels(2), 0.2)
    assert torch.equal(first, clean(labels(2, 4), 0.9))
    clock, model.clock = model.clock, Modulated(16).double()
    model.clock.net.load_state_dict(clock.net.state_dict())
    assert not torch.equal(clean(labels(2), 0.2), clean(labels(2, 4), 0.9))


def test_both_branches_of_guidance_remember_the_same():
    model = model_of()
    target, canvas = Target(model, labels(2), Guidance(1.5)), blank(model, 2)
    for turn, _ in enumerate(decode(target, canvas, SolverStep(2), Noise(), Keyed(3)), 1):
        held = target.cache.buffer[..., : target.cache.columns, :]
        assert torch.equal(held[:, :, :2], held[:, :, 2:])
        if turn == 7:
            break
    assert target.cache.columns == 12


def test_no_guidance_is_conditional():
    model = model_of()
    out = []
    for guidance in (None, Guidance(0.0), Guidance(1.5)):
        canvas = blank(model, 2)
        list(decode(Target(model, labels(2), guidance), canvas, MultiStep(3), Noise(), Keyed(3)))
        out.append(canvas.value["token"])
    assert (out[0] - out[1]).abs().max() < 1e-9 < 1e-3 < (out[0] - out[2]).abs().max()


def test_the_loss_of_a_block_knows_neither_later_blocks_nor_the_noise_of_others():
    model = model_of()
    value = torch.randn(2, 16, 4, generator=torch.Generator().manual_seed(0)).double()
    drawn = model.noised(model.canvas({"token": value}), Keyed(1))
    with torch.no_grad():
        before = model.losses_of(drawn, labels(2))
        for block in range(4):
            mine = block == GROUP
            other = drawn.copy()
            other.noise["token"][:, ~mine] += 1.0
            other.level[:, ~mine] = 0.5
            moved = says(model, other, labels(2)) - says(model, drawn, labels(2))
            assert moved[:, mine].abs().max() < 1e-9 < 1e-3 < moved[:, ~mine].abs().max()
            other = drawn.copy()  # its noise stands on the canvas: the loss of what is behind asks for another one
            other.value["token"][:, block < GROUP] += 1.0
            assert (model.losses_of(other, labels(2)) - before)[:, block >= GROUP].abs().max() < 1e-3


def test_frames_are_blocks_and_go_on_beyond_the_length_of_training():
    """Four frames of training, seven in sampling, of which two are given."""
    from seriatim.backbones.rope import RoPE
    from seriatim.backbones.transformer import Transformer, TransformerConfig

    base = model_of()
    model = acdit.Denoising(
        grid(4, 2, 2), Groups(), base.embed,
        Transformer(TransformerConfig(16, 2, 2, rope=RoPE(axes=(4, 2, 2)), qk_norm="rms", vector=16)),
        base.heads["token"], dict(base.conditions), clock=base.clock, times=base.times,
    )  # fmt: skip
    randomise(model, std=0.3)
    assert model.losses(model.canvas({"token": torch.randn(2, 16, 4).double()}), labels(2)).shape == (2, 16)
    real = torch.randn(2, 28, 4, generator=torch.Generator().manual_seed(0)).double()
    long = grid(7, 2, 2)
    canvas = model.canvas({"token": real}, 8, layout=long)
    steps = met(model, canvas, SolverStep(2), labels(2))
    assert len(steps) == 10 and torch.equal(canvas.value["token"][:, :8], real[:, :8])
    for element, said, then in steps:
        assert (says(model, then, labels(2), 28)[:, element] - said).abs().max() < 1e-9


def test_fresh_weights_learn_a_block_from_the_blocks_before_it():
    torch.manual_seed(0)
    model = acdit.build(replace(TINY, width=32))
    assert (
        float(
            says(model, model.noised(model.canvas({"token": torch.randn(2, 16, 4)}), Keyed(1)), labels(2)).abs().max()
        )
        == 0
    )

    def draw(n, generator):
        x = torch.randn(n, 1, 4, generator=generator).expand(-1, 16, -1).contiguous()
        return model.canvas({"token": x}), {"class": torch.zeros(n, dtype=torch.long)}

    fit(model, draw, Recipe(100, 32, 1e-2, weight_decay=0.0))
    canvas, label = draw(256, torch.Generator().manual_seed(1))
    with torch.no_grad():
        losses = model.losses(canvas, label, random=Generator(5)).mean(0)
    assert float(losses[GROUP == 3].mean()) < 0.75 * float(losses[GROUP == 0].mean())


def test_pictures_are_drawn_block_by_block():
    torch.manual_seed(0)
    system = acdit.ACDiT(TINY, PatchTokenizer(PatchConfig(side=8, channels=1, patch=2))).eval()
    randomise(system.model, std=0.3).float()
    out = system.draw(torch.tensor([3, 5]), sampling=Sampling(steps=3, guidance=0.5), film=True)
    assert out.forwards == 12 and torch.equal(out.decided[0], 3 * GROUP.view(4, 4) + 3)
    assert acdit.Config(block=[1, 4]).block == (1, 4)
    with pytest.raises(ValueError, match="rows and columns"):
        acdit.Config(block=(2, 2, 1))
