"""The released weights of xAR (Ren et al. 2025; Hub OliverRen/xAR, sizes B, L and H) in our parts.

What they generate are the 16 x 16 latents of MAR's autoencoder (KL-16, times 0.2325), a file of its own. The code
counts time in whole thousandths, gates its feed-forward networks by GELU, and turns neighbouring dimensions of a head
against each other; weights are put into our order here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seriatim.backbones.joined import Joined
from seriatim.backbones.layer import TransformerConfig
from seriatim.backbones.rope import RoPE
from seriatim.conditions.clock import NoiseClock
from seriatim.conditions.condition import ClassCondition
from seriatim.embed import VectorEmbed
from seriatim.factorization.cells import cells
from seriatim.factorization.groups import Groups
from seriatim.heads.in_place import InPlaceHead, Straight
from seriatim.interop.pickled import read_pickled
from seriatim.layout import grid
from seriatim.objectives.denoised import Denoising, LogitNormal

HEADS = {768: 12, 1024: 16, 1280: 16}  # of the released sizes, by their width
SAMPLED = {768: (40, 2.7), 1024: (50, 2.3), 1280: (50, 2.2)}  # steps and guidance (in the scale of the code) by width
OUTSIDE = {
    "time_embed.mlp": "clock.net", "class_emb.weight": "conditions.class.table", "z_proj": "embed.project",
    "z_proj_ln.weight": "backbone.norms.0", "encoder_norm.weight": "backbone.norms.1",
    "decoder_norm.weight": "backbone.norms.2", "decoder_embed": "backbone.join", "pred": "heads.token.out",
}  # fmt: skip


class Placed(VectorEmbed):
    """Vectors through a linear map, plus a learned position of each element."""

    def __init__(self, dim: int, width: int, elements: int):
        super().__init__(dim, width, start=False)
        self.place = nn.Parameter(torch.zeros(elements, width))

    def forward(self, canvas, plan, guess=None, prefix=None):  # type: ignore[no-untyped-def]
        x = super().forward(canvas, plan, guess, prefix)
        return x + self.place[plan.slots.element[..., 0].clamp(min=0).to(x.device)]


def is_xar(weights: Mapping[str, Tensor]) -> bool:
    return {"z_proj.weight", "decoder_embed.weight", "pred.weight", "encoder_blocks.0.mlp.fc1_g.weight"} <= (
        weights.keys()
    )


def read_xar(path: str | Path) -> Denoising:
    """The model of a released file: its averaged weights where it has them. Raises ValueError where they are not those
    of xAR."""
    return xar_of(read_pickled(path))


def sizes_of(weights: Mapping[str, Tensor], heads: int | None = None) -> dict[str, int]:
    """side, dim, classes, width, depth (of each stack) and heads of released weights. heads: of the attention (None: as
    released at this width). Raises ValueError where that is unknown."""
    width, dim = weights["z_proj.weight"].shape
    heads = heads or HEADS.get(width, width // 64)
    if not heads:
        raise ValueError(f"no released xAR is {width} wide; say how many heads its attention has")
    return {
        "side": math.isqrt(weights["encoder_pos_embed_learned"].shape[1]), "dim": dim,
        "classes": len(weights["class_emb.weight"]) - 1, "width": width, "heads": heads,
        "depth": sum(n.startswith("encoder_blocks.") and n.endswith("attn.qkv.weight") for n in weights),
    }  # fmt: skip


def model_of(side: int, dim: int, classes: int, width: int, depth: int, heads: int, cell: int) -> Denoising:
    """A model in the form that was released, with fresh weights: two stacks of `depth` layers, cells of so many rows
    and columns."""
    quarter = width // heads // 4
    config = TransformerConfig(
        width, depth, heads, hidden=int(width * 4 * 2 / 3), activation="geglu", bias=True,
        rope=RoPE(axes=(2 * quarter, 2 * quarter)), vector=width, eps=1e-6,
    )  # fmt: skip
    return Denoising(
        grid(side, side), Groups(cells(side, side, cell, cell)), Placed(dim, width, side**2), Joined(config, side**2),
        InPlaceHead(width, dim, Straight(), "velocity"), {"class": ClassCondition(classes, width)},
        clock=NoiseClock(width, whole=True), times=LogitNormal(), noisy_context=True,
    )  # fmt: skip


def xar_of(weights: Mapping[str, Tensor], cells_a_side: int = 2, heads: int | None = None) -> Denoising:
    """The model of released weights, in evaluation mode. cells_a_side: of the picture (released: 2); heads: of its
    attention (None: as released at this width). Raises ValueError where these are no weights of xAR."""
    sizes = sizes_of(weights, heads)
    model = model_of(**sizes, cell=sizes["side"] // cells_a_side)
    named = named_xar(weights, model)
    wanted = {name: x.shape for name, x in model.state_dict().items()}
    if {name: x.shape for name, x in named.items()} != wanted:
        wrong = sorted(set(named) ^ set(wanted)) or [n for n, s in wanted.items() if named[n].shape != s]
        raise ValueError(f"these are no weights of xAR: {', '.join(wrong[:5])}")
    model.load_state_dict(named)
    return model.eval().requires_grad_(False)


def named_xar(weights: Mapping[str, Tensor], model: Denoising) -> dict[str, Tensor]:
    """Released weights by our names, in the order of this model's elements. Unknown ones keep their names, and are
    refused by who loads them."""
    config: Any = model.backbone.config
    order = model.factorization.of(model.layout).argsort(stable=True)
    return _ours(weights, order, config.heads, config.width // config.heads // 4)


def _ours(weights: Mapping[str, Tensor], order: Tensor, heads: int, quarter: int) -> dict[str, Tensor]:
    """Released weights by our names, in our order. Unknown ones keep their names, and are refused."""
    out = {}
    for name, x in weights.items():
        if name == "mask" or name.endswith(("rope.freqs", "rope.freqs_cos", "rope.freqs_sin")):
            continue  # tables
        part, _, rest = name.partition(".")
        if part in ("encoder_pos_embed_learned", "decoder_pos_embed_learned"):
            ours = "embed.place" if part.startswith("encoder") else "backbone.position"
            out[ours] = torch.empty_like(x[0])
            out[ours][order] = x[0]
        elif part in ("encoder_blocks", "decoder_blocks"):
            number, _, rest = rest.partition(".")
            stack = "first" if part.startswith("encoder") else "second"
            out |= {f"backbone.{stack}.layers.{number}.{k}": v for k, v in _layer(rest, x, heads, quarter).items()}
        else:
            whole = next((k for k in OUTSIDE if name == k or name.startswith(k + ".")), None)
            out[name if whole is None else OUTSIDE[whole] + name[len(whole) :]] = x
    for kind in ("weight", "bias"):  # the code predicts noise - value
        if f"heads.token.out.{kind}" in out:
            out[f"heads.token.out.{kind}"] = -out[f"heads.token.out.{kind}"]
    for stack in ("first", "second"):
        for name in [n for n in out if n.startswith(f"backbone.{stack}.") and n.endswith(".gate")]:
            base = name.removesuffix(".gate")
            out[base] = torch.cat([out.pop(name), out.pop(base + ".value")])
    return out


def _layer(name: str, x: Tensor, heads: int, quarter: int) -> dict[str, Tensor]:
    """One tensor of a layer."""
    kind = "_bias" if name.endswith(".bias") else ""
    plain = {"attn.proj": "out", "mlp.fc2": "down", "mlp.fc1_g": "up", "mlp.fc1_x": "up"}
    part = name.rpartition(".")[0]
    if part == "attn.qkv":
        return {"qkv" + kind: _turned(x, heads, quarter)}
    if part == "ada_lin.1":  # gates, scales, shifts of both branches there; shift, scale, gate of each here
        g1, g2, c1, c2, s1, s2 = x.chunk(6)
        return {"ada" + kind: torch.cat([s1, c1, g1, s2, c2, g2])}
    if part in ("mlp.fc1_g", "mlp.fc1_x"):
        return {f"up{kind}.{'gate' if part.endswith('g') else 'value'}": x}
    return {plain[part] + kind if part in plain else name: x}


def _turned(x: Tensor, heads: int, quarter: int) -> Tensor:
    """Queries and keys in the order in which our rotary embedding pairs dimensions: the first half of a head against
    the second, rows before columns in each; there neighbours are pairs."""
    pair = torch.arange(4 * quarter).view(2, quarter, 2)  # axis, frequency, member
    order = pair.permute(2, 0, 1).flatten()
    q, k, v = x.chunk(3)
    q, k = (part.unflatten(0, (heads, -1))[:, order].flatten(0, 1) for part in (q, k))
    return torch.cat([q, k, v])
