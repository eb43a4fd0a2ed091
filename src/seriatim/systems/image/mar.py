"""Masked autoregression over continuous tokens: MAR (Li et al. 2024, arXiv 2406.11838).

New in it: an autoregressive model needs no discrete ids. Pictures are vectors (latents of a KL autoencoder, or patches
of pixels) of about unit variance; a bidirectional transformer reads the hidden ones given those shown, and each is
drawn from a small diffusion model that its hidden state conditions. 70 to 100% of the vectors are hidden in training (a
cut normal law); sampling reveals them in random order, few at first (cosine), with guidance of the predicted noise that
grows with the share that is known.

Departures from the released code: one stack instead of a masked autoencoder (whose encoder skips hidden places to save
time; the parts here compute every slot in every layer, so it would cost the same and see less); the class drives
adaptive norms instead of 64 class tokens in front; latents are the autoencoder's means, not samples; the hidden share
is drawn for each picture, not for each batch; guidance counts what is known before a step, not after it. With `buffer`
class tokens in front, stack, class and guidance are those of the released code, and released weights load.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from seriatim.backbones.masked import MaskedAutoencoder
from seriatim.backbones.transformer import Transformer, TransformerConfig
from seriatim.canvas import Canvas
from seriatim.conditions.condition import ClassCondition
from seriatim.decoding.guidance import Ahead, Guidance
from seriatim.decoding.loop import Decider, generate
from seriatim.decoding.sample import Select, schedule
from seriatim.decoding.target import Branch, Target
from seriatim.embed import SlotEmbed, TokenEmbed, VectorEmbed
from seriatim.factorization.static import AnyOrder
from seriatim.heads.categorical import CategoricalHead
from seriatim.heads.denoiser import Denoiser
from seriatim.heads.diffusion import DiffusionConfig, DiffusionHead
from seriatim.heads.dist import FromStates
from seriatim.laws.case import Case, Limit, Unmasked, randomise
from seriatim.layout import grid
from seriatim.model import Model
from seriatim.objectives.masked import ByRate, Masked, Masking, by_count
from seriatim.plan import Reads
from seriatim.random import Forced, Key, Random
from seriatim.systems.claim import Arm, Claim
from seriatim.systems.meta import Meta
from seriatim.systems.system import Sampling
from seriatim.systems.vector_system import VectorSystem
from seriatim.training.recipe import Recipe

META = Meta(
    key="mar",
    title="MAR: masked autoregression over vectors",
    family="image",
    modality="image",
    paper="Autoregressive Image Generation without Vector Quantization (2024), arXiv 2406.11838",
    likelihood="none",
    summary="Latent vectors in random order, many at once, each drawn by a small diffusion model of its own.",
)

CLAIM = Claim(
    text="A diffusion loss for each vector keeps the variety that a squared error, which can only say the mean of what "
    "is possible, loses: recall of real pictures without guidance; order, stack, data, steps alike, parameters to 2%.",
    paper="ImageNet 256x256 without guidance: FID 3.50 with diffusion loss, 8.79 with cross-entropy over ids (MAR)",
    metric="recall",
    better="higher",
    arms={
        "diffusion": Arm("mar", {"width": 64, "heads": 4}, steps=600, sampling={"guidance": 0.0, "temperature": 1.0}),
        "mse": Arm(
            "mar", {"width": 64, "heads": 4, "head": "mse"}, steps=600, sampling={"guidance": 0.0, "temperature": 1.0}
        ),
    },
    ours="diffusion",
    baseline="mse",
    data="digits",
)


@dataclass(frozen=True)
class Config:
    """Sizes; the defaults suit 8x8 digits in patches of 2x2 pixels. `side`: vectors in a row; `dim`: numbers in each.

    mean, deviation: of the numbers that the tokenizer gives, so that the model meets vectors of about unit variance;
    training measures them on its data. head:
    "diffusion", or "mse" for a network of about the same size that says one value, trained by squared error.
    head_width, head_depth: its residual blocks; head_steps: of diffusion in sampling; head_clip: no number of a vector
    is larger (DiffusionConfig.clip). buffer: class tokens in front of a masked autoencoder, whose two stacks have
    `depth` layers each, as released (there 64); 0: one stack, whose norms the class drives.
    """

    side: int = 4
    dim: int = 4
    classes: int = 10
    width: int = 96
    depth: int = 4
    heads: int = 4
    dropout: float = 0.1
    mean: float = 0.0
    deviation: float = 1.0
    head: Literal["diffusion", "mse"] = "diffusion"
    head_width: int = 128
    head_depth: int = 3
    head_steps: int = 50
    head_clip: float | None = 4.0
    buffer: int = 0

    def __post_init__(self) -> None:
        if self.head not in ("diffusion", "mse"):
            raise ValueError(f"head is diffusion or mse, not {self.head!r}")
        if not self.deviation > 0:
            raise ValueError(f"the deviation is positive, got {self.deviation}")
        if self.buffer < 0:
            raise ValueError(f"0 or more class tokens stand in front, got {self.buffer}")


class RandomOrder(AnyOrder):
    """Any order, of values whose density is not at hand: no likelihood, and no bound."""

    likelihood = "none"  # type: ignore[assignment]


class OneValue(FromStates):
    """All mass on what the network says; guidance mixes values. Temperature and filters change nothing."""

    __slots__ = ()

    def sample(self, random: Random, key: Key) -> Float[Tensor, "b m d"]:
        return self.combine(torch.stack([self.head.said(h) for h in self.states]))


class SquaredHead(nn.Module):
    """Vectors by regression: the diffusion head's network, asked once, with the hidden state for a noisy value."""

    exact = False
    continuous = True

    def __init__(self, width: int, dim: int, hidden: int, blocks: int):
        super().__init__()
        self.net = Denoiser(width, width, dim, hidden, blocks)
        self.width, self.dim, self.value_shape = width, dim, (dim,)

    def said(self, h: Float[Tensor, "b m w"]) -> Float[Tensor, "b m d"]:
        """The value."""
        return self.net(h, self.net.state(h) + self.net.clock(h.new_zeros(h.shape[:-1])))

    def dist(self, h: Float[Tensor, "b m w"], reads: Reads | None, canvas: Canvas) -> OneValue:
        return OneValue(self, h[None])

    def loss(
        self,
        h: Float[Tensor, "b m w"],
        reads: Reads | None,
        value: Float[Tensor, "b m d"],
        random: Random | None = None,
        key: Key | None = None,
    ) -> Float[Tensor, "b m"]:
        """Squared error, mean over numbers."""
        return (self.said(h).float() - value.float()).square().mean(-1)


def build(config: Config | None = None) -> Masked:
    """The model, with fresh weights."""
    c = config or Config()
    if c.head == "mse":
        head: nn.Module = SquaredHead(c.width, c.dim, c.head_width, c.head_depth)
    else:
        diffusion = DiffusionConfig(c.head_width, c.head_depth, steps=c.head_steps, clip=c.head_clip)
        head = DiffusionHead(c.width, c.dim, diffusion)
    places = () if c.buffer else (c.side, c.side)  # an autoencoder has its own
    embed = VectorEmbed(c.dim, c.width, positions=places, mask=True, start=False, std=0.4)
    return _assembled(c, embed, head)


def _assembled(c: Config, embed: SlotEmbed, head: nn.Module, judging: Masking | None = None) -> Masked:
    if c.buffer:
        return _released(c, embed, head, judging)
    backbone = Transformer(TransformerConfig(c.width, c.depth, c.heads, dropout=c.dropout, vector=c.width))
    condition = {"class": ClassCondition(c.classes, c.width, std=0.4)}
    return Masked(
        grid(c.side, c.side), RandomOrder(), embed, backbone, head, condition, masking=ByRate(), judging=judging
    )


def _released(c: Config, embed: SlotEmbed, head: nn.Module, judging: Masking | None = None) -> Masked:
    """As in the released code: class tokens in front of a masked autoencoder of plain layers."""
    plain = TransformerConfig(
        c.width, c.depth, c.heads, hidden=4 * c.width, norm="layer", activation="gelu", bias=True, dropout=c.dropout,
        eps=1e-6,
    )  # fmt: skip
    backbone, order = MaskedAutoencoder(plain, c.buffer, c.side**2), RandomOrder(prefix=c.buffer)
    condition = {"class": ClassCondition(c.classes, c.width, ("prefix",), slots=c.buffer)}
    return Masked(
        grid(c.side, c.side), order, embed, backbone, head, condition, masking=ByRate(), judging=judging
    )  # fmt: skip


class MAR(VectorSystem):
    """Vectors in random order."""

    meta, Config = META, Config
    sizes = MappingProxyType({
        "tiny": {},
        "small": {"width": 192, "depth": 6, "heads": 6, "head_width": 256},
    })  # fmt: skip
    recipes = MappingProxyType({
        "tiny": Recipe(1500, batch=64, learning_rate=2e-3, drop=0.1, ema=0.995),
        "small": Recipe(6000, batch=64, learning_rate=1e-3, drop=0.1, bf16=True, ema=0.998),
    })  # fmt: skip
    sampling = Sampling(temperature=0.7, guidance=2.0, steps=16)
    schedule = "linear"

    @staticmethod
    def build(config: Any, tokenizer: Any) -> Model:
        return build(config)

    def decider(self, sampling: Sampling) -> Decider:
        return Select("random", sampling.steps or self.model.layout.size, "cosine")

    def guidance(self, sampling: Sampling) -> Guidance | Sequence[Branch] | None:
        total = self.model.layout.size
        if not self.config.buffer or not sampling.guidance:
            return super().guidance(sampling)
        left = schedule(total, sampling.steps or total, "cosine")
        return Ahead(sampling.guidance, "linear", total=total, left=left)


# ---- what the laws run -----------------------------------------------------------------------------------------------

WHY = {1: "decided in any order", 2: "the order is drawn: the law is the mean over all orders"}


def case() -> Case:
    """A tiny instance for the laws, over ids: laws of enumeration need values that can be counted. Order, stack,
    condition and training are the system's; embedding and head are those of ids, and so is the bound by which it is
    judged (the diffusion head is tested apart)."""
    c = Config(side=2, classes=3, width=16, depth=2, heads=2, dropout=0.0)
    embed = TokenEmbed(2, c.width, positions=(2, 2), mask=True, start=False)
    model = randomise(_assembled(c, embed, CategoricalHead(c.width, 2), by_count))
    label = {"class": torch.tensor([1])}
    spread = {"class": torch.tensor([0, 1, 2])}
    limits = (one_step,)
    return Case(model, 2, 1, label, spread, lambda: Select("random", 4, "cosine"), limits, exempt=WHY)


def one_step() -> Limit:
    """Revealed in one step."""
    return together(case())


def together(one: Case) -> Limit:
    """Decided in one step, elements are independent given the class: each as if all others were hidden."""
    model, label = one.model, one.rows(6)
    x = one.sample(6)
    assert isinstance(model, Masked)
    forced, canvas = Forced(x), one.canvas(x)
    generate(Target(model, label), one.blank(x), Select("random", 1), random=forced)
    with torch.no_grad():
        losses = model.hidden_losses(canvas, canvas.open, label)
    return Limit("one step = independent elements", forced.log_prob, -losses.sum(1))


def mutant() -> Case:
    """The case with a wrong feed, which the laws must catch."""
    wrong = case()
    wrong.model.embed.__class__ = Unmasked
    return wrong
