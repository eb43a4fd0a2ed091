"""xAR: next-X prediction with noisy context (Ren et al. 2025, arXiv 2502.20388).

New in it: what is predicted next is any part of a picture (a token, a cell of neighbours, a subsample of distant ones,
the whole), by flow matching of all its vectors at once in the backbone itself. And noisy context learning: in training
every cell has a level of noise of its own, and later cells see it as noisy as it is, in one stream, so that the errors
of a sampled context are nothing new; in sampling, finished cells are context at level 0.

Departures from the released code: one stack (there two, joined by a norm and a linear map); queries and keys are
normalised, gates of adaptive norms start at 0; latents are the autoencoder's means. Its own form is `form="released"`.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch

from seriatim.decoding.loop import Decider
from seriatim.decoding.solver import StochasticStep
from seriatim.embed import VectorEmbed
from seriatim.factorization.cells import cells, subsample
from seriatim.factorization.groups import Groups
from seriatim.heads.in_place import InPlaceHead, Straight
from seriatim.interop.xar import model_of
from seriatim.laws.case import Case, Unmasked, randomise
from seriatim.model import Model
from seriatim.objectives.denoised import Denoising, LogitNormal
from seriatim.systems.claim import Arm, Claim
from seriatim.systems.flow_trials import context_trial, quality
from seriatim.systems.meta import Meta
from seriatim.systems.system import Sampling
from seriatim.systems.vector_system import DenoisedSystem, everything_at_once, from_ids, in_place, silent
from seriatim.training.recipe import Recipe

META = Meta(
    key="xar",
    title="xAR: next-X prediction",
    family="image",
    modality="image",
    paper="Beyond Next-Token: Next-X Prediction for Autoregressive Visual Generation (2025), arXiv 2502.20388",
    likelihood="none",
    summary="Cells of a picture one after another, each by flow matching, learned behind noisy cells.",
)


@dataclass(frozen=True)
class Config:
    """Sizes; the defaults suit 8x8 digits in patches of 2x2 pixels. `side`: vectors in a row; `dim`: numbers in each;
    mean, deviation: of the numbers that the tokenizer gives.

    x: what is generated at a time, a "cell" of `cell` x `cell` neighbours (1: a token; `side`: the whole picture), or a
    "subsample" of as many, spread evenly. context: of training, "noisy", or "clean" for teacher forcing in two streams.
    context_level: the level of noise that is told of finished cells in sampling, 0 or a little more. form: "single", or
    "released" for the two stacks of `depth` layers each that were published, with cells and noisy context as there.
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
    x: Literal["cell", "subsample"] = "cell"
    cell: int = 2
    context: Literal["noisy", "clean"] = "noisy"
    context_level: float = 0.0
    form: Literal["single", "released"] = "single"

    def __post_init__(self) -> None:
        if self.form not in ("single", "released"):
            raise ValueError(f"form is single or released, got {self.form!r}")
        if self.form == "released" and (self.x, self.context, self.context_level) != ("cell", "noisy", 0.0):
            raise ValueError("the released form draws cells behind noisy ones: leave x, context and context_level out")
        if self.x not in ("cell", "subsample") or self.context not in ("noisy", "clean"):
            raise ValueError(f"x is cell or subsample, context noisy or clean; got {self.x!r} and {self.context!r}")
        if not self.deviation > 0:
            raise ValueError(f"the deviation is positive, got {self.deviation}")


def order(c: Config) -> Groups:
    """The cells of the grid in raster order."""
    return Groups({"cell": cells, "subsample": subsample}[c.x](c.side, c.side, c.cell, c.cell))


def build(config: Config | None = None) -> Denoising:
    """The model, with fresh weights: it says that nothing moves."""
    c = config or Config()
    if c.form == "released":
        return model_of(c.side, c.dim, c.classes, c.width, c.depth, c.heads, c.cell)
    embed = VectorEmbed(c.dim, c.width, positions=(c.side, c.side), start=False)
    head = silent(InPlaceHead(c.width, c.dim, Straight(), "velocity"))
    training = {"times": LogitNormal(), "noisy_context": c.context == "noisy"}
    return in_place(Denoising, c, order(c), embed, head, c.context_level, **training)


class XAR(DenoisedSystem):
    """A class, then cell after cell."""

    meta, Config = META, Config
    sizes = MappingProxyType({
        "tiny": {},
        "small": {"width": 192, "depth": 6, "heads": 6, "cell": 4},
        "b": {"width": 768, "depth": 16, "heads": 12, "cell": 8},
    })  # fmt: skip
    recipes = MappingProxyType({
        "tiny": Recipe(1500, batch=64, learning_rate=2e-3, drop=0.1, ema=0.995),
        "small": Recipe(5000, batch=64, learning_rate=1e-3, drop=0.1, bf16=True, ema=0.998),
        "b": Recipe(500_000, batch=2048, learning_rate=4e-4, floor=1.0, drop=0.1, bf16=True, ema=0.9999, compile=True),
    })  # fmt: skip
    sampling = Sampling(guidance=1.0, steps=25)
    schedule = "linear"

    @staticmethod
    def build(config: Any, tokenizer: Any) -> Model:
        return build(config)

    def decider(self, sampling: Sampling) -> Decider:
        return StochasticStep(sampling.steps or 25)


CLAIM = Claim(
    text="A model that learned behind noisy cells is hurt less by errors of its context than one that learned behind "
    "the true cells, in as many steps: loss of cells behind a context with noise of half the deviation of its vectors.",
    paper="ImageNet 256x256: FID 1.72 (B, 172M), 1.24 (H, 1.1B); cells of 8x8 latents better than tokens and the whole",
    metric="loss_0.5",
    arms={
        "noisy": Arm("xar", steps=1500, measure=context_trial),
        "clean": Arm("xar", {"context": "clean"}, steps=1500, measure=context_trial),
        "token": Arm("xar", {"cell": 1}, steps=1500, measure=context_trial),
        "subsample": Arm("xar", {"x": "subsample"}, steps=1500, measure=context_trial),
        "whole": Arm("xar", {"cell": 4}, steps=1500, measure=quality),
    },
    ours="noisy",
    baseline="clean",
    other_seeds=(0,),
    data="digits",
)


# ---- what the laws run -----------------------------------------------------------------------------------------------

TINY = Config(side=2, classes=3, width=16, depth=2, heads=2)


def case(height: int = 1) -> Case:
    """A tiny instance for the laws, over ids, in cells of two (flow and noisy context are tested apart)."""
    model = randomise(from_ids(TINY, Groups(cells(2, 2, height, 2)), 0.0), std=0.3)
    spread = {"class": torch.tensor([0, 1, 2])}
    limits = (lambda: everything_at_once(case(2)),)
    return Case(model, 2, condition={"class": torch.tensor([1])}, spread=spread, limits=limits, over_ids=True)


def mutant() -> Case:
    """The case with a wrong feed, which the laws must catch."""
    wrong = case()
    wrong.model.embed.__class__ = Unmasked
    return wrong
