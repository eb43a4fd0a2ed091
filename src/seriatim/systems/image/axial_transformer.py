"""Axial Transformer: raster order by attention along rows and columns (Ho et al. 2019, arXiv 1912.12180).

New in it: exact full context of the raster order at the price of lines. Upper layers see whole rows and columns above
and are computed once a row, all its places at once; inner layers, along the row, are all that is run pixel by pixel.
Channels come one after another, each told the earlier ones whole; training draws one of them for each batch (the
released code one for each picture).

A departure: the activation is GELU by its tanh approximation, there x sigmoid(1.702 x). Branches and logits begin near
zero, as there (variances of 1e-10 of the usual).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from seriatim.backbones.axial import Axial, AxialConfig, kinds_of
from seriatim.backbones.transformer import Transformer, TransformerConfig
from seriatim.conditions.condition import ClassCondition
from seriatim.data.base import Data
from seriatim.embed import TokenEmbed
from seriatim.embed_axes import AxialEmbed
from seriatim.factorization.axes import COLUMN, Axes, AxialPlan
from seriatim.factorization.line import Line
from seriatim.heads.categorical import CategoricalHead
from seriatim.laws.case import Case, Limit, randomise
from seriatim.layout import Layout, grid
from seriatim.model import Model
from seriatim.random import Generator
from seriatim.systems.claim import Arm, Claim
from seriatim.systems.image_system import ImageSystem, whole_cells
from seriatim.systems.meta import Meta
from seriatim.systems.system import Sampling
from seriatim.training.recipe import Recipe
from seriatim.view import timed

META = Meta(
    key="axial-transformer",
    title="Axial Transformer",
    family="image",
    modality="image",
    paper="Axial Attention in Multidimensional Transformers (2019), arXiv 1912.12180",
    likelihood="exact",
    summary="Pixels in raster order, by attention along rows and columns; what is above is worked out once a row.",
)


@dataclass(frozen=True)
class Config:
    """Sizes; the defaults suit 8x8 digits at 17 grey levels. earlier, upper, inner: layers that see earlier channels
    (none where there is one channel), rows above, and the row; spread: of initial values and places."""

    rows: int = 8
    columns: int = 8
    channels: int = 1
    vocab: int = 17
    classes: int = 10
    width: int = 96
    earlier: int = 2
    upper: int = 2
    inner: int = 2
    heads: int = 4
    dropout: float = 0.04
    spread: float = 5.0


def build(config: Config | None = None) -> Model:
    """The model, with fresh weights."""
    c = config or Config()
    kinds, std = kinds_of(c.earlier if c.channels > 1 else 0, c.upper, c.inner), c.width**-0.5
    backbone = Axial(AxialConfig(
        c.width, len(kinds), c.heads, hidden=c.width, norm="layer", activation="gelu_tanh", bias=True,
        dropout=c.dropout, kinds=kinds,
    ))  # fmt: skip
    embed = AxialEmbed(c.vocab, c.width, c.channels, c.rows, c.columns, c.spread * std)
    head = CategoricalHead(c.width, c.vocab, bias=True)
    with torch.no_grad():
        head.weight.normal_(0, 1e-5 * std)
        for layer in backbone.layers:
            for name, size in (("qkv", 1.0), ("up", 1.0), ("out", 1e-5), ("down", 1e-5)):
                layer.get_parameter(name).normal_(0, size * std)
    condition = {"class": ClassCondition(c.classes, c.width, ("prefix",), c.spread * std)}
    return Model(grid(c.channels, c.rows, c.columns), Axes(), embed, backbone, head, condition)


class AxialTransformer(ImageSystem):
    """Pixels of small pictures, channel by channel and row by row, or the ids of a VQ tokenizer."""

    meta, Config = META, Config
    tokenizers = ("pixels", "image-vq")
    sizes = MappingProxyType({
        "tiny": {},
        "small": {"width": 128, "upper": 2, "inner": 2, "earlier": 2},
        "imagenet32": {"width": 1536, "earlier": 8, "upper": 8, "inner": 8, "heads": 16},
    })  # fmt: skip
    recipes = MappingProxyType({
        "tiny": Recipe(800, drop=0.1),
        "small": Recipe(4000, batch=32, learning_rate=1e-3, drop=0.1, bf16=True, ema=0.995),
        "imagenet32": Recipe(200_000, batch=64, learning_rate=1e-4, warm_up=0.025, bf16=True, ema=0.99995),
    })  # fmt: skip
    sampling = Sampling(guidance=0.0)

    @classmethod
    def tokenizer_settings_for(cls, shape: Sequence[int]) -> Mapping[str, Any]:
        """17 levels of pictures of at most 8 x 8 pixels, as digits have; 16 of larger ones."""
        return {"levels": 17 if shape[-1] <= 8 else 16}

    @classmethod
    def known(cls, tokenizer: Any, data: Data) -> dict[str, Any]:
        if tokenizer.vocab is None:
            raise ValueError(f"{META.key} needs a tokenizer of ids on a grid: pixels, or a run of image-vq")
        rows, columns = tokenizer.grid
        channels = getattr(tokenizer, "depth", 1)
        return {**super().known(tokenizer, data), "rows": rows, "columns": columns, "channels": channels}

    @staticmethod
    def build(config: Any, tokenizer: Any) -> Model:
        return build(config)

    # ---- a channel at a time ---------------------------------------------------------------------------------------

    def losses(self, batch: Mapping[str, Tensor], random: Generator, drop: float) -> tuple[Tensor, Tensor]:
        """In training those of one channel, drawn for the batch, times the number of channels, whose mean is that of
        all; else of all."""
        canvas, condition = self.canvas(batch)
        dropped = torch.rand(canvas.batch, generator=random.generator) < drop if drop else None
        encoded, order, channels = self.model.encode(condition, dropped), self.model.factorization, self.config.channels
        assert isinstance(order, Axes)
        some = range(channels)
        if self.training:
            c = int(torch.randint(channels, (), generator=random.generator))
            some = range(c, c + 1)
        parts = [self.model.losses_by(order.channel(canvas, c), canvas, encoded).sum() for c in some]
        return torch.stack(parts).sum() * channels / len(some), torch.tensor(canvas.batch * canvas.layout.size)

    def elements(self, images: Float[Tensor, "n c h w"], layout: Layout) -> Int[Tensor, "n E"]:
        codes = super().elements(images, layout)
        return codes if codes.dim() == 2 else codes.mT.flatten(1)  # channels outermost

    def picture(self, codes: Int[Tensor, "n E"]) -> Float[Tensor, "n c h w"]:
        return super().picture(
            codes if self.config.channels == 1 else codes.unflatten(1, (self.config.channels, -1)).mT
        )

    def shown(self, images: Float[Tensor, "n c h w"], known: Tensor) -> Float[Tensor, "n c h w"]:
        """Grey where a value is not known; of pictures with several channels, where none of a place is."""
        return super().shown(images, known.unflatten(1, (self.config.channels, -1)).any(1))

    def known_elements(self, keep: Tensor, layout: Layout) -> Tensor:
        return whole_cells(keep, self.tokenizer.grid).flatten().repeat(self.config.channels)


CLAIM = Claim(
    text="Attention along rows and columns loses no context: in the same steps, pixels cost at most two per cent more "
    "bits than in a dense raster transformer of as many layers and the same width.",
    paper="ImageNet 32x32: 3.76 bits a dimension, ImageNet 64x64: 3.44; no dense baseline of equal size is given",
    metric="bits_per_code",
    arms={
        "axial": Arm("axial-transformer", {"batch": 32}, steps=800),
        "dense": Arm("raster-ar", {"batch": 32}, steps=800),
    },
    ours="axial",
    baseline="dense",
    margin=0.98,
    data="digits",
)


# ---- what the laws run -----------------------------------------------------------------------------------------------


def case(channels: int = 2, rows: int = 2, columns: int = 2, given: int = 3, vocab: int = 2) -> Case:
    """A tiny instance for the laws: three of eight values are given, so that samples are few."""
    model = randomise(build(Config(rows, columns, channels, vocab, 3, 16, 2, 2, 1, 2, 0.0)))
    return Case(model, vocab=vocab, given=given, condition={"class": torch.tensor([1])}, limits=(one_row,))


def one_row() -> Limit:
    """A picture of one row and one channel is a line under plain causal attention, whatever the upper layers."""
    mine = case(1, 1, 4, given=0)
    with torch.no_grad():
        mine.model.get_parameter("conditions.class.table").zero_()
    plain = TransformerConfig(16, 1, 2, hidden=16, norm="layer", activation="gelu_tanh", bias=True)
    condition = {"class": ClassCondition(3, 16, ("prefix",))}
    line = Model(
        grid(1, 4), Line(prefix=1), TokenEmbed(2, 16, positions=(4,), start=False), Transformer(plain),
        CategoricalHead(16, 2, bias=True), condition,
    )  # fmt: skip
    theirs = Case(randomise(line), vocab=2, condition=mine.condition)
    own, other = mine.model.state_dict(), line.state_dict()
    named = {name: own[name] for name in other if name in own and own[name].shape == other[name].shape}
    named |= {name: own[name.replace("layers.0.", "layers.2.")] for name in other if ".layers." in name}
    named["embed.positions.0"] = own["embed.row"] + own["embed.column"]
    line.load_state_dict(named)
    x = mine.sample(6)
    return Limit("one row = a line under causal attention", mine.total(x), theirs.total(x))


class _LooksDown(Axes):
    """Wrong on purpose: along columns, upper slots see the rows below theirs."""

    def part(self, canvas: Any, which: range) -> AxialPlan:
        plan = super().part(canvas, which)
        column = plan.views[COLUMN]
        return replace(plan, views={**plan.views, COLUMN: timed(torch.zeros_like(column.at), lane=column.lane)})


def mutant() -> Case:
    """The case with columns that are not masked, which the laws must catch."""
    wrong = case()
    wrong.model.factorization = _LooksDown()
    return wrong
