"""GPHT: a hierarchy of patch decoders, pretrained on any series (Liu et al. 2024, arXiv 2402.16516).

New in it: one model for every series, variate and horizon. Four causal transformers read a series at four rates, from
coarse to fine (the maxima of 8, 4, 2 and 1 steps), a token a segment, and each predicts the next segment; what one of
them predicts is taken from the series before the next one reads it. Their predictions add up, and a forecast of any
length is rolled on, segment by segment. Further training on one series (`--from`) tunes the four heads alone.

Groups of a maximum lie within a segment, which keeps it causal. In training, as published, the scale of a window is
that of its whole lookback, of which early segments should know nothing; the last one, which forecasts, may.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from seriatim.data.base import load_data
from seriatim.evaluation.series_insight import Insight, Lines
from seriatim.home import HOME
from seriatim.laws.case import Limit
from seriatim.laws.series import SeriesCase
from seriatim.systems.claim import Arm, Claim, Trial
from seriatim.systems.meta import Meta
from seriatim.systems.series_system import PUBLISHED, Forecaster, RollingSystem, in_line, layers, together
from seriatim.systems.series_trials import errors_at, ridge_at
from seriatim.tokenizers.series import Scale, channels_apart, patches

META = Meta(
    key="gpht",
    title="GPHT: a generative pretrained hierarchy",
    family="series",
    modality="series",
    paper="Generative Pretrained Hierarchical Transformer for Time Series Forecasting (2024), arXiv 2402.16516",
    likelihood="none",
    summary="Causal transformers over segments at four rates, each on what the coarser left; any horizon, rolled on.",
)


@dataclass(frozen=True)
class Config:
    """`segment`: steps of a token, of which the lookback is a whole number; `rates`: of each transformer, how many
    steps become one; `depth`: layers of each. The default suits minutes on two cores; `published` is the paper's."""

    lookback: int = 336
    horizon: int = 96
    segment: int = 48
    rates: tuple[int, ...] = (8, 4, 2, 1)
    width: int = 64
    hidden: int = 256
    depth: int = 3
    heads: int = 4
    dropout: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "rates", tuple(self.rates))  # JSON knows lists only
        if self.lookback % self.segment:
            raise ValueError(f"a lookback is a whole number of segments of {self.segment}, got {self.lookback}")
        wrong = [rate for rate in self.rates if self.segment % rate]
        if wrong or not self.rates:
            raise ValueError(f"a segment of {self.segment} steps is no whole number of groups of {wrong or 'nothing'}")


class Stage(nn.Module):
    """A series at one rate: what it says of the segment behind each."""

    plan = staticmethod(in_line)

    def __init__(self, c: Config, rate: int):
        super().__init__()
        self.rate, self.segment, self.dropout = rate, c.segment, c.dropout
        self.embed = nn.Linear(c.segment // rate, c.width, bias=False)
        self.register_buffer("place", places(c.lookback // c.segment, c.width), persistent=False)
        self.backbone = layers(c)
        self.head = nn.Linear(c.width, c.segment)

    def forward(self, x: Float[Tensor, "n t"]) -> Float[Tensor, "n t"]:
        pooled = F.max_pool1d(x[:, None], self.rate)[:, 0] if self.rate > 1 else x
        tokens = self.embed(patches(pooled, self.segment // self.rate)) + self.place.to(x)
        h = self.backbone(F.dropout(tokens, self.dropout, self.training), self.plan(tokens.shape[1]))
        return self.head(h).flatten(1)


def places(count: int, width: int) -> Float[Tensor, "count width"]:
    """Sines and cosines of places (Vaswani et al. 2017)."""
    angle = torch.arange(count)[:, None] * torch.exp(-torch.arange(0, width, 2) / width * torch.tensor(1e4).log())
    return torch.stack([angle.sin(), angle.cos()], 2).flatten(1)[:, :width]


class Hierarchy(Forecaster):
    """Stages one after another, each on what the earlier ones left."""

    def __init__(self, c: Config):
        super().__init__()
        self.segment = c.segment
        self.stages = nn.ModuleList(Stage(c, rate) for rate in c.rates)

    def forward(self, x: Float[Tensor, "n t"]) -> Float[Tensor, "n t"]:
        """What comes one segment behind each step."""
        return torch.stack(self.contributions(x)).sum(0)

    def contributions(self, x: Float[Tensor, "n t"]) -> list[Float[Tensor, "n t"]]:
        """What each stage adds to that."""
        out = []
        for stage in self.stages:
            out.append(stage(x))
            x = x - F.pad(out[-1][:, : -self.segment], (self.segment, 0))
        return out


class GPHT(RollingSystem):
    """One model for all horizons, each variate by itself."""

    meta, Config = META, Config
    begins_as = "gpht"
    sizes = MappingProxyType({"tiny": {}, "published": {"width": 512, "hidden": 2048, "heads": 8}})
    recipes = MappingProxyType({
        "tiny": replace(PUBLISHED, batch=64, learning_rate=1e-3),
        "published": replace(PUBLISHED, batch=64),
        "further": replace(PUBLISHED, batch=32),
    })  # fmt: skip

    @staticmethod
    def build(config: Any, tokenizer: Any = None) -> Any:
        return Hierarchy(config)

    @torch.no_grad()
    def insights(self, batch: Mapping[str, Tensor], columns: Sequence[str]) -> dict[str, Insight]:
        """What each stage says of the next segment of the last variate, and their sum."""
        past, n = batch["past"][:, :, -1:], self.config.segment
        parts = self.model.contributions(channels_apart(Scale.of(past).on(past)))
        said = {f"stage at rate {r}": part[0, -n:] for r, part in zip(self.config.rates, parts, strict=True)}
        title = f"What stages say of the next {n} steps of {columns[-1]}, on the scale of the window"
        return {"stages": Lines(title, {**said, "their sum": torch.stack(parts).sum(0)[0, -n:]})}

    def take_over(self, base: Any) -> None:
        """Begin with the weights of a pretrained one, and train the heads alone."""
        super().take_over(base)
        for name, p in self.model.named_parameters():
            p.requires_grad_(".head." in name)


# ---- the claim -------------------------------------------------------------------------------------------------------

HORIZONS = (96, 192, 336, 720)
MIXTURE = "ETTh1,ETTh2,co2,elnino,sunspots"


def _measured(trained: Any) -> Mapping[str, float]:
    """On ETTh1, whatever it was trained on: the mean over four horizons, and each."""
    errors = errors_at(trained.system, load_data("ETTh1", "series"), HORIZONS)
    return {"mse": fmean(errors[f"mse_{h}"] for h in HORIZONS), **errors}


def _trained(_: Any, seed: int, data: str, minutes: float, further: float = 0.0) -> Mapping[str, float]:
    """A training on `data`, and of the heads alone on ETTh1 for some minutes more; gone on with where it was cut."""
    from seriatim.verbs.train import train  # which knows this file

    folder = HOME / "claims" / "gpht" / f"{data}-{minutes:g}-{seed}"
    first = train("gpht", data, out=folder, minutes=minutes, resume=True, settings={"seed": seed, "batch": BATCH})
    if not further:
        return _measured(first)
    tuned = {"seed": seed, "batch": PUBLISHED.batch}
    return _measured(
        train("gpht", "ETTh1", from_=folder, out=f"{folder}-tuned", minutes=further, resume=True, settings=tuned)
    )


def _ridge(_: Any, seed: int) -> Mapping[str, float]:
    errors = ridge_at(_, seed, Config().lookback, HORIZONS)
    return {"mse": fmean(errors[f"mse_{h}"] for h in HORIZONS), **errors}


BATCH = 448  # windows of one variate, as many as 64 of seven
CLAIM = Claim(
    text="Of equal minutes, those on several series and then of the heads alone on ETTh1 give better forecasts of "
    "ETTh1 at 96 to 720 steps by one model than those on ETTh1 alone; the mixture without further training, one stage "
    "in place of four, and a ridge regression for each horizon are further arms.",
    paper="mean squared error on ETTh1 over four horizons: .428 pretrained on eight sets, .403 with its heads tuned",
    metric="mse",
    arms={
        "tuned": Trial(None, partial(_trained, data=MIXTURE, minutes=3.0, further=1.0)),
        "alone": Arm("gpht", minutes=4.0, measure=_measured),
        "mixture": Trial(None, partial(_trained, data=MIXTURE, minutes=4.0)),
        "one stage": Arm("gpht", {"rates": (1,)}, minutes=4.0, measure=_measured),
        "ridge": Trial(None, _ridge),
    },
    ours="tuned",
    baseline="alone",
    seeds=(0, 1, 2),
    spread_seeds=(0, 1, 2),
    other_seeds=(0,),
    data="ETTh1",
)

# ---- what the laws run -----------------------------------------------------------------------------------------------


def _tiny(**more: Any) -> SeriesCase:
    c = Config(lookback=12, horizon=8, segment=4, width=16, hidden=32, depth=1, heads=2, **more)
    return SeriesCase(GPHT(c), segment=4, rate=3e-3)


def case() -> SeriesCase:
    """A tiny instance for the laws."""
    made = _tiny(rates=(2, 1))
    made.limits = (_one_stage,)
    return made


def _one_stage() -> Limit:
    """One stage at the rate 1 is a plain decoder over patches."""
    one = _tiny(rates=(1,))
    x = one.batch()["past"][..., 0]
    stage: Any = one.system.model.stages[0]
    with torch.no_grad():
        plain = stage.head(stage.backbone(stage.embed(x.unflatten(1, (-1, 4))) + stage.place.double(), in_line(3)))
        return Limit("one stage = a decoder over patches", one.system.model(x), plain.flatten(1))


def mutant() -> SeriesCase:
    """Wrong on purpose: segments see those behind them."""
    wrong = case()
    for stage in wrong.system.model.stages:
        stage.plan = together
    return wrong
