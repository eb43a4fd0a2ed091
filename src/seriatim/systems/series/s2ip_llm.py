"""S2IP-LLM: prompts out of a space of words (Pan et al. 2024, arXiv 2403.05798).

New in it: trend, season and rest of a window, patch beside patch, become tokens; the mean of them looks for its nearest
neighbours among anchors, which are sums of the model's word vectors, and these stand in front as a prompt. Training
draws both together. Of the language model's first layers norms and places alone are trained.

As published, all states are read out as three equal stretches by one linear map, whose results add up; the stretches
are of slots in a line, not of trend, season and rest, though there are three of both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from seriatim.data.series import SeriesData
from seriatim.evaluation.series_insight import Insight, Lines, Words
from seriatim.laws.case import Limit
from seriatim.laws.series import SeriesCase, shifted
from seriatim.random import Generator
from seriatim.systems.frozen_text import TINY, FrozenText
from seriatim.systems.meta import Meta
from seriatim.systems.series_system import PUBLISHED, Forecaster, SeriesSystem, patching
from seriatim.systems.series_trials import of_text
from seriatim.tokenizers.series import Scale, channels_apart, channels_together, overlapping, parted, patch_count

META = Meta(
    key="s2ip-llm",
    title="S2IP-LLM: prompts of the semantic space",
    family="series",
    modality="series",
    paper="S2IP-LLM: Semantic Space Informed Prompt Learning with LLM for Time Series Forecasting (2024), "
    "arXiv 2403.05798",
    likelihood="none",
    summary="Trend, season and rest as tokens, behind the anchors of word vectors that are nearest to them.",
)

STRETCHES = 3


@dataclass(frozen=True)
class Config:
    """`patch`, `stride`: steps of a patch, and from one to the next; `mean`, `period`: steps of the trend's mean and of
    the season; `anchors`: sums of word vectors (1,000 as published), of which `prompt` are chosen; `pull`: how much
    their cosines count in the loss; `model`, `weights`: a language model, pretrained, random or none; `layers`: the
    first so many of it (None: all)."""

    lookback: int = 512
    horizon: int = 96
    patch: int = 16
    stride: int = 8
    mean: int = 96
    period: int = 24
    anchors: int = 128
    prompt: int = 5
    pull: float = 0.05
    model: str = "zoo:text-base"
    weights: str = "pretrained"
    layers: int | None = 2

    @property
    def tokens(self) -> int:
        """Patches of a lookback."""
        return patch_count(self.lookback, self.patch, self.stride)

    def __post_init__(self) -> None:
        _ = self.tokens  # which says what does not fit
        if not 0 <= self.prompt <= self.anchors:
            raise ValueError(f"of {self.anchors} anchors {self.prompt} cannot be chosen")


class Informed(Forecaster):
    """Parts of a series behind their nearest anchors, through a language model."""

    def __init__(self, c: Config):
        super().__init__()
        self.c, self.text = c, FrozenText(c.model, c.weights, c.layers, ("norm", "place"))
        states = (c.prompt + c.tokens) * self.text.width
        if states % STRETCHES:
            raise ValueError(
                f"{c.prompt + c.tokens} states of {self.text.width} numbers make no {STRETCHES} equal stretches: take "
                f"a prompt of {-c.tokens % STRETCHES or STRETCHES}"
            )
        self.embed = nn.Linear(STRETCHES * c.patch, self.text.width)
        self.choose = nn.Linear(len(self.text.words), c.anchors)
        self.head = nn.Linear(states // STRETCHES, c.horizon)

    def forward(
        self, past: Float[Tensor, "b t c"], past_marks: Tensor, future_marks: Tensor, scale: Scale | None = None
    ) -> Float[Tensor, "b h c"]:
        return self.both(past, scale)[0]

    def both(self, past: Float[Tensor, "b t c"], scale: Scale | None = None) -> tuple[Tensor, Float[Tensor, " n"]]:
        """The forecast, and of each window and variate the sum of the cosines of its anchors."""
        scale = scale or Scale.of(past)
        tokens = self.tokens(channels_apart(scale.on(past)))
        anchors, chosen, alike = self.nearest(tokens)
        h = self.text(torch.cat([anchors[chosen], tokens], 1))
        made = self.head(h.flatten(1).unflatten(1, (STRETCHES, -1))).sum(1)
        return scale.off(channels_together(made, past.shape[2])), alike.sum(1)

    def tokens(self, x: Float[Tensor, "n t"]) -> Float[Tensor, "n p d"]:
        """Trend, season and rest of the same steps, side by side."""
        c = self.c
        parts = [overlapping(part, c.patch, c.stride) for part in parted(x, c.mean, c.period)]
        return self.embed(torch.cat(parts, 2))

    def nearest(self, tokens: Float[Tensor, "n p d"]) -> tuple[Float[Tensor, "a d"], Int[Tensor, "n k"], Tensor]:
        """All anchors, the numbers of those that are nearest to the mean of the tokens, and their cosines."""
        anchors = self.choose(self.text.words.detach().T).T
        cosines = F.normalize(tokens.mean(1), dim=-1) @ F.normalize(anchors, dim=-1).T
        alike, chosen = cosines.topk(self.c.prompt, dim=1)
        return anchors, chosen, alike


class S2IP(SeriesSystem):
    """One forward, each variate by itself, all steps."""

    meta, Config = META, Config
    looks = 32
    few = 200
    validation_batch = 16
    sizes = MappingProxyType({
        "tiny": {},
        "published": {"anchors": 1000, "prompt": 4, "layers": 6},
    })  # fmt: skip
    recipes = MappingProxyType({
        "tiny": replace(PUBLISHED, batch=4, learning_rate=3e-4, halving=False, warm_up=0.1),
        "published": replace(PUBLISHED, batch=128, halving=False),
    })  # fmt: skip

    @staticmethod
    def build(config: Any, tokenizer: Any = None) -> Any:
        return Informed(config)

    @torch.no_grad()
    def insights(self, batch: Mapping[str, Tensor], columns: Sequence[str]) -> dict[str, Insight]:
        """Trend, season and rest of the last variate, and words near to the anchors of each."""
        past, c = batch["past"], self.config
        x = channels_apart(Scale.of(past).on(past))
        anchors, chosen, _ = self.model.nearest(self.model.tokens(x))
        rows: dict[str, list[str]] = {}
        for name, numbers in zip(columns, chosen, strict=True):
            near = self.model.text.near(anchors[numbers], 3)
            rows |= {f"{name}, anchor {i}": words for i, words in zip(numbers.tolist(), near, strict=True)}
        parts = parted(x[-1:], c.mean, c.period)
        curves = {name: getattr(parts, name)[0] for name in parts._fields}
        title = f"{columns[-1]}: a window as trend, season and rest, on its own scale"
        return {
            "parts": Lines(title, {"window": x[-1], **curves}),
            "anchors": Words("Anchors that stand in front, and the words that are nearest to them", rows),
        }

    @classmethod
    def fitting(cls, data: SeriesData, settings: Mapping[str, Any], size: str | None) -> dict[str, int]:
        """Patches that fit the lookback, a prompt that makes whole stretches with them, and, on a lookback that does
        not hold two of the published means, a mean and a season that it holds."""
        found = super().fitting(data, settings, size)
        lookback = {"lookback": Config.lookback, **found, **settings}["lookback"]
        found |= patching(lookback, settings, Config)
        patches = {"patch": Config.patch, "stride": Config.stride, **found, **settings}
        tokens = patch_count(lookback, patches["patch"], patches["stride"])
        if "prompt" not in cls.sizes.get(size or "", {}):
            found |= {"prompt": STRETCHES + -tokens % STRETCHES}
        if lookback < 2 * Config.mean:
            half = max(lookback // 2, 1)
            found |= {"mean": half, "period": min(data.series.frequency.season, half)}
        return found

    def losses(self, batch: Mapping[str, Tensor], random: Generator, drop: float) -> tuple[Tensor, Tensor]:
        """Squared errors, less what the nearness of anchors counts."""
        value, alike = self.model.both(batch["past"])
        count = torch.tensor(value.numel())
        return (value - batch["future"]).square().sum() - self.config.pull * alike.mean() * count, count


CLAIM = of_text(
    "s2ip-llm", lookback=512, minutes=3.0, paper="mean squared error on ETTh1 .366 at 96 and .440 at 720 steps"
)

# ---- what the laws run -----------------------------------------------------------------------------------------------


def _tiny(**more: Any) -> SeriesCase:
    fixed = {"lookback": 8, "horizon": 3, "patch": 4, "stride": 2, "mean": 3, "period": 2, "anchors": 5, "layers": 1}
    return SeriesCase(S2IP(Config(**{**fixed, "prompt": 2, "model": TINY, **more})), rate=2e-2)  # type: ignore[arg-type]


def case() -> SeriesCase:
    """A tiny instance for the laws."""
    made = _tiny()
    made.limits = (_sum_of_parts, _no_model)
    return made


def _sum_of_parts() -> Limit:
    """Trend, season and rest add up to the series."""
    x = torch.randn(2, 30, generator=torch.Generator().manual_seed(0)).double()
    return Limit("trend + season + rest = the series", torch.stack(tuple(parted(x, 7, 4))).sum(0), x)


def _no_model() -> Limit:
    """Without model and prompt, three stretches through one map are one map, three times, side by side."""
    model = _tiny(weights="none").system.model
    past = torch.randn(2, 8, 1, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        scale = Scale.of(past)
        tokens = model.tokens(scale.on(past)[..., 0])
        anchors, chosen, _ = model.nearest(tokens)
        whole = torch.cat([anchors[chosen], tokens], 1).flatten(1)
        want = scale.off((whole @ model.head.weight.repeat(1, STRETCHES).T + STRETCHES * model.head.bias)[..., None])
        return Limit("three stretches = one map side by side", model(past, past, past), want)


def mutant() -> SeriesCase:
    """Wrong on purpose: the lookback that is read ends one step late."""
    return shifted(case())
