"""The released weights of MAR (Li et al. 2024; LTH14/mar: B, L and H, and the autoencoder KL-16) by our names.

Facts of the code: layers are those of a vision transformer, with biases; 64 tokens hold the class, and a vector of its
own the null; positions are added three times, before the encoder, before the decoder and before the head. Latents of
the autoencoder are multiplied by 0.2325; its decoder, unlike its encoder, does not attend at the lowest resolution.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from seriatim.interop.vqgan import body_of
from seriatim.tokenizers.kl import KLConfig

SCALE = 0.2325  # of latents
HEADS = {768: 12, 1024: 16, 1280: 16}  # of the released sizes, by their width
GUIDANCE = {768: 2.9, 1024: 3.0, 1280: 3.2}  # by width, in the scale of the code: those of the released figures
PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")  # of an autoencoder; others are of its training
OUTSIDE = {
    "z_proj": "embed.project", "z_proj_ln.weight": "backbone.norm", "z_proj_ln.bias": "backbone.norm_bias",
    "decoder_embed": "backbone.join", "encoder_norm.weight": "backbone.encoder.norm",
    "encoder_norm.bias": "backbone.encoder.norm_bias", "decoder_norm.weight": "backbone.decoder.norm",
    "decoder_norm.bias": "backbone.decoder.norm_bias",
}  # fmt: skip
POSITIONS = {"encoder_pos_embed_learned": 0, "decoder_pos_embed_learned": 1, "diffusion_pos_embed_learned": 2}
LAYER = {
    "norm1": "norm1", "norm2": "norm2", "attn.qkv": "qkv", "attn.proj": "out", "mlp.fc1": "up", "mlp.fc2": "down",
}  # fmt: skip
DIFFUSION = {
    "time_embed.mlp": "time", "cond_embed": "state", "input_proj": "value", "final_layer.linear": "out",
    "final_layer.adaLN_modulation.1": "modulation",
}  # fmt: skip
BLOCK = {"in_ln": "norm", "mlp.0": "up", "mlp.2": "down", "adaLN_modulation.1": "modulation"}


def is_mar(weights: Mapping[str, Tensor]) -> bool:
    return {"fake_latent", "mask_token", "z_proj.weight", "diffloss.net.cond_embed.weight"} <= weights.keys()


def is_kl(weights: Mapping[str, Tensor]) -> bool:
    return "encoder.down.0.block.0.conv1.weight" in weights and "quantize.embedding.weight" not in weights


def kl_of(weights: Mapping[str, Tensor], grid: int) -> tuple[KLConfig, dict[str, Tensor]]:
    """Config and weights of the autoencoder for pictures that become so many latents a side."""
    halvings = sum(name.endswith(".downsample.conv.weight") for name in weights)
    first = weights["encoder.conv_in.weight"]
    config = KLConfig(
        side=grid * 2**halvings, channels=first.shape[1], dim=weights["post_quant_conv.weight"].shape[1],
        body="residual", width=len(first), halvings=halvings, attends="encoder",
    )  # fmt: skip
    used = {
        name: x for name, x in weights.items()
        if name.startswith(PARTS) and not (name.startswith("decoder.up.") and ".attn." in name)
    }  # fmt: skip
    return config, body_of(used) | {"scale": torch.tensor(SCALE)}


def sizes_of(weights: Mapping[str, Tensor]) -> dict[str, int]:
    """side, dim, classes, width, depth, heads, buffer, head_width and head_depth of a released generator."""
    width, dim = weights["z_proj.weight"].shape
    elements = weights["diffusion_pos_embed_learned"].shape[1]
    return {
        "side": math.isqrt(elements), "dim": dim, "classes": len(weights["class_emb.weight"]), "width": width,
        "depth": sum(n.startswith("encoder_blocks.") and n.endswith("attn.qkv.weight") for n in weights),
        "heads": HEADS.get(width, width // 64),
        "buffer": weights["encoder_pos_embed_learned"].shape[1] - elements,
        "head_width": len(weights["diffloss.net.cond_embed.weight"]),
        "head_depth": sum(n.endswith(".in_ln.weight") for n in weights),
    }  # fmt: skip


def named_mar(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The generator's weights by our names. Unknown ones keep theirs, and are refused by who loads them."""
    out = {"conditions.class.table": torch.cat([weights["class_emb.weight"], weights["fake_latent"]])}
    for name, x in weights.items():
        if name in ("class_emb.weight", "fake_latent"):
            continue
        part, _, kind = name.rpartition(".")
        if name == "mask_token":
            out["embed.mask"] = x.flatten()
        elif name in POSITIONS:
            out[f"backbone.positions.{POSITIONS[name]}"] = x[0]
        elif name in OUTSIDE:
            out[OUTSIDE[name]] = x
        elif name.startswith(("encoder_blocks.", "decoder_blocks.")):
            stack, number, inner = part.split(".", 2)
            suffix = "_bias" if kind == "bias" else ""
            ours = f"{LAYER[inner]}{suffix}" if inner in LAYER else f"{inner}.{kind}"
            out[f"backbone.{stack.removesuffix('_blocks')}.layers.{number}.{ours}"] = x
        elif name.startswith("diffloss.net."):
            out[f"heads.token.net.{_denoiser(part.removeprefix('diffloss.net.'))}.{kind}"] = x
        else:
            out[f"{OUTSIDE.get(part, part)}.{kind}"] = x
    return out


def _denoiser(part: str) -> str:
    """A part of the head's network."""
    if part.startswith("res_blocks."):
        _, number, inner = part.split(".", 2)
        return f"blocks.{number}.{BLOCK.get(inner, inner)}"
    whole = next((p for p in DIFFUSION if part == p or part.startswith(p + ".")), None)
    return part if whole is None else DIFFUSION[whole] + part[len(whole) :]
