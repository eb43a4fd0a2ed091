"""Time-LLM: a series retold in a language model's words (Jin et al. 2024, arXiv 2310.01728).

New in it: reprogramming. Patches of a series ask a few prototypes, which are sums of the model's word vectors, and what
they get is of the model's own world; a prompt in front says what the series is, what is asked for, and statistics of
the window. The language model stays frozen; its states of the patches are flattened into all steps of the horizon.

Of the published code two things are otherwise: prompts are padded in front and not seen, so that a window's forecast
does not depend on its company, and lags are those of half a window behind the first, where circular autocorrelation
would name each twice and lag 0 always. Numbers have three digits, which keeps prompts short.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from seriatim.data.series import SeriesData
from seriatim.evaluation.series_insight import Insight, Words
from seriatim.laws.case import Limit
from seriatim.laws.series import SeriesCase, shifted
from seriatim.systems.frozen_text import TINY, FrozenText
from seriatim.systems.meta import Meta
from seriatim.systems.series_system import PUBLISHED, Forecaster, SeriesSystem, patching
from seriatim.systems.series_trials import of_text
from seriatim.tokenizers.series import Scale, channels_apart, channels_together, overlapping, patch_count

META = Meta(
    key="time-llm",
    title="Time-LLM: series reprogrammed into words",
    family="series",
    modality="series",
    paper="Time-LLM: Time Series Forecasting by Reprogramming Large Language Models (2024), arXiv 2310.01728",
    likelihood="none",
    summary="Patches ask prototypes of word vectors, behind a prompt with statistics, for a frozen language model.",
)

LAGS = 5
ASKED = 10  # prototypes that are shown


@dataclass(frozen=True)
class Config:
    """`patch`, `stride`: steps of a patch, and from one to the next; `width`: of patches before they ask; `prototypes`:
    sums of word vectors (1,000 as published); `heads` of `inner` numbers ask them, and as many channels of each state
    are read out; `model`, `weights`: a language model, pretrained, random or none; `layers`: the first so many of it
    (None: all); `about`: what the prompt says of the series; `prompt`: whether there is one."""

    lookback: int = 512
    horizon: int = 96
    patch: int = 16
    stride: int = 8
    width: int = 32
    prototypes: int = 64
    heads: int = 8
    inner: int = 128
    dropout: float = 0.1
    model: str = "zoo:text-base"
    weights: str = "pretrained"
    layers: int | None = 2
    about: str = "measurements of several variables at regular times."
    prompt: bool = True

    @property
    def tokens(self) -> int:
        """Patches of a lookback."""
        return patch_count(self.lookback, self.patch, self.stride)

    def __post_init__(self) -> None:
        _ = self.tokens  # which says what does not fit


class Reprogrammed(Forecaster):
    """Patches through prototypes of words and a frozen language model."""

    def __init__(self, c: Config):
        super().__init__()
        self.c, self.text = c, FrozenText(c.model, c.weights, c.layers)
        if c.inner > self.text.width:
            raise ValueError(f"{c.inner} channels of each state are read out, and {c.model} has {self.text.width}")
        self.embed = nn.Conv1d(c.patch, c.width, 3, padding=1, padding_mode="circular", bias=False)
        nn.init.kaiming_normal_(self.embed.weight, mode="fan_in", nonlinearity="leaky_relu")
        self.choose = nn.Linear(len(self.text.words), c.prototypes)
        both = c.heads * c.inner
        self.query, self.out = nn.Linear(c.width, both), nn.Linear(both, self.text.width)
        self.key, self.value = nn.Linear(self.text.width, both), nn.Linear(self.text.width, both)
        self.head = nn.Linear(c.inner * c.tokens, c.horizon)

    def forward(
        self, past: Float[Tensor, "b t c"], past_marks: Tensor, future_marks: Tensor, scale: Scale | None = None
    ) -> Float[Tensor, "b h c"]:
        scale = scale or Scale.of(past)
        x = channels_apart(scale.on(past))
        h = self.states(self.reprogrammed(x), x)[..., : self.c.inner]
        made = F.dropout(self.head(h.transpose(1, 2).flatten(1)), self.c.dropout, self.training)
        return scale.off(channels_together(made, past.shape[2]))

    def prototypes(self) -> Float[Tensor, "s d"]:
        """Sums of word vectors."""
        return self.choose(self.text.words.detach().T).T

    def reprogrammed(self, x: Float[Tensor, "n t"]) -> Float[Tensor, "n p d"]:
        """Patches as sums of what prototypes say."""
        weights, words = self.asked(x)
        v = self.value(words).unflatten(-1, (self.c.heads, self.c.inner)).transpose(0, 1)
        weights = F.dropout(weights, self.c.dropout, self.training)
        return self.out((weights @ v).transpose(1, 2).flatten(2))

    def asked(self, x: Float[Tensor, "n t"]) -> tuple[Float[Tensor, "n h p s"], Float[Tensor, "s d"]]:
        """How much each patch takes of each prototype, and the prototypes."""
        c = self.c
        tokens = self.embed(overlapping(x, c.patch, c.stride).transpose(1, 2)).transpose(1, 2)
        tokens = F.dropout(tokens, c.dropout, self.training)
        words = self.prototypes()
        q = self.query(tokens).unflatten(-1, (c.heads, c.inner)).transpose(1, 2)
        k = self.key(words).unflatten(-1, (c.heads, c.inner)).transpose(0, 1)
        return (q @ k.mT * c.inner**-0.5).softmax(-1), words

    def states(self, tokens: Float[Tensor, "n p d"], x: Float[Tensor, "n t"]) -> Float[Tensor, "n p d"]:
        """Of patches, behind the prompt of each window."""
        if not self.c.prompt or self.text.weights == "none":
            return self.text(tokens)
        words, empty = self.text.padded(self.prompts(x))
        return self.text(torch.cat([words.to(tokens), tokens], 1), empty)[:, words.shape[1] :]

    def prompts(self, x: Float[Tensor, "n t"]) -> list[str]:
        """What is said of each window."""
        c = self.c
        figures = torch.stack([x.amin(1), x.amax(1), x.median(1).values, x[:, -1] - x[:, 0]], 1).tolist()
        return [
            f"Dataset description: {c.about} Task description: forecast the next {c.horizon} steps given the previous "
            f"{c.lookback} steps information; Input statistics: min value {low:.3g}, max value {high:.3g}, median "
            f"value {middle:.3g}, the trend of input is {'upward' if rise > 0 else 'downward'}, top {len(lags)} lags "
            f"are: {', '.join(map(str, lags))}."
            for (low, high, middle, rise), lags in zip(figures, strongest(x).tolist(), strict=True)
        ]


def strongest(x: Float[Tensor, "n t"], count: int = LAGS) -> Tensor:
    """The lags from 1 to half a window at which it is most like itself, by circular autocorrelation, (n, count)."""
    half = max(x.shape[1] // 2, 1)
    power = torch.fft.rfft(x, dim=1).abs().square()
    alike = torch.fft.irfft(power, n=x.shape[1], dim=1)[:, 1 : half + 1]
    return alike.topk(min(count, half), dim=1).indices + 1


class TimeLLM(SeriesSystem):
    """One forward, each variate by itself, all steps."""

    meta, Config = META, Config
    looks = 32
    few = 200
    validation_batch = 16
    sizes = MappingProxyType({
        "tiny": {},
        "published": {"prototypes": 1000, "layers": None},
    })  # fmt: skip
    recipes = MappingProxyType({
        "tiny": replace(PUBLISHED, batch=4, learning_rate=1e-3, halving=False, warm_up=0.1),
        "published": replace(PUBLISHED, batch=24, learning_rate=1e-2),
    })  # fmt: skip

    @staticmethod
    def build(config: Any, tokenizer: Any = None) -> Any:
        return Reprogrammed(config)

    @torch.no_grad()
    def insights(self, batch: Mapping[str, Tensor], columns: Sequence[str]) -> dict[str, Insight]:
        """Words near to the prototypes that patches of the window ask most."""
        past = batch["past"]
        weights, prototypes = self.model.asked(channels_apart(Scale.of(past).on(past)))
        share, most = weights.mean((0, 1, 2)).topk(min(ASKED, self.config.prototypes))
        words = self.model.text.near(prototypes[most])
        rows = {
            f"prototype {i} ({100 * p:.1f}%)": w for i, p, w in zip(most.tolist(), share.tolist(), words, strict=True)
        }
        return {"prototypes": Words("Prototypes that patches ask most, and the words that are nearest to them", rows)}

    @classmethod
    def fitting(cls, data: SeriesData, settings: Mapping[str, Any], size: str | None) -> dict[str, int]:
        """Patches too that fit the lookback."""
        found = super().fitting(data, settings, size)
        lookback = {"lookback": Config.lookback, **found, **settings}["lookback"]
        return found | patching(lookback, settings, Config)


CLAIM = of_text(
    "time-llm",
    lookback=512,
    minutes=3.0,
    paper="mean squared error on ETTh1 .362 at 96 and .442 at 720 steps",
)

# ---- what the laws run -----------------------------------------------------------------------------------------------


def _tiny(**more: Any) -> SeriesCase:
    c = Config(
        lookback=8, horizon=3, patch=4, stride=2, width=8, prototypes=5, heads=2, inner=4, model=TINY, layers=1,
        about="", **more,
    )  # fmt: skip
    return SeriesCase(TimeLLM(c), channels=2, rate=3e-2)


def case() -> SeriesCase:
    """A tiny instance for the laws."""
    made = _tiny()
    made.limits = (_one_prototype, _no_model)
    return made


def _one_prototype() -> Limit:
    """With prototypes that are all alike, attention has no choice: every patch says the same."""
    model = _tiny().system.model
    with torch.no_grad():
        model.choose.weight.copy_(model.choose.weight[:1].clone().expand_as(model.choose.weight))
        model.choose.bias.fill_(0.3)
        got = model.reprogrammed(torch.randn(2, 8, generator=torch.Generator().manual_seed(0)).double())
        want = model.out(model.value(model.prototypes()[:1])).expand_as(got)
        return Limit("equal prototypes = one", got, want)


def _no_model() -> Limit:
    """Without a language model patches go straight into the head."""
    model = _tiny(weights="none").system.model
    past = torch.randn(2, 8, 1, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        scale = Scale.of(past)
        tokens = model.reprogrammed(scale.on(past)[..., 0])[..., :4]
        want = scale.off(model.head(tokens.mT.flatten(1))[..., None])
        return Limit("no model = patches straight into the head", model(past, past[..., :0], past[..., :0]), want)


def mutant() -> SeriesCase:
    """Wrong on purpose: the lookback that is read ends one step late."""
    return shifted(case())
