"""VAR: next-scale prediction (Tian et al. 2024, arXiv 2404.02905).

New in it: a picture is a pyramid of token maps, each the residual of the coarser ones, and a whole scale is predicted
in one step from all coarser scales. A slot carries the accumulated latent of everything coarser, area-downed to its
scale (a learned start and the class at the first), and reads out its own place. The order is block-causal; guidance
grows linearly with the scale.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from seriatim.backbones.transformer import Transformer
from seriatim.embed_pyramid import PlaceTable, PyramidEmbed, accumulated
from seriatim.factorization.static import Scales
from seriatim.laws.case import Case, randomise
from seriatim.layout import pyramid
from seriatim.model import Model
from seriatim.systems.claim import Claim, brief
from seriatim.systems.meta import Meta
from seriatim.systems.pyramid_system import (
    PeekingEmbed,
    ResidualPyramid,
    initial_std,
    one_scale,
    var_config,
    var_model,
)
from seriatim.systems.system import Sampling
from seriatim.tokenizers.multiscale import MultiScaleConfig, MultiScaleVQ

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


def build(config: Config | None = None, quantizer: MultiScaleVQ | None = None) -> Model:
    """The generator over a tokenizer's quantizer (a fresh one if none is given)."""
    c = config or Config()
    q = quantizer or c.tokenizer.quantizer()
    std, backbone = initial_std(c.width), Transformer(var_config(c))
    embed = PyramidEmbed(q, q.dim, c.width, accumulated, PlaceTable(q.total), scales=len(q.scales), std=std)
    return var_model(c, pyramid(q.scales), Scales(), backbone, embed, q.vocab)


class VAR(ResidualPyramid):
    """A class, then scale after scale."""

    meta, Config = META, Config
    sampling = Sampling(top_p=0.96, guidance=1.5)

    @staticmethod
    def build(config: Any, tokenizer: Any) -> Model:
        return build(config, None if tokenizer is None else tokenizer.quantizer)


CLAIM = Claim(
    text="At equal training seconds and near equal parameters, next-scale prediction draws better pictures than raster "
    "order over ids of the same vocabulary, in 6 forwards instead of 64.",
    paper="ImageNet 256x256: FID 18.65 to 1.73 against the raster baseline, with 20 times faster inference",
    metric="fd_s",
    arms={
        "var": brief("var", "zoo:image-msvq"),
        "raster-ar": brief("raster-ar", "zoo:image-vq"),
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
    return Case(model, vocab=vocab, condition={"class": torch.tensor([1])}, limits=(lambda: one_scale(case),))


def mutant() -> Case:
    """The case with a wrong feed, which the laws must catch."""
    wrong = case()
    wrong.model.embed.__class__ = PeekingEmbed
    return wrong
