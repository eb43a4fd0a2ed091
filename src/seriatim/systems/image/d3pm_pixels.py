"""Discrete diffusion of pixels: grey levels turn into near ones, and back (D3PM, Austin et al. 2021, arXiv 2107.03006).

New in it: noise that knows that levels have an order. A discretised Gaussian moves a level to a near one, ever
further, until all are alike; a network that sees the noisy picture says what each pixel was, and the kernel weighs in
what stands there. Masks, random levels and jumps to neighbours are other settings (`d3pm` has them for text).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from seriatim.backbones.transformer import Transformer, TransformerConfig
from seriatim.canvas import Canvas
from seriatim.conditions.condition import ClassCondition
from seriatim.data.base import Data
from seriatim.decoding.denoise import Denoise
from seriatim.decoding.loop import Decider, generate
from seriatim.decoding.target import Target
from seriatim.factorization.in_place import InPlace
from seriatim.heads.categorical import CategoricalHead
from seriatim.heads.kernels import in_turns, kernel_of
from seriatim.laws.case import Limit, randomise
from seriatim.laws.noised import NoisedCase
from seriatim.layout import grid
from seriatim.model import Model
from seriatim.objectives.noised import Noised, NoisedEmbed
from seriatim.random import Forced
from seriatim.systems.claim import Arm, Claim
from seriatim.systems.image_system import ImageSystem
from seriatim.systems.meta import Meta
from seriatim.systems.system import Sampling
from seriatim.systems.text.d3pm import Forgetful
from seriatim.training.recipe import Recipe

META = Meta(
    key="d3pm-pixels",
    title="D3PM: discrete diffusion of pixels",
    family="image",
    modality="image",
    paper="Structured Denoising Diffusion Models in Discrete State-Spaces (2021), arXiv 2107.03006",
    likelihood="bound",
    summary="All pixels at once, from random levels to near ones and to those of a picture.",
)


def judged(trained: Any) -> dict[str, float]:
    """The bound on held-out pictures, in bits a pixel."""
    nats, pixels = trained.system.eval().score(trained.data.test)
    return {"bits_per_code": nats / pixels / math.log(2)}


CLAIM = Claim(
    text="Of grey levels, noise that knows their order costs fewer bits than noise that does not: the bound of "
    "Gaussian diffusion is lower than that of uniform diffusion of the same shape, data and steps (masks, mixed and "
    "nearest-neighbour noise beside them).",
    paper="CIFAR-10, bits per dimension: Gaussian at most 3.97, absorbing 4.40, uniform 5.08",
    metric="bits_per_code",
    arms={
        noise: Arm("d3pm-pixels", {"noise": noise, "batch": 32}, steps=700, measure=judged)
        for noise in ("gaussian", "uniform", "absorbing", "mixed", "nearest")
    },
    ours="gaussian",
    baseline="uniform",
    spread_seeds=(0, 1, 2),
    other_seeds=(0,),
    data="digits",
)


@dataclass(frozen=True)
class Config:
    """Sizes; the defaults suit 8x8 digits at 17 grey levels. `side`: elements in a row. `noise`: gaussian, uniform,
    absorbing, mixed or nearest, in so many `turns`; `share`: of random levels in mixed noise; `near`: neighbours of a
    level in nearest noise; `told`: the network is told how noisy a picture is."""

    side: int = 8
    vocab: int = 17
    classes: int = 10
    width: int = 96
    depth: int = 4
    heads: int = 4
    dropout: float = 0.1
    noise: str = "gaussian"
    turns: int = 32
    share: float = 0.1
    near: int = 2
    told: bool = True

    def __post_init__(self) -> None:
        kernel_of(self.noise, self.vocab, self.turns, share=self.share, near=self.near)  # refuses what is none


def build(config: Config | None = None) -> Noised:
    """The model, with fresh weights."""
    c = config or Config()
    backbone = Transformer(TransformerConfig(c.width, c.depth, c.heads, dropout=c.dropout, vector=c.width))
    embed = NoisedEmbed(c.vocab, c.width, positions=(c.side, c.side), told=c.told, std=0.4)
    kernel = kernel_of(c.noise, c.vocab, c.turns, share=c.share, near=c.near)
    condition = {"class": ClassCondition(c.classes, c.width, std=0.4)}
    head = CategoricalHead(c.width, c.vocab)
    return Noised(grid(c.side, c.side), InPlace(), embed, backbone, head, condition, kernel=kernel)


class D3PMPixels(ImageSystem):
    """All pixels at once, from noise."""

    meta, Config = META, Config
    tokenizers = ("pixels", "image-vq")
    tokenizer_settings = MappingProxyType({"levels": 17})
    sizes = MappingProxyType({"tiny": {}, "small": {"width": 192, "depth": 6, "heads": 6}})
    recipes = MappingProxyType({
        "tiny": Recipe(1500, batch=64, learning_rate=2e-3, drop=0.1, ema=0.995),
        "small": Recipe(6000, batch=64, learning_rate=1e-3, drop=0.1, bf16=True, ema=0.998),
    })  # fmt: skip

    model: Noised

    @staticmethod
    def build(config: Any, tokenizer: Any) -> Model:
        return build(config)

    @classmethod
    def known(cls, tokenizer: Any, data: Data) -> dict[str, Any]:
        rows, columns = tokenizer.grid
        if tokenizer.vocab is None or getattr(tokenizer, "depth", 1) != 1 or rows != columns:
            raise ValueError(
                f"{META.key} needs a tokenizer with one id a place on a square grid: pixels of grey, or image-vq"
            )
        return {**super().known(tokenizer, data), "side": rows}

    def decider(self, sampling: Sampling) -> Decider:
        return Denoise(in_turns(self.model.kernel, sampling.steps))

    def so_far(self, canvas: Canvas) -> Float[Tensor, "n c h w"]:
        """Noise counts as what is there; masks do not."""
        known, value = canvas.known, canvas.value["token"]
        if "token" in canvas.noise:
            noise = canvas.noise["token"]
            there = canvas.open & (noise < self.config.vocab)
            known, value = known | there, torch.where(there, noise, value)
        return self.unfinished(value, known)


# ---- what the laws run on --------------------------------------------------------------------------------------------

WHY = {1: "denoised in place", 2: "all pixels at once, by many ways: the law is that of a chain over all canvases"}


def case() -> NoisedCase:
    """A tiny instance for the laws: two of four pixels are given."""
    c = Config(side=2, vocab=2, classes=3, width=16, depth=2, heads=2, dropout=0.0, turns=2, near=1)
    model = randomise(build(c))
    assert isinstance(model, Noised)
    decider, label = (lambda: Denoise(model.kernel)), {"class": torch.tensor([1])}
    spread = {"class": torch.tensor([0, 1, 2])}
    return NoisedCase(model, 2, 2, label, spread, decider, (one_step,), exempt=WHY)


def one_step() -> Limit:
    """In one step pixels are independent given the class and what is given."""
    one = case()
    model, label, x = one.model, one.rows(4), one.sample(4)
    assert isinstance(model, Noised)
    model.kernel = kernel_of("uniform", 2, 1)
    forced, canvas = Forced(x), one.blank(x)
    generate(Target(model, label, cached=False), canvas, Denoise(model.kernel), random=forced)
    with torch.no_grad():
        losses = model.noised_losses(one.canvas(x), torch.zeros_like(x), torch.ones(4).long(), label)
    return Limit("one step = independent pixels", forced.log_prob, -losses.sum(1))


def mutant() -> NoisedCase:
    """The case with a wrong reverse, which the laws must catch."""
    wrong = case()
    assert isinstance(wrong.model, Noised)
    kernel = wrong.model.kernel
    wrong.decider = lambda: Forgetful(kernel)
    return wrong
