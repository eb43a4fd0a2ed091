"""AutoTimes: a language model rolls series on (Liu et al. 2024, arXiv 2402.02370).

New in it: segments of a series stand where a frozen language model reads tokens, one map in and one map out are all
that is trained, and the model predicts the next segment at every place, as it was made to predict the next token. When
a segment begins and ends is told in words, read once by the same model, and added to the segment's vector. One model
serves all horizons, each variate by itself.

As published, the scale of a window is that of its whole lookback, of which early segments should know nothing in
training; the last one, which forecasts, may.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from seriatim.data.series import Part, Windows
from seriatim.laws.case import Limit
from seriatim.laws.series import SeriesCase
from seriatim.systems.claim import Arm, Claim, Trial
from seriatim.systems.frozen_text import TINY, FrozenText
from seriatim.systems.meta import Meta
from seriatim.systems.series_system import PUBLISHED, Forecaster, RollingSystem, together
from seriatim.systems.series_trials import errors_at, ridge_at
from seriatim.tokenizers.series import Scale, channels_apart, channels_together, patches

META = Meta(
    key="autotimes",
    title="AutoTimes: a frozen language model over segments",
    family="series",
    modality="series",
    paper="AutoTimes: Autoregressive Time Series Forecasters via Large Language Models (2024), arXiv 2402.02370",
    likelihood="none",
    summary="Segments in place of a frozen language model's tokens, with their times in words; any horizon, rolled on.",
)


@dataclass(frozen=True)
class Config:
    """`segment`: steps of a token, of which the lookback is a whole number; `model`: whatever loads as a language
    model; `weights`: pretrained, random or none; `stamps`: whether times are told in words; `hidden`: width of a layer
    with tanh in both maps (0: they are linear, as published for Llama; 512 for GPT-2)."""

    lookback: int = 672
    horizon: int = 96
    segment: int = 96
    model: str = "zoo:text-base"
    weights: str = "pretrained"
    stamps: bool = True
    hidden: int = 0

    def __post_init__(self) -> None:
        if self.lookback % self.segment:
            raise ValueError(f"a lookback is a whole number of segments of {self.segment}, got {self.lookback}")


def in_words(first: int, last: int) -> str:
    """When a segment begins and ends, in milliseconds since 1970, as the paper tells it."""
    begin, end = (str(np.datetime64(t, "ms").astype("datetime64[s]")).replace("T", " ") for t in (first, last))
    return f"This is Time Series from {begin} to {end}"


class Segments(Forecaster):
    """Segments in, the next segments out, through a frozen language model."""

    def __init__(self, c: Config):
        super().__init__()
        self.segment = c.segment
        self.text = FrozenText(c.model, c.weights)
        self.embed = _map(c.segment, self.text.width, c.hidden)
        self.head = _map(self.text.width, c.segment, c.hidden)
        told = c.stamps and c.weights != "none"
        self.mix = nn.Parameter(torch.ones(())) if told else None

    def forward(self, x: Float[Tensor, "b t c"], time: Int[Tensor, "b t 1"]) -> Float[Tensor, "b t c"]:
        """What comes one segment behind each step; times in milliseconds."""
        tokens = self.embed(patches(channels_apart(x), self.segment))
        if self.mix is not None:
            stamps = self.stamps(time).repeat_interleave(x.shape[2], 0)
            tokens = F.normalize(tokens, dim=-1) + self.mix * F.normalize(stamps, dim=-1)
        return channels_together(self.head(self.text(tokens)).flatten(1), x.shape[2])

    def stamps(self, time: Int[Tensor, "b t 1"]) -> Float[Tensor, "b p d"]:
        """What the language model makes of the times of each segment."""
        ends = time[:, self.segment - 1 :: self.segment, 0]
        texts = [
            [in_words(*ends_of) for ends_of in zip(*row, strict=True)]
            for row in zip(time[:, :: self.segment, 0].tolist(), ends.tolist(), strict=True)
        ]
        return self.text.states([text for row in texts for text in row]).unflatten(0, (len(time), -1))


def _map(before: int, behind: int, hidden: int) -> nn.Module:
    if not hidden:
        return nn.Linear(before, behind)
    return nn.Sequential(nn.Linear(before, hidden), nn.Tanh(), nn.Linear(hidden, behind))


class AutoTimes(RollingSystem):
    """One model for all horizons, each variate by itself."""

    meta, Config = META, Config
    told = "time"
    looks = 128
    few = 200
    sizes = MappingProxyType({"tiny": {}, "gpt2": {"hidden": 512}})
    recipes = MappingProxyType({
        "tiny": replace(PUBLISHED, batch=8, learning_rate=1e-3, halving=False, warm_up=0.05),
        "gpt2": replace(PUBLISHED, batch=256, learning_rate=2e-3, halving=False),
    })  # fmt: skip

    @staticmethod
    def build(config: Any, tokenizer: Any = None) -> Any:
        return Segments(config)

    def examples(self, part: Part) -> Windows:
        """Windows, whose times have been read once."""
        if self.model.mix is not None and hasattr(part, "data"):
            time, n = part.data.time[:, 0].tolist(), self.config.segment
            begin = max(part.begin - self.config.lookback, 0)
            self.model.text.learn([in_words(time[i], time[i + n - 1]) for i in range(begin, part.end - n + 1)])
        return super().examples(part)

    def behind(
        self, past: Float[Tensor, "b t c"], told: Tensor | None = None, scale: Scale | None = None
    ) -> Float[Tensor, "b t c"]:
        scale = scale or Scale.of(past)
        return scale.off(self.model(scale.on(past), told))


# ---- the claim -------------------------------------------------------------------------------------------------------

HORIZONS = (96, 720)


def _measured(trained: Any) -> Mapping[str, float]:
    return errors_at(trained.system, trained.data, HORIZONS)


def _arms(weights: Sequence[str], minutes: float) -> dict[str, Arm | Trial]:
    return {name: Arm("autotimes", {"weights": name}, minutes=minutes, measure=_measured) for name in weights}


CLAIM = Claim(
    text="Forecasts of ETTh1 at 720 steps, rolled on by 96, are better through a frozen language model that was "
    "trained on text than through the same model with random matrices; no model at all and a ridge regression of the "
    "same lookback are further arms, 96 steps a further horizon.",
    paper="mean squared error at 96 and 720 steps: .360 and .406 with Llama-7B, .365 and .450 without it",
    metric="mse_720",
    arms={
        **_arms(("pretrained", "random", "none"), 4.0),
        "ridge": Trial(None, partial(ridge_at, lookback=672, horizons=HORIZONS)),
    },
    ours="pretrained",
    baseline="random",
    seeds=(0, 1, 2),
    spread_seeds=(0, 1, 2),
    other_seeds=(0,),
    data="ETTh1",
)

# ---- what the laws run -----------------------------------------------------------------------------------------------


def _tiny(**more: Any) -> SeriesCase:
    return SeriesCase(AutoTimes(Config(lookback=12, horizon=8, segment=4, model=TINY, **more)), segment=4, rate=3e-2)


def case() -> SeriesCase:
    """A tiny instance for the laws."""
    made = _tiny()
    made.limits = (_no_model, _no_stamps)
    return made


def _no_model() -> Limit:
    """Without a language model the maps are linear autoregression from segment to segment."""
    system = _tiny(weights="none").system
    past = torch.randn(2, 12, 3, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        x = past.transpose(1, 2).unflatten(2, (3, 4))
        want = system.model.head(system.model.embed(x)).flatten(2).transpose(1, 2)
        return Limit("no model = a linear map of each segment", system.model(past, past[..., :1]), want)


def _no_stamps() -> Limit:
    """Stamps that count for nothing leave vectors of length one."""
    with_them, without = _tiny(), _tiny(stamps=False)
    model, plain = with_them.system.model, without.system.model
    batch = with_them.batch()
    with torch.no_grad():
        model.mix.zero_()
        plain.load_state_dict({k: v for k, v in model.state_dict().items() if k != "mix"})
        tokens = F.normalize(plain.embed(patches(channels_apart(batch["past"]), 4)), dim=-1)
        want = channels_together(plain.head(plain.text(tokens)).flatten(1), 3)
        return Limit("stamps that count for nothing = none", model(batch["past"], batch["past_time"]), want)


def mutant() -> SeriesCase:
    """Wrong on purpose: segments see those behind them."""
    wrong = case()
    wrong.system.model.text.forward = lambda x: wrong.system.model.text.system.model.backbone(x, together(x.shape[1]))
    return wrong
