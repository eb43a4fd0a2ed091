"""FlexVAR: next-scale prediction without residuals (Jiao et al. 2025, arXiv 2502.20313).

New in it: the map of every scale is a coding of the whole picture, not of what the coarser ones leave, and a scale is
told the map before alone, bicubic-up. Places are one learned grid that is resized to any map, and each step of training
draws other scales: so one model draws pictures of any size and form, in any number of steps.

Guidance grows linearly with the scale, to its whole weight at the last one (the released code reaches it at the tenth,
and goes beyond with more). As there, maps larger than any in training are decided by the likeliest ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from seriatim.backbones.transformer import Transformer
from seriatim.canvas import Canvas, Set
from seriatim.data.base import Data
from seriatim.decoding.guess import Guess
from seriatim.decoding.loop import Decider, Step
from seriatim.decoding.sample import SampleAll
from seriatim.embed_pyramid import PlaceGrid, PyramidEmbed, previous
from seriatim.factorization.static import Scales
from seriatim.laws.case import Case, Limit, randomise
from seriatim.layout import Layout, pyramid, shapes_of
from seriatim.model import Model, Rows
from seriatim.objectives.scales import drawn_scales, scales_to
from seriatim.random import Generator, Random
from seriatim.systems.claim import Claim, brief
from seriatim.systems.meta import Meta
from seriatim.systems.pyramid_system import (
    PeekingEmbed,
    PyramidSystem,
    initial_std,
    layout_of,
    one_scale,
    var_config,
    var_model,
)
from seriatim.systems.pyramid_trials import skipping
from seriatim.systems.system import Sampling
from seriatim.tokenizers.flexible import FlexTokenizer
from seriatim.tokenizers.multiscale import SCALES
from seriatim.tokenizers.quantizers import NormalizedVQ

META = Meta(
    key="flexvar",
    title="FlexVAR: next-scale prediction without residuals",
    family="image",
    modality="image",
    paper="FlexVAR: Flexible Visual Autoregressive Modeling without Residual Prediction (2025), arXiv 2502.20313",
    likelihood="exact",
    summary="Each scale codes the whole picture; any sizes, forms and numbers of steps from one model.",
)


@dataclass(frozen=True)
class Config:
    """Sizes; the defaults suit 32x32 glyphs. scales: sides of the maps that are drawn where no others are asked for,
    the last one of the trained pictures; grid: places in a row of the learned grid."""

    scales: tuple[int, ...] = SCALES[8]
    vocab: int = 256
    dim: int = 8
    grid: int = 32
    classes: int = 10
    width: int = 96
    depth: int = 4
    heads: int = 4
    dropout: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "scales", tuple(self.scales))  # JSON knows lists only


def build(config: Config | None = None, quantizer: nn.Module | None = None) -> Model:
    """The generator over a tokenizer's codes (fresh ones if none are given)."""
    c = config or Config()
    codes = quantizer or NormalizedVQ(c.vocab, c.dim)
    backbone = Transformer(var_config(c))
    embed = PyramidEmbed(codes, c.dim, c.width, previous, PlaceGrid(c.grid), std=initial_std(c.width))
    return var_model(c, pyramid(c.scales), Scales(), backbone, embed, c.vocab)


class UpToTrained(SampleAll):
    """Everything that is read; maps larger than any in training (`rows` x `columns`) by the likeliest ids."""

    def __init__(self, rows: int, columns: int):
        super().__init__()
        self.most = rows * columns

    def decide(self, canvas: Canvas, guess: Guess | None, rows: Rows, random: Random) -> Step:
        element = torch.as_tensor(rows.element)
        scale = int(canvas.layout.coord[int(element.max()), 0])
        height, width = shapes_of(canvas.layout)[scale]
        if height * width <= self.most:
            return super().decide(canvas, guess, rows, random)
        return Step((Set(rows.dist.mode(), element.expand(canvas.batch, -1)),))


class FlexVAR(PyramidSystem):
    """A class, then map after map, each of the whole picture."""

    meta, Config = META, Config
    tokenizers = ("image-flexvq",)
    source = "glyphs"
    sampling = Sampling(top_p=0.96, guidance=1.5)

    @staticmethod
    def build(config: Any, tokenizer: Any) -> Model:
        return build(config, None if tokenizer is None else tokenizer.quantizer)

    @classmethod
    def known(cls, tokenizer: Any, data: Data) -> dict[str, Any]:
        if not isinstance(tokenizer, FlexTokenizer):
            raise ValueError(f"{META.key} needs a tokenizer of maps of any size: a run of image-flexvq")
        dim = tokenizer.quantizer.code_dim
        return {**super().known(tokenizer, data), "scales": tokenizer.config.scales, "dim": dim}

    # ---- training ---------------------------------------------------------------------------------------------------

    def canvas(
        self, batch: Mapping[str, Tensor], scales: tuple[int, ...] | None = None
    ) -> tuple[Canvas, dict[str, Tensor] | None]:
        layout = self.model.layout if scales is None else layout_of(scales)
        codes = self.elements(batch["image"], layout)
        return self.model.canvas({"token": codes}, layout=layout), self.condition(batch.get("label"), len(codes))

    def losses(self, batch: Mapping[str, Tensor], random: Generator, drop: float) -> tuple[Tensor, Tensor]:
        """In training on scales drawn anew; the mean over elements is the same for all of them."""
        if not self.training:
            return super().losses(batch, random, drop)
        canvas, condition = self.canvas(batch, drawn_scales(self.config.scales, random.generator))
        dropped = torch.rand(canvas.batch, generator=random.generator) < drop if drop else None
        return self.summed(self.model.losses(canvas, condition, dropped), canvas.open)

    def elements(self, images: Float[Tensor, "n c h w"], layout: Layout) -> Int[Tensor, "n E"]:
        with torch.no_grad():
            return self.tokenizer.encode(images, shapes_of(layout))

    # ---- generation -------------------------------------------------------------------------------------------------

    def layout(self, sampling: Sampling) -> Layout:
        """Any sizes that are asked for. Raises ValueError for pictures that are no whole number of places, and maps
        that shrink."""
        s = sampling
        if s.scales is not None:
            if s.size is not None or s.steps is not None:
                raise ValueError("scales say all: leave size and steps out")
            shapes = tuple((n, n) if isinstance(n, int) else tuple(n) for n in s.scales)
            if not shapes or any(a == b or min(b[0] - a[0], b[1] - a[1]) < 0 for a, b in pairwise(shapes)):
                raise ValueError(f"scales are maps that grow, from coarse to fine, got {s.scales}")
            return layout_of(shapes)  # type: ignore[arg-type]
        rows = columns = self.config.scales[-1]
        if s.size is not None:
            (width, height), stride = s.size, self.tokenizer.stride
            if width % stride or height % stride or min(width, height) < stride:
                raise ValueError(f"sides of pictures are multiples of {stride} pixels here, got {width}x{height}")
            rows, columns = height // stride, width // stride
        return layout_of(scales_to((rows, columns), self.config.scales, s.steps))

    def decider(self, sampling: Sampling) -> Decider:
        return UpToTrained(self.config.scales[-1], self.config.scales[-1])

    def finished(self, canvas: Canvas) -> Float[Tensor, "n c h w"]:
        return self.tokenizer.decode(canvas.value["token"], shapes_of(canvas.layout))

    def so_far(self, canvas: Canvas) -> Float[Tensor, "n c h w"]:
        """The picture of the last map that is there, as large as the finished one."""
        shapes, begin, last = shapes_of(canvas.layout), 0, None
        for shape in shapes:
            end = begin + shape[0] * shape[1]
            if bool(canvas.known[:, begin:end].all()):
                last = shape, canvas.value["token"][:, begin:end]
            begin = end
        size = tuple(n * self.tokenizer.stride for n in shapes[-1])
        if last is None:
            return torch.zeros(canvas.batch, self.tokenizer.channels, *size)
        return F.interpolate(self.tokenizer.decode_map(last[1], last[0]), size=size, mode="nearest")


CLAIM = Claim(
    text="Where maps are codings of the whole picture, and other scales were met in training, a scale can be left out "
    "at sampling with little loss; VAR's pictures fall apart: FD-s with each inner scale skipped in turn, over FD-s "
    "with all of them, by its geometric mean.",
    paper="ImageNet 256x256: 6 to 13 steps by one model, FID 2.21 in ten and 2.08 in 13 (d24); VAR has its ten only",
    metric="skip_ratio",
    arms={
        "flexvar": brief("flexvar", "zoo:image-flexvq", measure=skipping),
        "var": brief("var", "zoo:image-msvq", measure=skipping),
    },
    ours="flexvar",
    baseline="var",
    data="glyphs",
)


# ---- what the laws run -----------------------------------------------------------------------------------------------


def case(scales: tuple[int, ...] = (1, 2), vocab: int = 2) -> Case:
    """A tiny instance for the laws."""
    c = Config(scales, vocab, dim=3, grid=4, classes=3, width=16, depth=2, heads=2, dropout=0.0)
    limits = (lambda: one_scale(case), prefix_of_another)
    return Case(randomise(build(c)), vocab=vocab, condition={"class": torch.tensor([1])}, limits=limits)


def prefix_of_another() -> Limit:
    """Two pyramids agree up to the first scale in which they differ, by one model."""
    one = case((1, 2, 3))
    x = one.sample(4)
    long = one.model.losses(one.canvas(x), one.rows(4))[:, :5]
    short = one.model.canvas({"token": x[:, :5]}, layout=layout_of((1, 2)))
    return Limit("two pyramids agree as far as they are alike", long, one.model.losses(short, one.rows(4)))


def mutant() -> Case:
    """The case with a wrong feed, which the laws must catch."""
    wrong = case()
    wrong.model.embed.__class__ = PeekingEmbed
    return wrong
