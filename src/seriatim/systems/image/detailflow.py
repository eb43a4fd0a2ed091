"""DetailFlow: next-detail prediction along a line of ids (Liu et al. 2025, arXiv 2505.21473).

New in it: the more ids of a picture there are, the higher is its resolution, so a line goes from coarse to fine without
a pyramid; behind a first group, generated id by id, each group of ids is generated at once: g + N / g - 1 forwards. As
ids of a group do not know of each other, the generator also learns from lines with wrong ids in a group, to say behind
them the ids that repair them.

A class also drives adaptive norms and positions (group, place in it) are learned, as in raster-ar; in the form "llama"
the class stands in front alone and positions are rotary, as released. The tokenizer makes wrong and repairing ids
(tokenizers/detail.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from seriatim.backbones.rope import RoPE
from seriatim.backbones.transformer import Transformer, TransformerConfig
from seriatim.canvas import Canvas
from seriatim.conditions.condition import ClassCondition
from seriatim.decoding.guess import Guess
from seriatim.embed import TokenEmbed
from seriatim.factorization.opened import OpenedGroups
from seriatim.heads.categorical import CategoricalHead
from seriatim.laws.case import Case, Limit, randomise
from seriatim.layout import grid
from seriatim.model import Model
from seriatim.plan import LEARNED, Plan
from seriatim.random import Generator
from seriatim.systems.claim import Claim, Trial, brief
from seriatim.systems.image import raster_ar
from seriatim.systems.meta import Meta
from seriatim.systems.query_system import QueryConfig, QuerySystem
from seriatim.systems.query_trials import prefixes_and_repairs
from seriatim.systems.system import Sampling
from seriatim.view import inclusive

META = Meta(
    key="detailflow",
    title="DetailFlow: next-detail prediction",
    family="image",
    modality="image",
    paper="DetailFlow: 1D Coarse-to-Fine Autoregressive Image Generation via Next-Detail Prediction (2025), 2505.21473",
    likelihood="exact",
    summary="A line of ids of growing resolution, group by group, which learns to repair its own mistakes.",
)

CLAIM = Claim(
    text="Trained on lines with wrong ids and their repair in three of ten pictures, a generator that draws four ids "
    "at once makes better pictures than one that met true ids alone, after equal minutes: FD-s.",
    paper="ImageNet 256x256: FID 2.96 by 128 ids in 23 forwards; VAR 3.3 and FlexVAR 3.05 by 680",
    metric="fd_s",
    arms={
        "detailflow": brief("detailflow", "zoo:image-detail"),
        "uncorrected": brief("detailflow", "zoo:image-detail", correction=0.0),
        "raster-ar": brief("raster-ar", "zoo:image-vq"),
        "var": brief("var", "zoo:image-msvq"),
        "prefixes": Trial("zoo:image-detail", prefixes_and_repairs),
    },
    ours="detailflow",
    baseline="uncorrected",
    spread_seeds=(0, 1, 2),
    other_seeds=(0,),
    data="glyphs",
)


@dataclass(frozen=True)
class Config(QueryConfig):
    """Sizes; the defaults suit 32x32 glyphs (4 groups of 4 ids). correction: share of pictures that training shows with
    wrong ids and their repair."""

    groups: int = 4
    correction: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.correction <= 1:
            raise ValueError(
                f"the share of pictures with wrong ids lies in 0..1, got a correction of {self.correction}"
            )


class PaddedEmbed(TokenEmbed):
    """Ids, and learned vectors at the slots between first and second group that carry none."""

    def __init__(self, vocab: int, width: int, groups: int, size: int):
        super().__init__(vocab, width, positions=(groups, size), start=False, std=0.4)
        pads = size - 1 if groups > 1 else 0
        self.pads = nn.Parameter(torch.randn(pads, width) * 0.4) if pads else None

    def forward(
        self, canvas: Canvas, plan: Plan, guess: Guess | None = None, prefix: Tensor | None = None
    ) -> Float[Tensor, "b s d"]:
        assert prefix is not None
        x = super().forward(canvas, plan, guess, F.pad(prefix, (0, 0, 0, 1)))
        group, place = plan.slots.coord.to(x.device).unbind(2)
        padded = (plan.slots.source.to(x.device) == LEARNED) & (group > 0)
        if self.pads is None or not bool(padded.any()):
            return x
        return torch.where(padded[..., None], x + self.pads[(place - 1).clamp(min=0)], x)


class PaddedLine(TokenEmbed):
    """The same without positions, slots numbered along the line."""

    def __init__(self, vocab: int, width: int, size: int):
        super().__init__(vocab, width, start=False, std=0.4)
        self.size, self.pads = size, nn.Parameter(torch.randn(size - 1, width) * 0.4)

    def forward(
        self, canvas: Canvas, plan: Plan, guess: Guess | None = None, prefix: Tensor | None = None
    ) -> Float[Tensor, "b s d"]:
        assert prefix is not None
        pads = self.pads.expand(len(prefix), -1, -1)
        return super().forward(canvas, plan, guess, torch.cat([F.pad(prefix, (0, 0, 0, self.size)), pads], 1))


def build(config: Config | None = None) -> Model:
    """The model, with fresh weights."""
    c = config or Config()
    if c.form == "llama":
        return _released(c)
    order = OpenedGroups(c.groups * c.group_size, c.group_size)
    backbone = Transformer(TransformerConfig(c.width, c.depth, c.heads, dropout=c.dropout, vector=c.width))
    embed = PaddedEmbed(c.vocab, c.width, c.groups, c.group_size)
    condition = {"class": ClassCondition(c.classes, c.width, ("prefix", "vector"), std=0.4)}
    return Model(grid(c.groups, c.group_size), order, embed, backbone, CategoricalHead(c.width, c.vocab), condition)


def _released(c: Config) -> Model:
    """As in the released code: groups and places turn queries and keys, those of the class are zero."""
    half = c.width // c.heads // 2
    rope = RoPE(axes=(half, half), raster=(1, c.group_size))
    layers = TransformerConfig(c.width, c.depth, c.heads, hidden=c.hidden, dropout=c.dropout, rope=rope)
    order = OpenedGroups(c.groups * c.group_size, c.group_size, line=True)
    embed = PaddedLine(c.vocab, c.width, c.group_size)
    condition = {"class": ClassCondition(c.classes, c.width, ("prefix",), std=0.4)}
    head = CategoricalHead(c.width, c.vocab)
    return Model(grid(c.groups, c.group_size), order, embed, Transformer(layers), head, condition)


class DetailFlow(QuerySystem):
    """Ids of a next-detail tokenizer: the first group one by one, then group by group."""

    meta, Config, codes, tokenizers = META, Config, "detail", ("image-detail",)
    sampling = Sampling(guidance=0.45)

    @staticmethod
    def build(config: Any, tokenizer: Any) -> Model:
        return build(config)

    def losses(self, batch: Mapping[str, Tensor], random: Generator, drop: float) -> tuple[Tensor, Tensor]:
        """In training some pictures are shown with wrong ids in a group, the same one in the whole batch."""
        if not self.training or self.config.correction == 0:
            return super().losses(batch, random, drop)
        t, g, images = self.tokenizer, random.generator, batch["image"]
        dropped = torch.rand(len(images), generator=g) < drop if drop else None
        lines = t.corrupted(images, t.start(t.config.queries, g), g)
        chosen = (torch.rand(len(images), generator=g) < self.config.correction)[:, None].to(lines.clean.device)
        fed, said = (torch.where(chosen, line, lines.clean) for line in (lines.fed, lines.said))
        raw = self.condition(batch.get("label"), len(images))
        return self.summed(*self.told(fed, said, raw, dropped))

    def told(
        self, fed: Tensor, said: Tensor, raw: Mapping[str, Tensor] | None, dropped: Tensor | None = None
    ) -> tuple[Float[Tensor, "b N"], Tensor]:
        """The losses of the ids `said`, each in view of those of `fed` before it, and which of them count."""
        model, target = self.model, self.model.canvas({"token": said})
        context = model.canvas({"token": fed})
        plan = model.factorization.packed(context)
        assert plan is not None
        h = model.hidden(plan, context, None, model.encode(raw, dropped))
        return model.losses_at(h, plan.reads, target), target.open

    def so_far(self, canvas: Canvas) -> Float[Tensor, "n c h w"]:
        """The picture of the ids that are known, as small as they allow, its pixels blown up; grey before the first."""
        t = self.tokenizer
        known = int(canvas.known.all(0).long().cumprod(0).sum())
        lengths = [length for length in t.config.lengths if length <= known]
        if not lengths:
            return torch.zeros(canvas.batch, t.channels, t.side, t.side)
        small = t.decode_prefix(canvas.value["token"][:, : lengths[-1]])
        return F.interpolate(small, size=(t.side, t.side), mode="nearest")


# ---- what the laws run -----------------------------------------------------------------------------------------------


def _tiny(groups: int = 2, size: int = 2) -> Config:
    return Config(groups, size, vocab=2, classes=3, width=16, depth=2, heads=2, dropout=0.0)


def case() -> Case:
    """A tiny instance for the laws."""
    return Case(randomise(build(_tiny())), vocab=2, condition={"class": torch.tensor([1])}, limits=(one_by_one,))


def one_by_one() -> Limit:
    """Groups of one id are plain next-token prediction."""
    one = randomise(build(_tiny(4, 1)))
    other = raster_ar.build(raster_ar.Config(4, 2, 3, 16, 2, 2, 0.0), 4, 1).double().eval()
    weights = dict(one.state_dict())
    weights["embed.positions.0"] = weights["embed.positions.0"] + weights.pop("embed.positions.1")
    other.load_state_dict(weights)
    x, label = torch.tensor([[0, 1, 1, 0], [1, 1, 0, 1]]), {"class": torch.tensor([1, 2])}
    got, want = (m.losses(m.canvas({"token": x}), label) for m in (one, other))
    return Limit("groups of one id are next-token prediction", got, want)


class _SeesAhead(OpenedGroups):
    """Wrong on purpose: slots also see those of the next turn, which carry what they read."""

    def packed(self, canvas):
        plan = super().packed(canvas)
        view = inclusive(self.turn)
        return replace(plan, views={"all": replace(view, born=view.born - 1)})


def mutant() -> Case:
    """The case with a mask that shows what is read, which the laws must catch."""
    wrong = case()
    wrong.model.factorization = _SeesAhead(4, 2)
    return wrong
