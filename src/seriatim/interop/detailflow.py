"""The released weights of DetailFlow (Liu et al. 2025; Hub ByteFlow-AI/DetailFlow-16, -32, -64 and the GPT-L of each)
by our names.

Facts of the code: encoder and decoder are SigLIP2's layers with one learned position for each patch, resized for
smaller pictures, and one for each query; patches are rows of pixels, channels innermost; the encoder of the release is
wider than its decoder. The generator is LlamaGen's, rotated by group and place of what a slot carries, with learned
tokens before the second group. What only training needs (features of another network) is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from seriatim.interop import llamagen
from seriatim.tokenizers.detail import DetailConfig

PADS = "spe_tok_embeddings.special_embeddings.weight"
TRAINING = ("repa_model.", "projection.", "global_token_proj.", "quantize.codebook_used")
HEADS = {1152: 16}  # by width; all others are 64 wide
GUIDANCE = {128: 0.45, 256: 0.5, 512: 0.32}  # by the ids of a picture: those of the released figures
PUBLISHED = DetailConfig.for_pictures(256, 3, form="released")
OUTSIDE = {
    "quant_conv": "encoder.to_code", "refine_conv": "encoder.follow.from_code", "post_quant_conv": "decoder.from_code",
}  # fmt: skip
LAYER = {
    "layer_norm1": "norm1", "layer_norm2": "norm2", "self_attn.out_proj": "out", "mlp.fc1": "up", "mlp.fc2": "down",
}  # fmt: skip


def is_detailflow(weights: Mapping[str, Tensor]) -> bool:
    return llamagen.is_llamagen(weights) and PADS in weights


def is_detail_tokenizer(weights: Mapping[str, Tensor]) -> bool:
    return {"encoder.latent_tokens", "encoder.refined_tokens", "decoder.mask_token", "quantize.embedding.weight"} <= (
        weights.keys()
    )


def group_of(weights: Mapping[str, Tensor]) -> int:
    """Ids of a group of a released generator."""
    return len(weights[PADS]) + 1


def named_detailflow(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The generator's weights by our names. Unknown ones keep theirs, and are refused by who loads them."""
    named = llamagen.named_llamagen(weights)
    return named | {"embed.pads": named.pop(PADS)}


def detail_of(weights: Mapping[str, Tensor], group: int) -> tuple[DetailConfig, dict[str, Tensor]]:
    """Config and weights of a released tokenizer, whose ids come in groups of this size."""
    vocab, dim = weights["quantize.embedding.weight"].shape
    width, inner = weights["decoder.mask_token"].shape[2], weights["encoder.latent_tokens"].shape[2]
    patch = math.isqrt(len(weights["decoder.to_pixel.model.bias"]) // 3)
    grid = math.isqrt(len(weights["decoder.visual_model.embeddings.position_embedding.weight"]))
    config = replace(
        PUBLISHED, side=grid * patch, vocab=vocab, dim=dim, queries=weights["encoder.latent_tokens"].shape[1],
        group=group, patch=patch, width=width, heads=HEADS.get(width, width // 64), depth=_depth(weights, "encoder"),
        draw_depth=_depth(weights, "decoder"), near=min(PUBLISHED.near, vocab), encoder_width=inner,
        encoder_heads=HEADS.get(inner, inner // 64),
        encoder_hidden=len(weights["encoder.visual_model.encoder.layers.0.mlp.fc1.bias"]),
    )  # fmt: skip
    return config, _ours(weights, patch, grid)


def _depth(weights: Mapping[str, Tensor], side: str) -> int:
    return sum(n.startswith(f"{side}.visual_model.") and n.endswith(".mlp.fc1.bias") for n in weights)


def _ours(weights: Mapping[str, Tensor], patch: int, grid: int) -> dict[str, Tensor]:
    """A tokenizer's weights by our names. Unknown ones keep theirs, and are refused by who loads them."""
    rest = {name: x for name, x in weights.items() if not name.startswith(TRAINING)}
    place, drawn = (rest.pop(f"{side}.latent_pos_embed")[0] for side in ("encoder", "decoder"))
    table = rest.pop("decoder.visual_model.embeddings.position_embedding.weight")
    out = {
        "encoder.queries": rest.pop("encoder.latent_tokens")[0] + place, "encoder.follow.place": place,
        "encoder.follow.queries": rest.pop("encoder.refined_tokens")[0], "decoder.place": drawn,
        "encoder.places": rest.pop("encoder.visual_model.embeddings.position_embedding.weight"),
        "decoder.grid": table.T.unflatten(1, (grid, grid)), "decoder.mask": rest.pop("decoder.mask_token").flatten(),
        "quantizer.table": rest.pop("quantize.embedding.weight"),
    }  # fmt: skip
    order = torch.arange(3 * patch**2).view(patch, patch, 3).permute(2, 0, 1).flatten()  # channels outermost
    for kind in ("weight", "bias"):
        into = rest.pop(f"encoder.visual_model.embeddings.patch_embedding.{kind}")
        out[f"encoder.from_patch.{kind}"] = into[:, order] if kind == "weight" else into
        out[f"decoder.to_patch.{kind}"] = rest.pop(f"decoder.to_pixel.model.{kind}")[order]
    for name, x in rest.items():
        part, _, kind = name.rpartition(".")
        side, _, inner = part.partition(".visual_model.")
        suffix = "_bias" if kind == "bias" else ""
        if part in OUTSIDE:
            out[f"{OUTSIDE[part]}.{kind}"] = x
        elif inner == "post_layernorm":
            out[f"{side}.net.norm{suffix}"] = x
        elif inner.startswith("encoder.layers."):
            _, _, number, within = inner.split(".", 3)
            if within == "self_attn.q_proj":
                others = (rest[name.replace("q_proj", f"{k}_proj")] for k in "kv")
                out[f"{side}.net.layers.{number}.qkv{suffix}"] = torch.cat([x, *others])
            elif within not in ("self_attn.k_proj", "self_attn.v_proj"):
                out[f"{side}.net.layers.{number}.{LAYER.get(within, within)}{suffix}"] = x
        else:
            out[name] = x
    return out
