"""Systems of token pyramids: what VAR and its kin share, whatever their visibility, feed and tokenizer.

Backbone and initial weights are those of the released VAR; a system's file puts layout, order, feed and places
together. Known parts of a picture are kept at every scale while the rest is drawn anew: in- and out-painting.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import accumulate
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from seriatim.backbones.layer import Layer, TransformerConfig
from seriatim.backbones.transformer import Transformer
from seriatim.canvas import Canvas
from seriatim.conditions.condition import ClassCondition
from seriatim.data.base import Data
from seriatim.embed_pyramid import PyramidEmbed
from seriatim.factorization.base import Factorization
from seriatim.heads.categorical import CategoricalHead
from seriatim.laws.case import Case, Limit
from seriatim.layout import Layout, pyramid, shapes_of
from seriatim.maps import Shape
from seriatim.model import Model
from seriatim.systems.image_system import ImageSystem, Pictures, whole_cells
from seriatim.systems.system import Sampling
from seriatim.tokenizers.multiscale import MultiScaleTokenizer
from seriatim.training.recipe import Recipe


def initial_std(width: int) -> float:
    """The deviation of most initial weights in the released VAR."""
    return (3 * width) ** -0.5


def var_config(c: Any) -> TransformerConfig:
    """VAR's stack of c.depth layers: adaptive norms, queries and keys of unit length with a learned temperature."""
    return TransformerConfig(
        c.width, c.depth, c.heads, norm="layer", activation="gelu_tanh", bias=True, qk_norm="l2", vector=c.width,
        eps=1e-6, dropout=c.dropout,
    )  # fmt: skip


def var_model(
    c: Any, layout: Layout, order: Factorization, backbone: Transformer, embed: PyramidEmbed, vocab: int,
    head: CategoricalHead | None = None,
) -> Model:  # fmt: skip
    """A model of VAR's parts around an order, a stack and an embedding, with VAR's initial weights."""
    std = initial_std(c.width)
    condition = {"class": ClassCondition(c.classes, c.width, ("prefix", "vector"), std)}
    head = head or CategoricalHead(c.width, vocab, bias=True)
    initialise(embed, backbone, head, std)
    return Model(layout, order, embed, backbone, head, condition)


@torch.no_grad()
def initialise(embed: PyramidEmbed, backbone: Transformer, head: CategoricalHead, std: float) -> None:
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


@lru_cache(maxsize=256)
def layout_of(shapes: tuple[int | Shape, ...]) -> Layout:
    """The pyramid of these maps, the same object each time: what is compiled for a layout is found again."""
    return pyramid(shapes)


class PyramidSystem(ImageSystem):
    """A class, then scale after scale. Sizes and recipes are VAR's."""

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
    schedule = "linear"

    seen_ahead = True  # of what is known of a finer scale, coarser ones see nothing

    def known_elements(self, keep: Bool[Tensor, "h w"], layout: Layout) -> Bool[Tensor, "E"]:
        """Of each scale the places whose part of the picture is kept (`kept`)."""
        shapes = shapes_of(layout)
        return kept(whole_cells(keep, shapes[-1]), shapes)

    def refine(
        self, images: Float[Tensor, "n c h w"], coarse: int, labels: Int[Tensor, " n"] | None = None,
        sampling: Sampling | None = None, seed: int = 0, film: bool = False,
    ) -> Pictures:  # fmt: skip
        """Pictures whose first `coarse` scales are those of given ones; what follows is drawn anew (a picture refined,
        or others like it). Raises ValueError for scales that there are not."""
        s = sampling or self.sampling
        layout = self.layout(s)
        if not 0 <= coarse <= len(shapes_of(layout)):
            raise ValueError(f"there are {len(shapes_of(layout))} scales, and {coarse} are to be kept")
        with torch.inference_mode():
            return self._repainted(images, layout.coord[:, 0] < coarse, layout, labels, s, seed, film)


def kept(keep: Bool[Tensor, "rows columns"], shapes: tuple[Shape, ...]) -> Bool[Tensor, "E"]:
    """Which elements of a pyramid are known where a part of its finest map is. As the released VAR edits: at each scale
    the places of which the resized map is more than half; and the scales of at most 3 places as a whole."""
    parts = []
    for rows, columns in shapes:
        share = F.interpolate(keep[None, None].float(), (rows, columns), mode="bilinear", align_corners=False)
        parts.append((share.flatten() > 0.5) | (rows * columns <= 3))
    return torch.cat(parts)


class ResidualPyramid(PyramidSystem):
    """Over the multi-scale residual tokenizer of VAR: each scale adds to the coarser ones."""

    tokenizers = ("image-msvq",)
    tokenizer_class: ClassVar[type[MultiScaleTokenizer]] = MultiScaleTokenizer

    @classmethod
    def known(cls, tokenizer: Any, data: Data) -> dict[str, Any]:
        if type(tokenizer) is not cls.tokenizer_class:  # one of another analysis would do, but its config is another
            raise ValueError(
                f"{cls.meta.key} needs a {cls.tokenizer_class.kind} tokenizer: a run of {cls.tokenizers[0]}"
            )
        return {"tokenizer": tokenizer.config, "classes": max(len(data.classes), 1)}

    def unfinished(self, codes: Tensor, known: Tensor) -> Float[Tensor, "n c h w"]:
        """The picture of the scales so far."""
        whole = [end for end in accumulate(self.tokenizer.quantizer.sizes) if bool(known[:, :end].all())]
        return self.tokenizer.partial_decode(codes[:, : max(whole, default=0)])[-1]


# ---- what the laws run -----------------------------------------------------------------------------------------------


def one_scale(case: Callable[[tuple[int, ...]], Case]) -> Limit:
    """A pyramid of one scale is one-shot independent prediction: no element depends on another."""
    one = case((2,))
    model, label = one.model, one.condition
    values = torch.randint(2, (6, 4), generator=torch.Generator().manual_seed(0))
    label = {k: v.expand(6) for k, v in (label or {}).items()}
    losses = model.losses(model.canvas({"token": values}), label)
    plan = model.factorization.packed(model.canvas({"token": values}))
    assert plan is not None
    blank = model.canvas({"token": values * 0})
    dist, _, _ = model.dist(model.hidden(plan, blank, None, model.encode(label)), plan, blank)
    return Limit("one scale = independent elements", -losses, dist.log_prob(values))


class PeekingEmbed(PyramidEmbed):
    """Wrong on purpose, for mutants of pyramid systems: every scale is fed the codes of the finest map, too."""

    def forward(
        self, canvas: Canvas, plan: Any, guess: Any = None, prefix: Tensor | None = None
    ) -> Float[Tensor, "b s d"]:
        x = super().forward(canvas, plan, guess, prefix)
        rows, columns = shapes_of(canvas.layout)[-1]
        table = self.quantizer.codebook.detach()  # type: ignore[union-attr, operator]
        finest = F.embedding(canvas.value["token"][:, -rows * columns :], table).mean(1)
        return x + self.project(finest.to(x.dtype))[:, None]
