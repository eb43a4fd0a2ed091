"""The released weights of HMAR (Kumbong et al. 2025; Hub nvidia/HMAR: d16 to d30) by our names; VAR's tokenizer.

Facts of the code: layers are VAR's and stand in three lists, those of both ends first (`base_blocks`), then those of
next-scale prediction (`ns_blocks`) and of mask passes (`mask_blocks`); head and last norm come twice; the bias of what
coarser scales say stands apart, since what a slot's own element adds has none.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from seriatim.interop import var

SETTINGS = {16: (1000, 1.7), 20: (950, 1.9), 24: (900, 2.1), 30: (650, 1.6)}  # top-k and guidance by depth
OWN = ("mask_embed.weight", "word_embed_bias")


def is_hmar(weights: Mapping[str, Tensor]) -> bool:
    return {"mask_embed.weight", "word_embed_bias", "ns_head.weight", "mask_head.weight"} <= weights.keys()


def sizes_of(weights: Mapping[str, Tensor]) -> dict[str, int]:
    """width, depth, heads, classes and mask_layers of a released generator."""
    return var.sizes_of(one_end(weights, "ns")) | {"mask_layers": count(weights, "mask_blocks.")}


def named_hmar(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The generator's weights by our names. Unknown ones keep theirs, and are refused by who loads them."""
    out = var.named_var(one_end(weights, "ns"))
    shared = count(weights, "base_blocks.")
    for name, x in var.named_var(one_end(weights, "mask")).items():
        if name.startswith("backbone.layers."):
            _, _, number, rest = name.split(".")
            if int(number) >= shared:
                out[f"backbone.fork.{int(number) - shared}.{rest}"] = x
        elif name.startswith(("backbone.ada", "heads.")):
            out[name.replace("backbone.ada", "backbone.fork_ada").replace("heads.token", "heads.token.fork")] = x
    return out | {"embed.mask": weights["mask_embed.weight"][0]}


def one_end(weights: Mapping[str, Tensor], end: str) -> dict[str, Tensor]:
    """The weights that a forward through one end ("ns" or "mask") takes, as VAR names them."""
    out, shared = {"word_embed.bias": weights["word_embed_bias"]}, count(weights, "base_blocks.")
    other = {"ns": "mask", "mask": "ns"}[end]
    for name, x in weights.items():
        if name.startswith(f"{end}_blocks."):
            _, number, rest = name.split(".", 2)
            out[f"blocks.{shared + int(number)}.{rest}"] = x
        elif not name.startswith((f"{other}_blocks.", f"{other}_head", *OWN)):
            out[name.replace("base_blocks.", "blocks.").replace(f"{end}_head", "head")] = x
    return out


def count(weights: Mapping[str, Tensor], stack: str) -> int:
    """How many layers a list has."""
    return sum(name.startswith(stack) and name.endswith(".attn.mat_qkv.weight") for name in weights)
