"""The released tokenizer of D-AR in our parts: names and shapes of its file, numbers of its code, and what would break
them.

The golden numbers were computed once by the released code (VQModel of showlab/D-AR, in float32, with stand-ins for the
two layers that it takes from timm) with the weights and inputs that `released` and `inputs` make: the first four
numbers, and the largest of all, of the latents of two pictures, of the condition vectors of their ids, of a velocity
that is told the second group, and of the pictures that are drawn.
"""

from __future__ import annotations

import pytest
import torch

import seriatim.tokenizers.sequential as sequential
from seriatim.backbones.rope import RotaryTable
from seriatim.interop import d_ar
from seriatim.interop.d_ar import d_ar_of, read_d_ar

WIDTH, SIDE, QUERIES, GROUPS = 128, 16, 8, 4
IDS = [17, 4, 4, 9]  # the first four of the first picture
GOLDEN = {
    "latents": ((-1.47138, 0.19964, -0.51581, 0.25203), 4.08284),
    "conditions": ((0.47107, 1.51026, 0.72021, -0.08529), 4.49776),
    "velocity": ((1.42956, 0.08736, 2.39693, -2.18775), 5.1505),
    "picture": ((1.82603, 4.916, 1.20958, -3.60988), 10.82758),
}


def shapes():
    """Names and shapes of the tensors of a file, at this size, but for those that only training needs."""
    w = WIDTH
    out = {
        "patchify.weight": (w, 3, 4, 4), "patchify.bias": (w,), "quant_in_conv.weight": (8, w, 1, 1),
        "quant_out_conv.weight": (w, 8, 1, 1), "quantize.embedding.weight": (32, 8),
        "query_embedding.weight": (1024, 8), "query_linear.weight": (w, 8), "query_linear.bias": (w,),
        "decoder_embedding.weight": (1024, w),
    }  # fmt: skip
    flow = "diff_decoder.net."
    for name, out_size, in_size in (
        ("cond_mlp", (w,), (w,)),
        ("conv_in", (w,), (48, 1, 1)),
        ("conv_out", (48,), (w, 1, 1)),
    ):
        out |= {f"{flow}{name}.weight": (*out_size, *in_size), f"{flow}{name}.bias": out_size}
    for stack in ("encoder_layers.0.", "decoder_layers.0.", flow + "blocks.0."):
        linear = {
            "mlp.fc1": (4 * w, w),
            "mlp.fc2": (w, 4 * w),
            **{f"attention.{x}": (w, w) for x in ("q", "k", "v", "proj")},
        }
        norms = {"attention.q_norm": 64, "attention.k_norm": 64}
        if "blocks" in stack:
            linear |= {f"cross_attn.{x}": (w, w) for x in ("q", "k", "v", "proj")}
            linear |= {f"{x}.{i}": (w, w) for x in ("time_embed.mlp", "cond_embed") for i in (0, 2)}
            linear["adaLN_modulation.1"] = (6 * w, w)
            norms |= {"cross_attn.q_norm": 64, "cross_attn.k_norm": 64}
        else:
            out |= {stack + "gate1": (w,), stack + "gate2": (w,)}
            norms |= {"norm1": w, "norm2": w}
        for name, shape in (linear | {n: (size,) for n, size in norms.items()}).items():
            out |= {f"{stack}{name}.weight": shape, f"{stack}{name}.bias": shape[:1]}
    return out


def released():
    """Weights as large as those that were trained, gates among them."""
    g, out = torch.Generator().manual_seed(0), {}
    for name, shape in sorted(shapes().items()):
        x = torch.randn(shape, generator=g)
        if "embedding" not in name:
            norm = ("norm" in name and name.endswith("weight")) or "gate" in name
            x = 1.6 * x / x[0].numel() ** 0.5 if len(shape) > 1 else 0.4 * x + float(norm)
        out[name] = x
    return out


def inputs():
    """Pictures, and noise."""
    images = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return images, torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2))


def model_of():
    return d_ar_of(released(), SIDE, QUERIES, GROUPS)


@torch.no_grad()
def said(tokenizer, name):
    images, noise = inputs()
    if name == "latents":
        return tokenizer.latents(images)
    codes = tokenizer.quantizer.decode_ids(tokenizer.encode(images))
    if name == "picture":
        return tokenizer.draw(codes, noise)
    told = tokenizer.conditions(codes)
    return told if name == "conditions" else tokenizer.decoder(noise, torch.tensor([0.3, 0.8]), told[:, 2:4])


def gap(tokenizer, name):
    x = said(tokenizer, name)
    first, largest = GOLDEN[name]
    found = torch.cat([x.flatten()[:4], x.abs().max()[None]])
    return float((found - torch.tensor([*first, largest])).abs().max()) / largest


@pytest.mark.parametrize("name", GOLDEN)
def test_its_numbers_are_those_of_the_released_code(name):
    tokenizer = model_of()
    assert gap(tokenizer, name) < 1e-5
    assert tokenizer.encode(inputs()[0])[0, :4].tolist() == IDS


def _unturned(monkeypatch):
    monkeypatch.setattr(d_ar, "_turned", lambda x: x)


def _columns_first(monkeypatch):
    at = RotaryTable.at
    monkeypatch.setattr(RotaryTable, "at", lambda self, coord, dtype, near=False: at(self, coord.flip(-1), dtype, near))


def _no_gates(monkeypatch):
    layer = d_ar._layer
    monkeypatch.setattr(d_ar, "_layer", lambda w: layer({k: v for k, v in w.items() if "gate" not in k}))


def _euler(monkeypatch):
    monkeypatch.setattr(sequential, "adams_bashforth", lambda now, before: now)


def _even_times(monkeypatch):
    monkeypatch.setattr(sequential.SequentialTokenizer, "time", lambda self, share: share)


@pytest.mark.parametrize(
    ("name", "trap"),
    [
        ("latents", _unturned), ("latents", _columns_first), ("latents", _no_gates), ("conditions", _no_gates),
        ("velocity", _unturned), ("velocity", _columns_first), ("picture", _euler), ("picture", _even_times),
    ],
)  # fmt: skip
def test_what_would_break_them_is_caught(monkeypatch, name, trap):
    trap(monkeypatch)
    assert gap(model_of(), name) > 1e-3


def test_files_are_read_with_what_only_training_needs(tmp_path):
    weights = released() | {
        "quantize.codebook_used": torch.zeros(65536),
        "diff_decoder.net.repa_out.0.weight": torch.ones(3, 3),
    }
    torch.save({"model": {}, "ema": weights, "config": {"any": 1}}, tmp_path / "file.pt")
    torch.save({"patches": torch.ones(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="these are no weights of D-AR's tokenizer"):
        read_d_ar(tmp_path / "other.pt")
    tokenizer = d_ar_of(weights, SIDE, QUERIES, GROUPS)
    assert torch.equal(said(tokenizer, "latents"), said(model_of(), "latents"))
    whole = read_d_ar(tmp_path / "file.pt")
    assert (whole.side, whole.config.queries, whole.config.groups) == (256, 256, 8)


def test_weights_of_another_shape_are_refused():
    weights = released()
    weights["encoder_layers.0.mlp.fc1.weight"] = torch.zeros(3, WIDTH)
    with pytest.raises(ValueError, match=r"encoder\.net\.layers\.0\.up"):
        d_ar_of(weights, SIDE, QUERIES, GROUPS)
    with pytest.raises(ValueError, match=r"something\.else"):
        d_ar_of(released() | {"something.else": torch.zeros(1)}, SIDE, QUERIES, GROUPS)
