"""iTransformer: variates as tokens (Liu et al. 2024, arXiv 2310.06625).

New in it: a token is the whole lookback of one variate, not what all variates are at one time. Attention, unmasked,
relates variates; the feed-forward network reads each one's past, and a linear map gives its whole horizon in one
forward. Hour, weekday and days, told as four more variates, go through the same embedding.

There is no order: all steps of the horizon are read at once. Each window is seen on its own scale (`Scale`); what
stands in its place on the scale of another gives the same forecast on that scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from seriatim.evaluation.attention_distance import watched_attention
from seriatim.evaluation.series_insight import Heat, Insight
from seriatim.laws.case import Limit
from seriatim.laws.series import SeriesCase, shifted
from seriatim.systems.claim import Arm, Claim, Trial
from seriatim.systems.meta import Meta
from seriatim.systems.series_system import Forecaster, SeriesSystem, layers, together
from seriatim.systems.series_trials import judged_at, ridge_errors
from seriatim.tokenizers.series import Scale

META = Meta(
    key="itransformer",
    title="iTransformer",
    family="series",
    modality="series",
    paper="iTransformer: Inverted Transformers Are Effective for Time Series Forecasting (2024), arXiv 2310.06625",
    likelihood="none",
    summary="The whole past of each variate is a token; attention relates variates, one forward gives all steps.",
)


@dataclass(frozen=True)
class Config:
    """The published settings for ETTh1 at horizons of 96 and 192; 336 and 720 take a width and `hidden` of 512, ETTh2
    of 128. `hidden`: width of the feed-forward networks."""

    lookback: int = 96
    horizon: int = 96
    width: int = 256
    hidden: int = 256
    depth: int = 2
    heads: int = 8
    dropout: float = 0.1


class Inverted(Forecaster):
    """Lookbacks, one token a variate, through a transformer; any number of variates."""

    def __init__(self, c: Config):
        super().__init__()
        self.embed = nn.Linear(c.lookback, c.width)
        self.backbone = layers(c)
        self.head = nn.Linear(c.width, c.horizon)
        self.dropout = c.dropout

    def forward(
        self, past: Float[Tensor, "b t c"], past_marks: Float[Tensor, "b t m"], future_marks: Tensor,
        scale: Scale | None = None,
    ) -> Float[Tensor, "b h c"]:  # fmt: skip
        scale = scale or Scale.of(past)
        tokens = torch.cat([scale.on(past), past_marks.to(past)], 2).transpose(1, 2)
        x = F.dropout(self.embed(tokens), self.dropout, self.training)
        h = self.backbone(x, together(x.shape[1]))[:, : past.shape[2]]
        return scale.off(self.head(h).transpose(1, 2))


class ITransformer(SeriesSystem):
    """One forward, all variates, all steps."""

    meta, Config = META, Config
    sizes = MappingProxyType({
        "tiny": {},
        "wide": {"width": 512, "hidden": 512},
        "narrow": {"width": 128, "hidden": 128},
    })  # fmt: skip

    @staticmethod
    def build(config: Any, tokenizer: Any = None) -> Any:
        return Inverted(config)

    @torch.no_grad()
    def insights(self, batch: Mapping[str, Tensor], columns: Sequence[str]) -> dict[str, Insight]:
        """How much each variate attends to each, mean over heads."""
        with watched_attention(self.model.backbone) as seen:
            self.model(*self.given(batch))
        marks = [f"mark {i + 1}" for i in range(batch["past_marks"].shape[2])]
        maps = {f"layer {i + 1}": weights[0].mean(0) for i, weights in sorted(seen.items())}
        return {"attention": Heat("Attention between variates, mean over heads", maps, (*columns, *marks))}


CLAIM = Claim(
    text="On ETTh2, at a lookback and a horizon of 96 steps, relating variates by attention gives better forecasts "
    "than a linear map of each variate by itself (DLinear). A ridge regression of the same lookback is a further arm. "
    "The published figures themselves are held to in benchmarks/series_table.py.",
    paper="mean squared error .297 against DLinear's .333",
    metric="mse",
    arms={
        "itransformer": Arm("itransformer", size="narrow", measure=partial(judged_at, horizon=96)),
        "dlinear": Arm("dlinear", {"learning_rate": 0.05}, measure=partial(judged_at, horizon=96)),
        "ridge": Trial(None, partial(ridge_errors, lookback=96, horizon=96, data="ETTh2")),
    },
    ours="itransformer",
    baseline="dlinear",
    seeds=(0, 1, 2),
    other_seeds=(0,),
    data="ETTh2",
)


def _tiny() -> SeriesCase:
    return SeriesCase(ITransformer(Config(lookback=6, horizon=3, width=16, hidden=16, depth=1, heads=2)), rate=2e-2)


def case() -> SeriesCase:
    """A tiny instance for the laws."""
    made = _tiny()
    made.limits = (_alone,)
    return made


def _alone() -> Limit:
    """One variate, and no marks: attention has no choice, and its values pass through two linear maps."""
    model = _tiny().system.model
    past = torch.randn(2, 6, 1, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        scale, b = Scale.of(past), model.backbone
        x = model.embed(scale.on(past).transpose(1, 2))
        for w in b.layers:
            d = x.shape[-1]
            told = F.linear(F.linear(x, w.qkv[-d:], w.qkv_bias[-d:]), w.out, w.out_bias)
            x = F.layer_norm(x + told, (d,), w.norm1, w.norm1_bias)
            h = F.linear(F.gelu(F.linear(x, w.up, w.up_bias)), w.down, w.down_bias)
            x = F.layer_norm(x + h, (d,), w.norm2, w.norm2_bias)
        want = scale.off(model.head(F.layer_norm(x, (d,), b.norm, b.norm_bias)).transpose(1, 2))
        return Limit("one variate = a network of its past alone", model(past, past[..., :0], past[..., :0]), want)


def mutant() -> SeriesCase:
    """Wrong on purpose: the lookback that is embedded ends one step late."""
    return shifted(case())
