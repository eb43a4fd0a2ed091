"""The released weights of Hi-MAR in our parts: names and shapes of its files, numbers of its code, and what would break
them.

The golden numbers were computed once by the released code (HiDream-ai/himar, in float32; `timm`'s layers written out)
with the weights that `generator_weights` makes from names and shapes alone: states of both phases with some elements
known (the first four, the last four, the largest), what both heads say of noisy values, and the last pivot and the last
fine vector drawn under guidance in 16 and 3 steps, of four steps of diffusion each, at temperature 1,000, from the
noise and in the order that `Keyed(0)` gives here. (With such weights a diffusion enlarges its first noise some 30,000
times; the temperature lets the noise of the steps count, too.)
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from seriatim.canvas import Remember, Set
from seriatim.decoding.guidance import ByPhase, Guidance
from seriatim.decoding.loop import decode
from seriatim.interop.hi_mar import is_himar
from seriatim.random import Keyed
from seriatim.systems.image.hi_mar import HiMAR
from seriatim.systems.system import Sampling
from seriatim.verbs.load import load
from support.released_himar import (
    BLOCKS,
    BUFFER,
    CLASSES,
    DEPTH,
    DIM,
    HIDDEN,
    PIVOTS,
    SIDE,
    WIDE,
    WIDTH,
    generator_weights,
)
from support.released_mar import autoencoder_shapes
from support.released_var import released

FIRST, FINE = PIVOTS**2, SIDE**2
LABEL = torch.tensor([1, 4])
STATES = (
    ((-1.08517, 0.43585, -1.61116, 2.85432, 4.68039, 0.68772, -0.90646, -0.09021), 5.47166),
    ((-0.07451, -1.85397, -0.48931, -0.74762, 2.49767, 0.05461, 2.25651, -1.26681), 6.61063),
)
SAID = (
    (0.61032, -0.47936, 0.99316, -0.79414, 0.50527, -0.3301, 1.16225, -0.2493, -0.1659, -1.45463, 2.45259, 0.5831),
    (0.75994, -0.03196, 2.00129, -0.81118, 1.71062, 2.81187, -1.3525, -2.82309),
)
SAID_MOST = 7.96619
DRAWN = {
    14: (2654.4929, -32084.6309, 14482.8594, 49922.1914, -22385.666, 10115.5146),
    17: (-8930.4004, -20393.7324, -43102.8516, 4829.6963, -999.511, -30927.4219),
}  # by element: pivot and fine vector that are drawn last
DRAWN_MOST = 71616.6953, 141103.7812  # of pivots, of fine vectors


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A generator beside MAR's autoencoder, as a training wrote them."""
    place = tmp_path_factory.mktemp("released")
    torch.save({"model": released(autoencoder_shapes())}, place / "kl16.ckpt")
    torch.save({"model": {}, "model_ema": generator_weights(), "epoch": 799}, place / "checkpoint-last.pth")
    return place


@pytest.fixture
def system(files):
    return load(files / "checkpoint-last.pth")


def inputs():
    """Latents of both sizes, which of them are known, noisy fine ones, states of pivots, and noisy pivots."""
    g = torch.Generator().manual_seed(3)
    x, known = torch.randn(2, FIRST + FINE, DIM, generator=g), torch.rand(2, FIRST + FINE, generator=g) < 0.4
    known[:, 0], known[:, 1] = True, False
    known[1] = known[0]
    noisy, memo = torch.randn(2, FINE, DIM, generator=g), torch.randn(2, FIRST, WIDTH, generator=g)
    return x, known, noisy, memo, torch.randn(2 * FIRST, DIM, generator=g)


def states(system, phase):
    """Those of the elements that a phase draws."""
    model, (x, known, _, memo, _) = system.model, inputs()
    pivot = torch.arange(FIRST + FINE) < FIRST
    canvas = model.canvas({"token": x}, known & (pivot if phase == 0 else ~pivot))
    if phase:
        element = torch.arange(FIRST).expand(2, -1)
        canvas.apply([Set(x[:, :FIRST], element), Remember(element, memo)])
    plan = model.factorization.step(canvas, None, 0)
    assert plan.phase == phase
    with torch.no_grad():
        h = model.hidden(plan, canvas, None, model.encode({"class": LABEL}))[:, BUFFER:]
    return h[:, :FIRST] if phase == 0 else h[:, FIRST:]


@torch.no_grad()
def said(system, phase):
    """What the head of a phase says of noisy vectors in the middle of the diffusion."""
    head, h, (_, _, noisy, _, alone) = system.model.heads["token"], states(system, phase), inputs()
    if phase:
        return head.fine.net(noisy, 0.5, head.fine.net.told(h, head.fine.plan), head.fine.plan)
    net = head.coarse.net
    return net(alone, net.clock(torch.full((2 * FIRST,), 500.0)) + net.state(h.flatten(0, 1)))[3]


def gap(system, phase):
    """Of states and of what the head says."""
    h, (numbers, largest), x = states(system, phase), STATES[phase], said(system, phase)
    found = torch.cat([h[0, 0, :4], h[1, -1, -4:], h.abs().max()[None]])
    wrong = (found - torch.tensor([*numbers, largest])).abs().max() / largest
    of_head = torch.cat([x[0, 0, :4], x[1, -1, -4:]]) if phase else x
    return float(torch.maximum(wrong, (of_head - torch.tensor(SAID[phase])).abs().max() / SAID_MOST))


def drawn(system):
    """Latents of a picture of the first class, and how many of them were known after each step."""
    heads, known = system.model.heads["token"], []
    for head in (heads.coarse, heads.fine):
        head.config = replace(head.config, steps=4)
    noise, sampling = Keyed(0), Sampling(temperature=1e3, guidance=6.0, steps=3)
    canvas, target = system.model.blank(1, noise), system.target({"class": LABEL[:1]}, sampling)
    with torch.inference_mode():
        for _ in decode(target, canvas, system.decider(sampling), None, noise):
            known.append(int(canvas.known.sum()))
    return canvas.value["token"][0], known


def gap_drawn(x):
    return max(
        float((x[at] - torch.tensor(numbers)).abs().max() / most)
        for (at, numbers), most in zip(DRAWN.items(), DRAWN_MOST, strict=True)
    )


@pytest.mark.parametrize("phase", [0, 1])
def test_states_and_heads_are_those_of_the_released_code(system, phase):
    assert gap(system, phase) < 2e-5


def test_latents_under_guidance_are_those_of_the_released_code(system):
    x, known = drawn(system)
    assert gap_drawn(x) < 5e-5
    assert known == [*range(1, FIRST + 1), FIRST + 35, FIRST + 128, FIRST + FINE]


def phases_swapped(system):
    system.model.clock.of = system.model.clock.of.flip(0)


def positions_of_the_other_phase(system):
    for table in system.model.backbone.positions[:2]:
        table.data = table.data.roll(len(table) // 2, 0)


def masks_of_the_other_phase(system):
    mask = system.model.embed.mask
    mask.data = mask.data.roll(len(mask) // 2, 0)


def larger_eps(system):
    for stack in (system.model.backbone.encoder, system.model.backbone.decoder):
        stack.config = replace(stack.config, eps=1e-2)


def stacks_swapped(system):
    backbone = system.model.backbone
    backbone.encoder, backbone.decoder = backbone.decoder, backbone.encoder


def gates_left_out(system):
    for layer in system.model.backbone.decoder.layers:
        layer.ada.data[2 * WIDTH : 3 * WIDTH] = 1


def sines_first(system):
    for head in (system.model.heads["token"].coarse, system.model.heads["token"].fine):
        head.net.time[0].weight.data = head.net.time[0].weight.data.roll(128, 1)


BOTH = [phases_swapped, positions_of_the_other_phase, masks_of_the_other_phase, larger_eps, stacks_swapped]
BOTH += [gates_left_out, sines_first]


@pytest.mark.parametrize("phase", [0, 1])
@pytest.mark.parametrize("wrong", BOTH)
def test_each_trap_fails_the_same_test(system, wrong, phase):
    wrong(system)
    assert gap(system, phase) > 1e-4


def one_map_for_both(system):
    system.model.embed.coarse = system.model.embed.project


def pivots_alone(system):
    system.model.factorization.masked = False


def values_told(system):
    system.model.embed.state = torch.nn.Identity()


def places_of_the_map(system):
    position = system.model.heads["token"].fine.net.position
    position.data = position.data.unflatten(0, (SIDE, SIDE)).transpose(0, 1).flatten(0, 1)


def other_gelu(system):
    net = system.model.heads["token"].fine.net.transformer
    net.config = replace(net.config, activation="silu")


ONE = [(one_map_for_both, 0), (pivots_alone, 0), (values_told, 1), (places_of_the_map, 1), (other_gelu, 1)]


@pytest.mark.parametrize(("wrong", "phase"), ONE)
def test_each_trap_of_one_phase_fails_its_test(system, wrong, phase):
    wrong(system)
    assert gap(system, phase) > 1e-4


def guided_by_what_was_known_before(system):
    system.guidance = lambda sampling: Guidance(sampling.guidance, "linear")


def guided_alike(system):
    system.config = replace(system.config, pivot_guidance=1.0)


def known_drawn_along(system):
    fine = system.model.heads["token"].fine
    fine.config = replace(fine.config, anchored=False)


def other_null(system):
    table = system.model.conditions["class"].table
    table.data = torch.cat([table.data[:-1], table.data[:1]])


DRAWING = [guided_by_what_was_known_before, guided_alike, known_drawn_along, other_null]


@pytest.mark.parametrize("wrong", DRAWING)
def test_each_trap_of_sampling_draws_something_else(system, wrong):
    wrong(system)
    assert gap_drawn(drawn(system)[0]) > 5e-4


def test_it_is_sampled_as_published_and_has_its_sizes(system):
    c, s = system.config, system.sampling
    assert isinstance(system, HiMAR) and c.form == "released"
    assert (c.width, c.depth, c.heads, c.classes, c.side, c.pivots, c.dim) == (
        WIDTH, DEPTH, 2, CLASSES, SIDE, PIVOTS, DIM,
    )  # fmt: skip
    assert (c.buffer, c.head_width, c.head_depth, c.head_steps, c.head_clip) == (BUFFER, HIDDEN, BLOCKS, 100, None)
    assert (c.map_width, c.map_depth, c.map_heads, c.map_steps) == (WIDE, 2, 2, 250)
    assert (s.temperature, s.guidance, s.steps, c.pivot_steps) == (1.0, 1.5, 4, 4 * PIVOTS)
    guidance = system.guidance(s)
    assert isinstance(guidance, ByPhase) and guidance.of(0).scale == pytest.approx(1.7)
    assert guidance.of(1).weight(1.0) == pytest.approx(1.5 * 255 / 256)


def test_fresh_models_of_the_form_begin_as_plain_layers():
    from seriatim.systems.image.hi_mar import Config, build

    model = build(Config(form="released", buffer=2, width=16, depth=1, heads=2, map_width=16, map_depth=1))
    x = torch.randn(2, 20, 4, generator=torch.Generator().manual_seed(0))
    backbone = model.backbone.eval()
    canvas = model.canvas({"token": x})
    with torch.no_grad():
        plan = model.factorization.fine(model.blank(2, Keyed(0)))
        h = torch.randn(2, plan.size, 16, generator=torch.Generator().manual_seed(1))
        said = [backbone.encoder(h, plan, None, model.clock.of[i][None]) for i in range(2)]
        assert torch.equal(*said)
        model.clock.of.zero_()  # gates are said by phases alone
        assert (said[0] - backbone.encoder(h, plan, None, model.clock.of[:1])).abs().max() > 1e-3
    losses = model.hidden_losses(canvas, torch.ones(2, 20, dtype=torch.bool), {"class": LABEL}, random=Keyed(0))
    assert losses.shape == (2, 20) and bool(torch.isfinite(losses).all())


def test_files_of_something_else_are_refused(files, tmp_path):
    assert not is_himar({"fake_latent": torch.zeros(1)})
    (tmp_path / "kl16.ckpt").write_bytes((files / "kl16.ckpt").read_bytes())
    weights = generator_weights()
    weights["decoder_blocks.1.other.bias"] = weights.pop("decoder_blocks.1.mlp.fc2.bias")
    torch.save(weights, tmp_path / "checkpoint-last.pth")
    with pytest.raises(ValueError, match=r"backbone\.decoder\.layers\.1\."):
        load(tmp_path / "checkpoint-last.pth")
