"""VAR: next-scale prediction (Tian et al. 2024, arXiv 2404.02905).

New in it: a picture is a pyramid of token maps, each the residual of the coarser ones, and a whole scale is predicted
in one step from all coarser scales. A slot carries the accumulated latent of everything coarser, area-downed to its
scale (a learned start and the class at the first), and reads out its own place. The order is block-causal; guidance
grows linearly with the scale.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from seriatim.backbones.layer import Layer
from seriatim.backbones.transformer import Transformer, TransformerConfig
from seriatim.canvas import Canvas
from seriatim.conditions.condition import ClassCondition
from seriatim.data.base import Data
from seriatim.decoding.guess import Guess
from seriatim.factorization.static import Scales
from seriatim.heads.categorical import CategoricalHead
from seriatim.laws.case import Case, Limit, randomise
from seriatim.layout import pyramid
from seriatim.model import Model
from seriatim.plan import Plan
from seriatim.systems.claim import Arm, Claim
from seriatim.systems.image_system import ImageSystem
from seriatim.systems.meta import Meta
from seriatim.systems.system import Sampling
from seriatim.tokenizers.multiscale import MultiScaleConfig, MultiScaleTokenizer, MultiScaleVQ
from seriatim.training.recipe import Recipe

META = Meta(
    key="var",
    title="VAR: next-scale prediction",
    family="image",
    modality="image",
    paper="Visual Autoregressive Modeling: Scalable Image Generation via Next-Scale Prediction (2024), 2404.02905",
    likelihood="exact",
    summary="A pyramid of token maps, coarse to fine; each scale in one step from all coarser ones.",
)


@dataclass(frozen=True)
class Config:
    """Sizes of the generator and of its tokenizer; the defaults suit 8x8 digits."""

    tokenizer: MultiScaleConfig = field(default_factory=MultiScaleConfig)
    classes: int = 10
    width: int = 96
    depth: int = 4
    heads: int = 4
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if isinstance(self.tokenizer, dict):  # from JSON
            object.__setattr__(self, "tokenizer", MultiScaleConfig(**self.tokenizer))


class ScaleEmbed(nn.Module):
    """What a slot of the pyramid carries: the accumulated latent of all coarser scales, area-downed to its own and
    projected; plus position and scale. The quantizer belongs to the tokenizer and is frozen."""

    def __init__(self, quantizer: MultiScaleVQ, width: int, std: float):
        super().__init__()
        self.quantizer = quantizer.requires_grad_(False)
        self.project = nn.Linear(quantizer.dim, width)
        self.start = nn.Parameter(torch.randn(width) * std)
        self.position = nn.Parameter(torch.randn(quantizer.total, width) * std)
        self.scale = nn.Parameter(torch.randn(len(quantizer.scales), width) * std)

    def forward(
        self, canvas: Canvas, plan: Plan, guess: Guess | None = None, prefix: Tensor | None = None
    ) -> Float[Tensor, "b s d"]:
        q, b = self.quantizer, canvas.batch
        coord = plan.slots.coord[0].to(self.start.device)
        scale = coord[:, 0]
        first, last = int(scale.min()), int(scale.max())
        sides = torch.tensor(q.scales, device=scale.device)
        offset = torch.tensor((0, *q.sizes), device=scale.device).cumsum(0)
        place = offset[scale] + coord[:, 1] * sides[scale] + coord[:, 2]
        start = self.start.expand(b, 1, -1) if prefix is None else prefix + self.start
        parts = [start.expand(-1, q.sizes[0], -1)] if first == 0 else []
        known = canvas.value["token"][:, : int(offset[last])]
        latents = q.partial_latents(known) if last else []
        parts += [
            self.project(q.next_input(latents[k - 1], k - 1).to(start.dtype)) for k in range(max(first, 1), last + 1)
        ]
        content = torch.cat(parts, 1)[:, place - offset[first]]
        return content + self.position[place] + self.scale[scale]


def build(config: Config | None = None, quantizer: MultiScaleVQ | None = None) -> Model:
    """The generator over a tokenizer's quantizer (a fresh one if none is given)."""
    c = config or Config()
    t = c.tokenizer
    quantizer = quantizer or MultiScaleVQ(t.scales, t.vocab, t.dim, t.phis, t.phi_ratio, t.beta)
    std = (3 * c.width) ** -0.5
    backbone = Transformer(
        TransformerConfig(
            c.width, c.depth, c.heads, norm="layer", activation="gelu_tanh", bias=True, qk_norm="l2", vector=c.width,
            eps=1e-6, dropout=c.dropout,
        )
    )  # fmt: skip
    embed = ScaleEmbed(quantizer, c.width, std)
    condition = {"class": ClassCondition(c.classes, c.width, ("prefix", "vector"), std)}
    head = CategoricalHead(c.width, t.vocab, bias=True)
    initialise(embed, backbone, head, std)
    return Model(pyramid(t.scales), Scales(), embed, backbone, head, condition)


@torch.no_grad()
def initialise(embed: ScaleEmbed, backbone: Transformer, head: CategoricalHead, std: float) -> None:
    """The initial weights of the released code: matrices and tables are normal of deviation `std`, biases 0.

    Smaller are: what ends a branch, by (2 depth)^-1/2; shifts and scales of the adaptive norms, by 1/2; their gates, by
    1e-5, so that a layer starts as almost the identity; the head, by 1/50. Temperatures of attention start at 4, as the
    backbone makes them.
    """
    embed.project.weight.normal_(0, std)
    embed.project.bias.zero_()
    for layer in backbone.layers:
        assert isinstance(layer, Layer)
        for matrix in (layer.qkv, layer.up):
            matrix.normal_(0, std)
        for matrix in (layer.out, layer.down):
            matrix.normal_(0, std / (2 * len(backbone.layers)) ** 0.5)
        parts = layer.get_parameter("ada").chunk(6)
        for part, size in zip(parts, (0.5, 0.5, 1e-5) * 2, strict=True):  # shift, scale, gate
            part.normal_(0, std * size)
    assert backbone.ada is not None
    backbone.ada.normal_(0, std / 2)
    head.weight.normal_(0, std / 50)


class VAR(ImageSystem):
    """A class, then scale after scale."""

    meta, Config = META, Config
    tokenizers = ("image-msvq",)
    sizes = MappingProxyType({
        "tiny": {},
        "small": {"width": 192, "depth": 6, "heads": 6},
        "d16": {"width": 1024, "depth": 16, "heads": 16, "dropout": 0.0},
    })  # fmt: skip
    recipes = MappingProxyType({
        "tiny": Recipe(500, drop=0.1),
        "small": Recipe(4000, batch=64, learning_rate=1e-3, drop=0.1, bf16=True, ema=0.995),
        "d16": Recipe(500_000, batch=768, learning_rate=3e-4, floor=0.1, drop=0.1, bf16=True, compile=True),
    })  # fmt: skip
    sampling = Sampling(top_p=0.96, guidance=1.5)
    schedule = "linear"

    @staticmethod
    def build(config: Any, tokenizer: Any) -> Model:
        return build(config, None if tokenizer is None else tokenizer.quantizer)

    @classmethod
    def known(cls, tokenizer: Any, data: Data) -> dict[str, Any]:
        if not isinstance(tokenizer, MultiScaleTokenizer):
            raise ValueError(f"{META.key} needs a multi-scale tokenizer: a run of image-msvq")
        return {"tokenizer": tokenizer.config, "classes": max(len(data.classes), 1)}

    def unfinished(self, codes: Tensor, known: Tensor) -> Float[Tensor, "n c h w"]:
        """The picture of the scales so far."""
        whole = [end for end in accumulate(self.tokenizer.quantizer.sizes) if bool(known[:, :end].all())]
        return self.tokenizer.partial_decode(codes[:, : max(whole, default=0)])[-1]


CLAIM = Claim(
    text="At equal training seconds and near equal parameters, next-scale prediction draws better pictures than raster "
    "order over ids of the same vocabulary, in 6 forwards instead of 64.",
    paper="ImageNet 256x256: FID 18.65 to 1.73 against the raster baseline, with 20 times faster inference",
    metric="fd_s",
    arms={
        "var": Arm("var", size="small", tokenizer="zoo:image-msvq", minutes=4),
        "raster-ar": Arm("raster-ar", size="small", tokenizer="zoo:image-vq", minutes=4),
    },
    ours="var",
    baseline="raster-ar",
    data="glyphs",
)


# ---- what the laws run -----------------------------------------------------------------------------------------------


def case(scales: tuple[int, ...] = (1, 2), vocab: int = 2) -> Case:
    """A tiny instance for the laws."""
    tokenizer = MultiScaleConfig(scales=scales, vocab=vocab, dim=3, width=8, phis=2)
    model = randomise(build(Config(tokenizer, classes=3, width=16, depth=2, heads=2, dropout=0.0)))
    return Case(model, vocab=vocab, condition={"class": torch.tensor([1])}, limits=(one_scale,))


def one_scale() -> Limit:
    """A pyramid of one scale is one-shot independent prediction: no element depends on another."""
    one = case(scales=(2,))
    model, label = one.model, one.condition
    values = torch.randint(2, (6, 4), generator=torch.Generator().manual_seed(0))
    label = {k: v.expand(6) for k, v in (label or {}).items()}
    losses = model.losses(model.canvas({"token": values}), label)
    plan = model.factorization.packed(model.canvas({"token": values}))
    assert plan is not None
    blank = model.canvas({"token": values * 0})
    dist, _, _ = model.dist(model.hidden(plan, blank, None, model.encode(label)), plan, blank)
    return Limit("one scale = independent elements", -losses, dist.log_prob(values))


class _PeekingEmbed(ScaleEmbed):
    """Feeds the finest latent of the whole sample at every scale."""

    def forward(self, canvas, plan, guess=None, prefix=None):
        x = super().forward(canvas, plan, guess, prefix)
        whole = self.quantizer.decode_latent(canvas.value["token"]).mean((2, 3))
        return x + self.project(whole.to(x.dtype))[:, None]


def mutant() -> Case:
    """The case with a wrong feed, which the laws must catch."""
    wrong = case()
    wrong.model.embed.__class__ = _PeekingEmbed
    return wrong
