"""Next-token prediction: the line from which everything else departs.

A decoder-only transformer over bytes or merged pairs of them (Radford et al. 2019, in the shape of Llama: RMSNorm,
rotary positions, SwiGLU). Slot i carries token i-1 (a learned start in front) and reads out token i; slots see all
earlier slots.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch

from seriatim.backbones.rope import RoPE
from seriatim.backbones.transformer import Transformer, TransformerConfig
from seriatim.embed import TokenEmbed
from seriatim.factorization.line import Line
from seriatim.heads.categorical import CategoricalHead
from seriatim.interop.blueprint import Part
from seriatim.interop.export import Publication, llama_of, llama_parts
from seriatim.laws.case import Case, randomise
from seriatim.layout import line
from seriatim.model import Model
from seriatim.systems.language_model import LanguageModel
from seriatim.systems.meta import Meta
from seriatim.training.recipe import Recipe

META = Meta(
    key="next-token",
    title="Next-token language model",
    family="text",
    modality="text",
    paper="Language Models are Unsupervised Multitask Learners (2019)",
    likelihood="exact",
    summary="Tokens one after another, each from all before it; a Llama-shaped decoder.",
)


@dataclass(frozen=True)
class Config:
    """Sizes of the model; `length` is the longest text in tokens, `hidden` the width of the feed-forward layers (None:
    8/3 of the width, in steps of 64), `tied` makes input and output matrices one."""

    length: int = 512
    vocab: int = 272
    width: int = 256
    depth: int = 6
    heads: int = 4
    hidden: int | None = None
    theta: float = 10_000.0
    tied: bool = False


def build(config: Config | None = None) -> Model:
    """The model, with fresh weights."""
    c = config or Config()
    backbone = Transformer(TransformerConfig(c.width, c.depth, c.heads, hidden=c.hidden, rope=RoPE(c.theta)))
    embed = TokenEmbed(c.vocab, c.width)
    head = CategoricalHead(c.width, c.vocab, tied=embed.table if c.tied else None)
    return Model(line(c.length), Line(prefix=1), embed, backbone, head)


class NextToken(LanguageModel):
    """A learned start, then every token from all before it."""

    meta, Config = META, Config
    sizes = MappingProxyType({
        "tiny": {},
        "small": {"length": 1024, "depth": 8, "hidden": 640, "tied": True},
        "medium": {"length": 1024, "width": 768, "depth": 12, "heads": 12, "tied": True},
    })  # fmt: skip
    recipes = MappingProxyType({
        "tiny": Recipe(800, batch=4, learning_rate=2e-3, weight_decay=0.1, bf16=True),
        "small": Recipe(6000, batch=8, learning_rate=2e-3, weight_decay=0.1, bf16=True, compile=True),
        "medium": Recipe(
            50_000, batch=256, accumulate=16, learning_rate=6e-4, weight_decay=0.1, bf16=True, compile=True
        ),
    })  # fmt: skip

    @staticmethod
    def build(config: Any, tokenizer: Any) -> Model:
        return build(config)

    @property
    def parts(self) -> tuple[Part, ...]:
        return llama_parts(self.model)

    def publication(self) -> Publication:
        """A Llama. The learned start becomes the embedding of <bos>."""
        special = self.tokenizer.special
        config, tensors = llama_of(self.model, self.config.length, special["bos"])
        settings = {"bos_token_id": special["bos"], "eos_token_id": special["eos"]}
        return Publication(config | settings, tensors, settings)


def case() -> Case:
    """A tiny instance for the laws."""
    return Case(randomise(build(Config(length=4, vocab=3, width=16, depth=2, heads=2))), vocab=3)


class _SeesItself(Line):
    """Wrong on purpose: slot i carries the very token that it reads out."""

    def packed(self, canvas):
        plan = super().packed(canvas)
        element = (plan.slots.element + 1).clamp(max=canvas.layout.size - 1)
        return replace(plan, slots=replace(plan.slots, element=element, source=torch.zeros_like(plan.slots.source)))


def mutant() -> Case:
    """The case with a wrong feed, which the laws must catch."""
    right = case()
    right.model.factorization = _SeesItself(prefix=1)
    return right
