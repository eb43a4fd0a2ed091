"""Systems of pictures whose elements are vectors: latents of a KL autoencoder, or patches of pixels.

Training measures mean and deviation of the numbers that the tokenizer gives, so that the model meets vectors of about
unit variance, whatever the tokenizer. A config holds `side`, `dim`, `mean` and `deviation`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from seriatim.backbones.rope import RoPE
from seriatim.backbones.transformer import Transformer, TransformerConfig
from seriatim.canvas import GUESSED, Canvas
from seriatim.conditions.clock import NoiseClock
from seriatim.conditions.condition import ClassCondition
from seriatim.data.base import Data
from seriatim.decoding.kept import KeptInNoise
from seriatim.decoding.loop import Decider, Proposer
from seriatim.decoding.solver import Noise
from seriatim.embed import SlotEmbed, TokenEmbed
from seriatim.factorization.groups import Groups
from seriatim.factorization.static import AnyOrder
from seriatim.heads.categorical import CategoricalHead
from seriatim.heads.in_place import InPlaceHead
from seriatim.laws.case import Case, Limit
from seriatim.layout import Layout, grid
from seriatim.model import Model
from seriatim.plan import MASK
from seriatim.systems.image_system import ImageSystem
from seriatim.systems.system import Sampling, evenly

MEASURED = 512  # pictures whose numbers say mean and deviation


class VectorSystem(ImageSystem):
    """Pictures as a square grid of vectors, kind "token"."""

    tokenizers = ("patches", "image-kl")

    @classmethod
    def tokenizer_settings_for(cls, shape: Sequence[int]) -> Mapping[str, Any]:
        """The smallest patches, from 2x2 pixels on, that leave a grid of at most 8x8."""
        side = int(shape[-1])
        return {"patch": next((n for n in range(2, side + 1) if side % n == 0 and side // n <= 8), 1)}

    @classmethod
    def known(cls, tokenizer: Any, data: Data) -> dict[str, Any]:
        rows, columns = tokenizer.grid
        if tokenizer.vocab is not None or rows != columns:
            raise ValueError(
                f"{cls.meta.key} needs a tokenizer of vectors on a square grid: patches, or a run of image-kl"
            )
        some = data.train.take(evenly(len(data.train), MEASURED))["image"]
        with torch.no_grad():
            codes = tokenizer.encode(some).double()
        unit = {"mean": round(float(codes.mean()), 4), "deviation": round(float(codes.std()), 4)}
        return {"side": rows, "dim": tokenizer.dim, "classes": max(len(data.classes), 1), **unit}

    def vectors(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """Vectors of about unit variance."""
        with torch.no_grad():
            return (self.tokenizer.encode(images) - self.config.mean) / self.config.deviation

    def elements(self, images: Float[Tensor, "b c h w"], layout: Layout) -> Float[Tensor, "b n d"]:
        return self.vectors(images)

    def picture(self, codes: Tensor) -> Float[Tensor, "n c h w"]:
        return self.tokenizer.decode(codes * self.config.deviation + self.config.mean)


class DenoisedSystem(VectorSystem):
    """Vectors that the backbone itself denoises in place: noise stands on the canvas, and a film shows it."""

    def proposer(self, sampling: Sampling) -> Proposer:
        return Noise()

    def keeping(self, decider: Decider, value: Mapping[str, Tensor], known: Bool[Tensor, "E"]) -> Decider:
        return KeptInNoise(decider, value, known, self.model.heads["token"].path)

    def so_far(self, canvas: Canvas) -> Float[Tensor, "n c h w"]:
        """What is known, and what is being denoised as it stands; grey elsewhere."""
        level = torch.ones(canvas.status.shape) if canvas.level is None else canvas.level
        begun = (canvas.status == GUESSED) & (level < 1)
        codes = torch.where(begun[..., None], canvas.noise["token"], canvas.value["token"])
        return self.unfinished(codes, canvas.known | begun)


M = TypeVar("M", bound=Model)


def in_place(
    kind: Callable[..., M], c: Any, order: Groups, embed: SlotEmbed, head: nn.Module, values: float | None,
    **more: Any,
) -> M:  # fmt: skip
    """A diffusion transformer over a square grid: class and level of noise drive the norms of each slot, rotary
    positions by row and column. values: `NoiseClock.values`."""
    half = c.width // c.heads // 2
    backbone = Transformer(
        TransformerConfig(
            c.width, c.depth, c.heads, rope=RoPE(axes=(half, half)), qk_norm="rms", dropout=c.dropout, vector=c.width
        )
    )
    condition = {"class": ClassCondition(c.classes, c.width)}
    clock = NoiseClock(c.width, values)
    return kind(grid(c.side, c.side), order, embed, backbone, head, condition, clock=clock, **more)


def from_ids(c: Any, order: Groups, values: float | None) -> Model:
    """The same over two ids, for laws of enumeration, which need values that can be counted: each is read at a mask, as
    noise of level 1 is."""
    embed = TokenEmbed(2, c.width, positions=(c.side, c.side), mask=True, start=False)
    return in_place(Model, c, Groups(order.group, MASK), embed, CategoricalHead(c.width, 2), values)


def silent(head: InPlaceHead) -> InPlaceHead:
    """A head that says zero before it is trained, as those of diffusion transformers begin."""
    nn.init.zeros_(head.out.weight)
    nn.init.zeros_(head.out.bias)
    return head


def everything_at_once(one: Case) -> Limit:
    """One group as large as the picture: the first step of an order in which all see all."""
    model, x = one.model, one.sample(4)
    parts = model.embed, model.backbone, dict(model.heads), dict(model.conditions), model.clock
    free, canvas = Model(model.layout, AnyOrder(), *parts), one.blank(x)
    plan = free.factorization.step(canvas, None, 0)
    assert plan is not None
    dist, _, _ = free.dist(free.hidden(plan, canvas, None, free.encode(one.rows(4))), plan, canvas)
    return Limit("one group = everything at once", dist.log_prob(x).sum(1), one.total(x))
