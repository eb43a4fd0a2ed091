"""Next-token prediction: the line from which everything else departs.

A decoder-only transformer over bytes (Radford et al. 2019, in the shape of Llama: RMSNorm, rotary positions, SwiGLU).
Slot i carries byte i-1 (a learned start in front) and reads out byte i; slots see all earlier slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from seriatim.backbones.rope import RoPE
from seriatim.backbones.transformer import Transformer, TransformerConfig
from seriatim.embed import TokenEmbed
from seriatim.factorization.line import Line
from seriatim.heads.categorical import CategoricalHead
from seriatim.laws.case import Case, randomise
from seriatim.layout import line
from seriatim.model import Model
from seriatim.systems.meta import Meta

META = Meta(
    key="next-token",
    title="Next-token language model",
    family="text",
    modality="text",
    paper="Language Models are Unsupervised Multitask Learners (2019)",
    likelihood="exact",
    summary="Bytes one after another, each from all before it; a Llama-shaped decoder.",
)


@dataclass(frozen=True)
class Config:
    """Sizes of the model; `length` is the longest text in bytes."""

    length: int = 512
    vocab: int = 256
    width: int = 256
    depth: int = 6
    heads: int = 4
    theta: float = 10_000.0


def build(config: Config | None = None) -> Model:
    """The model, with fresh weights."""
    c = config or Config()
    backbone = Transformer(TransformerConfig(c.width, c.depth, c.heads, rope=RoPE(c.theta)))
    embed = TokenEmbed(c.vocab, c.width)
    return Model(line(c.length), Line(prefix=1), embed, backbone, CategoricalHead(c.width, c.vocab))


def case() -> Case:
    """A tiny instance for the laws."""
    return Case(randomise(build(Config(length=4, vocab=3, width=16, depth=2, heads=2))), vocab=3)


class _SeesItself(Line):
    """Wrong on purpose: slot i carries the very byte that it reads out."""

    def packed(self, canvas):
        from dataclasses import replace

        plan = super().packed(canvas)
        element = (plan.slots.element + 1).clamp(max=canvas.layout.size - 1)
        return replace(plan, slots=replace(plan.slots, element=element, source=torch.zeros_like(plan.slots.source)))


def mutant() -> Case:
    """The case with a wrong feed, which the laws must catch."""
    right = case()
    right.model.factorization = _SeesItself(prefix=1)
    return right
