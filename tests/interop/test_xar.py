"""The released weights of xAR in our parts: names and shapes of its files, numbers of its code, and what would break
them.

The golden numbers were computed once by the released code (models/xar.py of OliverRensu/xAR, in float32, with stand-ins
for the few layers that it takes from timm) with the weights and inputs that `released` and `inputs` make: the first
four numbers that it predicts, and the largest of all, of a training forward, and of the first step of the second cell.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from seriatim.backbones.rope import RotaryTable
from seriatim.decoding.loop import generate
from seriatim.decoding.solver import Noise, StochasticStep
from seriatim.decoding.target import Target
from seriatim.interop.xar import read_xar, xar_of
from seriatim.systems.image.xar import XAR, Config, build
from seriatim.systems.system import Sampling
from seriatim.verbs.load import load
from support.released_mar import autoencoder_shapes
from support.released_var import released as made

WIDTH, HEADS, DEPTH, DIM, ROWS = 32, 2, 1, 16, 2
WIDE = 128  # of the files that are loaded whole: two heads, as their width tells
GOLDEN = {
    "training": ((4.03812, 3.70303, -1.37254, -0.93669), 7.09157),
    "second_cell": ((0.736, 0.14987, -1.20066, -0.29543), 6.41526),
}


def shapes(w=WIDTH):
    """Names and shapes of the tensors of a file, at this size; tables of rotary angles and the mask left out."""
    hidden = int(w * 4 * 2 / 3.0)
    out = {
        "encoder_pos_embed_learned": (1, 256, w), "decoder_pos_embed_learned": (1, 256, w),
        "class_emb.weight": (1001, w), "time_embed.mlp.0.weight": (w, 256), "time_embed.mlp.0.bias": (w,),
        "time_embed.mlp.2.weight": (w, w), "time_embed.mlp.2.bias": (w,), "z_proj.weight": (w, DIM),
        "z_proj.bias": (w,), "z_proj_ln.weight": (w,),
    }  # fmt: skip
    for stack in ("encoder", "decoder"):
        for i in range(DEPTH):
            b = f"{stack}_blocks.{i}."
            out |= {
                b + "attn.qkv.weight": (3 * w, w), b + "attn.qkv.bias": (3 * w,), b + "attn.proj.weight": (w, w),
                b + "attn.proj.bias": (w,), b + "mlp.fc1_g.weight": (hidden, w), b + "mlp.fc1_g.bias": (hidden,),
                b + "mlp.fc1_x.weight": (hidden, w), b + "mlp.fc1_x.bias": (hidden,), b + "mlp.fc2.weight": (w, hidden),
                b + "mlp.fc2.bias": (w,), b + "ada_lin.1.weight": (6 * w, w), b + "ada_lin.1.bias": (6 * w,),
            }  # fmt: skip
    return out | {
        "encoder_norm.weight": (w,), "decoder_embed.weight": (w, w), "decoder_embed.bias": (w,),
        "decoder_norm.weight": (w,), "pred.weight": (DIM, w), "pred.bias": (DIM,),
    }  # fmt: skip


def released(w=WIDTH):
    """Weights as large as those that were trained, gates among them."""
    g, out = torch.Generator().manual_seed(0), {}
    for name, shape in shapes(w).items():
        x = torch.randn(shape, generator=g)
        matrix = len(shape) == 2 and "class" not in name
        out[name] = 1.6 * x / shape[1] ** 0.5 if matrix else 0.4 * x + float(len(shape) == 1 and "norm" in name)
    out["z_proj_ln.weight"] = out["z_proj_ln.weight"] + 1
    return out


def inputs():
    """What stands in the places, cell by cell, the level of each cell, and classes."""
    g = torch.Generator().manual_seed(1)
    return torch.randn(ROWS, 256, DIM, generator=g), torch.rand(ROWS, 4, generator=g), torch.tensor([7, 207])


def cell_order(model):
    return model.factorization.group.argsort(stable=True)


def canvas_of(model, x, level):
    order = cell_order(model)
    canvas = model.canvas({"token": torch.zeros_like(x)})
    canvas.noise["token"] = torch.zeros_like(x)
    canvas.noise["token"][:, order] = x
    canvas.level = torch.zeros(x.shape[:2])
    canvas.level[:, order] = level.repeat_interleave(64, 1)
    return canvas


def training(model):
    """What is predicted in one pass over noisy cells, in their order, as the code has it: noise - value."""
    x, level, label = inputs()
    canvas = canvas_of(model, x, level)
    plan = model.factorization.noisy(canvas)
    with torch.no_grad():
        h = model.hidden(plan, canvas, None, model.encode({"class": label}))
        return -model.heads["token"].out(h)[:, cell_order(model)]


def second_cell(model):
    """What is predicted in the first step of the second cell, behind the first one, which is clean by now."""
    x, level, label = inputs()
    canvas = canvas_of(model, x, level)
    order = cell_order(model)
    known = model.factorization.group == 0
    value = torch.zeros_like(x)
    value[:, order] = x
    canvas.value["token"] = value
    canvas.status[:, known] = 1
    plan = Target(model, {"class": label}).plan(canvas)
    with torch.inference_mode():
        rows = Target(model, {"class": label}).forward(plan, canvas)
    assert torch.equal(rows.element[0], order[64:128])
    return -rows.dist.said


def gap(model, forward):
    said = forward(model)
    first, largest = GOLDEN[forward.__name__]
    found = torch.cat([said.flatten()[:4], said.abs().max()[None]])
    return float((found - torch.tensor([*first, largest])).abs().max()) / largest


def model_of():
    return xar_of(released(), heads=HEADS)


@pytest.mark.parametrize("forward", [training, second_cell])
def test_what_is_said_is_what_the_released_code_says(forward):
    assert gap(model_of(), forward) < 1e-4


def fractions_of_time(model):
    model.clock.whole = False


def gated_by_silu(model):
    for stack in (model.backbone.first, model.backbone.second):
        stack.config = replace(stack.config, activation="swiglu")


def raster_positions(model):
    order = cell_order(model)
    model.embed.place.data[:] = model.embed.place.data[order]


def columns_first(model):
    for stack in (model.backbone.first, model.backbone.second):
        stack.rotary = {k: Transposed(table.rope, 16) for k, table in stack.rotary.items()}


class Transposed(RotaryTable):
    def at(self, coord, dtype, near=False):
        return super().at(coord.flip(-1), dtype, near)


def one_norm_less(model):
    model.backbone.norms[1].data.fill_(1.0)


WRONG = [fractions_of_time, gated_by_silu, raster_positions, columns_first, one_norm_less]


@pytest.mark.parametrize("wrong", WRONG)
def test_each_trap_shows(wrong):
    model = copy.deepcopy(model_of())
    wrong(model)
    assert gap(model, training) > 1e-3


def test_a_file_is_read_and_draws_and_the_cache_of_both_stacks_is_invisible(tmp_path):
    buffers = {"mask": torch.zeros(1), "encoder_blocks.0.attn.rope.freqs_cos": torch.zeros(1)}
    torch.save({"model": {}, "model_ema": released() | buffers}, tmp_path / "xar.pth")
    with pytest.raises(ValueError, match="no released xAR is 32 wide"):
        read_xar(tmp_path / "xar.pth")
    model, drawn = model_of(), []
    for cached in (True, False):
        target = Target(model, {"class": torch.tensor([1])}, cached=cached)
        canvas = generate(target, model.blank(1), StochasticStep(2), Noise())
        drawn.append(canvas.value["token"])
    assert (drawn[0] - drawn[1]).abs().max() < 1e-3 * drawn[0].abs().max()
    assert bool(torch.isfinite(drawn[0]).all())


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A generator, wide enough to tell its heads, beside its autoencoder."""
    place = tmp_path_factory.mktemp("released")
    torch.save({"model": made(autoencoder_shapes(DIM))}, place / "kl16.ckpt")
    torch.save({"model": {}, "model_ema": released(WIDE), "epoch": 799}, place / "xar.pth")
    return place / "xar.pth"


def test_a_file_beside_its_autoencoder_is_a_system(file):
    """The same model as by `read_xar`; pictures are drawn cell by cell at the published settings."""
    system, model = load(file), read_xar(file)
    assert isinstance(system, XAR) and system.tokenizer.grid == (16, 16)
    for name, x in model.state_dict().items():
        assert torch.equal(system.model.state_dict()[name], x), name
    c, s = system.config, system.sampling
    assert (c.form, c.cell, c.side, c.dim, c.width, c.depth, c.heads) == ("released", 8, 16, DIM, WIDE, DEPTH, 2)
    assert (s.guidance, s.steps) == (pytest.approx(1.7), 40)
    drawn = system.draw(torch.tensor([1]), sampling=Sampling(guidance=1.0, steps=2))
    assert drawn.forwards == 4 * 2 and drawn.images.shape == (1, 3, 64, 64)
    assert build(replace(c)).state_dict().keys() == model.state_dict().keys()


def test_a_file_alone_or_without_a_weight_is_refused(file, tmp_path):
    weights = {name: x for name, x in released(WIDE).items() if name != "decoder_embed.bias"}
    torch.save(weights, tmp_path / "xar.pth")
    with pytest.raises(FileNotFoundError, match=r"put kl16\.ckpt into"):
        load(tmp_path / "xar.pth")
    (tmp_path / "kl16.ckpt").write_bytes((file.parent / "kl16.ckpt").read_bytes())
    with pytest.raises(ValueError, match=r"backbone\.join\.bias"):
        load(tmp_path / "xar.pth")


@pytest.mark.parametrize(
    ("change", "message"), [({"form": "twice"}, "single or released"), ({"context": "clean"}, "draws cells behind")]
)
def test_the_released_form_is_one_only(change, message):
    with pytest.raises(ValueError, match=message):
        Config(**{"form": "released"} | change)


def test_other_weights_are_refused():
    missing = {name: x for name, x in released().items() if name != "decoder_embed.bias"}
    with pytest.raises(ValueError, match=r"no weights of xAR: backbone.join.bias"):
        xar_of(missing, heads=HEADS)
    with pytest.raises(ValueError, match=r"no weights of xAR: fake_latent"):
        xar_of({**released(), "fake_latent": torch.zeros(1)}, heads=HEADS)
