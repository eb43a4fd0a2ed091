"""ELM: a language model for pictures, its vocabulary cut into sub-codes (Liu et al. 2024, arXiv 2410.16257).

New in it: ids of a binary autoencoder (image-bae) need no codebook, and their bits are cut into a few sub-codes; each
is fed beside the others and predicted by a matrix of its own, all of a place at once, so that 2^20 codes take no more
room than two vocabularies of 2^10. Guidance grows linearly from the first place to the last.

Here the class also drives adaptive norms, and all sub-codes share a table; in the form "llama" it stands in front alone
and each has a table of its own, as released. The masked model that the paper compares with is `maskgit` over the same
ids, whole ones as in the released weights; how random ids are, and how far attention reaches:
`benchmarks/token_statistics.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from seriatim.backbones.rope import RoPE
from seriatim.backbones.transformer import Transformer, TransformerConfig
from seriatim.canvas import Canvas
from seriatim.conditions.condition import ClassCondition
from seriatim.data.base import Data
from seriatim.decoding.guidance import Guidance
from seriatim.decoding.target import Branch
from seriatim.embed import TokenEmbed
from seriatim.factorization.windows import NextGroup
from seriatim.heads.categorical import CategoricalHead
from seriatim.heads.fused import FusedEmbed
from seriatim.laws.case import Case, Limit, randomise
from seriatim.layout import Layout, line
from seriatim.model import Model
from seriatim.random import Generator
from seriatim.systems.claim import Claim, brief
from seriatim.systems.image import raster_ar
from seriatim.systems.image.raster_ar import Form
from seriatim.systems.meta import Meta
from seriatim.systems.raster_system import RasterSystem
from seriatim.systems.system import Sampling
from seriatim.tokenizers.bernoulli import from_parts, to_parts

META = Meta(
    key="elm",
    title="ELM: sub-codes of a binary autoencoder",
    family="image",
    modality="image",
    paper="Elucidating the design space of language models for image generation (2024), arXiv 2410.16257",
    likelihood="exact",
    summary="Places row by row, each by a few sub-codes at once; linear guidance.",
)

CLAIM = Claim(
    text="Two sub-codes of five bits make better pictures than one id of ten, after equal minutes of training: FD-s. "
    "Beside it: whole ids filled in by a masked model.",
    paper="ImageNet 256x256: two sub-codes (2-10) are best at L and XL, 2-12 at XXL and 2B (FID 1.54)",
    metric="fd_s",
    arms={
        "two": brief("elm", "zoo:image-bae"),
        "one": brief("elm", "zoo:image-bae", parts=1),
        "masked": brief("maskgit", "zoo:image-bae"),
    },
    ours="two",
    baseline="one",
    spread_seeds=(0, 1, 2),
    other_seeds=(0,),
    data="glyphs",
)


@dataclass(frozen=True)
class Config:
    """Sizes; the defaults suit 8x8 digits at 16 grey levels. side: ids in a row; bits: of an id; parts: sub-codes that
    it is cut into, equally long; form, hidden: as of raster-ar."""

    side: int = 8
    bits: int = 4
    parts: int = 2
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
        if self.parts < 1 or self.bits % self.parts:
            raise ValueError(f"{self.bits} bits cannot be cut into {self.parts} equal parts")

    @property
    def vocab(self) -> int:
        """Of a sub-code."""
        return 2 ** (self.bits // self.parts)


class TablesEmbed(TokenEmbed):
    """A slot carries the sub-codes of a place: the sum of their vectors, from a table each, one below the other."""

    def __init__(self, vocab: int, width: int, parts: int):
        super().__init__(vocab * parts, width, start=False, std=0.4)
        self.each = vocab

    def vectors(self, value: Int[Tensor, "b s parts"]) -> Float[Tensor, "b s parts d"]:
        return super().vectors(value + self.each * torch.arange(value.shape[-1], device=value.device))


def build(config: Config | None = None, places: int | None = None) -> Model:
    """The model, with fresh weights; its elements are the sub-codes of one place behind those of another."""
    c = config or Config()
    places, half = places or c.side**2, c.width // c.heads // 2
    if c.form == "llama":
        rope = RoPE(axes=(half, half), raster=(1, c.side))
        layers = TransformerConfig(c.width, c.depth, c.heads, hidden=c.hidden, dropout=c.dropout, rope=rope)
        embed: TokenEmbed = TablesEmbed(c.vocab, c.width, c.parts)
        condition = {"class": ClassCondition(c.classes, c.width, ("prefix",), std=0.4)}
    else:
        layers = TransformerConfig(c.width, c.depth, c.heads, hidden=c.hidden, dropout=c.dropout, vector=c.width)
        embed = FusedEmbed(c.vocab, c.width, c.parts, positions=(places,))
        condition = {"class": ClassCondition(c.classes, c.width, ("prefix", "vector"), std=0.4)}
    order = NextGroup(torch.arange(places).repeat_interleave(c.parts))
    head = CategoricalHead(c.width, c.vocab, roles=c.parts)
    return Model(line(places * c.parts), order, embed, Transformer(layers), head, condition)


class ELM(RasterSystem):
    """Grey levels of small pictures, or bits of an autoencoder, row by row."""

    meta, Config = META, Config
    tokenizers = ("pixels", "image-bae")
    tokenizer_settings = MappingProxyType({"levels": 16})
    sampling = Sampling(guidance=1.0)
    schedule = "linear"

    @staticmethod
    def build(config: Any, tokenizer: Any) -> Model:
        return build(config)

    @classmethod
    def tokenizer_for(cls, shape: Sequence[int]) -> str:
        return "pixels" if shape[0] == 1 and shape[1] <= 16 else "image-bae"

    @classmethod
    def known(cls, tokenizer: Any, data: Data) -> dict[str, Any]:
        known = super().known(tokenizer, data)
        vocab = known.pop("vocab")
        if vocab & (vocab - 1):
            raise ValueError(f"{META.key} cuts ids into bits, so it needs a power of two of them, not {vocab}")
        return {**known, "bits": vocab.bit_length() - 1}

    def guidance(self, sampling: Sampling) -> Guidance | Sequence[Branch] | None:
        w = sampling.guidance
        if self.config.form == "driven" or not w:
            return super().guidance(sampling)
        return Guidance(w, "linear", w / self.config.side**2)  # counts the place that is drawn, as released

    def elements(self, images: Float[Tensor, "n c h w"], layout: Layout) -> Int[Tensor, "n E"]:
        return to_parts(super().elements(images, layout), self.config.parts, self.config.vocab).flatten(1)

    def losses(self, batch: Mapping[str, Tensor], random: Generator, drop: float) -> tuple[Tensor, Tensor]:
        """Over so many places, each of several elements."""
        total, elements = super().losses(batch, random, drop)
        return total, elements // self.config.parts

    def picture(self, codes: Tensor) -> Float[Tensor, "n c h w"]:
        return self.tokenizer.decode(from_parts(codes.unflatten(1, (-1, self.config.parts)), self.config.vocab))

    def so_far(self, canvas: Canvas) -> Float[Tensor, "n c h w"]:
        images = self.picture(torch.where(canvas.known, canvas.value["token"], 0))
        return self.shown(images, canvas.known.unflatten(1, (-1, self.config.parts)).all(2))


# ---- what the laws run -----------------------------------------------------------------------------------------------


_TINY = {"classes": 3, "width": 16, "depth": 2, "heads": 2, "dropout": 0.0}


def case() -> Case:
    """A tiny instance for the laws: three places of two bits, each a sub-code."""
    model = randomise(build(Config(bits=2, **_TINY), 3))  # type: ignore[arg-type]
    return Case(model, vocab=2, condition={"class": torch.tensor([1])}, limits=(whole_ids,))


def whole_ids() -> Limit:
    """Ids in one part are raster autoregression."""
    one = randomise(build(Config(side=2, bits=1, parts=1, **_TINY)))  # type: ignore[arg-type]
    other = raster_ar.case().model
    other.load_state_dict(one.state_dict())
    x, label = torch.tensor([[0, 1, 1, 0], [1, 1, 0, 1]]), {"class": torch.tensor([1, 2])}
    got, want = (m.losses(m.canvas({"token": x}), label) for m in (one, other))
    return Limit("ids in one part are raster autoregression", got, want)


class _ReadsItself(NextGroup):
    """Wrong on purpose: each slot reads the place that it carries."""

    def packed(self, canvas):
        plan = super().packed(canvas)
        slot = (plan.reads.slot + 1).clamp(max=plan.size - 1)
        return replace(plan, reads=replace(plan.reads, slot=slot))


def mutant() -> Case:
    """The case with read-outs at the slots that carry what is read, which the laws must catch."""
    wrong = case()
    wrong.model.factorization = _ReadsItself(torch.arange(3).repeat_interleave(2))
    return wrong
