"""The released weights of ARFlow in our parts: names and shapes of its files, numbers of its code, and what would break
them.

The golden numbers were computed once by the released code (models.py and its layers, the kernel replaced by its own
naive form, in float32) with the weights and inputs that `released` and `inputs` make.
"""

from __future__ import annotations

import copy

import pytest
import torch

from seriatim.canvas import Revise
from seriatim.decoding.guidance import Guidance
from seriatim.decoding.loop import decode
from seriatim.decoding.solver import Noise, StochasticStep
from seriatim.decoding.target import Target
from seriatim.interop.arflow import arflow_of, read_arflow
from seriatim.layout import Layout
from seriatim.systems.image.arflow import ARFlow, Config
from seriatim.systems.system import Sampling
from seriatim.verbs.load import load
from support.released_sd_vae import store

WIDTH, DEPTH, HEADS, CHANNELS, SIDE, PATCH, CLASSES = 32, 2, 2, 4, 4, 2, 5
TRAINED = {(0, 0, 0, 0): (-5.5092, 0.1134, -0.9719, 0.3874), (1, 4, 3, 2): (3.9700, 1.5304, 1.7599, -2.1878)}
SAMPLED = {(0, 0, 0): (-0.9839, 0.6306, -3.7807, 3.9263), (1, 5, 6): (5.7327, 1.9936, 1.1602, -5.4920)}


def shapes():
    """Names and shapes of the tensors of a file, at this size."""
    w, p = WIDTH, PATCH
    out = {
        "x_embedder.proj.weight": (w, CHANNELS, p, p), "x_embedder.proj.bias": (w,),
        "t_embedder.mlp.0.weight": (w, 256), "t_embedder.mlp.0.bias": (w,), "t_embedder.mlp.2.weight": (w, w),
        "t_embedder.mlp.2.bias": (w,), "y_embedder.embedding_table.weight": (CLASSES + 1, w),
        "final_layer.linear.bias": (2 * CHANNELS * p * p,),
        "final_layer.linear.weight": (2 * CHANNELS * p * p, w), "final_layer.adaLN_modulation.1.weight": (2 * w, w),
        "final_layer.adaLN_modulation.1.bias": (2 * w,),
    }  # fmt: skip
    for i in range(DEPTH):
        b = f"blocks.{i}."
        out |= {b + f"attn.{name}_proj.weight": (w, w) for name in ("q", "k", "v", "g", "out")}
        out |= {
            b + "attn.gt_proj.weight": (HEADS, w), b + "mlp.fc1.weight": (4 * w, w), b + "mlp.fc1.bias": (4 * w,),
            b + "mlp.fc2.weight": (w, 4 * w), b + "mlp.fc2.bias": (w,), b + "adaLN_modulation.1.weight": (6 * w, w),
            b + "adaLN_modulation.1.bias": (6 * w,),
        }  # fmt: skip
    return out


def released():
    """Weights as large as those that were trained, gates among them; positions are sines and cosines."""
    g, out = torch.Generator().manual_seed(0), {}
    for name, shape in sorted(shapes().items()):
        x = torch.randn(shape, generator=g)
        out[name] = 0.4 * x if len(shape) < 2 else 1.6 * x / x[0].numel() ** 0.5
    angle = torch.arange(SIDE)[:, None] / 10000 ** (torch.arange(WIDTH // 4) / (WIDTH / 4))
    axis = torch.cat([angle.sin(), angle.cos()], 1)
    both = torch.cat([axis[None].expand(SIDE, -1, -1), axis[:, None].expand(-1, SIDE, -1)], 2)  # columns, rows
    return out | {"pos_embed": both.flatten(0, 1)[None]}


def inputs():
    """Latents of five pictures, how clean each is, classes, and noise to begin with."""
    g, size = torch.Generator().manual_seed(1), SIDE * PATCH
    x = torch.randn(3, 5, CHANNELS, size, size, generator=g)
    clean = torch.rand(3, 5, generator=g).sort(1).values
    return x, clean, torch.tensor([0, 3, 4]), torch.randn(2, CHANNELS, size, size, generator=g)


def rows(latent):
    """Patches (..., n, d) of latents (..., c, h, w)."""
    cut = latent.unflatten(-1, (SIDE, PATCH)).unflatten(-3, (SIDE, PATCH))  # ... c, row, y, column, x
    return cut.movedim(-5, -1).transpose(-4, -3).flatten(-3).flatten(-3, -2)


def latents(patches):
    cut = patches.unflatten(-1, (PATCH, PATCH, CHANNELS)).unflatten(-4, (SIDE, SIDE))
    return cut.movedim(-1, -5).transpose(-3, -2).flatten(-4, -3).flatten(-2)


def says(model):
    """What the model says of each of five pictures behind the noisier ones (3, 5, c, h, w)."""
    x, clean, label, _ = inputs()
    layout = Layout(model.layout.segments * 5)
    element = torch.arange(layout.size).expand(3, -1)
    canvas = model.canvas({"token": torch.zeros(3, layout.size, CHANNELS * PATCH**2)}, layout=layout)
    canvas.apply([Revise(element, rows(x).flatten(1, 2), (1 - clean).repeat_interleave(SIDE**2, 1))])
    plan = model.factorization.packed(canvas)
    with torch.no_grad():
        said = model.heads["token"].out(model.hidden(plan, canvas, None, model.encode({"class": label})))
    return latents(said.unflatten(1, (5, -1)))


def at(x, places):
    return torch.stack([x[(*place[:-2], slice(None), *place[-2:])] for place in places])


def close(got, golden):
    return (at(got, golden) - torch.tensor(list(golden.values()))).abs().max() < 1e-3


def test_one_pass_over_five_pictures_says_what_the_released_code_says():
    out = says(arflow_of(released()))
    assert close(out, TRAINED) and abs(float(out.abs().max()) - 9.5603) < 1e-3


class Still(StochasticStep):
    """Without the noise of the steps between."""

    def moved(self, dist, level, turn, key, canvas, random):
        value, noise = dist.parts()
        return dist.x - (dist.level - level)[..., None] * (2 * noise - value)


def sampled(model):
    target = Target(model, {"class": torch.tensor([1, 2])}, Guidance(1.5))
    canvas = model.canvas({"token": torch.zeros(2, SIDE**2, CHANNELS * PATCH**2)})
    start = rows(inputs()[3])
    canvas.apply([Revise(torch.arange(SIDE**2).expand(2, -1), start, torch.ones(1, 1))])
    list(decode(target, canvas, Still(3), Noise()))
    return latents(canvas.value["token"])


def test_guided_sampling_with_its_state_goes_where_the_released_sampler_goes():
    out = sampled(arflow_of(released()))
    assert close(out, SAMPLED) and abs(float(out.abs().max()) - 9.1603) < 1e-3


def test_guidance_of_all_channels_goes_elsewhere():
    model = arflow_of(released(), guide_all=True)
    assert close(says(model), TRAINED) and not close(sampled(model), SAMPLED)


def other_time(model):
    model.clock.begin, model.clock.length = 0.0, 1.0


def quick_gates(model):
    object.__setattr__(model.backbone.config, "slowness", 1.0)


def rms_norms(model):
    object.__setattr__(model.backbone.config, "norm", "rms")


@pytest.mark.parametrize("mistake", [other_time, quick_gates, rms_norms])
def test_each_peculiarity_is_needed(mistake):
    model = copy.deepcopy(arflow_of(released()))
    mistake(model)
    assert not close(says(model), TRAINED)


def test_files_are_read_and_others_refused(tmp_path):
    torch.save({"model": {}, "ema": released()}, tmp_path / "arflow.pt")
    torch.save(released(), tmp_path / "plain.pt")
    for name in ("arflow.pt", "plain.pt"):
        assert close(says(read_arflow(tmp_path / name)), TRAINED)
    for wrong in ({}, {**released(), "more": torch.zeros(1)}, {**released(), "pos_embed": torch.randn(1, 16, WIDTH)}):
        with pytest.raises(ValueError, match="no weights of ARFlow"):
            arflow_of(wrong)


def test_a_file_beside_its_autoencoder_is_a_system(tmp_path):
    torch.save({"ema": released()}, tmp_path / "arflow.pt")
    with pytest.raises(FileNotFoundError, match=r"put diffusion_pytorch_model\.safetensors into"):
        load(tmp_path / "arflow.pt")
    store(tmp_path)
    system = load(tmp_path / "arflow.pt")
    c, s = system.config, system.sampling
    assert isinstance(system, ARFlow) and (c.form, c.side, c.dim, c.classes) == ("released", SIDE, 16, CLASSES)
    assert (s.guidance, s.steps) == (3.5, 250) and system.tokenizer.side == 64
    want = arflow_of(released()).state_dict()
    assert all(torch.equal(x, want[name]) for name, x in system.model.state_dict().items())
    drawn = system.draw(torch.tensor([1]), sampling=Sampling(guidance=1.0, steps=3))
    assert drawn.images.shape == (1, 3, 64, 64) and drawn.forwards == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"form": "twice"}, "single or released"), ({"form": "released", "dim": 8}, "square patches"),
        ({"form": "released", "dim": 16, "pictures": 1}, "several pictures"),
    ],
)  # fmt: skip
def test_the_released_form_is_one_only(changes, message):
    with pytest.raises(ValueError, match=message):
        Config(**changes)
