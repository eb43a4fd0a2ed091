"""The released weights of M-VAR (Ren et al. 2024; Hub OliverRen/M-VAR: d16 to d32) by our names; VAR's tokenizer.

Facts of the code: beside what VAR has, a layer holds a Mamba-2 mixer by the names of `mamba_ssm`, and its matrix of
nine parts stands as gates, scales, shifts of attention, mixer and feed-forward network. Queries and keys have unit
length from d24 on, which their temperatures tell; without, scores are a fourth of the usual.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from seriatim.interop import var

MIXER = {
    "in_proj.weight": "into", "conv1d.weight": "conv", "conv1d.bias": "conv_bias", "dt_bias": "dt_bias",
    "A_log": "A_log", "D": "D", "norm.weight": "gated_norm", "out_proj.weight": "out",
}  # fmt: skip
HEAD = 64  # channels of every head of attention


def is_mvar(weights: Mapping[str, Tensor]) -> bool:
    return var.is_var(weights) and "blocks.0.mamba.in_proj.weight" in weights


def sizes_of(weights: Mapping[str, Tensor]) -> dict[str, int | bool]:
    """width, depth, heads, classes, state, channels and unit of a released generator."""
    width, inner = weights["word_embed.weight"].shape[0], weights["blocks.0.mamba.norm.weight"].numel()
    heads, rows = weights["blocks.0.mamba.A_log"].numel(), weights["blocks.0.mamba.conv1d.weight"].shape[0]
    return {
        "width": width, "depth": sum(name.endswith(".mamba.in_proj.weight") for name in weights),
        "heads": width // HEAD, "classes": len(weights["class_emb.weight"]) - 1, "state": (rows - inner) // 2,
        "channels": inner // heads, "unit": "blocks.0.attn.scale_mul_1H11" in weights,
    }  # fmt: skip


def named_mvar(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The generator's weights by our names. Unknown ones keep theirs, and are refused by who loads them."""
    out, rest = {}, {}
    for name, x in weights.items():
        part = name.partition(".mamba.")[2]
        layer = "backbone.layers." + name.split(".")[1] if name.startswith("blocks.") else ""
        if part in MIXER:
            out[f"{layer}.mixer.{MIXER[part]}"] = x.flatten(1) if part == "conv1d.weight" else x
        elif ".ada_lin.1." in name and layer:
            parts = x.chunk(9)
            rest[name] = torch.cat([parts[i] for i in (0, 2, 3, 5, 6, 8)])  # as in VAR, of the two other branches
            suffix = "_bias" if name.endswith(".bias") else ""
            out[f"{layer}.mixer.ada{suffix}"] = torch.cat([parts[i] for i in (7, 4, 1)])  # shift, scale, gate
        elif not name.endswith(".attn.patch_nums"):  # a table, which follows from the scales
            rest[name] = x
    return out | var.named_var(rest)
