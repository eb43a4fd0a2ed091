"""M-VAR: attention inside of a scale, a state between scales (Ren et al. 2024, arXiv 2411.10433).

New in it: next-scale prediction with its two concerns apart. Each layer attends within a scale alone, both ways, and
then lets a Mamba-2 mixer run over the whole pyramid, from coarse to fine and in raster order inside of a scale; so what
coarser scales hold arrives by a state of one size, and no keys or values are kept. That a place sees earlier ones of
its own scale by the state is no leak: all that is fed to a scale follows from coarser ones.

Tokenizer, feed, places, guidance and initial weights are VAR's. Departures from the released code: sampling goes on
from the state instead of running over everything again (the numbers are the same), the gates of all three branches
begin near zero (there, by an oversight, not the last), and the mixer's branch has the same dropout as the others.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from seriatim.backbones.decoupled import OWN, Decoupled, DecoupledConfig
from seriatim.backbones.mamba import MambaConfig
from seriatim.embed_pyramid import PlaceTable, PyramidEmbed, accumulated
from seriatim.factorization.static import Scales
from seriatim.laws.case import Case, Limit, randomise
from seriatim.layout import pyramid
from seriatim.model import Model
from seriatim.systems.claim import Claim, Trial, brief
from seriatim.systems.image import hmar
from seriatim.systems.meta import Meta
from seriatim.systems.pyramid_system import (
    PyramidSystem,
    ResidualPyramid,
    initial_std,
    one_scale,
    var_config,
    var_model,
)
from seriatim.systems.pyramid_trials import costs
from seriatim.systems.system import Sampling
from seriatim.tokenizers.multiscale import MultiScaleConfig, MultiScaleVQ
from seriatim.view import View, inclusive, own_rank

META = Meta(
    key="m-var",
    title="M-VAR: decoupled next-scale prediction",
    family="image",
    modality="image",
    paper="M-VAR: Decoupled Scale-wise Autoregressive Modeling for High-Quality Image Generation (2024), 2411.10433",
    likelihood="exact",
    summary="Scale after scale; a scale attends to itself alone, and knows the coarser ones by a state of fixed size.",
)


@dataclass(frozen=True)
class Config:
    """Sizes of the generator and of its tokenizer; the defaults suit 8x8 digits. state: numbers that a channel of the
    mixers remembers; channels: of one of their heads, which together are twice as wide as the stack; unit: are queries
    and keys of unit length (as released from 24 layers on; below that, scores are a fourth of the usual)?"""

    tokenizer: MultiScaleConfig = field(default_factory=MultiScaleConfig)
    classes: int = 10
    width: int = 96
    depth: int = 3
    heads: int = 4
    dropout: float = 0.1
    state: int = 64
    channels: int = 64
    unit: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.tokenizer, dict):  # from JSON
            object.__setattr__(self, "tokenizer", MultiScaleConfig(**self.tokenizer))


def in_turn(scale: Int[Tensor, "1 s"]) -> View:
    """One after the other: the scan of a pyramid, whose slots stand from coarse to fine and in raster order."""
    return inclusive(torch.arange(scale.shape[1]))


def stack(c: Any) -> Decoupled:
    """VAR's stack with a third branch in every layer."""
    mixer = MambaConfig(c.width, c.depth, head_dim=c.channels, state=c.state)
    scores = {} if c.unit else {"qk_norm": None, "score_scale": 0.25 * (c.width // c.heads) ** -0.5}
    return Decoupled(DecoupledConfig(**{**asdict(var_config(c)), **scores, "kinds": (OWN,), "mixer": mixer}))


def build(config: Config | None = None, quantizer: MultiScaleVQ | None = None) -> Model:
    """The generator over a tokenizer's quantizer (a fresh one if none is given)."""
    c = config or Config()
    q = quantizer or c.tokenizer.quantizer()
    std, backbone = initial_std(c.width), stack(c)
    embed = PyramidEmbed(q, q.dim, c.width, accumulated, PlaceTable(q.total), scales=len(q.scales), std=std)
    order = Scales({OWN: own_rank, "all": in_turn})
    model = var_model(c, pyramid(q.scales), order, backbone, embed, q.vocab)
    initialise_mixers(backbone, std)
    return model


@torch.no_grad()
def initialise_mixers(backbone: Decoupled, std: float) -> None:
    """Matrices as all others of VAR; steps, decays and convolutions as Mamba-2 draws them."""
    for layer in backbone.layers:
        mixer: Any = layer.mixer
        mixer.into.normal_(0, std)
        mixer.out.normal_(0, std)
        for part, size in zip(mixer.ada.chunk(3), (0.5, 0.5, 1e-5), strict=True):  # shift, scale, gate
            part.normal_(0, std * size)


class MVAR(ResidualPyramid):
    """A class, then scale after scale."""

    meta, Config = META, Config
    sizes = MappingProxyType({
        **PyramidSystem.sizes,
        "small": {"width": 192, "depth": 4, "heads": 6},  # about as many parameters as VAR with six layers
        "d16": {**PyramidSystem.sizes["d16"], "unit": False},
    })  # fmt: skip
    sampling = Sampling(top_p=0.96, guidance=1.5)

    @staticmethod
    def build(config: Any, tokenizer: Any) -> Model:
        return build(config, None if tokenizer is None else tokenizer.quantizer)


CLAIM = Claim(
    text="What coarser scales say beyond their sum is worth a state: at equal training seconds and near equal "
    "parameters, held-out pictures cost fewer bits than where a scale knows of the others that sum alone.",
    paper="ImageNet 256x256: FID 1.78 (d32); against VAR 0.19 better, with fewer parameters than its largest",
    metric="bits_per_code",
    arms={
        "costs": Trial(None, costs),
        "m-var": brief("m-var", "zoo:image-msvq"),
        "sum alone": brief("hmar", "zoo:image-msvq", weighted=False),
        "var": brief("var", "zoo:image-msvq"),
    },
    ours="m-var",
    baseline="sum alone",
    data="glyphs",
)


# ---- what the laws run -----------------------------------------------------------------------------------------------


def case(scales: tuple[int, ...] = (1, 2), vocab: int = 2) -> Case:
    """A tiny instance for the laws."""
    tokenizer = MultiScaleConfig(scales=scales, vocab=vocab, dim=3, width=8, phis=2)
    c = Config(tokenizer, 3, width=16, depth=2, heads=2, dropout=0.0, state=4, channels=8)
    limits = (lambda: one_scale(case), without_state)
    return Case(randomise(build(c)), vocab=vocab, condition={"class": torch.tensor([1])}, limits=limits)


def without_state() -> Limit:
    """Where the mixers say nothing it is the first stage of HMAR."""
    mine, theirs = case((1, 2, 3)), hmar.case((1, 2, 3))
    silence(mine.model, "mixer.out")
    named = {name: x for name, x in mine.model.state_dict().items() if ".mixer." not in name}
    theirs.model.load_state_dict(named)
    x = mine.sample(4)
    return Limit("without a state it is the first stage of HMAR", mine.total(x), theirs.total(x))


@torch.no_grad()
def silence(model: Model, *branches: str) -> None:
    """Zero the last matrix of some branches in all layers: "out" of attention, "mixer.out", "down"."""
    for layer in model.backbone.layers:  # type: ignore[union-attr]
        for name in branches:
            layer.get_parameter(name).zero_()
            if isinstance(bias := getattr(layer, f"{name}_bias", None), Tensor):
                bias.zero_()


def from_fine_to_coarse(scale: Int[Tensor, "1 s"]) -> View:
    """Wrong on purpose: the state runs the other way."""
    return inclusive(torch.arange(scale.shape[1]).flip(0))


def mutant() -> Case:
    """The case with a scan that begins at the finest scale, which the laws must catch."""
    wrong = case()
    wrong.model.factorization.visibility = {  # type: ignore[attr-defined]
        OWN: own_rank,
        "all": from_fine_to_coarse,
    }
    return wrong
