"""The released weights of ACDiT (Hu et al. 2024; `ACDiT-{XL,H}-{img,vid}.pt`) in our parts: pictures and videos.

What they generate are latents of the Stable Diffusion autoencoder (8 x 8 pixels, 4 numbers, times 0.18215), a file of
its own (`interop.sd_vae`).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seriatim.backbones.rope import RoPE
from seriatim.backbones.transformer import Transformer, TransformerConfig
from seriatim.conditions.clock import NoiseClock
from seriatim.conditions.condition import ClassCondition
from seriatim.embed import VectorEmbed
from seriatim.factorization.cells import cells
from seriatim.factorization.groups import Groups
from seriatim.heads.in_place import InPlaceHead, Linear
from seriatim.interop.pickled import read_pickled
from seriatim.layout import grid
from seriatim.objectives.denoised import Denoising, EachStep

OUTSIDE = {
    "x_embedder.weight": "embed.project.weight",
    "y_embedder.embedding_table.weight": "conditions.class.table",
    "t_embedder.mlp.0": "clock.net.0",
    "t_embedder.mlp.2": "clock.net.2",
    "final_layer.norm_final.weight": "backbone.norm",
    "final_layer.adaLN_modulation.1.weight": "backbone.ada",
    "final_layer.adaLN_modulation.1.bias": "backbone.ada_bias",
    "final_layer.linear": "heads.token.out",
}
INSIDE = {
    "norm1.weight": "norm1", "norm2.weight": "norm2", "attn.qkv.weight": "qkv", "attn.qkv.bias": "qkv_bias",
    "attn.q_norm.weight": "q_norm", "attn.k_norm.weight": "k_norm", "attn.proj.weight": "out",
    "attn.proj.bias": "out_bias", "mlp.fc1.weight": "up", "mlp.fc1.bias": "up_bias", "mlp.fc2.weight": "down",
    "mlp.fc2.bias": "down_bias", "adaLN_modulation.1.weight": "ada", "adaLN_modulation.1.bias": "ada_bias",
}  # fmt: skip


def is_acdit(weights: Mapping[str, Tensor]) -> bool:
    return {"blocks.0.attn.q_norm.weight", "final_layer.norm_final.weight", "t_embedder.mlp.0.weight"} <= weights.keys()


def asked(path: str | Path) -> dict[str, Any]:
    """What the training of a released file was asked: image_size, vae_patch_pixels, patch_size (latents a side of a
    vector), block_size (vectors of a block), num_frames and nd_split among it. Raises ValueError where the file does
    not say."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        file = torch.load(path, map_location="cpu", weights_only=True)
    found = file.get("args") if isinstance(file, Mapping) else None
    names = ("image_size", "vae_patch_pixels", "patch_size", "block_size", "num_frames", "nd_split")
    if found is None or not all(hasattr(found, name) for name in names):
        raise ValueError(f"{path} does not say the sizes of its pictures and blocks (args): it is no file of ACDiT")
    return {name: getattr(found, name) for name in names}


def shape_of(a: Mapping[str, Any]) -> dict[str, Any]:
    """side, block, frames and split of `model_of`."""
    split = None if a["nd_split"] is None else tuple(int(x) for x in str(a["nd_split"]).split("_"))
    side = a["image_size"] // a["vae_patch_pixels"] // a["patch_size"]
    return {"side": side, "block": a["block_size"], "frames": a["num_frames"], "split": split}


def sizes_of(weights: Mapping[str, Tensor]) -> dict[str, int]:
    """width, dim, depth, heads and classes of released weights."""
    width, dim = weights["x_embedder.weight"].shape
    return {
        "width": width, "dim": dim, "heads": width // len(weights["blocks.0.attn.q_norm.weight"]),
        "depth": 1 + max((int(n.split(".")[1]) for n in weights if n.startswith("blocks.")), default=-1),
        "classes": len(weights["y_embedder.embedding_table.weight"]) - 1,
    }  # fmt: skip


def read_acdit(path: str | Path) -> Denoising:
    """The model of a released file. Raises ValueError where its weights are not those of ACDiT."""
    return acdit_of(read_pickled(path), **shape_of(asked(path)))


def model_of(
    side: int, dim: int, classes: int, width: int, depth: int, heads: int, block: int, frames: int = 1,
    split: tuple[int, ...] | None = None,
) -> Denoising:  # fmt: skip
    """A model in the form that was released, with fresh weights: vectors on a grid of side x side, or on `frames` of
    them, in blocks of so many vectors; square ones of a picture, consecutive ones of a video. split: the shares of a
    head's dimensions that the axes take."""
    video, head = frames > 1, width // heads
    split = split or ((2, 3, 3) if video else (1, 1))
    bases = {(int(8 * n / math.pi) // 100 + 1) * 100 for n in ((frames,) if video else ()) + (side, side)}
    if len(bases) > 1:
        raise ValueError(f"all axes have one base of rotary angles here; of these lengths they have {sorted(bases)}")
    rope = RoPE(bases.pop(), tuple(2 * n * (head // 2 // sum(split)) for n in split), crossed=True)
    backbone = Transformer(
        TransformerConfig(
            width, depth, heads, hidden=4 * width, activation="gelu_tanh", bias=True, rope=rope, qk_norm="rms",
            vector=width, scaled=True, eps=1e-6,
        )
    )  # fmt: skip
    layout = grid(frames, side, side) if video else grid(side, side)
    square = math.isqrt(block)
    group = torch.arange(layout.size) // block if video else cells(side, side, square, square)
    return Denoising(
        layout, Groups(group), VectorEmbed(dim, width, start=False), backbone,
        InPlaceHead(width, dim, Linear(), "noise"), {"class": ClassCondition(classes, width)},
        clock=NoiseClock(width, None, begin=-1.0), times=EachStep(),
    )  # fmt: skip


def acdit_of(
    weights: Mapping[str, Tensor], side: int, block: int, frames: int = 1, split: tuple[int, ...] | None = None
) -> Denoising:
    """The model of released weights, in evaluation mode (`model_of`). Raises ValueError where these are no weights of
    ACDiT."""
    model = model_of(side, block=block, frames=frames, split=split, **sizes_of(weights))
    named, wanted = named_acdit(weights), {name: x.shape for name, x in model.state_dict().items()}
    if {name: x.shape for name, x in named.items()} != wanted:
        wrong = sorted(set(named) ^ set(wanted)) or [n for n, s in wanted.items() if named[n].shape != s]
        raise ValueError(f"these are no weights of ACDiT: {', '.join(wrong[:5])}")
    model.load_state_dict(named)
    return model.eval().requires_grad_(False)


def named_acdit(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Released weights by our names. Unknown ones keep theirs, and are refused by who loads them."""
    named = {_ours(name): x for name, x in weights.items()}
    return named | {"embed.project.bias": torch.zeros(len(weights["x_embedder.weight"]))}


def _ours(name: str) -> str:
    """The name of a released tensor among ours; unknown names stay, and are refused."""
    if name in OUTSIDE:
        return OUTSIDE[name]
    if name.startswith("blocks."):
        _, number, rest = name.split(".", 2)
        return f"backbone.layers.{number}.{INSIDE.get(rest, rest)}"
    whole, _, kind = name.rpartition(".")
    return f"{OUTSIDE.get(whole, whole)}.{kind}"
