"""The released weights of ARFlow (Hui et al. 2025; Hub `MudeHui/ARFlow-Weights`) in our parts.

What they generate are latents of the Stable Diffusion autoencoder (8 x 8 pixels, 4 numbers, times 0.18215) in patches
of 2 x 2 (`interop.sd_vae`). A vector holds a patch row by row, its channels last. The second half of what the
network says, which nothing reads, is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from seriatim.backbones.chunked import Chunked, ChunkedConfig
from seriatim.conditions.clock import NoiseClock
from seriatim.conditions.condition import ClassCondition
from seriatim.embed import VectorEmbed
from seriatim.factorization.trajectory import Trajectory
from seriatim.heads.in_place import InPlaceHead, Straight
from seriatim.interop.pickled import read_pickled
from seriatim.layout import grid
from seriatim.objectives.denoised import Falling, Uniform

GUIDED = 3  # of four channels, in the released samplers (as in those of DiT)
OUTSIDE = {
    "y_embedder.embedding_table.weight": "conditions.class.table",
    "final_layer.adaLN_modulation.1.weight": "backbone.ada",
    "final_layer.adaLN_modulation.1.bias": "backbone.ada_bias",
}
CLOCK = {"t_embedder.mlp.0": "clock.net.0", "t_embedder.mlp.2": "clock.net.2"}
INSIDE = {
    "attn.g_proj.weight": "gate", "attn.gt_proj.weight": "forget", "attn.out_proj.weight": "out",
    "mlp.fc1.weight": "up", "mlp.fc1.bias": "up_bias", "mlp.fc2.weight": "down", "mlp.fc2.bias": "down_bias",
    "adaLN_modulation.1.weight": "ada", "adaLN_modulation.1.bias": "ada_bias",
}  # fmt: skip


def is_arflow(weights: Mapping[str, Tensor]) -> bool:
    return {"blocks.0.attn.gt_proj.weight", "x_embedder.proj.weight", "pos_embed"} <= weights.keys()


def sizes_of(weights: Mapping[str, Tensor]) -> dict[str, int]:
    """side, channels, patch, classes, width, depth and heads of released weights."""
    width, channels, patch, _ = weights["x_embedder.proj.weight"].shape
    return {
        "side": math.isqrt(weights["pos_embed"].shape[1]), "channels": channels, "patch": patch,
        "classes": len(weights["y_embedder.embedding_table.weight"]) - 1, "width": width,
        "depth": 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks.")),
        "heads": len(weights["blocks.0.attn.gt_proj.weight"]),
    }  # fmt: skip


def read_arflow(path: str | Path, guide_all: bool = False) -> Falling:
    """The model of a released file. guide_all: whether guidance is of all channels of a latent, rather than of the
    first three. Raises ValueError where its weights are not those of ARFlow."""
    return arflow_of(read_pickled(path), guide_all)


def model_of(
    side: int, channels: int, patch: int, classes: int, width: int, depth: int, heads: int, guide_all: bool = False
) -> Falling:
    """A model in the form that was released, with fresh weights."""
    dim = channels * patch * patch
    backbone = Chunked(
        ChunkedConfig(
            width, depth, heads, hidden=4 * width, norm="layer", activation="gelu_tanh", bias=("up", "down"),
            vector=width, eps=1e-6,
        )
    )  # fmt: skip
    guided = None if guide_all else torch.arange(dim) % channels < GUIDED
    return Falling(
        grid(side, side), Trajectory(side**2), VectorEmbed(dim, width, positions=(side, side), start=False), backbone,
        InPlaceHead(width, dim, Straight(), "velocity", guided), {"class": ClassCondition(classes, width)},
        clock=NoiseClock(width, begin=1.0, length=-1.0), times=Uniform(),
    )  # fmt: skip


def arflow_of(weights: Mapping[str, Tensor], guide_all: bool = False) -> Falling:
    """The model of released weights, in evaluation mode. Raises ValueError where these are no weights of ARFlow."""
    try:
        sizes = sizes_of(weights)
        named = named_arflow(weights)
    except (KeyError, ValueError, RuntimeError) as error:
        raise ValueError(f"these are no weights of ARFlow ({error})") from None
    model = model_of(**sizes, guide_all=guide_all)
    wanted = {name: x.shape for name, x in model.state_dict().items()}
    if {name: x.shape for name, x in named.items()} != wanted:
        wrong = sorted(set(named) ^ set(wanted)) or [n for n, s in wanted.items() if named[n].shape != s]
        raise ValueError(f"these are no weights of ARFlow: {', '.join(wrong[:5])}")
    model.load_state_dict(named)
    return model.eval().requires_grad_(False)


def named_arflow(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Released weights by our names. Unknown ones keep theirs, and are refused by who loads them."""
    sizes = sizes_of(weights)
    return _renamed(weights, sizes["depth"], sizes["channels"], sizes["side"])


def _renamed(weights: Mapping[str, Tensor], depth: int, channels: int, side: int) -> dict[str, Tensor]:
    """Released tensors by our names; unknown names stay, and are refused."""
    out, rest = {}, dict(weights)
    out["embed.project.weight"] = rest.pop("x_embedder.proj.weight").permute(0, 2, 3, 1).flatten(1)
    out["embed.project.bias"] = rest.pop("x_embedder.proj.bias")
    out["embed.positions.0"], out["embed.positions.1"] = _axes(rest.pop("pos_embed"), side)
    for kind in ("weight", "bias"):
        said = rest.pop(f"final_layer.linear.{kind}").unflatten(0, (-1, 2 * channels))[:, :channels]
        out[f"heads.token.out.{kind}"] = said.flatten(0, 1)
    for i in range(depth):
        parts = [rest.pop(f"blocks.{i}.attn.{name}_proj.weight") for name in "qkv"]
        out[f"backbone.layers.{i}.qkv"] = torch.cat(parts)
    for name, x in rest.items():
        if name.startswith("blocks."):
            _, number, inner = name.split(".", 2)
            out[f"backbone.layers.{number}.{INSIDE.get(inner, inner)}"] = x
        else:
            whole, _, kind = name.rpartition(".")
            out[OUTSIDE.get(name) or f"{CLOCK.get(whole, whole)}.{kind}"] = x
    return out


def _axes(table: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Positions of rows and of columns, whose sum the table holds: columns in its first half, rows in its second."""
    both = table[0].unflatten(0, (side, side))
    rows, columns = torch.zeros_like(both[:, 0]), torch.zeros_like(both[0])
    half = both.shape[-1] // 2
    rows[:, half:], columns[:, :half] = both[:, 0, half:], both[0, :, :half]
    if not torch.allclose(rows[:, None] + columns, both):
        raise ValueError("positions are not those of rows and columns")
    return rows, columns
