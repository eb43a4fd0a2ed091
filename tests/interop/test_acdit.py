"""The released weights of ACDiT in our parts: names and shapes of its files, numbers of its code, and what would break
them.

The golden numbers were computed once by the released code (models.py of thunlp/ACDiT, in float32) with the weights and
inputs that `released` and `inputs` make: the first four numbers that it predicts, and the largest of all.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import replace

import pytest
import torch

from seriatim.backbones.rope import RotaryTable
from seriatim.decoding.loop import generate
from seriatim.decoding.solver import MultiStep, Noise
from seriatim.decoding.target import Target
from seriatim.interop.acdit import acdit_of, read_acdit
from seriatim.systems.image.acdit import ACDiT, Config
from seriatim.systems.system import Sampling
from seriatim.verbs.load import load
from support.released_sd_vae import FILE, store

WIDTH, DEPTH, CLASSES, DIM, ROWS = 128, 2, 5, 4, 3
PICTURE, VIDEO = (1, 4, 4), (4, 2, 8)  # frames, side, vectors in a block
GOLDEN = {
    PICTURE: ((0.44653, 3.7837, -4.15659, -1.48832), 9.85789),
    VIDEO: ((-1.68844, 2.80635, -3.35733, -2.68691), 8.92867),
}


def shapes():
    """Names and shapes of the tensors of a file, at this size."""
    w = WIDTH
    out = {
        "t_embedder.mlp.0.weight": (w, 256), "t_embedder.mlp.0.bias": (w,), "t_embedder.mlp.2.weight": (w, w),
        "t_embedder.mlp.2.bias": (w,), "y_embedder.embedding_table.weight": (CLASSES + 1, w),
        "x_embedder.weight": (w, DIM),
    }  # fmt: skip
    for i in range(DEPTH):
        b = f"blocks.{i}."
        out |= {
            b + "norm1.weight": (w,), b + "attn.qkv.weight": (3 * w, w), b + "attn.qkv.bias": (3 * w,),
            b + "attn.q_norm.weight": (64,), b + "attn.k_norm.weight": (64,), b + "attn.proj.weight": (w, w),
            b + "attn.proj.bias": (w,), b + "norm2.weight": (w,), b + "mlp.fc1.weight": (4 * w, w),
            b + "mlp.fc1.bias": (4 * w,), b + "mlp.fc2.weight": (w, 4 * w), b + "mlp.fc2.bias": (w,),
            b + "adaLN_modulation.1.weight": (6 * w, w), b + "adaLN_modulation.1.bias": (6 * w,),
        }  # fmt: skip
    return out | {
        "final_layer.norm_final.weight": (w,), "final_layer.linear.weight": (DIM, w), "final_layer.linear.bias": (DIM,),
        "final_layer.adaLN_modulation.1.weight": (2 * w, w), "final_layer.adaLN_modulation.1.bias": (2 * w,),
    }  # fmt: skip


def released():
    """Weights as large as those that were trained, gates among them."""
    g, out = torch.Generator().manual_seed(0), {}
    for name, shape in shapes().items():
        x = torch.randn(shape, generator=g)
        out[name] = 0.4 * x + float("norm" in name) if len(shape) < 2 else 1.6 * x / shape[1] ** 0.5
    return out


def inputs(frames, side, block):
    """Clean and noised vectors in the order of the blocks, their steps, and classes, of which 5 is the null."""
    g, n = torch.Generator().manual_seed(1), frames * side * side
    clean, noised = (torch.randn(ROWS, n, DIM, generator=g) for _ in range(2))
    return clean, noised, torch.randint(0, 1000, (ROWS, n // block), generator=g), torch.tensor([0, 3, 5])


def says(model, frames, side, block):
    """The noise that is predicted, in the order of the blocks."""
    clean, noised, step, label = inputs(frames, side, block)
    order = model.factorization.of(model.layout).argsort(stable=True)
    canvas = model.canvas({"token": torch.zeros_like(clean)})
    canvas.value["token"][:, order] = clean
    canvas.noise["token"] = torch.zeros_like(noised)
    canvas.noise["token"][:, order] = noised
    canvas.level = torch.zeros(clean.shape[:2])
    canvas.level[:, order] = ((step + 1) / 1000).repeat_interleave(block, 1)
    plan = model.factorization.packed(canvas)
    condition = model.encode({"class": label.clamp(max=4)}, label == 5)
    with torch.no_grad():
        h = model.hidden(plan, canvas, None, condition)
        return model.heads["token"].out(h)[:, : model.layout.size][:, order]


def model_of(kind):
    frames, side, block = kind
    return acdit_of(released(), side, block, frames)


def gap(model, kind):
    said = says(model, *kind)
    first, largest = GOLDEN[kind]
    found = torch.cat([said.flatten()[:4], said.abs().max()[None]])
    return float((found - torch.tensor([*first, largest])).abs().max()) / largest


@pytest.mark.parametrize("kind", [PICTURE, VIDEO])
def test_what_is_said_is_what_the_released_code_says(kind):
    assert gap(model_of(kind), kind) < 1e-5


def called_from_zero(model):
    model.clock.begin = 0.0


def modulated_context(model):
    model.clock.values = 0.0


def plain_rotation(model):
    tables = model.backbone.rotary
    model.backbone.rotary = {k: RotaryTable(replace(t.rope, crossed=False), 64) for k, t in tables.items()}


def norms_without_weights(model):
    for layer in model.backbone.layers:
        layer.norm1.data.fill_(1.0)


def raster_blocks(model):
    model.factorization.group = torch.arange(model.layout.size) // int((model.factorization.group == 0).sum())


WRONG = [called_from_zero, modulated_context, plain_rotation, norms_without_weights]


@pytest.mark.parametrize("kind", [PICTURE, VIDEO])
@pytest.mark.parametrize("wrong", WRONG)
def test_each_trap_shows(kind, wrong):
    model = copy.deepcopy(model_of(kind))
    wrong(model)
    assert gap(model, kind) > 0.01


def test_blocks_of_pictures_are_squares():
    model = copy.deepcopy(model_of(PICTURE))
    raster_blocks(model)
    assert gap(model, PICTURE) > 0.01


def test_a_file_is_read_and_draws(tmp_path):
    said = argparse.Namespace(
        image_size=32, vae_patch_pixels=8, patch_size=1, block_size=4, num_frames=1, nd_split=None
    )
    torch.save({"model": released(), "args": said}, tmp_path / "ACDiT.pt")
    model = read_acdit(tmp_path / "ACDiT.pt")
    assert torch.equal(says(model, *PICTURE), says(model_of(PICTURE), *PICTURE))
    assert not any(p.requires_grad for p in model.parameters())
    canvas = generate(Target(model, {"class": torch.tensor([1, 2])}), model.blank(2), MultiStep(3), Noise())
    assert canvas.done and bool(torch.isfinite(canvas.value["token"]).all())


def stored(place, **changes):
    """A file beside the autoencoder of its latents."""
    asked = {"image_size": 32, "vae_patch_pixels": 8, "patch_size": 1, "block_size": 4, "num_frames": 1}
    said = argparse.Namespace(**asked | {"nd_split": None} | changes)
    torch.save({"model": released(), "args": said}, place / "ACDiT-XL-img.pt")
    store(place)
    return place / "ACDiT-XL-img.pt"


def test_a_file_beside_its_autoencoder_is_a_system(tmp_path):
    system = load(stored(tmp_path))
    c, s = system.config, system.sampling
    assert isinstance(system, ACDiT) and (c.form, c.side, c.block, c.dim) == ("released", 4, (2, 2), 4)
    assert (s.guidance, s.steps) == (0.5, 25) and system.tokenizer.side == 32
    assert gap(system.model, PICTURE) < 1e-5
    drawn = system.draw(torch.tensor([1, 3]), sampling=Sampling(guidance=0.5, steps=2))
    assert drawn.images.shape == (2, 3, 32, 32) and drawn.forwards == 4 * 2


def test_videos_and_files_that_say_too_little_or_stand_alone_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"latents of videos: seriatim\.interop\.acdit\.read_acdit"):
        load(stored(tmp_path, num_frames=4))
    file = stored(tmp_path)
    (tmp_path / FILE).write_bytes(b"\0" * 9)
    with pytest.raises(ValueError, match="no whole safetensors file"):
        load(file)
    (tmp_path / FILE).unlink()
    with pytest.raises(FileNotFoundError, match=r"put diffusion_pytorch_model\.safetensors into"):
        load(file)
    torch.save({"model": released()}, file)
    with pytest.raises(ValueError, match="does not say the sizes"):
        load(file)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"form": "twice"}, "single or released"), ({"form": "released", "block": (1, 2)}, "square blocks")],
)
def test_the_released_form_is_one_only(changes, message):
    with pytest.raises(ValueError, match=message):
        Config(**changes)


def test_other_weights_are_refused():
    missing = {name: x for name, x in released().items() if name != "blocks.1.mlp.fc1.bias"}
    with pytest.raises(ValueError, match=r"no weights of ACDiT: backbone.layers.1.up_bias"):
        acdit_of(missing, 4, 4)
    with pytest.raises(ValueError, match=r"no weights of ACDiT: .*pos_embed"):
        acdit_of({**released(), "pos_embed": torch.zeros(1)}, 4, 4)
    with pytest.raises(ValueError, match="one base of rotary angles"):
        acdit_of(released(), 64, 4, frames=4)
