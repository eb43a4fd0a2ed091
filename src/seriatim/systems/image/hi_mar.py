"""Hi-MAR: masked autoregression over few coarse tokens, then over all fine ones (Zheng et al. 2025, arXiv 2505.20288).

New in it: the picture at half the size is drawn first, as pivots, by MAR; what the fine phase is told of a pivot is the
hidden state from which it was drawn, in training as in sampling, and never its value. And since only a few steps are
left for the fine tokens, all of them are denoised together in each step, by a diffusion transformer over the map.

Departures from the released code: one stack instead of a masked autoencoder and 64 class tokens, as in `mar`; the phase
is added to the class in the adaptive norms, at first nothing, in place of a modulation of its own (which begins as the
identity, too); masks of fine places, which say nothing, are left out while pivots are drawn; the hidden share is drawn
for each picture; both phases are guided alike, by what is known before a step; the fine map begins as zero. In the form
"released" all of this but the drawing of the hidden share is that of the released code, and released weights load.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from seriatim.backbones.transformer import Transformer, TransformerConfig
from seriatim.canvas import Canvas, Remember, Set
from seriatim.conditions.condition import ClassCondition
from seriatim.data.base import Data
from seriatim.decoding.guess import Guess
from seriatim.decoding.guidance import Ahead, ByPhase, Guidance
from seriatim.decoding.loop import Decider, generate
from seriatim.decoding.nested import Nested
from seriatim.decoding.remembered import Remembered
from seriatim.decoding.sample import schedule
from seriatim.decoding.target import Branch, Target
from seriatim.embed import SlotEmbed, TokenEmbed, VectorEmbed, gather_values
from seriatim.factorization.pivots import PhasePlan, Pivots
from seriatim.heads.by_level import ByLevel
from seriatim.heads.categorical import CategoricalHead
from seriatim.heads.diffusion import DiffusionConfig, DiffusionHead
from seriatim.heads.diffusion_map import MapDiffusionConfig, MapDiffusionHead
from seriatim.initial import drawn
from seriatim.interop.hi_mar import WEIGHTS, model_of
from seriatim.laws.case import Case, Limit, randomise
from seriatim.layout import Layout, pyramid
from seriatim.maps import area_down
from seriatim.model import Model
from seriatim.noise import NOISES
from seriatim.objectives.masked import ByRate, ByShare, Masking, Unweighted, by_count
from seriatim.objectives.pivots import TwoPhases
from seriatim.plan import DERIVED, MASK, VALUE, Plan
from seriatim.random import Forced, Generator
from seriatim.systems.claim import Arm, Claim
from seriatim.systems.flow_trials import few_steps
from seriatim.systems.image_system import whole_cells
from seriatim.systems.meta import Meta
from seriatim.systems.system import Sampling
from seriatim.systems.vector_system import VectorSystem
from seriatim.training.recipe import Recipe

META = Meta(
    key="hi-mar",
    title="Hi-MAR: pivots at half the size, then all vectors",
    family="image",
    modality="image",
    paper="Hierarchical Masked Autoregressive Models with Low-Resolution Token Pivots (2025), arXiv 2505.20288",
    likelihood="none",
    summary="A small picture in random order, then the large one in few steps, each denoised as a whole map.",
)

WARMUP = 8  # the share of rows that are told of pivots has grown after this part of training (100 of 800 epochs)


@dataclass(frozen=True)
class Config:
    """Sizes; the defaults suit 8x8 digits in patches of 2x2 pixels. `side`: vectors in a row; `dim`: numbers in each;
    mean, deviation: of the numbers that the tokenizer gives. pivots: vectors in a row of the small picture (0: half as
    many); pivot_steps: forwards that draw them (0: four for each in a row).

    told: what the fine phase knows of pivots, their "states" or their "values"; rate: the share of samples in training
    in which it knows anything. head: of the fine phase, "map", or "token" for the one that draws pivots. head_width,
    head_depth, head_steps, head_clip: of the diffusion of a vector alone, map_...: of that of a map (map_heads 0: as
    many as `heads`).

    form: "single", or "released" for the masked autoencoder that was published, `buffer` class tokens in front of two
    stacks of `depth` layers each; guidance of pivots is there `pivot_guidance` times that of fine vectors.
    """

    side: int = 4
    dim: int = 4
    pivots: int = 0
    classes: int = 10
    width: int = 96
    depth: int = 4
    heads: int = 4
    dropout: float = 0.1
    mean: float = 0.0
    deviation: float = 1.0
    told: Literal["states", "values"] = "states"
    rate: float = 0.5
    head: Literal["map", "token"] = "map"
    head_width: int = 128
    head_depth: int = 2
    head_steps: int = 50
    head_clip: float | None = 4.0
    map_width: int = 96
    map_depth: int = 2
    map_steps: int = 50
    map_heads: int = 0
    pivot_steps: int = 0
    form: Literal["single", "released"] = "single"
    buffer: int = 64
    pivot_guidance: float = 1.0

    def __post_init__(self) -> None:
        pivots = self.pivots or self.side // 2
        object.__setattr__(self, "pivots", pivots)
        object.__setattr__(self, "map_heads", self.map_heads or self.heads)
        object.__setattr__(self, "pivot_steps", self.pivot_steps or 4 * pivots)
        if not 1 <= pivots < self.side or self.side % pivots:
            raise ValueError(f"pivots are fewer in a row than the {self.side} vectors, and divide them; got {pivots}")
        if self.head not in ("map", "token") or self.told not in ("states", "values"):
            raise ValueError(f"head is map or token, told is states or values; got {self.head!r} and {self.told!r}")
        if self.form not in ("single", "released") or self.buffer < 1:
            raise ValueError(
                f"form is single or released, with 1 class token or more; got {self.form!r}, {self.buffer}"
            )
        if self.form == "released" and (self.head, self.told) != ("map", "states"):
            raise ValueError("the released form draws maps, told of states: leave head and told as they are")
        if not (self.deviation > 0 and 0 <= self.rate <= 1 and self.pivot_steps > 0):
            raise ValueError("the deviation is positive, the rate between 0 and 1, and pivots take at least one step")


class PhaseClock(nn.Module):
    """The vector that drives the norms: that of the class, and one of the phase, which begins as zero."""

    def __init__(self, width: int):
        super().__init__()
        self.phase = nn.Parameter(torch.zeros(2, width))

    def forward(self, canvas: Canvas, plan: Plan, vector: Tensor | None) -> Tensor:
        assert isinstance(plan, PhasePlan) and vector is not None
        return vector + self.phase[plan.phase]


class PivotEmbed(nn.Module):
    """What stands in the slots of both phases: values by `inner`; the states of pivots by a linear map; and for each
    place of each phase a mask and a position of its own (pivots of the fine phase that are not told are masks)."""

    def __init__(self, inner: SlotEmbed, layout: Layout, std: float = 0.02):
        super().__init__()
        self.inner, self.width, self.vocab = inner, inner.width, getattr(inner, "vocab", None)
        self.pivots = int((layout.coord[:, 0] == 0).sum())
        places = self.pivots + layout.size
        self.state = nn.Linear(inner.width, inner.width)
        self.mask, self.position = (nn.Parameter(drawn(places, inner.width, std=std)) for _ in range(2))

    def forward(
        self, canvas: Canvas, plan: Plan, guess: Guess | None = None, prefix: Tensor | None = None
    ) -> Float[Tensor, "b s d"]:
        assert isinstance(plan, PhasePlan)
        element, source = plan.slots.element, plan.slots.source.to(self.mask.device)[..., None]
        x = self.inner.vectors(gather_values(canvas, element, "token"))[:, :, 0]
        element = element[..., 0]
        if canvas.memo is not None and bool((source == DERIVED).any()):
            memo = canvas.memo.gather(1, element.expand(canvas.batch, -1)[..., None].expand(-1, -1, self.width))
            x = torch.where(source == DERIVED, self.state(memo.to(self.state.weight)), x)
        place = (element + plan.phase * self.pivots).to(self.mask.device)
        return torch.where(source == MASK, self.mask[place], x) + self.position[place]


def build(config: Config | None = None) -> TwoPhases:
    """The model, with fresh weights."""
    c = config or Config()
    if c.form == "released":
        return model_of(
            c.side, c.dim, c.pivots, c.classes, c.width, c.depth, c.heads, c.buffer, c.head_width, c.head_depth,
            c.map_width, c.map_depth, c.map_heads, c.head_steps, c.map_steps, c.head_clip, c.dropout,
        )  # fmt: skip
    layout = pyramid((c.pivots, c.side))
    alone = DiffusionConfig(c.head_width, c.head_depth, steps=c.head_steps, clip=c.head_clip)
    fine: nn.Module = DiffusionHead(c.width, c.dim, alone)
    if c.head == "map":
        together = MapDiffusionConfig(c.map_width, c.map_depth, steps=c.map_steps, heads=c.map_heads, clip=c.head_clip)
        fine = MapDiffusionHead(c.width, c.dim, layout, layout.coord[:, 0].nonzero()[:, 0], together)
    head = ByLevel(layout, DiffusionHead(c.width, c.dim, alone), fine)
    share: Masking = ByShare(NOISES["cosine"])
    hiding = Unweighted(share) if c.head == "map" else share  # the loss of a map is that of all its places
    order = Pivots(c.told, whole=c.head == "map")
    return _assembled(c, order, VectorEmbed(c.dim, c.width, start=False, std=0.4), head, hiding)


def _assembled(c: Config, order: Pivots, inner: SlotEmbed, head: nn.Module, fine: Masking, **more: Any) -> TwoPhases:
    layout = pyramid((c.pivots, c.side))
    backbone = Transformer(TransformerConfig(c.width, c.depth, c.heads, dropout=c.dropout, vector=c.width))
    condition = {"class": ClassCondition(c.classes, c.width, std=0.4)}
    return TwoPhases(
        layout, order, PivotEmbed(inner, layout, 0.4), backbone, head, condition, PhaseClock(c.width),
        masking=ByRate(), fine=fine, weights=WEIGHTS, **more,
    )  # fmt: skip


class HiMAR(VectorSystem):
    """Pivots in random order, then all vectors in few steps."""

    meta, Config = META, Config
    model: TwoPhases
    sizes = MappingProxyType({
        "tiny": {},
        "small": {"width": 192, "depth": 8, "heads": 6, "head_width": 256, "map_width": 192, "map_depth": 3},
    })  # fmt: skip
    recipes = MappingProxyType({
        "tiny": Recipe(1500, batch=64, learning_rate=2e-3, drop=0.1, ema=0.995),
        "small": Recipe(6000, batch=64, learning_rate=1e-3, drop=0.1, bf16=True, ema=0.998),
    })  # fmt: skip
    sampling = Sampling(temperature=0.9, guidance=1.5, steps=4)
    schedule = "linear"

    @staticmethod
    def build(config: Any, tokenizer: Any) -> Model:
        return build(config)

    @classmethod
    def known(cls, tokenizer: Any, data: Data) -> dict[str, Any]:
        known = super().known(tokenizer, data)
        if known["side"] % 2:
            raise ValueError(
                f"{cls.meta.key} halves pictures, and these have {known['side']} vectors in a row: take a tokenizer "
                "with an even number"
            )
        return known

    def forward(self, batch: Mapping[str, Tensor], random: Generator, step: int, steps: int) -> tuple[Tensor, Tensor]:
        self.model.told = self.config.rate * min(1.0, WARMUP * step / max(steps, 1))
        return super().forward(batch, random, step, steps)

    def vectors(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """Those of the small picture, encoded by itself, and those of the picture."""
        small = self.halved(images.shape[-1])
        with torch.no_grad():
            pivots = small.encode(area_down(images, (small.side,) * 2))
        return torch.cat([(pivots - self.config.mean) / self.config.deviation, super().vectors(images)], 1)

    def halved(self, side: int) -> Any:
        """The tokenizer for pictures so much smaller, with the same weights."""
        small = copy.copy(self.tokenizer)
        small.config = replace(small.config, side=side * self.config.pivots // self.config.side)
        return small

    def known_elements(self, keep: Bool[Tensor, "h w"], layout: Layout) -> Bool[Tensor, "E"]:
        """Pivots and fine vectors all of whose pixels are kept. (Of given pivots the fine phase is told nothing: it
        sees the fine vectors in their places.)"""
        return torch.cat([whole_cells(keep, (n, n)).flatten() for n in (self.config.pivots, self.config.side)])

    def decider(self, sampling: Sampling) -> Decider:
        return Remembered(Nested(self.turns(sampling), rule="random"))

    def turns(self, sampling: Sampling) -> tuple[int, int]:
        """Steps of both phases."""
        return self.config.pivot_steps, sampling.steps or self.config.side**2

    def guidance(self, sampling: Sampling) -> Guidance | Sequence[Branch] | None:
        c, w = self.config, sampling.guidance
        if c.form == "single" or not w:
            return super().guidance(sampling)
        phases = zip((c.pivots**2, c.side**2), (c.pivot_guidance * w, w), self.turns(sampling), strict=True)
        return ByPhase(w, "linear", phases=tuple(
            Ahead(scale, "linear", total=n, left=schedule(n, steps, "cosine")) for n, scale, steps in phases
        ))  # fmt: skip

    def picture(self, codes: Tensor) -> Float[Tensor, "n c h w"]:
        return super().picture(codes[:, -(self.config.side**2) :])

    def so_far(self, canvas: Canvas) -> Float[Tensor, "n c h w"]:
        """What is known of the fine vectors, around it the small picture, enlarged; grey where neither is known."""
        codes, known, n = canvas.value["token"], canvas.known, self.config.pivots**2
        small, fine = self.halved(self.tokenizer.side), self.unfinished(codes, known[:, n:])
        coarse = small.decode(codes[:, :n] * self.config.deviation + self.config.mean)
        shown = _enlarged(known[:, :n].float().view(-1, 1, self.config.pivots, self.config.pivots), coarse.shape[-1])
        coarse = _enlarged(coarse * shown, fine.shape[-1])
        return torch.where(
            _enlarged(known[:, n:].float().view(-1, 1, *self.tokenizer.grid), fine.shape[-1]) > 0, fine, coarse
        )

    def unfinished(self, codes: Tensor, known: Tensor) -> Float[Tensor, "n c h w"]:
        return self.shown(self.picture(codes), known)


def _enlarged(x: Float[Tensor, "n c h w"], side: int) -> Float[Tensor, "n c side side"]:
    return F.interpolate(x, size=(side, side), mode="nearest")


LIKE = MappingProxyType({"guidance": 1.0, "temperature": 1.0})  # how all arms sample

CLAIM = Claim(
    text="Pivots buy steps: FD-s of glyphs drawn in 4 steps of their 64 vectors, against masked autoregression over "
    "these alone (MAR), at equal parameters and training seconds; what the states of pivots (against their values) and "
    "the map (against vectors one by one) add is shown beside it, and so are 8, 16 and 32 steps.",
    paper="ImageNet 256x256: FID 1.93 (B, 244M, 4 dense steps) against 2.31 of MAR-B, 1.66 against 1.78 (L)",
    metric="fd_s_4",
    arms={
        "hi-mar": Arm("hi-mar", {"width": 128}, minutes=3, sampling=LIKE, measure=few_steps),
        "mar": Arm("mar", {"width": 128, "depth": 5, "head_width": 139}, minutes=3, sampling=LIKE, measure=few_steps),
        "values": Arm("hi-mar", {"width": 128, "told": "values"}, minutes=3, sampling=LIKE, measure=few_steps),
        "token": Arm(
            "hi-mar", {"width": 128, "head": "token", "head_width": 144}, minutes=3, sampling=LIKE, measure=few_steps
        ),
    },
    ours="hi-mar",
    baseline="mar",
    other_seeds=(0,),
    data="glyphs",
)


# ---- what the laws run -----------------------------------------------------------------------------------------------

WHY = {1: "decided in any order", 2: "the order is drawn: the law is the mean over all orders"}
SHAPES = (1, 2), (1, 2)


class PivotCase(Case):
    """Two pivots and two fine elements: pivots tell by states, so the law depends on the step that decided each."""

    def law(self) -> Mapping[tuple[int, ...], float]:
        """The mean over all orders within the phases, element by element."""
        orders = [(*a, *b) for a in itertools.permutations((0, 1)) for b in itertools.permutations((2, 3))]
        values = list(itertools.product(range(self.vocab), repeat=4))
        x = torch.tensor(values)
        target = Target(self.model, self.rows(len(x)), cached=False)
        mean = sum(self._along(target, x, order).exp() for order in orders) / len(orders)
        return dict(zip(values, torch.as_tensor(mean).tolist(), strict=True))

    def _along(self, target: Target, x: Tensor, order: tuple[int, ...]) -> Float[Tensor, "n"]:
        """Log-probabilities of samples, decided in an order."""
        canvas, total = self.canvas(x), torch.zeros(len(x)).double()  # values stand where nothing may look yet
        for e in order:
            plan = target.plan(canvas)
            assert plan is not None
            with torch.no_grad():
                rows = target.forward(plan, canvas)
            column = int((torch.as_tensor(rows.element)[0] == e).nonzero()[0])
            total = total + rows.dist.log_probs()[torch.arange(len(x)), column, x[:, e]]
            element, state = torch.full((len(x), 1), e), rows.hidden[:, e : e + 1]
            canvas.apply([Set(x[:, e : e + 1], element), Remember(element, state)])
        return total

    def learn(self, steps: int = 40, batch: int = 32) -> tuple[float, float]:
        """Fewer steps than others, each of which is two forwards."""
        return super().learn(steps, batch)


def case() -> PivotCase:
    """A tiny instance for the laws, over ids (both diffusions are tested apart)."""
    c = Config(side=2, classes=3, width=16, depth=2, heads=2, dropout=0.0)
    layout, order = pyramid(SHAPES), Pivots(whole=False)
    embed = PivotEmbed(TokenEmbed(2, c.width, start=False), layout)
    backbone = Transformer(TransformerConfig(c.width, c.depth, c.heads, vector=c.width))
    condition = {"class": ClassCondition(c.classes, c.width)}
    model = TwoPhases(
        layout, order, embed, backbone, CategoricalHead(c.width, 2), condition, PhaseClock(c.width),
        masking=by_count, fine=by_count, judging=by_count,
    )  # fmt: skip
    label, spread = {"class": torch.tensor([1])}, {"class": torch.tensor([0, 1, 2])}
    steps = Nested((2, 2), "linear", "random")
    return PivotCase(randomise(model), 2, 0, label, spread, lambda: Remembered(steps), limits=(two_steps,), exempt=WHY)


def two_steps() -> Limit:
    """Revealed in one step, the elements of a phase are independent: each as if all of its phase were hidden."""
    one = case()
    model, label, x = one.model, one.rows(6), one.sample(6)
    assert isinstance(model, TwoPhases)
    forced, canvas = Forced(x), one.canvas(x)
    generate(Target(model, label), one.blank(x), Remembered(Nested()), random=forced)
    with torch.no_grad():
        losses = model.hidden_losses(canvas, canvas.open, label)
    return Limit("one step a phase = independent elements", forced.log_prob, -losses.sum(1))


class Telling(PivotEmbed):
    """Wrong on purpose: the value itself stands where the labels speak of a mask."""

    def forward(
        self, canvas: Canvas, plan: Plan, guess: Guess | None = None, prefix: Tensor | None = None
    ) -> Float[Tensor, "b s d"]:
        source = torch.where(plan.slots.source == MASK, VALUE, plan.slots.source)
        return super().forward(canvas, replace(plan, slots=replace(plan.slots, source=source)), guess, prefix)


def mutant() -> Case:
    """The case with a wrong feed, which the laws must catch."""
    wrong = case()
    wrong.model.embed.__class__ = Telling
    return wrong
