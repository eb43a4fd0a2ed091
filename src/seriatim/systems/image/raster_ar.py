"""Raster autoregression: pixels (or token maps) row by row, as text is written.

A class in a prefix slot, then every element in raster order (PixelRNN, van den Oord et al. 2016; in the shape of
LlamaGen, Sun et al. 2024: RMSNorm, SwiGLU). Plain grey levels serve as tokens for small pictures. Of two forms,
"driven" learns positions and lets the class drive all norms, which small models gain from; "llama" is LlamaGen as
published: rows and columns turn queries and keys, and the class stands in the prefix alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch

from seriatim.backbones.rope import RoPE
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


Form = Literal["driven", "llama"]


@dataclass(frozen=True)
class Config:
    """Sizes; the defaults suit 8x8 digits at 17 grey levels. `side`: elements in a row; `form`: how places and the
    class are told; `hidden`: width of the feed-forward layers (None: 8/3 of the width, in steps of 8)."""

    side: int = 8
    vocab: int = 17
    classes: int = 10
    width: int = 96
    depth: int = 4
    heads: int = 4
    dropout: float = 0.1
    form: Form = "driven"
    hidden: int | None = None

    def __post_init__(self) -> None:
        if self.form not in get_args(Form):
            raise ValueError(f"form is one of {', '.join(get_args(Form))}, got {self.form!r}")
        if self.form == "llama" and self.width // self.heads % 4:
            raise ValueError(f"heads of {self.width // self.heads} are not shared by two axes: take a multiple of 4")


def build(config: Config | None = None, *shape: int, along: bool = False) -> Model:
    """The model, with fresh weights; shape: rows and columns of a grid that is no square; along: in form llama rotary
    positions count along the line, the class first."""
    c = config or Config()
    rows, columns = shape or (c.side, c.side)
    size, driven, head = (c.width, c.depth, c.heads), c.form == "driven", c.width // c.heads
    rope = None if driven else RoPE() if along else RoPE(axes=(head // 2, head // 2), raster=(1, columns))
    backbone = Transformer(
        TransformerConfig(*size, hidden=c.hidden, dropout=c.dropout, rope=rope, vector=c.width if driven else None)
    )
    positions = (rows * columns,) if driven else ()
    embed = TokenEmbed(c.vocab, c.width, positions=positions, start=False, std=0.4)
    told = ("prefix", "vector") if driven else ("prefix",)
    condition = {"class": ClassCondition(c.classes, c.width, told, std=0.4)}
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
