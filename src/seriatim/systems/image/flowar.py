"""FlowAR: next-scale autoregression meets flow matching (Ren et al. 2024, arXiv 2412.15205).

New in it: the scales of a picture are plain downsamplings of its latent vectors, each twice as large as the one before,
so that any autoencoder will do; a transformer says a vector for each place of the next scale, and a flow over that
whole map, into whose norms each vector enters at its own place (Spatial-adaLN), draws it.

No code was released. Taken for what the paper leaves open: one flow network for all scales; a loss that is the mean
over all vectors; Euler's method; bicubic enlargement of the map before; the class in the first slot and in the norms.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from types import MappingProxyType
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from seriatim.backbones.transformer import Transformer, TransformerConfig
from seriatim.canvas import Canvas
from seriatim.conditions.condition import ClassCondition
from seriatim.embed_pyramid import Feed, PlaceTable, PyramidEmbed, previous
from seriatim.factorization.static import Scales
from seriatim.heads.categorical import CategoricalHead
from seriatim.heads.flow_map import MapFlowConfig, MapFlowHead
from seriatim.laws.case import Case, randomise
from seriatim.layout import pyramid
from seriatim.maps import area_down
from seriatim.model import Model
from seriatim.systems.claim import Arm, Claim
from seriatim.systems.flow_trials import quality
from seriatim.systems.meta import Meta
from seriatim.systems.pyramid_system import PeekingEmbed, one_scale
from seriatim.systems.system import Sampling
from seriatim.systems.vector_system import VectorSystem
from seriatim.tokenizers.conv import map_to_rows, rows_to_map
from seriatim.tokenizers.quantizers import NormalizedVQ
from seriatim.training.recipe import Recipe

META = Meta(
    key="flowar",
    title="FlowAR: scales by flow matching",
    family="image",
    modality="image",
    paper="FlowAR: Scale-wise Autoregressive Image Generation Meets Flow Matching (2024), arXiv 2412.15205",
    likelihood="none",
    summary="Maps of vectors that double in size, each drawn as a whole by a flow that a transformer conditions.",
)

M = TypeVar("M", bound=Model)


@dataclass(frozen=True)
class Config:
    """Sizes; the defaults suit 8x8 digits in patches of 2x2 pixels. `side`: vectors in a row of the finest map; `dim`:
    numbers in each; mean, deviation: of the numbers that the tokenizer gives. scales: sides of the maps, coarse to fine
    (none: halvings of the last).

    flow_width, flow_depth: of the network of the flow; flow_steps: of its integration; inject: how the transformer's
    vectors enter it (`MapFlowConfig.inject`).
    """

    side: int = 4
    dim: int = 4
    scales: tuple[int, ...] = ()
    classes: int = 10
    width: int = 96
    depth: int = 3
    heads: int = 4
    dropout: float = 0.0
    mean: float = 0.0
    deviation: float = 1.0
    flow_width: int = 96
    flow_depth: int = 2
    flow_steps: int = 25
    inject: Literal["spatial", "pooled", "concat"] = "spatial"

    def __post_init__(self) -> None:
        scales = tuple(self.scales) or halvings(self.side)
        object.__setattr__(self, "scales", scales)
        if scales[-1] != self.side or any(b <= a for a, b in pairwise(scales)):
            raise ValueError(f"scales grow up to the side of {self.side} vectors, got {scales}")
        if not self.deviation > 0:
            raise ValueError(f"the deviation is positive, got {self.deviation}")


def halvings(side: int) -> tuple[int, ...]:
    """Sides from 1 up to this one, each half of the next as long as that is whole."""
    out = [side]
    while out[0] > 1:
        out.insert(0, out[0] // 2 if out[0] % 2 == 0 else 1)
    return tuple(out)


def build(config: Config | None = None) -> Model:
    """The model, with fresh weights: it says that nothing moves."""
    c = config or Config()
    flow = MapFlowConfig(c.flow_width, c.flow_depth, c.flow_steps, heads=c.heads, inject=c.inject)
    return assembled(c, None, MapFlowHead(c.width, c.dim, pyramid(c.scales), flow))


def assembled(c: Any, codes: Any, head: Any, feed: Feed = previous, kind: type[M] = Model) -> M:  # type: ignore[assignment]
    """A model of maps, coarse to fine, of c.scales: behind a class, each is fed what the one before says."""
    total = sum(side * side for side in c.scales)
    embed = PyramidEmbed(codes, c.dim, c.width, feed, PlaceTable(total), len(c.scales))
    backbone = Transformer(TransformerConfig(c.width, c.depth, c.heads, dropout=c.dropout, vector=c.width))
    condition = {"class": ClassCondition(c.classes, c.width, ("prefix", "vector"))}
    return kind(pyramid(c.scales), Scales(), embed, backbone, head, condition)


class FlowAR(VectorSystem):
    """A class, then map after map."""

    meta, Config = META, Config
    sizes = MappingProxyType({
        "tiny": {},
        "small": {"width": 192, "depth": 5, "heads": 6, "flow_width": 192, "flow_depth": 3},
        "s": {"width": 768, "depth": 12, "heads": 12, "flow_width": 768, "flow_depth": 6},
    })  # fmt: skip
    recipes = MappingProxyType({
        "tiny": Recipe(1500, batch=64, learning_rate=2e-3, drop=0.1, ema=0.995),
        "small": Recipe(5000, batch=64, learning_rate=1e-3, drop=0.1, bf16=True, ema=0.998),
        "s": Recipe(500_000, batch=1024, learning_rate=2e-4, floor=0.1, drop=0.1, bf16=True, ema=0.9999),
    })  # fmt: skip
    sampling = Sampling(guidance=0.5)

    @staticmethod
    def build(config: Any, tokenizer: Any) -> Model:
        return build(config)

    def vectors(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """Those of all maps, each a downsampling of the finest."""
        finest = rows_to_map(super().vectors(images), (self.config.side,) * 2)
        return torch.cat([map_to_rows(area_down(finest, (n, n))) for n in self.config.scales], 1)

    def picture(self, codes: Tensor) -> Float[Tensor, "n c h w"]:
        return super().picture(codes[:, -(self.config.side**2) :])

    def so_far(self, canvas: Canvas) -> Float[Tensor, "n c h w"]:
        """The last map that is there, every vector of it in all places that it covers."""
        begin = (0, *accumulate(n * n for n in self.config.scales))
        side, codes = self.config.side, canvas.value["token"]
        there = [k for k in range(len(begin) - 1) if bool(canvas.known[:, : begin[k + 1]].all())]
        if not there:
            return super().picture(codes.new_zeros(len(codes), side * side, self.config.dim))
        last = there[-1]
        coarse = rows_to_map(codes[:, begin[last] : begin[last + 1]], (self.config.scales[last],) * 2)
        return super().picture(map_to_rows(F.interpolate(coarse, (side, side), mode="nearest")))


CLAIM = Claim(
    text="What a transformer says of a map enters its flow best place by place: FD-s with Spatial-adaLN against "
    "adaptive norms of the mean over places, at equal parameters and steps.",
    paper="ImageNet 256x256: FID 1.65 (H, 1.9B), VAR-d30 1.97; of the ways to condition a flow Spatial-adaLN is best",
    metric="fd_s",
    arms={
        "spatial": Arm("flowar", steps=1200, measure=quality),
        "pooled": Arm("flowar", {"inject": "pooled"}, steps=1200, measure=quality),
        "concat": Arm("flowar", {"inject": "concat"}, steps=1200, measure=quality),
        "two scales": Arm("flowar", {"scales": (1, 4)}, steps=1200, measure=quality),
        "one scale": Arm("flowar", {"scales": (4,)}, steps=1200, measure=quality),
    },
    ours="spatial",
    baseline="pooled",
    other_seeds=(0,),
    data="digits",
)


# ---- what the laws run -----------------------------------------------------------------------------------------------


def case(scales: tuple[int, ...] = (1, 2), vocab: int = 2) -> Case:
    """A tiny instance for the laws, over ids of a codebook (the flow is tested apart)."""
    c = Config(scales[-1], 3, scales, classes=3, width=16, depth=2, heads=2)
    model = randomise(assembled(c, NormalizedVQ(vocab, c.dim), CategoricalHead(c.width, vocab)))
    limits = (lambda: one_scale(case),)
    return Case(model, vocab, condition={"class": torch.tensor([1])}, limits=limits, over_ids=True)


def mutant() -> Case:
    """The case with a wrong feed, which the laws must catch."""
    wrong = case()
    wrong.model.embed.__class__ = PeekingEmbed
    return wrong
