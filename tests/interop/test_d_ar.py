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
from support.released_d_ar import WIDTH
from support.released_d_ar import tokenizer_weights as released

SIDE, QUERIES, GROUPS = 16, 8, 4
IDS = [17, 4, 4, 9]  # the first four of the first picture
GOLDEN = {
    "latents": ((-1.47138, 0.19964, -0.51581, 0.25203), 4.08284),
    "conditions": ((0.47107, 1.51026, 0.72021, -0.08529), 4.49776),
    "velocity": ((1.42956, 0.08736, 2.39693, -2.18775), 5.1505),
    "picture": ((1.82603, 4.916, 1.20958, -3.60988), 10.82758),
}


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
