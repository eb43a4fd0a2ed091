"""Masked diffusion: text in any order, many tokens at once (MDLM, Sahoo et al. 2024, arXiv 2406.07524).

New in it: absorbing diffusion reduced to a weighted masked-language-model loss. Each token is hidden with probability t
and a bidirectional transformer, which is not told t, reads the hidden ones; weighed by 1/t the loss bounds the negative
log-likelihood, and the bound is the mean over all orders. A token is never hidden as an id: the mask is what stands in
a slot (its source), so the head has no logit for it (the paper's zero masking probability), and what is known is never
read again (its carry-over unmasking): the SUBS parameterisation holds by construction.

Decoding is LLaDA's (Nie et al. 2025, arXiv 2502.09992): each forward decides the likeliest of the tokens it draws,
which then stay, in blocks from left to right; the rule "random" is the ancestral sampler, its counts at their means. In
training a share of the batches has a random length (LLaDA: one in a hundred), for texts shorter than the window.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations, product
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from seriatim.backbones.rope import RoPE
from seriatim.backbones.transformer import Transformer, TransformerConfig
from seriatim.canvas import Canvas
from seriatim.decoding.sample import Rule, Select
from seriatim.decoding.target import Target
from seriatim.embed import TokenEmbed
from seriatim.factorization.static import AnyOrder
from seriatim.heads.categorical import CategoricalHead
from seriatim.laws.case import Case, Limit, Unmasked, randomise
from seriatim.layout import line
from seriatim.model import Model
from seriatim.objectives.masked import Masked, by_count, masking_of
from seriatim.random import Generator
from seriatim.systems.claim import Arm, Claim
from seriatim.systems.infill import Parts
from seriatim.systems.masked_text import MaskedText
from seriatim.systems.meta import Meta
from seriatim.systems.system import Sampling, evenly
from seriatim.training.recipe import Recipe

META = Meta(
    key="mdlm",
    title="MDLM: masked diffusion of text",
    family="text",
    modality="text",
    paper="Simple and Effective Masked Diffusion Language Models (2024), arXiv 2406.07524",
    likelihood="bound",
    summary="Hidden tokens from all known ones, in any order and many at once; a bidirectional transformer.",
)

CLAIM = Claim(
    text="The bound of masked diffusion comes close to the exact likelihood of next-token prediction of the same "
    "shape, data, steps and batch: at least two thirds of it, in bits per byte (a bound against an exact value).",
    paper="LM1B perplexity: at most 27.04 (a bound) against 22.32 after 33 B tokens, 23.00 against 20.86 after 327 B",
    metric="bits_per_byte",
    margin=2 / 3,
    arms={"mdlm": Arm("mdlm", steps=600), "next-token": Arm("next-token", steps=600)},
    ours="mdlm",
    baseline="next-token",
    data="stdlib",
)


@dataclass(frozen=True)
class Config:
    """Sizes; `length` is the longest text in tokens, `hidden` the width of the feed-forward layers (None: 8/3 of the
    width, in steps of 8), `tied` makes input and output matrices one. `short`: share of the training batches that are
    cut to a random length. How texts are decoded: `block`, so many tokens together, block after block (None: all at
    once), and `rule`, which of a block first (`Select`; a model that was not trained for long is surest of blanks, and
    writes little else by confidence). `masking`: tokens are hidden by "time", as in the paper, or by "count", which has
    the same expectation and varies less, much less where few are to be written (answers). `noise`: the schedule of
    times, `weight` of what is hidden (`masking_of`)."""

    length: int = 512
    vocab: int = 272
    width: int = 256
    depth: int = 6
    heads: int = 4
    hidden: int | None = None
    theta: float = 10_000.0
    tied: bool = False
    short: float = 0.1
    block: int | None = 32
    rule: Rule = "confidence"
    masking: str = "time"
    noise: str = "linear"
    weight: str = "bound"

    def __post_init__(self) -> None:
        Select(self.rule)  # refuses what is no rule
        masking_of(self.noise, self.weight, self.masking)  # refuses what means nothing
        if not 0 <= self.short <= 1:
            raise ValueError(f"short is a share of the batches from 0 to 1, got {self.short}")
        if self.block is not None and self.block < 1:
            raise ValueError(f"a block holds at least 1 token, got {self.block}")


def build(config: Config | None = None) -> Masked:
    """The model, with fresh weights."""
    c = config or Config()
    backbone = Transformer(TransformerConfig(c.width, c.depth, c.heads, hidden=c.hidden, rope=RoPE(c.theta)))
    embed = TokenEmbed(c.vocab, c.width, mask=True, start=False)
    head = CategoricalHead(c.width, c.vocab, tied=embed.table if c.tied else None)
    masking = masking_of(c.noise, c.weight, c.masking)
    return Masked(line(c.length), AnyOrder(), embed, backbone, head, masking=masking, judging=by_count)


class MDLM(MaskedText):
    """Any token from all that are known."""

    meta, Config = META, Config
    sizes = MappingProxyType({
        "tiny": {"rule": "random"},
        "small": {"length": 1024, "depth": 8, "hidden": 640, "tied": True},
    })  # fmt: skip
    recipes = MappingProxyType({
        "tiny": Recipe(800, batch=4, learning_rate=2e-3, weight_decay=0.1, bf16=True),
        "small": Recipe(6000, batch=8, learning_rate=2e-3, weight_decay=0.1, bf16=True, compile=True),
    })  # fmt: skip
    sampling = Sampling(temperature=0.7, top_p=0.95, steps=128)
    begins_as = "next-token"

    model: Masked

    @staticmethod
    def build(config: Any, tokenizer: Any) -> Model:
        return build(config)

    # ---- training ---------------------------------------------------------------------------------------------------

    def forward(self, batch: Mapping[str, Tensor], random: Generator, step: int, steps: int) -> tuple[Tensor, Tensor]:
        if "counts" not in batch and float(torch.rand((), generator=random.generator)) < self.config.short:
            most = batch["token"].shape[1]
            length = int(torch.randint(1, most + 1, (), generator=random.generator))
            start = int(torch.randint(most - length + 1, (), generator=random.generator))
            batch = {"token": batch["token"][:, start : start + length]}
        return super().forward(batch, random, step, steps)

    @torch.no_grad()
    def score(self, examples: Any, most: int | None = None) -> tuple[float, int]:
        """The bound in nats, summed over windows, and their tokens: one draw a window, the counts of hidden tokens
        spread evenly over all windows."""
        index = evenly(len(examples), most or self.score_size)
        generator = torch.Generator().manual_seed(0)
        unit = (torch.randperm(len(index), generator=generator) + torch.rand(len(index), generator=generator)) / len(
            index
        )
        nats, tokens = 0.0, 0
        for part, units in zip(index.split(self.validation_batch), unit.split(self.validation_batch), strict=True):
            canvas, _ = self.canvas({k: v.to(self.model.device) for k, v in examples.take(part).items()})
            hidden, weight = by_count(canvas.open, units, torch.rand(canvas.open.shape, generator=generator))
            nats += float((self.model.hidden_losses(canvas, hidden).double().sum(1).cpu() * weight).sum())
            tokens += int(canvas.open.sum())
        return nats, tokens

    # ---- generation -------------------------------------------------------------------------------------------------

    def begun(self, ids: Sequence[int], length: int | None) -> Canvas:
        """As for all text; what is asked for stands in blocks of `block`, counted from the end of the prompt."""
        plain = super().begun(ids, length)
        return self.blocked(plain, self.config.block or plain.layout.size)

    def gapped(self, parts: Parts) -> Canvas:
        """As of all text; what is asked for stands in blocks of `block`, counted without what is given."""
        plain = super().gapped(parts)
        asked = plain.open
        rank = (asked.long().cumsum(1) - 1).clamp(min=0) // (self.config.block or plain.layout.size)
        return Canvas(plain.layout, plain.value, ~asked, rank)


# ---- what the laws run -----------------------------------------------------------------------------------------------

WHY = {1: "decided in any order", 2: "the order is the decoder's choice: the bound is the mean over all orders"}


def case() -> Case:
    """A tiny instance for the laws, decoded one token at a time in random order."""
    model = randomise(build(Config(length=3, vocab=2, width=16, depth=2, heads=2)))
    return Case(model, vocab=2, decider=lambda: Select("random", steps=3), limits=(mean_over_orders,), exempt=WHY)


def mean_over_orders() -> Limit:
    """The bound, over every draw of its counts and sets, is the mean over all orders of the surprise of a sample
    decoded one token after another."""
    model, n = case().model, 3
    assert isinstance(model, Masked)
    x = torch.randint(2, (4, n), generator=torch.Generator().manual_seed(0))
    canvas, target = model.canvas({"token": x}), Target(model, cached=False)
    bound, surprise = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    orders = list(permutations(range(n)))
    with torch.no_grad():
        for order, count in product(orders, range(n)):
            unit, noise = torch.full((4,), (count + 0.5) / n), torch.tensor(order).expand(4, -1) / n
            hidden, weight = by_count(canvas.open, unit, noise)
            bound += model.hidden_losses(canvas, hidden).sum(1) * weight / n
            known = torch.isin(torch.arange(n), torch.tensor(order[:count])).expand(4, -1)
            present = model.canvas({"token": x}, known)
            plan = target.plan(present)
            assert plan is not None
            surprise -= target.forward(plan, present).dist.log_prob(x)[:, order[count]]
    return Limit("the bound = the mean over orders", bound / len(orders), surprise / len(orders))


def mutant() -> Case:
    """The case with a wrong feed, which the laws must catch."""
    wrong = case()
    wrong.model.embed.__class__ = Unmasked
    return wrong
