"""The released weights of M-VAR in our parts: names and shapes of its files, numbers of its code, and what would break
them.

The golden numbers were computed once by the released code (OliverRensu/MVAR, in float32) with the weights that
`released` makes from names and shapes alone, flash attention by plain attention and its Mamba-2 by that of
`transformers`: logits of a training forward (the first four, the last four, the largest) over the ids of `pictures`,
and a picture drawn greedily under guidance, for which that code runs over all earlier scales again.
"""

from __future__ import annotations

import pytest
import torch

from seriatim.systems.image.m_var import MVAR
from seriatim.systems.image.var import VAR
from seriatim.systems.system import Sampling
from seriatim.verbs.load import load
from support.released_var import CLASSES, DEPTH, SCALES, generator_shapes, pictures, released, tokenizer_shapes

WIDTH, INNER, MIXERS, STATE = 128, 256, 4, 64
LABEL = torch.tensor([1, 4])
GOLDEN = {  # by whether queries and keys have unit length
    False: {
        "logits": (0.85406, 0.01143, -0.69659, 0.83316, 1.10371, -0.64158, -2.01768, 0.12766), "largest": 9.65125,
        "drawn": (0.02846, -0.47787, 0.33278, 0.46466, 0.31686, 0.33974),
    },
    True: {
        "logits": (0.85406, 0.01143, -0.69659, 0.83316, 1.48873, -0.64935, -2.0821, -0.16515), "largest": 9.55412,
        "drawn": (0.14339, -0.19282, 0.54185, 0.5276, 0.45252, 0.4798),
    },
}  # fmt: skip


def shapes(unit):
    out, w = generator_shapes(w=WIDTH, heads=2), WIDTH
    for i in range(DEPTH):
        b = f"blocks.{i}."
        out |= {b + "ada_lin.1.weight": (9 * w, w), b + "ada_lin.1.bias": (9 * w,), b + "attn.patch_nums": (4,)}
        if not unit:
            del out[b + "attn.scale_mul_1H11"]
        m, channels = b + "mamba.", INNER + 2 * STATE
        out |= {
            m + "in_proj.weight": (INNER + channels + MIXERS, w), m + "conv1d.weight": (channels, 1, 4),
            m + "conv1d.bias": (channels,), m + "dt_bias": (MIXERS,), m + "A_log": (MIXERS,), m + "D": (MIXERS,),
            m + "norm.weight": (INNER,), m + "out_proj.weight": (w, INNER),
        }  # fmt: skip
    return out


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Both kinds of released files, beside their tokenizer."""
    place = tmp_path_factory.mktemp("released")
    torch.save(released(tokenizer_shapes()), place / "vae_ch160v4096z32.pth")
    for unit in (False, True):
        torch.save(released(shapes(unit)), place / f"{unit}.pth")
    return place


@pytest.fixture(scope="module", params=[False, True], ids=["d16", "d24"])
def system(request, files):
    return load(files / f"{request.param}.pth")


def gap(system):
    canvas, condition = system.canvas({"image": pictures(), "label": LABEL})
    plan = system.model.factorization.packed(canvas)
    with torch.no_grad():
        h = system.model.hidden(plan, canvas, None, system.model.encode(condition))
        said = system.model.dist(h, plan, canvas)[0].logits
    golden = GOLDEN[system.config.unit]
    found = torch.cat([said[0, 0, :4], said[1, -1, -4:], said.abs().max()[None]])
    return float((found - torch.tensor([*golden["logits"], golden["largest"]])).abs().max()) / golden["largest"]


def test_what_is_said_is_what_the_released_code_says(system):
    assert gap(system) < 1e-4


def test_a_picture_under_guidance_is_that_of_the_code_that_runs_over_everything_again(system):
    drawn = system.draw(LABEL, sampling=Sampling(temperature=0.0, guidance=1.5))
    assert drawn.forwards == len(SCALES)
    expected = torch.tensor(GOLDEN[system.config.unit]["drawn"])
    assert torch.allclose(drawn.images[1, :, 40, 11:13].flatten(), expected, atol=1e-3)


def parts_of_the_modulation(layer):
    layer.mixer.ada.data = layer.mixer.ada.data.view(3, -1, WIDTH).flip(0).reshape_as(layer.mixer.ada)


def gate_of_another_branch(layer):
    layer.ada.data = layer.ada.data.roll(3 * WIDTH, 0)


def parts_of_the_projection(layer):
    layer.mixer.into.data = torch.cat([layer.mixer.into[INNER : 2 * INNER], layer.mixer.into[:INNER],
                                       layer.mixer.into[2 * INNER :]]).detach()  # fmt: skip


def taps_backwards(layer):
    layer.mixer.conv.data = layer.mixer.conv.data.flip(1)


@pytest.mark.parametrize(
    "wrong", [parts_of_the_modulation, gate_of_another_branch, parts_of_the_projection, taps_backwards]
)
def test_each_trap_fails_the_same_test(files, wrong):
    made = load(files / "True.pth")
    for layer in made.model.backbone.layers:
        wrong(layer)
    assert gap(made) > 1e-3


def test_scores_a_fourth_of_the_usual_are_told_from_those_of_unit_length(files):
    made = load(files / "False.pth")
    assert made.model.backbone.config.score_scale == 0.25 / 8
    object.__setattr__(made.model.backbone.config, "score_scale", 1 / 8)
    assert gap(made) > 1e-3


def test_it_has_its_sizes_and_is_sampled_as_published(system):
    c, s = system.config, system.sampling
    assert isinstance(system, MVAR) and not isinstance(system, VAR)
    assert (c.width, c.depth, c.heads, c.classes, c.state, c.channels) == (WIDTH, DEPTH, 2, CLASSES, STATE, 64)
    assert (s.top_k, s.top_p, s.guidance) == (900, 0.96, 1.5)


def test_a_missing_weight_is_named(tmp_path):
    torch.save(released(tokenizer_shapes()), tmp_path / "vae_ch160v4096z32.pth")
    weights = {k: v for k, v in released(shapes(True)).items() if k != "blocks.1.mamba.D"}
    torch.save(weights, tmp_path / "d24.pth")
    with pytest.raises(ValueError, match=r"backbone\.layers\.1\.mixer\.D"):
        load(tmp_path / "d24.pth")
