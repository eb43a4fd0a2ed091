"""Names of the convolutional body that VQGAN published (Esser et al. 2021) and VAR, LlamaGen and latent diffusion kept,
as ours: `ResidualEncoder` and `ResidualDecoder` (tokenizers/conv.py)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

BLOCKS = 2  # of a resolution in the encoder; the decoder has one more
PARTS = {"nin_shortcut": "shortcut", "proj_out": "out"}


def body_of(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Encoder, decoder and the convolutions to and from the code by our names; the rest is left out. Where queries,
    keys and values are convolutions of their own, they become one."""
    levels = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("encoder.down."))
    ours = {"quant_conv": "encoder.to_code", "post_quant_conv": "decoder.from_code"}
    down, up = (any(n.startswith(f"{p}.{levels - 1}.attn.") for n in weights) for p in ("encoder.down", "decoder.up"))
    for side, names in (("encoder", encoder_names(levels, down)), ("decoder", decoder_names(levels, up))):
        ours |= {f"{side}.{theirs}": f"{side}.layers.{i}" for i, theirs in enumerate(names) if theirs}
    out: dict[str, Tensor] = {}
    for name, x in weights.items():
        part = max((p for p in ours if name.startswith(p + ".")), key=len, default=None)
        if part is not None:
            words = [PARTS.get(word, word) for word in name[len(part) + 1 :].split(".")]
            out[f"{ours[part]}.{'.'.join(words)}"] = x
    for name in [n for n in out if n.split(".")[-2] == "q"]:
        base, kind = name.rsplit(".", 2)[0], name.rsplit(".", 1)[1]
        out[f"{base}.qkv.{kind}"] = torch.cat([out.pop(f"{base}.{part}.{kind}") for part in "qkv"])
    return out


def encoder_names(levels: int, attends: bool = True) -> list[str]:
    """The published name of each of our layers ("": without weights); attends: whether blocks of the lowest resolution
    do."""
    names = ["conv_in"]
    for i in range(levels):
        lowest = i == levels - 1
        for j in range(BLOCKS):
            names += [f"down.{i}.block.{j}"] + [f"down.{i}.attn.{j}"] * (attends and lowest)
        names += [f"down.{i}.downsample.conv"] * (not lowest)
    return [*names, "mid.block_1", "mid.attn_1", "mid.block_2", "norm_out", "", "conv_out"]


def decoder_names(levels: int, attends: bool = True) -> list[str]:
    """The same of the decoder."""
    names = ["conv_in", "mid.block_1", "mid.attn_1", "mid.block_2"]
    for i in reversed(range(levels)):
        for j in range(BLOCKS + 1):
            names += [f"up.{i}.block.{j}"] + [f"up.{i}.attn.{j}"] * (attends and i == levels - 1)
        names += [f"up.{i}.upsample.conv"] * (i > 0)
    return [*names, "norm_out", "", "conv_out"]
