"""VARiant: one VAR whose fine scales run fewer layers ("Progressive Supernet Training for Efficient Visual
Autoregressive Modeling", Chen et al. 2025, arXiv 2511.16546).

New in it: the coarse scales run all layers, the fine ones, which hold most of the tokens, some of the same layers only:
late slots neither compute nor remember the others. One set of weights serves every depth of the fine scales, since
training takes now all layers, now fewer, at first seldom and at last always (`seriatim train variant --from RUN`, a run
of var). `--depth N` and `VARiant.at` change the depth of what is drawn.

The paper trains one depth at a time; here `depths` are drawn evenly where there are several. Its code is not public:
shares of the phases follow its epochs.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from seriatim.canvas import Canvas
from seriatim.decoding.target import Target
from seriatim.factorization.static import Scales
from seriatim.laws.case import Case, Limit, randomise
from seriatim.model import Model
from seriatim.plan import Plan
from seriatim.random import Generator
from seriatim.systems.claim import Arm, Claim
from seriatim.systems.image import var
from seriatim.systems.meta import Meta
from seriatim.systems.pyramid_system import PyramidSystem, ResidualPyramid, one_scale
from seriatim.systems.pyramid_trials import both_depths
from seriatim.systems.system import Sampling
from seriatim.tokenizers.multiscale import MultiScaleConfig, MultiScaleVQ
from seriatim.training.recipe import Recipe

META = Meta(
    key="variant",
    title="VARiant: fewer layers for fine scales",
    family="image",
    modality="image",
    paper="Progressive Supernet Training for Efficient Visual Autoregressive Modeling (2025), arXiv 2511.16546",
    likelihood="exact",
    summary="VAR whose fine scales run a part of the layers; one set of weights serves every depth.",
)

BRIDGE = 0.6  # of the scales run all layers: six of ten
SELDOM, RISING, ALWAYS = 0.2, 0.2, 0.8  # the first share of fewer layers; from when on it grows, and when it is 1


@dataclass(frozen=True)
class Config(var.Config):
    """VAR's sizes. depths: of the fine scales in training beside all layers; the first of them is that of drawing and
    scoring. bridge: how many coarse scales run all layers (None: six of ten). share: of the steps with fewer layers
    (None: it grows)."""

    depths: tuple[int, ...] = (2,)
    bridge: int | None = None
    share: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "depths", tuple(self.depths))  # JSON knows lists only
        scales = len(self.tokenizer.scales)
        if not self.depths or not all(1 <= d <= self.depth for d in self.depths):
            raise ValueError(f"fine scales run 1 to {self.depth} layers, got depths {self.depths}")
        if self.bridge is not None and not 0 <= self.bridge <= scales:
            raise ValueError(f"of {scales} scales 0 to {scales} run all layers, got bridge {self.bridge}")
        if self.share is not None and not 0 <= self.share <= 1:
            raise ValueError(f"the share of the steps lies in [0, 1], got {self.share}")

    def by_scale(self, depth: int) -> tuple[int, ...]:
        """How many layers each scale runs, where fine ones run `depth`. Raises ValueError for impossible depths."""
        if not 1 <= depth <= self.depth:
            raise ValueError(f"fine scales run 1 to {self.depth} layers, got {depth}")
        scales = len(self.tokenizer.scales)
        bridge = round(BRIDGE * scales) if self.bridge is None else self.bridge
        return (self.depth,) * bridge + (depth,) * (scales - bridge)


class Supernet(Scales):
    """Scale k runs `depths[k]` of `total` layers, evenly from the first to the last: the i-th of d is
    floor(i (total - 1) / (d - 1))."""

    def __init__(self, total: int, depths: Sequence[int]):
        super().__init__()
        self.layers = torch.zeros(total, len(depths), dtype=torch.bool)
        for scale, depth in enumerate(depths):
            self.layers[[i * (total - 1) // max(depth - 1, 1) for i in range(depth)], scale] = True

    def packed(self, canvas: Canvas) -> Plan:
        return replace(super().packed(canvas), layers=self.layers[:, canvas.layout.coord[:, 0]])


def build(config: Config | None = None, quantizer: MultiScaleVQ | None = None) -> Model:
    """VAR at the first of the depths."""
    c = config or Config()
    model = var.build(c, quantizer)
    model.factorization = Supernet(c.depth, c.by_scale(c.depths[0]))
    return model


def share_of_fewer(progress: float) -> float:
    """How often a step of training runs fewer layers, by how far training is (0 to 1): seldom, ever more, always. In
    the paper for 5 epochs, 15 and 5 (or up to 15)."""
    risen = min(max((progress - RISING) / (ALWAYS - RISING), 0.0), 1.0)
    return SELDOM + (1 - SELDOM) * risen


class VARiant(ResidualPyramid):
    """A class, then scale after scale, the fine ones by fewer layers."""

    meta, Config = META, Config
    begins_as = "var"
    recipes = MappingProxyType({
        **PyramidSystem.recipes,
        "further": Recipe(2000, batch=64, learning_rate=3e-4, drop=0.1, bf16=True, ema=0.995),
    })  # fmt: skip
    sampling = var.VAR.sampling

    @staticmethod
    def build(config: Any, tokenizer: Any) -> Model:
        return build(config, None if tokenizer is None else tokenizer.quantizer)

    def at(self, depth: int) -> VARiant:
        """The same system, over the same weights, with so many layers at fine scales. Raises ValueError for impossible
        depths."""
        model, made = copy.copy(self.model), copy.copy(self)
        model.factorization = Supernet(self.config.depth, self.config.by_scale(depth))
        made.__dict__["_modules"] = {**self._modules, "model": model}
        return made

    def target(self, condition: Mapping[str, Tensor] | None, sampling: Sampling, **more: Any) -> Target:
        """As of every system; `sampling.depth`: layers at fine scales (None: the first that it was trained for)."""
        if sampling.depth is None:
            return super().target(condition, sampling, **more)
        return self.at(sampling.depth).target(condition, replace(sampling, depth=None), **more)

    # ---- training ---------------------------------------------------------------------------------------------------

    def forward(self, batch: Mapping[str, Tensor], random: Generator, step: int, steps: int) -> tuple[Tensor, Tensor]:
        return self.at(self.drawn_depth(step / max(steps - 1, 1), random.generator)).losses(batch, random, self.drop)

    def drawn_depth(self, progress: float, generator: torch.Generator) -> int:
        """The depth of fine scales in one step of training: all layers, or one of `depths`."""
        c, (chance, which) = self.config, torch.rand(2, generator=generator, device=generator.device).tolist()
        if chance >= (share_of_fewer(progress) if c.share is None else c.share):
            return int(c.depth)
        return int(c.depths[int(which * len(c.depths))])

    def validate(self, examples: Any) -> dict[str, float]:
        """With the first of the depths, and (`loss_full`) with all layers."""
        nats, ids = self.at(self.config.depth).score(examples, self.validation_size)
        return {**super().validate(examples), "loss_full": nats / ids}


CLAIM = Claim(
    text="Where the share of steps with fewer layers grows from a fifth to one, the whole net and the subnet of two "
    "layers together are better than after as much training with a fixed share of a half: the mean of their losses.",
    paper="ImageNet 256x256, VAR-d30: FID 2.05 with 16 layers at fine scales, 2.12 with 8, 2.97 with 2; full 1.95",
    metric="loss_both",
    arms={
        "progressive": Arm("variant", base="zoo:var", minutes=3, measure=both_depths),
        "a half": Arm("variant", {"share": 0.5}, base="zoo:var", minutes=3, measure=both_depths),
        "always": Arm("variant", {"share": 1.0}, base="zoo:var", minutes=3, measure=both_depths),
    },
    ours="progressive",
    baseline="a half",
    other_seeds=(0,),
    data="glyphs",
)


# ---- what the laws run -----------------------------------------------------------------------------------------------


def case(
    scales: tuple[int, ...] = (1, 2), vocab: int = 2, depths: tuple[int, ...] = (2,), bridge: int | None = None
) -> Case:
    """A tiny instance for the laws: three layers, the first and the last of them at fine scales."""
    tokenizer = MultiScaleConfig(scales=scales, vocab=vocab, dim=3, width=8, phis=2)
    c = Config(tokenizer, 3, width=16, depth=3, heads=2, dropout=0.0, depths=depths, bridge=bridge)
    limits = (lambda: one_scale(case), all_layers, all_bridged)
    return Case(randomise(build(c)), vocab=vocab, condition={"class": torch.tensor([1])}, limits=limits)


def all_layers() -> Limit:
    """With all layers at all scales it is VAR."""
    return _as_var("with all layers it is VAR", case((1, 2, 3), depths=(3,)))


def all_bridged() -> Limit:
    """Where every scale is a coarse one, too."""
    return _as_var("with no fine scale it is VAR", case((1, 2, 3), bridge=3))


def _as_var(name: str, mine: Case) -> Limit:
    theirs = case((1, 2, 3))
    theirs.model.load_state_dict(mine.model.state_dict())
    theirs.model.factorization = Scales()
    x = mine.sample(4)
    return Limit(name, mine.total(x), theirs.total(x), 0.0)


class ForgetsItsLayers(Supernet):
    """Wrong on purpose: in decoding all layers are run."""

    def step(self, canvas: Canvas, guess: Any, cached: int | Tensor) -> Plan | None:
        plan = super().step(canvas, guess, cached)
        return None if plan is None else replace(plan, layers=None)


def mutant() -> Case:
    """The case with steps that forget which layers they run, which the laws must catch."""
    wrong = case()
    wrong.model.factorization.__class__ = ForgetsItsLayers
    return wrong
