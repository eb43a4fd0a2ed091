"""ARFlow: autoregressive flow with hybrid linear attention (Hui et al. 2025, arXiv 2501.16085).

New in it: autoregression runs along the time of a flow. In training a sequence holds several pictures of one class,
each noisier than the next, and each sees those before it; in sampling every step of the solver sees the whole way that
the picture has come, as if its earlier states were those other pictures. Inside of a picture attention is full, between
pictures there is a gated state that does not grow (`backbones.chunked`): trained on sequences of five, it carries two
hundred and fifty steps.

Departures from the released code: SwiGLU in place of GELU, norms by root mean square, no biases in layers, learned
positions, time told in thousandths; gradients are clipped by their norm. A batch counts pictures, not sequences. Its
own form is `form="released"`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from seriatim.backbones.chunked import Chunked, ChunkedConfig
from seriatim.canvas import Canvas
from seriatim.conditions.clock import NoiseClock
from seriatim.conditions.condition import ClassCondition
from seriatim.data.together import Copies, OfOneClass
from seriatim.decoding.loop import Decider
from seriatim.decoding.solver import StochasticStep
from seriatim.embed import TokenEmbed, VectorEmbed
from seriatim.factorization.cells import cells
from seriatim.factorization.groups import Groups
from seriatim.factorization.trajectory import Moments, Trajectory
from seriatim.heads.categorical import CategoricalHead
from seriatim.heads.in_place import InPlaceHead, Straight
from seriatim.interop.arflow import model_of
from seriatim.laws.case import Case, randomise
from seriatim.layout import Layout, grid
from seriatim.model import Model
from seriatim.objectives.denoised import Falling, Uniform
from seriatim.plan import MASK
from seriatim.scan import Chunks
from seriatim.systems.claim import Arm, Claim
from seriatim.systems.flow_trials import remembering
from seriatim.systems.meta import Meta
from seriatim.systems.system import Sampling
from seriatim.systems.vector_system import DenoisedSystem, everything_at_once, silent
from seriatim.training.recipe import Recipe

META = Meta(
    key="arflow",
    title="ARFlow: autoregressive flow",
    family="image",
    modality="image",
    paper="ARFlow: Autogressive Flow with Hybrid Linear Attention (2025), arXiv 2501.16085",
    likelihood="none",
    summary="A flow whose every step sees the whole way before it, held in a state that does not grow.",
)


@dataclass(frozen=True)
class Config:
    """Sizes; the defaults suit 8x8 digits in patches of 2x2 pixels. `side`: vectors in a row; `dim`: numbers in each;
    mean, deviation: of the numbers that the tokenizer gives.

    pictures: in a sequence of training; with 1 it is a plain flow (SiT), and no step of sampling remembers another one.
    context: which pictures these are, others of the "class", or the "same" one again, as in sampling. form: "single",
    or "released" for the layers that were published, over latents of `channels` numbers.
    """

    side: int = 4
    dim: int = 4
    classes: int = 10
    width: int = 96
    depth: int = 4
    heads: int = 4
    dropout: float = 0.0
    mean: float = 0.0
    deviation: float = 1.0
    pictures: int = 5
    context: Literal["class", "same"] = "class"
    form: Literal["single", "released"] = "single"
    channels: int = 4

    def __post_init__(self) -> None:
        if self.pictures < 1 or self.context not in ("class", "same"):
            raise ValueError(
                "a sequence has at least one picture, others of its class or the same again (context is class or "
                f"same); got {self.pictures} and {self.context!r}"
            )
        if self.form not in ("single", "released"):
            raise ValueError(f"form is single or released, got {self.form!r}")
        if self.form == "released" and (
            self.pictures < 2 or math.isqrt(self.dim // self.channels) ** 2 * self.channels != self.dim
        ):
            raise ValueError(f"the released form sees several pictures, of square patches of {self.channels} numbers")
        if not self.deviation > 0:
            raise ValueError(f"the deviation is positive, got {self.deviation}")


def build(config: Config | None = None) -> Falling:
    """The model, with fresh weights: it says that nothing moves."""
    c = config or Config()
    if c.form == "released":
        patch = math.isqrt(c.dim // c.channels)
        return model_of(c.side, c.channels, patch, c.classes, c.width, c.depth, c.heads)
    order = (Trajectory if c.pictures > 1 else Moments)(c.side**2)
    embed = VectorEmbed(c.dim, c.width, positions=(c.side, c.side), start=False)
    head = silent(InPlaceHead(c.width, c.dim, Straight(), "velocity"))
    return Falling(grid(c.side, c.side), order, embed, backbone(c), head, **said(c), times=Uniform())


def backbone(c: Config) -> Chunked:
    """Layers over pictures, driven by class and time."""
    return Chunked(ChunkedConfig(c.width, c.depth, c.heads, dropout=c.dropout, vector=c.width))


def said(c: Config) -> dict[str, Any]:
    """What drives norms and gates."""
    return {"conditions": {"class": ClassCondition(c.classes, c.width)}, "clock": NoiseClock(c.width)}


@lru_cache(maxsize=16)
def pictures(count: int, side: int) -> Layout:
    """So many pictures one after another, all in the same place."""
    return Layout(grid(side, side).segments * count)


class ARFlow(DenoisedSystem):
    """A class, then one picture from noise, in view of where it has been."""

    meta, Config = META, Config
    sizes = MappingProxyType({
        "tiny": {},
        "small": {"width": 192, "depth": 6, "heads": 6},
        "b": {"width": 768, "depth": 12, "heads": 12},
    })  # fmt: skip
    recipes = MappingProxyType({
        "tiny": Recipe(2000, batch=60, learning_rate=2e-3, drop=0.1, ema=0.995),
        "small": Recipe(8000, batch=60, learning_rate=1e-3, drop=0.1, ema=0.998),
        "b": Recipe(400_000, batch=1280, learning_rate=1e-4, floor=1.0, drop=0.1, betas=(0.9, 0.95), ema=0.9999),
    })  # fmt: skip
    sampling = Sampling(guidance=0.5, steps=50)

    @staticmethod
    def build(config: Any, tokenizer: Any) -> Model:
        return build(config)

    def drawn_from(self, examples: Any) -> Any:
        """Sequences of the pictures of a class."""
        of = {"class": OfOneClass, "same": Copies}[self.config.context]
        return of(examples, self.config.pictures) if self.config.pictures > 1 else examples

    def canvas(self, batch: Mapping[str, Tensor]) -> tuple[Canvas, dict[str, Tensor] | None]:
        """Of pictures (b, c, h, w), or of sequences (b, n, c, h, w) of them."""
        images = batch["image"]
        count = images.shape[1] if images.dim() == 5 else 1
        codes = self.vectors(images.flatten(0, -4)).reshape(len(images), -1, self.config.dim)
        layout = self.model.layout if count == 1 else pictures(count, self.config.side)
        return self.model.canvas({"token": codes}, layout=layout), self.condition(batch.get("label"), len(images))

    def score(self, examples: Any, most: int | None = None) -> tuple[float, int]:
        return super().score(examples if isinstance(examples, OfOneClass) else self.drawn_from(examples), most)

    def decider(self, sampling: Sampling) -> Decider:
        return StochasticStep(sampling.steps or 50)


CLAIM = Claim(
    text="A flow learns better, at equal weights, pictures and steps, in view of noisier pictures of the same class, "
    "and samples in view of its own way: FD-s against a flow that sees one picture (SiT).",
    paper="ImageNet 128x128, 400,000 steps: FID 14.08, with guidance 4.34, against 9.17 of SiT",
    metric="fd_s",
    arms={
        "arflow": Arm("arflow", steps=1500, measure=remembering),
        "sit": Arm("arflow", {"pictures": 1}, steps=1500, measure=remembering),
        "same picture": Arm("arflow", {"context": "same"}, steps=1500, measure=remembering),
        "arflow, 3 minutes": Arm("arflow", minutes=3, measure=remembering),
        "sit, 3 minutes": Arm("arflow", {"pictures": 1}, minutes=3, measure=remembering),
    },
    ours="arflow",
    baseline="sit",
    other_seeds=(0,),
    data="digits",
)


# ---- what the laws run -----------------------------------------------------------------------------------------------

TINY = Config(side=2, classes=3, width=16, depth=2, heads=2)


def case(rows: int = 1) -> Case:
    """A tiny instance for the laws, over ids, in blocks of two in two streams: states are handed from block to block
    (flow and trajectory are tested apart)."""
    embed = TokenEmbed(2, TINY.width, positions=(2, 2), mask=True, start=False)
    order, head = Groups(cells(2, 2, rows, 2), MASK), CategoricalHead(TINY.width, 2)
    model = randomise(Model(grid(2, 2), order, embed, backbone(TINY), head, **said(TINY)), std=0.3)
    spread = {"class": torch.tensor([0, 1, 2])}
    limits = (lambda: everything_at_once(case(2)),) if rows == 1 else ()
    starved = tuple(f"backbone.layers.{i}.forget" for i in range(TINY.depth)) if rows == 2 else ()
    return Case(
        model, 2, condition={"class": torch.tensor([1])}, spread=spread, limits=limits, starved=starved, over_ids=True
    )


class _Straying(Chunked):
    """Wrong on purpose: every chunk goes on from the one before it in the array, whatever it may see."""

    def _sights(self, plan, cache, x, some):
        sights = super()._sights(plan, cache, x, some)
        kind, sight = next(iter(sights.items()))
        c = sight.chunks
        return {kind: sight._replace(chunks=Chunks(c.slots, tuple(range(-1, len(c.parent) - 1)), c.chunk))}


def mutant() -> Case:
    """The case with states that go astray, which the laws must catch."""
    wrong = case()
    wrong.model.backbone.__class__ = _Straying
    return wrong
