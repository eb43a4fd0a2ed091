"""Raster autoregression: pixels (or token maps) row by row, as text is written.

A class in a prefix slot, then every element in raster order (PixelRNN, van den Oord et al. 2016; in the shape of
LlamaGen, Sun et al. 2024: RMSNorm, SwiGLU). Positions are learned. Plain grey levels serve as tokens for small
pictures.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from seriatim.backbones.transformer import Transformer, TransformerConfig
from seriatim.conditions.condition import ClassCondition
from seriatim.embed import TokenEmbed
from seriatim.factorization.line import Line
from seriatim.heads.categorical import CategoricalHead
from seriatim.laws.case import Case, randomise
from seriatim.layout import grid
from seriatim.model import Model
from seriatim.plan import Plan
from seriatim.systems.meta import Meta
from seriatim.systems.raster_system import RasterSystem
from seriatim.view import inclusive

META = Meta(
    key="raster-ar",
    title="Raster autoregression",
    family="image",
    modality="image",
    paper="Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation (2024), arXiv 2406.06525",
    likelihood="exact",
    summary="The elements of a picture row by row, each from all before it and the class.",
)


@dataclass(frozen=True)
class Config:
    """Sizes; the defaults suit 8x8 digits at 17 grey levels. `side`: elements in a row."""

    side: int = 8
    vocab: int = 17
    classes: int = 10
    width: int = 96
    depth: int = 4
    heads: int = 4
    dropout: float = 0.1


def build(config: Config | None = None, *shape: int) -> Model:
    """The model, with fresh weights; shape: rows and columns of a grid that is no square."""
    c = config or Config()
    rows, columns = shape or (c.side, c.side)
    backbone = Transformer(TransformerConfig(c.width, c.depth, c.heads, dropout=c.dropout, vector=c.width))
    embed = TokenEmbed(c.vocab, c.width, positions=(rows * columns,), start=False, std=0.4)
    condition = {"class": ClassCondition(c.classes, c.width, ("prefix", "vector"), std=0.4)}
    return Model(grid(rows, columns), Line(prefix=1), embed, backbone, CategoricalHead(c.width, c.vocab), condition)


class RasterAR(RasterSystem):
    """Pixels of small pictures, or ids of a VQ tokenizer, row by row."""

    meta, Config = META, Config

    @staticmethod
    def build(config: Any, tokenizer: Any) -> Model:
        return build(config)


def case() -> Case:
    """A tiny instance for the laws."""
    model = randomise(build(Config(side=2, vocab=2, classes=3, width=16, depth=2, heads=2, dropout=0.0)))
    return Case(model, vocab=2, condition={"class": torch.tensor([1])})


class _SkipsOne(Line):
    """Wrong on purpose: in one pass every slot also sees the slot behind it."""

    def packed(self, canvas):
        plan = super().packed(canvas)
        rank = torch.arange(plan.size) // 2
        return Plan(plan.slots, {"all": inclusive(rank)}, replace(plan.reads), plan.rank)


def mutant() -> Case:
    """The case with a mask that lets pairs of slots see each other, which the laws must catch."""
    wrong = case()
    wrong.model.factorization = _SkipsOne(prefix=1)
    return wrong
