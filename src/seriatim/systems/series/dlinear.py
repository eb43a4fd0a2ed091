"""DLinear: one layer, twice (Zeng et al. 2023, arXiv 2205.13504).

New in it: how little it takes. A moving mean parts the lookback into trend and rest, a linear map of each gives its
horizon, and their sum is the forecast; all variates share the maps. It beat the transformers for series of its time,
and is what any forecaster is to be compared with.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from seriatim.laws.series import SeriesCase, shifted
from seriatim.systems.meta import Meta
from seriatim.systems.series_system import PUBLISHED, Forecaster, SeriesSystem
from seriatim.tokenizers.series import Scale, channels_apart, channels_together, smoothed

META = Meta(
    key="dlinear",
    title="DLinear",
    family="series",
    modality="series",
    paper="Are Transformers Effective for Time Series Forecasting? (2023), arXiv 2205.13504",
    likelihood="none",
    summary="A linear map of the trend and one of the rest, shared by all variates.",
)


@dataclass(frozen=True)
class Config:
    """`smooth`: steps of the moving mean, an odd number. The paper's lookback is 336; on ETTh2 its learning rate is
    0.05. At such rates a first look at held-out data may be lucky, so training goes on through all passes."""

    lookback: int = 96
    horizon: int = 96
    smooth: int = 25


class Decomposed(Forecaster):
    """Trend and rest of a lookback, each through its own map."""

    def __init__(self, c: Config):
        super().__init__()
        if c.smooth < 1 or c.smooth % 2 == 0:
            raise ValueError(f"a moving mean is of an odd number of steps, got {c.smooth}")
        self.smooth = c.smooth
        self.trend, self.rest = nn.Linear(c.lookback, c.horizon), nn.Linear(c.lookback, c.horizon)

    def forward(
        self, past: Float[Tensor, "b t c"], past_marks: Tensor, future_marks: Tensor, scale: Scale | None = None
    ) -> Float[Tensor, "b h c"]:
        x = channels_apart(past)
        trend = smoothed(x, self.smooth)
        return channels_together(self.trend(trend) + self.rest(x - trend), past.shape[2])


class DLinear(SeriesSystem):
    """One forward, each variate by itself, all steps."""

    meta, Config = META, Config
    scales = False
    sizes = MappingProxyType({"tiny": {}, "published": {"lookback": 336}})
    recipes = MappingProxyType({"tiny": replace(PUBLISHED, learning_rate=5e-3, patience=10)})

    @staticmethod
    def build(config: Any, tokenizer: Any = None) -> Any:
        return Decomposed(config)


def case() -> SeriesCase:
    """A tiny instance for the laws."""
    return SeriesCase(DLinear(Config(lookback=6, horizon=3, smooth=3)))


def mutant() -> SeriesCase:
    """Wrong on purpose: the lookback that is mapped ends one step late."""
    return shifted(case())
