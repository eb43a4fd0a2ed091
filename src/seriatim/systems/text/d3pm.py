"""Discrete diffusion of text by any noise (D3PM, Austin et al. 2021, arXiv 2107.03006).

New in it: ids are turned into noise by a Markov chain whose matrices are a choice: masks, random ids, near ids in an
order or in an embedding, or several of these. A network that sees what has become of all of them says what they were;
it learns by how far its posterior of the step before is from the true one, which bounds the negative log-likelihood.

The network says what it believes of an element without regard to what stands there, and the kernel weighs that in by
Bayes' rule (equation 4 there). So masked diffusion needs no rule of its own: what was not masked stays as it is, and
the bound is that of `mdlm` in so many steps. In a slot stands its noise, and how noisy the row is is told beside it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from seriatim.backbones.rope import RoPE
from seriatim.backbones.transformer import Transformer, TransformerConfig
from seriatim.decoding.denoise import Denoise
from seriatim.decoding.loop import Decider, generate
from seriatim.decoding.target import Target
from seriatim.factorization.in_place import InPlace
from seriatim.heads.categorical import CategoricalHead
from seriatim.heads.kernels import Kernel, in_turns, kernel_of, spelled
from seriatim.laws.case import Limit, randomise
from seriatim.laws.noised import NoisedCase, everything
from seriatim.layout import line
from seriatim.model import Model
from seriatim.objectives.noised import Noised, NoisedEmbed
from seriatim.random import Forced
from seriatim.systems.claim import Arm, Claim
from seriatim.systems.masked_text import MaskedText
from seriatim.systems.meta import Meta
from seriatim.systems.system import Sampling
from seriatim.systems.text import mdlm
from seriatim.tokenizers.pieces import pieces
from seriatim.training.recipe import Recipe

META = Meta(
    key="d3pm",
    title="D3PM: discrete diffusion of text by any noise",
    family="text",
    modality="text",
    paper="Structured Denoising Diffusion Models in Discrete State-Spaces (2021), arXiv 2107.03006",
    likelihood="bound",
    summary="All tokens at once, from masks, random or near ones step by step; the noise is a choice.",
)


def _arm(noise: str) -> Arm:
    return Arm("d3pm", {"noise": noise, "length": 128, "width": 128, "depth": 4, "batch": 16}, steps=700)


CLAIM = Claim(
    text="Of characters of text, masks cost fewer bits than random ids: the bound of absorbing diffusion is lower than "
    "that of uniform diffusion of the same shape, data and steps (mixed and nearest-neighbour noise beside them).",
    paper="text8, bits per character: absorbing at most 1.45, uniform 1.61, nearest neighbours 1.59",
    metric="bits_per_byte",
    arms={noise: _arm(noise) for noise in ("absorbing", "uniform", "mixed", "nearest", "gaussian")},
    ours="absorbing",
    baseline="uniform",
    spread_seeds=(0, 1, 2),
    other_seeds=(0,),
    data="stdlib",
)


@dataclass(frozen=True)
class Config:
    """Sizes; `length` is the longest text in tokens, `hidden` the width of the feed-forward layers (None: 8/3 of the
    width, in steps of 8). `noise`: absorbing, uniform, mixed, gaussian or nearest, in so many `turns`; `share`: of
    random ids in mixed noise; `near`: neighbours of an id in nearest noise, by the kinds of its letters. `told`: the
    network is told how noisy a row is."""

    length: int = 256
    vocab: int = 272
    width: int = 256
    depth: int = 6
    heads: int = 4
    hidden: int | None = None
    theta: float = 10_000.0
    noise: str = "absorbing"
    turns: int = 64
    share: float = 0.1
    near: int = 3
    told: bool = True

    def __post_init__(self) -> None:
        kernel_of(self.noise, 4, self.turns, share=self.share, near=min(self.near, 3))  # refuses what is none


def build(config: Config | None = None, embedding: Float[Tensor, "v d"] | None = None) -> Noised:
    """The model, with fresh weights; embedding: which ids are alike (None: near numbers)."""
    c = config or Config()
    backbone = Transformer(TransformerConfig(c.width, c.depth, c.heads, hidden=c.hidden, rope=RoPE(c.theta)))
    embed = NoisedEmbed(c.vocab, c.width, told=c.told)
    kernel = kernel_of(c.noise, c.vocab, c.turns, embedding, c.share, c.near)
    return Noised(line(c.length), InPlace(), embed, backbone, CategoricalHead(c.width, c.vocab), kernel=kernel)


def letters(tokenizer: Any) -> Float[Tensor, "v d"]:
    """An embedding of the ids of a tokenizer by the kinds of their letters."""
    return spelled([p.decode("utf-8", "replace") if isinstance(p, bytes) else None for p in pieces(tokenizer)])


class D3PM(MaskedText):
    """All tokens at once, from noise."""

    meta, Config = META, Config
    sizes = MappingProxyType({"tiny": {}, "small": {"length": 512, "depth": 8, "hidden": 640}})
    recipes = MappingProxyType({
        "tiny": Recipe(800, batch=8, learning_rate=2e-3, weight_decay=0.1, bf16=True),
        "small": Recipe(6000, batch=16, learning_rate=1e-3, weight_decay=0.1, bf16=True, compile=True),
    })  # fmt: skip
    sampling = Sampling(temperature=0.8)

    model: Noised

    @staticmethod
    def build(config: Any, tokenizer: Any) -> Model:
        return build(config, letters(tokenizer) if config.noise == "nearest" else None)

    def decider(self, sampling: Sampling) -> Decider:
        return Denoise(in_turns(self.model.kernel, sampling.steps), self.stop)


# ---- what the laws run on --------------------------------------------------------------------------------------------

WHY = {1: "denoised in place", 2: "all tokens at once, by many ways: the law is that of a chain over all canvases"}
SMALL: Mapping[str, Any] = MappingProxyType({"length": 3, "vocab": 2, "width": 16, "depth": 2, "heads": 2})


def case() -> NoisedCase:
    """A tiny instance for the laws: masks and random ids, in two steps."""
    return _case(Denoise)


def _case(decider: Callable[[Kernel], Decider]) -> NoisedCase:
    model = randomise(build(Config(**SMALL, noise="mixed", turns=2, share=0.5)))
    assert isinstance(model, Noised)
    limits = (masks_are_those_of_mdlm, one_step)
    return NoisedCase(model, vocab=2, decider=lambda: decider(model.kernel), limits=limits, exempt=WHY)


def masks_are_those_of_mdlm() -> Limit:
    """With masks only and no time told, the bound over every draw is that of `mdlm` in as many steps: what is hidden at
    step k weighs 1/k."""
    turns, n = 3, SMALL["length"]
    model = build(Config(**SMALL, noise="absorbing", turns=turns, told=False))
    randomise(model)
    masked = mdlm.build(mdlm.Config(**SMALL)).double().eval()
    masked.load_state_dict(model.state_dict())
    x = everything(2, n)
    canvas = model.canvas({"token": x})
    got, want = torch.zeros(len(x), dtype=torch.float64), torch.zeros(len(x), dtype=torch.float64)
    with torch.no_grad():
        for k, hide in itertools.product(range(1, turns + 1), itertools.product((False, True), repeat=n)):
            hidden = torch.tensor(hide).expand(len(x), -1)
            chance = (k / turns) ** sum(hide) * (1 - k / turns) ** (n - sum(hide))
            noise, steps = torch.where(hidden, 2, x), torch.full((len(x),), k)
            got += chance * model.noised_losses(canvas, noise, steps).sum(1)
            want += chance * masked.hidden_losses(canvas, hidden).sum(1) / k
    return Limit("masks = mdlm in so many steps", got, want)


def one_step() -> Limit:
    """In one step tokens are independent: each as if nothing were known."""
    model = build(Config(**SMALL, noise="uniform", turns=1))
    randomise(model)
    x = everything(2, SMALL["length"])
    forced = Forced(x)
    canvas = model.canvas({"token": torch.zeros_like(x)})
    generate(Target(model, cached=False), canvas, Denoise(model.kernel), random=forced)
    with torch.no_grad():
        losses = model.noised_losses(model.canvas({"token": x}), torch.zeros_like(x), torch.ones(len(x)).long())
    return Limit("one step = independent tokens", forced.log_prob, -losses.sum(1))


class Forgetful(Denoise):
    """Wrong on purpose: noise is drawn anew at every step, whatever stands there."""

    def law(self, p: Tensor, x: Int[Tensor, "b m"], k: Int[Tensor, "b"]) -> Tensor:
        return self.kernel.mixed(p, k - 1)


def mutant() -> NoisedCase:
    """The case with a wrong reverse, which the laws must catch."""
    return _case(Forgetful)
