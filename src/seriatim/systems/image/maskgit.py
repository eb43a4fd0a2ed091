"""MaskGIT: the ids of a picture in any order, many at once (Chang et al. 2022, arXiv 2202.04200).

New in it: a transformer that sees in all directions fills in what is hidden, and keeps at every step those of its ids
that it is surest of: few at first, by a cosine. Here the class drives adaptive norms, as in raster-ar, whose masked
counterpart this is; ELM's masked model is this one over the ids of a binary autoencoder.

Of `groups` "diagonals", steps decide as many ids as an anti-diagonal of the grid has, at random places: generation in
groups of these sizes without a place of their own, to compare NAR's groups with. Then the bound is that of this very
generation; else that of one id at a time, in random order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from seriatim.backbones.transformer import Transformer, TransformerConfig
from seriatim.conditions.condition import ClassCondition
from seriatim.decoding.loop import Decider
from seriatim.decoding.sample import Select
from seriatim.embed import TokenEmbed
from seriatim.factorization.static import AnyOrder
from seriatim.heads.categorical import CategoricalHead
from seriatim.laws.case import Case, Limit, Unmasked, randomise
from seriatim.layout import grid
from seriatim.model import Model
from seriatim.noise import NOISES
from seriatim.objectives.masked import ByGroups, ByShare, Masked, Masking, by_count
from seriatim.systems.image.mar import WHY, together
from seriatim.systems.meta import Meta
from seriatim.systems.raster_system import RasterSystem
from seriatim.systems.system import Sampling

META = Meta(
    key="maskgit",
    title="MaskGIT",
    family="image",
    modality="image",
    paper="MaskGIT: Masked Generative Image Transformer (2022), arXiv 2202.04200",
    likelihood="bound",
    summary="Ids in any order, many at a time: those that the model is surest of, few at first.",
)

Groups = Literal["cosine", "diagonals"]


@dataclass(frozen=True)
class Config:
    """Sizes; the defaults suit 8x8 digits at 17 grey levels. `side`: ids in a row; `groups`: how many are decided
    together."""

    side: int = 8
    vocab: int = 17
    classes: int = 10
    width: int = 96
    depth: int = 4
    heads: int = 4
    dropout: float = 0.1
    groups: Groups = "cosine"

    def __post_init__(self) -> None:
        if self.groups not in get_args(Groups):
            raise ValueError(f"groups is one of {', '.join(get_args(Groups))}, got {self.groups!r}")


def diagonals(side: int) -> tuple[int, ...]:
    """How many places each anti-diagonal of a square has."""
    return (*range(1, side + 1), *range(side - 1, 0, -1))


def build(config: Config | None = None) -> Masked:
    """The model, with fresh weights."""
    c = config or Config()
    masking: Masking = ByShare(NOISES["cosine"]) if c.groups == "cosine" else ByGroups(diagonals(c.side))
    judging = by_count if c.groups == "cosine" else masking
    backbone = Transformer(TransformerConfig(c.width, c.depth, c.heads, dropout=c.dropout, vector=c.width))
    embed = TokenEmbed(c.vocab, c.width, positions=(c.side, c.side), mask=True, start=False, std=0.4)
    condition = {"class": ClassCondition(c.classes, c.width, std=0.4)}
    head = CategoricalHead(c.width, c.vocab)
    return Masked(
        grid(c.side, c.side), AnyOrder(), embed, backbone, head, condition, masking=masking, judging=judging
    )  # fmt: skip


class MaskGIT(RasterSystem):
    """Pixels of small pictures, or ids of a VQ tokenizer or a binary autoencoder, in any order."""

    meta, Config = META, Config
    tokenizers = ("pixels", "image-vq", "image-bae")
    sampling = Sampling(guidance=1.0, steps=16)
    schedule = "linear"

    @staticmethod
    def build(config: Any, tokenizer: Any) -> Model:
        return build(config)

    def decider(self, sampling: Sampling) -> Decider:
        if self.config.groups == "diagonals":
            return Select("random", sizes=diagonals(self.config.side))
        return Select("confidence", sampling.steps or self.model.layout.size, "cosine")


# ---- what the laws run -----------------------------------------------------------------------------------------------


def case() -> Case:
    """A tiny instance for the laws."""
    model = randomise(build(Config(side=2, vocab=2, classes=3, width=16, depth=2, heads=2, dropout=0.0)))
    label, spread = {"class": torch.tensor([1])}, {"class": torch.tensor([0, 1, 2])}
    limits = (one_step, one_by_one)
    return Case(model, 2, 1, label, spread, lambda: Select("random", 4, "cosine"), limits, exempt=WHY)


def one_step() -> Limit:
    """Decided in one step."""
    return together(case())


def one_by_one() -> Limit:
    """Groups of one id hide as many as the bound of one id at a time does, and weigh them alike."""
    free, unit = torch.ones(8, 4, dtype=torch.bool), torch.arange(8) / 8
    noise = torch.arange(32.0).view(8, 4).cos().abs()
    hidden, weight = ByGroups((1,) * 4)(free, unit.flip(0), noise)
    other, same = by_count(free, unit, noise)
    return Limit("groups of one = one at a time", hidden.double().sum(1) + 9 * weight, other.double().sum(1) + 9 * same)


def mutant() -> Case:
    """The case with a wrong feed, which the laws must catch."""
    wrong = case()
    wrong.model.embed.__class__ = Unmasked
    return wrong
