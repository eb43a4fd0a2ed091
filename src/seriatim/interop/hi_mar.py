"""The released weights of Hi-MAR (Zheng et al. 2025; Hub HiDream-ai/Hi-MAR: B, L and H) in our parts, beside MAR's
autoencoder.

Facts of the code: both phases go through one masked autoencoder, with positions and masks of their own; pivots and fine
latents are embedded by different maps; fine masks stand behind the pivots while these are drawn. In each layer a vector
of the phase is scaled and shifted to say scale and gate of both branches: what comes of it is constant, and stands in
the matrices of our adaptive norms, a column for each phase. The map's transformer is told no class, and sees known
latents with as much noise as a step has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from seriatim.backbones.masked import MaskedAutoencoder
from seriatim.backbones.transformer import TransformerConfig
from seriatim.canvas import Canvas
from seriatim.conditions.condition import ClassCondition
from seriatim.decoding.guess import Guess
from seriatim.embed import VectorEmbed, gather_values
from seriatim.factorization.pivots import Pivots
from seriatim.heads.by_level import ByLevel
from seriatim.heads.diffusion import DiffusionConfig, DiffusionHead
from seriatim.heads.diffusion_map import MapDiffusionConfig, MapDiffusionHead
from seriatim.initial import drawn
from seriatim.interop import mar
from seriatim.layout import Layout, pyramid
from seriatim.noise import NOISES
from seriatim.objectives.masked import ByRate, ByShare, Unweighted
from seriatim.objectives.pivots import TwoPhases
from seriatim.plan import DERIVED, LEARNED, MASK, Plan

SAMPLED = {768: (2.7, 2.5, 4), 1024: (3.5, 3.5, 4), 1280: (5.5, 3.2, 12)}  # by width: guidance of each phase, steps
ACTIVE = 1.278464542761074  # SiLU makes it 1
WEIGHTS = 2.0, 0.75  # of the losses of pivots and of fine vectors
OUTSIDE = {
    "cond_proj.weight": "embed.coarse.weight", "cond_proj.bias": "embed.coarse.bias",
    "cond_z_proj.weight": "embed.state.weight", "cond_z_proj.bias": "embed.state.bias",
}  # fmt: skip
MAP = {
    "x_embedder.proj": "value", "c_embedder.proj": "state", "t_embedder.mlp.0": "time.0", "t_embedder.mlp.2": "time.2",
    "final_layer.linear": "out",
}  # fmt: skip
INSIDE = {"attn.qkv": "qkv", "attn.proj": "out", "mlp.fc1": "up", "mlp.fc2": "down", "adaLN_modulation.1": "ada"}


class PhaseVectors(VectorEmbed):
    """Vectors of pivots and of fine elements, each through a map of their own, in place of told pivots their states
    through a third, of others one learned vector a pivot; masks are learned for each place and phase."""

    mask: nn.Parameter

    def __init__(self, dim: int, width: int, layout: Layout):
        super().__init__(dim, width, start=False)
        self.size, pivots = layout.size, int((layout.coord[:, 0] == 0).sum())
        self.coarse, self.state = nn.Linear(dim, width), nn.Linear(width, width)
        self.blank = nn.Parameter(drawn(pivots, dim))
        self.mask = nn.Parameter(drawn(2 * layout.size, width))

    def forward(
        self, canvas: Canvas, plan: Plan, guess: Guess | None = None, prefix: Tensor | None = None
    ) -> Float[Tensor, "b s d"]:
        assert prefix is not None
        front, slots = prefix.shape[1], plan.slots
        element, source = slots.element[:, front:, 0], slots.source[:, front:, None].to(prefix.device)
        value = gather_values(canvas, element[..., None], "token")[:, :, 0].to(self.project.weight)
        place, pivot = element.to(prefix.device), (element < len(self.blank)).to(prefix.device)[..., None]
        x = torch.where(pivot, self.coarse(value), self.project(value))
        blank = self.coarse(self.blank)[place.clamp(max=len(self.blank) - 1)]
        x = torch.where(source == LEARNED, blank, x)
        if canvas.memo is not None and bool((source == DERIVED).any()):
            memo = canvas.memo.gather(1, element.expand(canvas.batch, -1)[..., None].expand(-1, -1, self.width))
            x = torch.where(source == DERIVED, self.state(memo.to(x)), x)
        x = torch.where(source == MASK, self.mask[place + plan.phase * self.size], x)
        return torch.cat([prefix.to(x), x.expand(len(prefix), -1, -1)], 1)


class PhaseColumn(nn.Module):
    """What drives the norms: 1 in the place of the phase, once the norms have made it active."""

    of: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("of", ACTIVE * torch.eye(2), persistent=False)

    def forward(self, canvas: Canvas, plan: Plan, vector: Tensor | None) -> Float[Tensor, "1 2"]:
        return self.of[plan.phase][None]


def is_himar(weights: Mapping[str, Tensor]) -> bool:
    return {"cond_tokens", "cond_z_proj.weight", "encoder_task_emb.weight", "cond_diffloss.net.pos_embed"} <= (
        weights.keys()
    )


def sizes_of(weights: Mapping[str, Tensor]) -> dict[str, int]:
    """side, dim, pivots (in a row), classes, width, depth, heads, buffer, head_width, head_depth, map_width, map_depth
    and map_heads of released weights."""
    width, dim = weights["z_proj.weight"].shape
    pivots, each = weights["cond_tokens"].shape[1], weights["mask_token"].shape[1] // 2
    wide = weights["cond_diffloss.net.pos_embed"].shape[2]
    return {
        "side": math.isqrt(each - pivots), "dim": dim, "pivots": math.isqrt(pivots),
        "classes": len(weights["class_emb.weight"]), "width": width,
        "depth": _count(weights, "encoder_blocks.", ".attn.qkv.weight"), "heads": mar.HEADS.get(width, width // 64),
        "buffer": weights["encoder_pos_embed_learned"].shape[1] // 2 - each,
        "head_width": len(weights["diffloss.net.cond_embed.weight"]),
        "head_depth": _count(weights, "diffloss.", ".in_ln.weight"), "map_width": wide,
        "map_depth": _count(weights, "cond_diffloss.", ".attn.qkv.weight"), "map_heads": wide // 64,
    }  # fmt: skip


def _count(weights: Mapping[str, Tensor], begin: str, end: str) -> int:
    return sum(name.startswith(begin) and name.endswith(end) for name in weights)


def model_of(
    side: int, dim: int, pivots: int, classes: int, width: int, depth: int, heads: int, buffer: int, head_width: int,
    head_depth: int, map_width: int, map_depth: int, map_heads: int, head_steps: int = 100, map_steps: int = 250,
    clip: float | None = None, dropout: float = 0.0,
) -> TwoPhases:  # fmt: skip
    """A model in the form that was released, with fresh weights: both phases begin alike, as plain layers."""
    layout = pyramid((pivots, side))
    config = TransformerConfig(
        width, depth, heads, hidden=4 * width, norm="layer", activation="gelu", bias=True, dropout=dropout, eps=1e-6,
        vector=2, scaled=True,
    )  # fmt: skip
    backbone = MaskedAutoencoder(config, buffer, layout.size, phases=2)
    with torch.no_grad():
        for stack in (backbone.encoder, backbone.decoder):
            for layer in stack.layers:
                layer.get_parameter("ada").unflatten(0, (6, width))[2::3] = 1.0  # gates
    fine = MapDiffusionConfig(
        map_width, map_depth, steps=map_steps, heads=map_heads, clip=clip, placed=True, anchored=True
    )
    head = ByLevel(
        layout, DiffusionHead(width, dim, DiffusionConfig(head_width, head_depth, steps=head_steps, clip=clip)),
        MapDiffusionHead(width, dim, layout, layout.coord[:, 0].nonzero()[:, 0], fine),
    )  # fmt: skip
    return TwoPhases(
        layout, Pivots(prefix=buffer, masked=True), PhaseVectors(dim, width, layout), backbone, head,
        {"class": ClassCondition(classes, width, ("prefix",), slots=buffer)}, PhaseColumn(), masking=ByRate(),
        fine=Unweighted(ByShare(NOISES["cosine"])), weights=WEIGHTS,
    )  # fmt: skip


def named_himar(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Released weights by our names. Unknown ones keep theirs, and are refused by who loads them."""
    out, rest = {}, dict(weights)
    out["embed.mask"], out["embed.blank"] = rest.pop("mask_token")[0], rest.pop("cond_tokens")[0]
    for stack in ("encoder", "decoder"):
        out |= _modulation(rest, stack)
    for name in list(rest):
        if name in OUTSIDE:
            out[OUTSIDE[name]] = rest.pop(name)
        elif name.startswith("cond_diffloss.net."):
            inner, x = name.removeprefix("cond_diffloss.net."), rest.pop(name)
            if inner != "c_pos_embed":  # is not used
                out |= {f"heads.token.fine.net.{_in_map(inner)}": x[0] if inner == "pos_embed" else _matrix(x)}
    named = mar.named_mar(rest)
    return out | {name.replace("heads.token.net.", "heads.token.coarse.net."): x for name, x in named.items()}


def _modulation(rest: dict[str, Tensor], stack: str) -> dict[str, Tensor]:
    """What the layers of a stack say of each phase: (6 width, 2), and nothing beside it."""
    table = F.silu(rest.pop(f"{stack}_task_emb.weight"))
    table = F.linear(table, rest.pop(f"{stack}_blocks_ada.1.weight"), rest.pop(f"{stack}_blocks_ada.1.bias"))
    width, out = table.shape[1] // 4, {}
    for name in [name for name in rest if name.startswith(f"{stack}_blocks.") and name.endswith(".adaLN_scale")]:
        whole = name.removesuffix("adaLN_scale")
        said = table * rest.pop(name)[:, 0, 0] + rest.pop(whole + "adaLN_shift")[:, 0, 0]
        nothing = torch.zeros_like(said[:, :width])
        scale1, gate1, scale2, gate2 = said.chunk(4, 1)
        layer = f"backbone.{stack}.layers.{whole.split('.')[1]}."
        out[layer + "ada"] = torch.cat([nothing, scale1, gate1, nothing, scale2, gate2], 1).T.contiguous()
        out[layer + "ada_bias"] = table.new_zeros(6 * width)
    last = f"backbone.{stack}.ada"
    return out | {last: table.new_zeros(2 * width, 2), last + "_bias": table.new_zeros(2 * width)}


def _in_map(name: str) -> str:
    """A part of the map's transformer."""
    part, _, kind = name.rpartition(".")
    suffix = "_bias" if kind == "bias" else ""
    if name == "pos_embed":
        return "position"
    if part == "final_layer.adaLN_modulation.1":
        return "transformer.ada" + suffix
    if part.startswith("blocks."):
        _, number, inner = part.split(".", 2)
        return f"transformer.layers.{number}.{INSIDE[inner]}{suffix}" if inner in INSIDE else name
    return f"{MAP.get(part, part)}.{kind}"


def _matrix(x: Tensor) -> Tensor:
    """That of a convolution over single places, too."""
    return x.flatten(1) if x.dim() == 4 else x
