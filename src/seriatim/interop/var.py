"""The released weights of VAR (Tian et al. 2024; Hub FoundationVision/var: d16 to d36, a tokenizer) by our names.

Facts of the code: queries and values have a bias, keys a fixed one of 0; scales and shifts of a layer stand as gates,
scales, shifts of both branches there and as shift, scale, gate of each here; d36 shares one matrix for these among all
layers, with an offset for each.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from seriatim.interop.vqgan import body_of
from seriatim.tokenizers.multiscale import SCALES, MultiScaleConfig

TABLES = ("lvl_1L", "attn_bias_for_masking")  # of the code, which follow from the scales
OUTSIDE = {
    "word_embed.weight": "embed.project.weight", "word_embed.bias": "embed.project.bias",
    "lvl_embed.weight": "embed.scale", "class_emb.weight": "conditions.class.table",
    "head.weight": "heads.token.weight", "head.bias": "heads.token.bias",
}  # fmt: skip
LAYER = {
    "attn.mat_qkv.weight": "qkv", "attn.proj.weight": "out", "attn.proj.bias": "out_bias", "ffn.fc1.weight": "up",
    "ffn.fc1.bias": "up_bias", "ffn.fc2.weight": "down", "ffn.fc2.bias": "down_bias",
}  # fmt: skip
ORDER = (4, 2, 0, 5, 3, 1)  # gates, scales, shifts of both branches -> shift, scale, gate of each


def is_var(weights: Mapping[str, Tensor]) -> bool:
    return {"word_embed.weight", "lvl_embed.weight", "pos_1LC", "head_nm.ada_lin.1.weight"} <= weights.keys()


def is_var_tokenizer(weights: Mapping[str, Tensor]) -> bool:
    return "quantize.quant_resi.qresi_ls.0.weight" in weights and "quantize.embedding.weight" in weights


def multiscale_of(weights: Mapping[str, Tensor], scales: tuple[int, ...]) -> tuple[MultiScaleConfig, dict[str, Tensor]]:
    """Config and weights of a released tokenizer for these scales: its weights do not depend on them."""
    vocab, dim = weights["quantize.embedding.weight"].shape
    phis = sum(name.startswith("quantize.quant_resi.") and name.endswith(".weight") for name in weights)
    levels = sum(name.endswith(".downsample.conv.weight") for name in weights)
    config = MultiScaleConfig(
        scales=scales, vocab=vocab, dim=dim, channels=weights["encoder.conv_in.weight"].shape[1],
        width=len(weights["encoder.conv_in.weight"]), halvings=levels, body="residual", phis=phis,
    )  # fmt: skip
    named = body_of(weights) | {"quantizer.codebook": weights["quantize.embedding.weight"]}
    for name, x in weights.items():
        if name.startswith("quantize.quant_resi."):
            named["quantizer.phis." + name.removeprefix("quantize.quant_resi.qresi_ls.")] = x
    return config, named


def sizes_of(weights: Mapping[str, Tensor]) -> dict[str, int]:
    """width, depth, heads and classes of a released generator. Heads are 64 wide; their temperatures tell how many."""
    width = weights["word_embed.weight"].shape[0]
    depth = sum(name.endswith(".attn.mat_qkv.weight") for name in weights)
    temperature = weights.get("blocks.0.attn.scale_mul_1H11")
    if temperature is None:
        raise ValueError("this VAR was trained without queries and keys of unit length, as no released one was")
    return {
        "width": width, "depth": depth, "heads": temperature.numel(),
        "classes": len(weights["class_emb.weight"]) - 1,
    }  # fmt: skip


def scales_of(weights: Mapping[str, Tensor]) -> tuple[int, ...]:
    """The scales whose places a released generator has. Raises ValueError for none that were released."""
    places, count = weights["pos_1LC"].shape[1], len(weights["lvl_embed.weight"])
    for scales in SCALES.values():
        if len(scales) == count and sum(side * side for side in scales) == places:
            return scales
    raise ValueError(f"no released VAR has {count} scales of {places} places in all")


def named_var(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The generator's weights by our names. Unknown ones keep theirs, and are refused by who loads them."""
    out, width = {}, weights["word_embed.weight"].shape[0]
    shared = weights.get("shared_ada_lin.1.weight")
    for name, x in weights.items():
        if name in TABLES or name.startswith("shared_ada_lin.") or name.endswith(".attn.zero_k_bias"):
            continue
        if name in OUTSIDE:
            out[OUTSIDE[name]] = x
        elif name == "pos_start":
            out["embed.start"] = x.reshape(-1, width)[0]
        elif name == "pos_1LC":
            out["embed.position"] = x[0]
        elif name.startswith("head_nm.ada_lin.1."):  # scale, shift there
            scale, shift = x.chunk(2)
            out["backbone.ada" + _bias(name)] = torch.cat([shift, scale])
        elif name.startswith("blocks."):
            _, number, rest = name.split(".", 2)
            out |= {f"backbone.layers.{number}.{k}": y for k, y in _layer(rest, x, weights, number).items()}
        else:
            out[name] = x
    if shared is not None:
        matrix = torch.cat([shared.chunk(6)[i] for i in ORDER])
        out |= {f"backbone.layers.{i}.ada": matrix for i in range(sizes_of(weights)["depth"])}
    return out


def _bias(name: str) -> str:
    return "_bias" if name.endswith(".bias") else ""


def _layer(name: str, x: Tensor, weights: Mapping[str, Tensor], number: str) -> dict[str, Tensor]:
    """One tensor of a layer."""
    if name in LAYER:
        return {LAYER[name]: x}
    if name == "attn.q_bias":
        return {"qkv_bias": torch.cat([x, torch.zeros_like(x), weights[f"blocks.{number}.attn.v_bias"]])}
    if name == "attn.v_bias":
        return {}
    if name == "attn.scale_mul_1H11":
        return {"q_norm": x.view(-1, 1)}
    if name.startswith("ada_lin.1."):
        return {"ada" + _bias(name): torch.cat([x.chunk(6)[i] for i in ORDER])}
    if name == "ada_gss":
        offset = x.reshape(6, -1) + weights["shared_ada_lin.1.bias"].view(6, -1)
        return {"ada_bias": offset[list(ORDER)].flatten()}
    return {name: x}
