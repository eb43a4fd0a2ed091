"""ACDiT: a diffusion transformer from block to block (Hu et al. 2024, arXiv 2412.07720).

New in it: p(x) = prod p(block | earlier blocks), each factor a diffusion of the whole block by one transformer; a block
of everything is a diffusion transformer (DiT), a block of one vector token-wise autoregression. Noised and clean blocks
stand in one sequence under a skip-causal mask, and adaptive norms (time and class) act on the noised stream only, so
that keys and values of the context depend neither on time nor on class.

Departures from the released code: SwiGLU in place of GELU, no biases in layers; norms have no weights; rotary angles
turn pairs of dimensions of one axis (there a dimension of one axis is paired with one of another). Its own form is
`form="released"`.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch

from seriatim.decoding.loop import Decider
from seriatim.decoding.solver import MultiStep
from seriatim.embed import VectorEmbed
from seriatim.factorization.cells import cells
from seriatim.factorization.groups import Groups
from seriatim.heads.in_place import InPlaceHead, Linear
from seriatim.interop.acdit import model_of
from seriatim.laws.case import Case, Unmasked, randomise
from seriatim.model import Model
from seriatim.objectives.denoised import Denoising, EachStep
from seriatim.systems.claim import Arm, Claim
from seriatim.systems.flow_trials import quality
from seriatim.systems.meta import Meta
from seriatim.systems.system import Sampling
from seriatim.systems.vector_system import DenoisedSystem, everything_at_once, from_ids, in_place, silent
from seriatim.training.recipe import Recipe

META = Meta(
    key="acdit",
    title="ACDiT: autoregressive conditional diffusion transformer",
    family="image",
    modality="image",
    paper="ACDiT: Interpolating Autoregressive Conditional Modeling and Diffusion Transformer (2024), arXiv 2412.07720",
    likelihood="none",
    summary="Blocks of a picture one after another, each by diffusion behind the clean blocks before it.",
)


@dataclass(frozen=True)
class Config:
    """Sizes; the defaults suit 8x8 digits in patches of 2x2 pixels. `side`: vectors in a row; `dim`: numbers in each;
    mean, deviation: of the numbers that the tokenizer gives. block: rows and columns of vectors in a block;
    train_steps: of the diffusion. form: "single", or "released" for the layers that were published, and square
    blocks."""

    side: int = 4
    dim: int = 4
    classes: int = 10
    width: int = 96
    depth: int = 4
    heads: int = 4
    dropout: float = 0.0
    mean: float = 0.0
    deviation: float = 1.0
    block: tuple[int, int] = (2, 2)
    train_steps: int = 1000
    form: Literal["single", "released"] = "single"

    def __post_init__(self) -> None:
        object.__setattr__(self, "block", tuple(self.block))  # JSON knows lists only
        if len(self.block) != 2:
            raise ValueError(f"a block has rows and columns, as in (2, 2); got {self.block}")
        if self.form not in ("single", "released"):
            raise ValueError(f"form is single or released, got {self.form!r}")
        if self.form == "released" and (self.block[0] != self.block[1] or self.train_steps != 1000):
            raise ValueError("the released form has square blocks and 1,000 steps of training")
        if not self.deviation > 0:
            raise ValueError(f"the deviation is positive, got {self.deviation}")


def build(config: Config | None = None) -> Denoising:
    """The model, with fresh weights: it predicts no noise."""
    c = config or Config()
    if c.form == "released":
        return model_of(c.side, c.dim, c.classes, c.width, c.depth, c.heads, c.block[0] ** 2)
    order = Groups(cells(c.side, c.side, *c.block))
    embed = VectorEmbed(c.dim, c.width, start=False)
    head = silent(InPlaceHead(c.width, c.dim, Linear(c.train_steps), "noise"))
    return in_place(Denoising, c, order, embed, head, None, times=EachStep(c.train_steps))


class ACDiT(DenoisedSystem):
    """A class, then block after block."""

    meta, Config = META, Config
    sizes = MappingProxyType({
        "tiny": {},
        "small": {"width": 192, "depth": 6, "heads": 6, "block": (4, 4)},
        "b": {"width": 768, "depth": 12, "heads": 12, "block": (16, 16)},
    })  # fmt: skip
    recipes = MappingProxyType({
        "tiny": Recipe(1500, batch=64, learning_rate=2e-3, drop=0.1, ema=0.995),
        "small": Recipe(5000, batch=64, learning_rate=1e-3, drop=0.1, bf16=True, ema=0.998),
        "b": Recipe(1_200_000, batch=1024, learning_rate=1e-4, floor=0.1, drop=0.1, bf16=True, ema=0.9999),
    })  # fmt: skip
    sampling = Sampling(guidance=0.5, steps=25)

    @staticmethod
    def build(config: Any, tokenizer: Any) -> Model:
        return build(config)

    def decider(self, sampling: Sampling) -> Decider:
        return MultiStep(sampling.steps or 25)


CLAIM = Claim(
    text="More blocks cost a picture quality, at equal weights and steps: FD-s of one block, which is a diffusion "
    "transformer, against eight.",
    paper="ImageNet 256x256: FID 2.37 (H, 954M, 4 blocks); fewer blocks are better for pictures, as many do for videos",
    metric="fd_s",
    arms={
        "1 block": Arm("acdit", {"block": (4, 4)}, steps=1200, measure=quality),
        "2 blocks": Arm("acdit", {"block": (2, 4)}, steps=1200, measure=quality),
        "4 blocks": Arm("acdit", {"block": (2, 2)}, steps=1200, measure=quality),
        "8 blocks": Arm("acdit", {"block": (1, 2)}, steps=1200, measure=quality),
    },
    ours="1 block",
    baseline="8 blocks",
    other_seeds=(0,),
    data="digits",
)


# ---- what the laws run -----------------------------------------------------------------------------------------------

TINY = Config(side=2, classes=3, width=16, depth=2, heads=2)


def case(rows: int = 1) -> Case:
    """A tiny instance for the laws, over ids, in blocks of two (diffusion is tested apart)."""
    model = randomise(from_ids(TINY, Groups(cells(2, 2, rows, 2)), None), std=0.3)
    spread = {"class": torch.tensor([0, 1, 2])}
    limits = (lambda: everything_at_once(case(2)),)
    return Case(model, 2, condition={"class": torch.tensor([1])}, spread=spread, limits=limits, over_ids=True)


def mutant() -> Case:
    """The case with a wrong feed, which the laws must catch."""
    wrong = case()
    wrong.model.embed.__class__ = Unmasked
    return wrong
