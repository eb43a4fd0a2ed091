"""Coarse-to-fine token prediction (CTF, Guo et al. 2025, arXiv 2503.16194).

New in it: codes near each other stand for nearly the same picture, so a causal transformer over clusters of codes has
an easy, small vocabulary; a second one sees the whole map of clusters and says which of its members every place is, for
all of them in one forward.

The paper's two models are two stacks of layers here, which share the table of classes, that of fed clusters, and the
scale of the last norm. Members are told apart by a classifier of all ids, limited to the cluster.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from seriatim.backbones.transformer import Transformer, TransformerConfig
from seriatim.canvas import Canvas
from seriatim.conditions.condition import ClassCondition
from seriatim.embed import TokenEmbed
from seriatim.factorization.coarse_fine import COARSE, FINE, CoarseThenFine
from seriatim.heads.clustered import ClusterHead
from seriatim.laws.case import Case, Limit, randomise
from seriatim.layout import Layout, grid
from seriatim.model import Model
from seriatim.random import Generator
from seriatim.systems.claim import Claim, brief
from seriatim.systems.image import raster_ar
from seriatim.systems.meta import Meta
from seriatim.systems.raster_system import RasterSystem
from seriatim.tokenizers.clusters import kmeans, members_of
from seriatim.view import full

META = Meta(
    key="ctf",
    title="CTF: coarse-to-fine token prediction",
    family="image",
    modality="image",
    paper="Improving Autoregressive Image Generation through Coarse-to-Fine Token Prediction (2025), arXiv 2503.16194",
    likelihood="exact",
    summary="Clusters of codes row by row, then all ids at once, each among the members of its cluster.",
)

CLAIM = Claim(
    text="Clusters of codes first, then all ids at once, make better pictures than ids row by row, by equally many "
    "layers and minutes of training: FD-s.",
    paper="ImageNet 256x256 (L): FID 2.97 and IS 291.5, LlamaGen-L 3.80 and 248; 8.71 pictures a second against 7.50",
    metric="fd_s",
    arms={
        "ctf": brief("ctf", "zoo:image-vq", clusters=32),
        "raster-ar": brief("raster-ar", "zoo:image-vq"),
        "5 clusters": brief("ctf", "zoo:image-vq"),
    },
    ours="ctf",
    baseline="raster-ar",
    spread_seeds=(0, 1, 2),
    other_seeds=(0, 1),
    data="glyphs",
)


@dataclass(frozen=True)
class Config:
    """Sizes; the defaults suit 8x8 digits at 17 grey levels. side: ids in a row; clusters: of the ids' codes; depth,
    fine_depth: layers that read clusters one by one, and all of them at once."""

    side: int = 8
    vocab: int = 17
    classes: int = 10
    clusters: int = 5
    width: int = 96
    depth: int = 3
    fine_depth: int = 2
    heads: int = 4
    dropout: float = 0.1


def build(config: Config | None = None, codes: Float[Tensor, "v d"] | None = None) -> Model:
    """The model, with fresh weights; codes: of the ids (None: numbers on a line, as grey levels are)."""
    c = config or Config()
    codes = torch.arange(c.vocab)[:, None].double() if codes is None else codes
    members, n = members_of(kmeans(codes, c.clusters), codes), c.side**2
    backbone = Transformer(
        TransformerConfig(c.width, c.depth + c.fine_depth, c.heads, dropout=c.dropout, vector=c.width)
    )
    embed = TokenEmbed(max(members.shape), c.width, positions=(2 * n,), start=False, std=0.4)
    condition = {"class": ClassCondition(c.classes, c.width, ("prefix", "vector"), std=0.4)}
    order, head = CoarseThenFine(c.depth, c.fine_depth), ClusterHead(c.width, members)
    return Model(grid(2, c.side, c.side), order, embed, backbone, head, condition)


def codes_of(tokenizer: Any) -> Float[Tensor, "v d"] | None:
    """The codes of all ids; None where ids are grey levels."""
    if not hasattr(tokenizer, "quantizer"):
        return None
    with torch.no_grad():
        return tokenizer.quantizer.decode_ids(torch.arange(tokenizer.vocab)[None])[0]


class CTF(RasterSystem):
    """Pixels of small pictures, or ids of a VQ tokenizer: coarse row by row, then fine at once."""

    meta, Config = META, Config
    sizes = MappingProxyType({
        "tiny": {},
        "small": {"width": 192, "depth": 4, "fine_depth": 2, "heads": 6, "clusters": 32},
        "b": {"width": 768, "depth": 10, "fine_depth": 4, "heads": 12, "clusters": 512},
    })  # fmt: skip

    @staticmethod
    def build(config: Any, tokenizer: Any) -> Model:
        return build(config, codes_of(tokenizer))

    @property
    def members(self) -> Tensor:
        return self.model.heads["token"].members  # type: ignore[return-value]

    # ---- training ---------------------------------------------------------------------------------------------------

    def elements(self, images: Float[Tensor, "n c h w"], layout: Layout) -> Int[Tensor, "n E"]:
        where = (self.members == super().elements(images, layout)[..., None, None]).flatten(2).int().argmax(2)
        return torch.cat([where // self.members.shape[1], where % self.members.shape[1]], 1)

    def losses(self, batch: Mapping[str, Tensor], random: Generator, drop: float) -> tuple[Tensor, Tensor]:
        """Each stage in a forward of its own layers; over so many ids, each of which is two elements."""
        canvas, condition = self.canvas(batch)
        dropped = torch.rand(canvas.batch, generator=random.generator) < drop if drop else None
        order: Any = self.model.factorization
        encoded = self.model.encode(condition, dropped)
        parts = [self.model.losses_by(order.part(canvas, (s,)), canvas, encoded) for s in (COARSE, FINE)]
        return (parts[0] + parts[1]).sum(), canvas.open.sum() // 2

    # ---- generation -------------------------------------------------------------------------------------------------

    def picture(self, codes: Tensor) -> Float[Tensor, "n c h w"]:
        coarse, fine = codes.chunk(2, 1)
        return self.tokenizer.decode(self.members[coarse, fine].clamp(min=0))

    def so_far(self, canvas: Canvas) -> Float[Tensor, "n c h w"]:
        """Where only the cluster is known, its middle member."""
        images = self.picture(torch.where(canvas.known, canvas.value["token"], 0))
        return self.shown(images, canvas.known.chunk(2, 1)[0])


# ---- what the laws run -----------------------------------------------------------------------------------------------


def _tiny(**settings: Any) -> Config:
    sizes = {"side": 2, "vocab": 4, "classes": 3, "clusters": 2, "width": 16, "depth": 1, "fine_depth": 1, "heads": 2}
    return Config(**{**sizes, "dropout": 0.0, **settings})


def case() -> Case:
    """A tiny instance for the laws: four ids in two clusters of two, so that every pair of numbers is an id."""
    model = randomise(build(_tiny(), torch.tensor([[0.0], [1.0], [8.0], [9.0]])))
    return Case(model, vocab=2, condition={"class": torch.tensor([1])}, limits=(each_its_own,))


def each_its_own() -> Limit:
    """As many clusters as ids: nothing is left to the second stage, and the first is raster autoregression."""
    one, n = randomise(build(_tiny(vocab=2))), 4
    sizes = {"side": 2, "vocab": 2, "classes": 3, "width": 16, "depth": 1, "heads": 2, "dropout": 0.0}
    other = raster_ar.build(raster_ar.Config(**sizes)).double().eval()  # type: ignore[arg-type]
    weights = {name: x for name, x in one.state_dict().items() if "layers.1." not in name and "heads" not in name}
    weights["embed.positions.0"] = weights["embed.positions.0"][:n]
    weights["heads.token.weight"] = one.heads["token"].coarse.weight  # type: ignore[union-attr, assignment]
    other.load_state_dict(weights)
    x, label = torch.tensor([[0, 1, 1, 0], [1, 1, 0, 1]]), {"class": torch.tensor([1, 2])}
    got = one.losses(one.canvas({"token": torch.cat([x, torch.zeros_like(x)], 1)}), label)
    want = other.losses(other.canvas({"token": x}), label)
    return Limit("as many clusters as ids are raster autoregression", got, torch.cat([want, torch.zeros_like(want)], 1))


class _SeesAll(CoarseThenFine):
    """Wrong on purpose: everybody sees everybody."""

    def part(self, canvas, stages):
        plan = super().part(canvas, stages)
        return replace(plan, views={"all": full(plan.size)})


def mutant() -> Case:
    """The case with a view in which the first stage sees what it predicts, which the laws must catch."""
    wrong = case()
    wrong.model.factorization = _SeesAll(1, 1)
    return wrong
