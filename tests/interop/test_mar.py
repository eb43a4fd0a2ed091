"""The released weights of MAR in our parts: names and shapes of its files, numbers of its code, and what would break
them.

The golden numbers were computed once by the released code (LTH14/mar, in float32; `timm`'s layer written out) with the
weights that `released` makes from names and shapes alone: latents of a picture and what they decode to, states behind
six known latents a row (the first four, the last four, the largest), what the head says of a noisy value, and a vector
of latents drawn under guidance in five steps at temperature 1,000, from the noise and in the order that `Keyed(0)`
gives here. (With such weights 100 steps of diffusion enlarge their first noise some 30,000 times; the temperature lets
the noise of the steps count, too.)
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from seriatim.decoding.guidance import Guidance
from seriatim.decoding.loop import decode
from seriatim.random import Keyed
from seriatim.systems.image.mar import MAR
from seriatim.systems.system import Sampling
from seriatim.verbs.load import load
from support.released_mar import (
    BLOCKS,
    BUFFER,
    CLASSES,
    DEPTH,
    DIM,
    HIDDEN,
    SIDE,
    WIDTH,
    autoencoder_shapes,
    balanced,
    generator_shapes,
)
from support.released_var import released

LABEL = torch.tensor([1, 4])
LATENT = (0.00593, -0.30593, 0.39366, 1.22372, 0.03958, 0.47328)
DECODED = (-0.49687, -0.85327, -1.0, -1.0, 0.20359, -0.18628)  # of the second picture: row 9, columns 3 and 4
STATES = (-0.30169, 1.2534, -0.45459, 0.80853, 2.32894, 1.67186, 0.31782, 0.59321)
LARGEST = 7.00177
LARGEST_DRAWN = 224729.7812
SAID = (0.77779, 0.23618, -0.47678, -0.54738, 1.00832, 1.43188, -0.76004, 0.64031, 0.08904, -0.81297, -0.40352, 1.4002)
DRAWN = (-7098.7637, -18747.6152, -72282.6562, 44789.6445, -41017.168, 52752.2695)  # vector 5 of the second picture


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A generator beside its autoencoder, as trainings wrote them."""
    place = tmp_path_factory.mktemp("released")
    torch.save({"model": released(autoencoder_shapes())}, place / "kl16.ckpt")
    weights = balanced(released(generator_shapes()))
    torch.save({"model": {}, "model_ema": weights, "epoch": 799}, place / "checkpoint-last.pth")
    return place


@pytest.fixture
def system(files):
    return load(files / "checkpoint-last.pth")


def pictures():
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(5)) * 2 - 1


def inputs():
    """Latents, which six of each row are known, and a noisy vector for each place."""
    g = torch.Generator().manual_seed(3)
    x, known = torch.randn(2, 16, DIM, generator=g), torch.rand(2, 16, generator=g).argsort(1) < 6
    return x, known, torch.randn(16, DIM, generator=g)


def states(system, drop=None):
    model, (x, known, _) = system.model, inputs()
    canvas = model.canvas({"token": x}, known)
    plan = model.factorization.step(canvas, None, 0)
    with torch.no_grad():
        return model.hidden(plan, canvas, None, model.encode({"class": LABEL}, drop))[:, BUFFER:]


def drawn(system, seed=0):
    noise, sampling = Keyed(seed), Sampling(temperature=1e3, guidance=1.9, steps=5)
    canvas, target = system.model.blank(2, noise), system.target({"class": LABEL}, sampling)
    with torch.inference_mode():
        for _ in decode(target, canvas, system.decider(sampling), None, noise):
            pass
    return canvas.value["token"]


def gap(system):
    """Of states and of what the head says."""
    h = states(system)
    found = torch.cat([h[0, 0, :4], h[1, -1, -4:], h.abs().max()[None]])
    wrong = (found - torch.tensor([*STATES, LARGEST])).abs().max() / LARGEST
    net, noisy = system.model.heads["token"].net, inputs()[2]
    with torch.no_grad():
        said = net(noisy, net.clock(torch.full((16,), 500.0)) + net.state(h[1]))[7]
    return float(torch.maximum(wrong, (said - torch.tensor(SAID)).abs().max()))


def gap_drawn(system):
    return float((drawn(system)[1, 5] - torch.tensor(DRAWN)).abs().max() / LARGEST_DRAWN)


def test_the_autoencoder_is_the_released_one(system):
    latents = system.tokenizer.encode(pictures())
    assert torch.allclose(latents[1, 5], torch.tensor(LATENT), atol=1e-4)
    picture = system.tokenizer.decode(latents)[1, :, 9, 3:5].flatten()
    assert torch.allclose(picture, torch.tensor(DECODED), atol=1e-4)


def test_states_and_head_are_those_of_the_released_code(system):
    assert gap(system) < 2e-5


def test_latents_under_guidance_are_those_of_the_released_code(system):
    assert gap_drawn(system) < 2e-5


def larger_eps(system):
    for stack in (system.model.backbone, system.model.backbone.encoder, system.model.backbone.decoder):
        stack.config = replace(stack.config, eps=1e-2)


def tanh_gelu(system):
    for stack in (system.model.backbone.encoder, system.model.backbone.decoder):
        stack.config = replace(stack.config, activation="gelu_tanh")


def positions_swapped(system):
    one, two, _ = system.model.backbone.positions
    one.data, two.data = two.data, one.data


def none_behind(system):
    system.model.backbone.positions[2].data.zero_()


def class_once(system):
    system.model.conditions["class"].slots = 1
    system.model.factorization.prefix = system.model.backbone.prefix = 1


def masks_encoded(system):
    backbone = system.model.backbone
    backbone._shown = lambda plan: torch.arange(plan.size)[None]


def stacks_swapped(system):
    backbone = system.model.backbone
    backbone.encoder, backbone.decoder = backbone.decoder, backbone.encoder


def parts_of_the_modulation(system):
    for block in system.model.heads["token"].net.blocks:
        block.modulation.weight.data = block.modulation.weight.data.roll(HIDDEN, 0)


def sines_first(system):
    first = system.model.heads["token"].net.time[0]
    first.weight.data = first.weight.data.roll(128, 1)


TRAPS = [
    larger_eps, tanh_gelu, positions_swapped, none_behind, masks_encoded, stacks_swapped, parts_of_the_modulation,
    sines_first,
]  # fmt: skip


@pytest.mark.parametrize("wrong", TRAPS)
def test_each_trap_fails_the_same_test(system, wrong):
    wrong(system)
    assert gap(system) > 1e-4


def test_a_class_told_once_is_not_told_as_released(system):
    h = states(system)
    class_once(system)
    assert (states(system) - h[:, BUFFER - 1 :]).abs().max() > 1e-2 * LARGEST


def guided_by_what_was_known_before(system):
    system.guidance = lambda sampling: Guidance(sampling.guidance, "linear")


def other_null(system):
    table = system.model.conditions["class"].table
    table.data = torch.cat([table.data[:-1], table.data[:1]])


def bounded(system):
    head = system.model.heads["token"]
    head.config = replace(head.config, clip=1.0)


def evenly_revealed(system):
    decider = system.decider
    system.decider = lambda sampling: replace(decider(sampling), schedule="linear")


def variance_of_the_upper_bound(system):
    net = system.model.heads["token"].net
    net.out.weight.data[DIM:] = 0
    net.out.bias.data[DIM:] = 1


DRAWING = [guided_by_what_was_known_before, other_null, bounded, evenly_revealed, variance_of_the_upper_bound]


@pytest.mark.parametrize("wrong", DRAWING)
def test_each_trap_of_sampling_draws_something_else(system, wrong):
    wrong(system)
    assert gap_drawn(system) > 1e-4


def test_latents_are_scaled_as_released(system):
    """By 0.2325, and nothing else."""
    unscaled = system.tokenizer.posterior(pictures()).mean.flatten(2).transpose(1, 2)
    assert torch.allclose(system.tokenizer.encode(pictures()), 0.2325 * unscaled)
    assert (system.config.mean, system.config.deviation) == (0.0, 1.0)


def test_it_is_sampled_as_published_and_has_its_sizes(system):
    c, s = system.config, system.sampling
    assert isinstance(system, MAR)
    assert (c.width, c.depth, c.heads, c.classes, c.side, c.dim) == (WIDTH, DEPTH, 2, CLASSES, SIDE, DIM)
    assert (c.buffer, c.head_width, c.head_depth, c.head_steps) == (BUFFER, HIDDEN, BLOCKS, 100)
    assert (s.temperature, s.guidance, s.steps) == (1.0, 2.0, 16)


def test_pictures_are_drawn_and_parts_of_them_drawn_anew(system):
    assert system.draw(LABEL, sampling=Sampling(guidance=1.0, steps=3)).forwards == 3
    keep = torch.zeros(16, 16, dtype=torch.bool)
    keep[:8] = True
    made = system.repaint(pictures(), keep, LABEL, Sampling(guidance=1.0, steps=3)).images
    assert torch.equal(made[:, :, :8], pictures()[:, :, :8])


def test_the_autoencoder_alone_and_missing_weights_are_refused(files, tmp_path):
    with pytest.raises(ValueError, match="load the generator beside it"):
        load(files / "kl16.ckpt")
    (tmp_path / "checkpoint-last.pth").write_bytes((files / "checkpoint-last.pth").read_bytes())
    with pytest.raises(FileNotFoundError, match=r"put kl16\.ckpt into"):
        load(tmp_path / "checkpoint-last.pth")
    weights = balanced(released(generator_shapes()))
    del weights["decoder_blocks.1.mlp.fc2.bias"]
    torch.save(weights, tmp_path / "checkpoint-last.pth")
    (tmp_path / "kl16.ckpt").write_bytes((files / "kl16.ckpt").read_bytes())
    with pytest.raises(ValueError, match=r"backbone\.decoder\.layers\.1\.down_bias"):
        load(tmp_path / "checkpoint-last.pth")
