"""Systems of series: a lookback becomes a forecast of what is behind it. Directly, all steps in one forward, or rolled
on, a segment after another.

What is trained says by `Predictions` what is compared with what, and how much of the window each value may depend on:
the laws hold it to that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from seriatim.backbones.transformer import Transformer, TransformerConfig
from seriatim.data.series import Part, SeriesData, Windows
from seriatim.evaluation.series_insight import Insight
from seriatim.plan import Plan, plan_of
from seriatim.random import Generator
from seriatim.systems.system import System, evenly
from seriatim.tokenizers.series import Scale, channels_apart, channels_together
from seriatim.training.recipe import Recipe
from seriatim.view import full, inclusive

SEGMENTS = (48, 24, 16, 8)
HORIZONS = (96, 48, 24, 12, 8, 4, 2, 1)  # that are tried on short series, where none is named
PATCHES = (16, 8, 4, 2, 1)  # the same
UNSAID = 10**9  # steps of a training and of a pass that follow from the data
LEAST = 100  # steps between halvings of the learning rate
PUBLISHED = Recipe(  # the field's protocol
    UNSAID, batch=32, learning_rate=1e-4, weight_decay=0.0, betas=(0.9, 0.999), warm_up=0.0, clip=1e9, epoch=UNSAID,
    halving=True, patience=3,
)  # fmt: skip


class Predictions(NamedTuple):
    """Values (b, m, c) and what they should be; known: upon how many rows of the window, lookback and horizon in one,
    each of the m may depend where the scale of the window is given."""

    value: Float[Tensor, "b m c"]
    target: Float[Tensor, "b m c"]
    known: Int[Tensor, " m"]


class Forecaster(nn.Module):
    """The network of a system of series."""

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device


class SeriesSystem(System):
    """Series with a config that holds `lookback` and `horizon`. `passes`: over the training windows, at most; `rolls`:
    whether it forecasts any number of steps; `mixes`: whether it is trained on several series at once; `scales`:
    whether each window is seen on its own scale; `told`: what it hears of rows beside values, their calendar's `marks`
    or their `time` in milliseconds. Of slow systems, `looks`: held-out windows that training looks at, and `few`: about
    how many it is judged on, at one distance (None: all)."""

    source = "co2"
    recipes: ClassVar[Mapping[str, Recipe]] = MappingProxyType({"tiny": PUBLISHED})
    passes: ClassVar[int] = 10
    rolls: ClassVar[bool] = False
    mixes: ClassVar[bool] = False
    scales: ClassVar[bool] = True
    told: ClassVar[str] = "marks"
    looks: ClassVar[int | None] = None
    few: ClassVar[int | None] = None
    normed = False
    validation_batch = 256

    model: Any

    def __init__(self, config: Any, tokenizer: Any = None):
        if config.lookback < 1 or config.horizon < 1:
            raise ValueError(f"lookback and horizon are at least 1, got {config.lookback} and {config.horizon}")
        super().__init__(config, tokenizer)

    @staticmethod
    def build(config: Any, tokenizer: Any) -> Any:
        raise NotImplementedError

    # ---- data -------------------------------------------------------------------------------------------------------

    @classmethod
    def fitting(cls, data: SeriesData, settings: Mapping[str, Any], size: str | None) -> dict[str, int]:
        """The lookback and horizon that are not named: the system's own, or, on series of which training does not hold
        four of both in a row or the other parts two horizons, the largest horizon of a few of which they do, with a
        lookback of twice that: a longer one is learned by heart. Raises ValueError for several series, where variates
        are not read one by one."""
        if not hasattr(data, "series"):
            raise ValueError(f"{cls.meta.key} reads the variates of one series together, and {data.name} are several")
        default = {"lookback": cls.Config.lookback, "horizon": cls.Config.horizon}
        said = {**default, **cls.sizes.get(size or next(iter(cls.sizes)), {}), **settings}
        room = min(len(p) // len(data.series.columns) for p in (data.validation, data.test))
        enough = room >= 2 * said["horizon"] and data.split.train >= 4 * (said["lookback"] + said["horizon"])
        if "lookback" in settings or enough:
            return {}
        horizon = settings.get("horizon") or next((h for h in HORIZONS if 2 * h <= room), 1)
        return {"lookback": 2 * horizon, "horizon": horizon}

    def examples(self, part: Part) -> Windows:
        """The windows that it is trained on."""
        return part.windows(self.config.lookback, self.config.horizon)

    def passing(self, recipe: Recipe, examples: Windows) -> Recipe:
        """The recipe with the steps of the system's passes over these windows, one look at held-out data after each;
        numbers that were said stay. Where a pass is short, several count as one: the rate halves after each."""
        turn = max(len(examples) // recipe.batch, LEAST)
        steps = self.passes * turn if recipe.steps == UNSAID else recipe.steps
        epoch = turn if recipe.epoch == UNSAID else recipe.epoch
        return replace(recipe, steps=steps, epoch=epoch, validate_every=recipe.validate_every or epoch or turn)

    # ---- training ---------------------------------------------------------------------------------------------------

    def predictions(self, batch: Mapping[str, Tensor], scale: Scale | None = None) -> Predictions:
        """What is compared in training: here, the forecast with the future. scale: of the windows (None: their own)."""
        future = batch["future"]
        value = self.model(*self.given(batch), scale)
        return Predictions(value, future, torch.full((future.shape[1],), batch["past"].shape[1]))

    def given(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Of windows what a forecast is made from."""
        return batch["past"], batch[f"past_{self.told}"], batch[f"future_{self.told}"]

    def losses(self, batch: Mapping[str, Tensor], random: Generator, drop: float) -> tuple[Tensor, Tensor]:
        """Squared errors on the scale of the training rows."""
        made = self.predictions(batch)
        return (made.value - made.target).square().sum(), torch.tensor(made.value.numel())

    def validate(self, examples: Any) -> dict[str, float]:
        """The mean squared error of forecasts of held-out windows."""
        total, count = 0.0, 0
        for part in evenly(len(examples), self.looks or len(examples)).split(self.validation_batch):
            batch = {k: v.to(self.model.device) for k, v in examples.take(part).items()}
            gap = self.forecast(*self.given(batch)) - batch["future"]
            total, count = total + float(gap.square().sum(dtype=torch.float64)), count + gap.numel()
        return {"loss": total / count}

    # ---- forecasts --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def forecast(
        self, past: Float[Tensor, "b t c"], past_marks: Float[Tensor, "b t m"], future_marks: Float[Tensor, "b h m"]
    ) -> Float[Tensor, "b h c"]:
        """So many steps as there are marks of. Raises ValueError for more than it was trained for, where it does not
        roll on, for none, and for a lookback of another length."""
        horizon, c = future_marks.shape[1], self.config
        self.check(past.shape[1], horizon)
        if self.rolls:
            return self.rolled(past, past_marks, future_marks)
        if horizon < c.horizon:
            rest = future_marks[:, -1:].expand(-1, c.horizon - horizon, -1)
            future_marks = torch.cat([future_marks, rest], 1)
        return self.model(past, past_marks, future_marks, None)[:, :horizon]

    def rolled(self, past: Tensor, past_marks: Tensor, future_marks: Tensor) -> Tensor:
        """A forecast in segments, each from all before it."""
        raise NotImplementedError

    def insights(self, batch: Mapping[str, Tensor], columns: Sequence[str]) -> dict[str, Insight]:
        """What else there is to see of a batch of one window, by the names of its files. columns: the variates."""
        return {}

    def check(self, lookback: int, horizon: int) -> None:
        """Raises ValueError for what it cannot forecast."""
        c = self.config
        if horizon < 1:
            raise ValueError(f"a horizon is at least 1 step, got {horizon}")
        if lookback != c.lookback:
            raise ValueError(f"{self.meta.key} was made for lookbacks of {c.lookback} steps, got {lookback}")
        if horizon > c.horizon and not self.rolls:
            raise ValueError(
                f"this {self.meta.key} forecasts {c.horizon} steps in one forward, and {horizon} are asked for: train "
                f"one with --horizon {horizon}, or take a system that rolls on (gpht, autotimes)"
            )


class RollingSystem(SeriesSystem):
    """Each variate by itself, a `segment` of steps a token: what is trained is the segment behind each, what is
    forecast is rolled on by one after another, each on the scale of the lookback that it is behind. The model takes
    series on that scale (n, t), and says what comes a segment behind each step."""

    rolls = mixes = True

    @classmethod
    def fitting(cls, data: SeriesData, settings: Mapping[str, Any], size: str | None) -> dict[str, int]:
        """On short series, the longest segment of a few that leaves windows in all parts, with seven for a lookback;
        and a horizon that the held-out parts hold, of several series those of the longest."""
        of: Sequence[SeriesData] = getattr(data, "of", (data,))
        room = max(min(len(p) // len(one.series.columns) for p in (one.validation, one.test)) for one in of)
        default = cls.Config()
        horizon = {} if "horizon" in settings or room >= default.horizon else {"horizon": room}
        if {"lookback", "segment"} & set(settings) or not hasattr(data, "series"):
            return horizon
        if data.split.train >= 2 * default.lookback and room >= 2 * default.segment:
            return horizon
        segment = next((s for s in SEGMENTS if 9 * s <= data.split.train and 2 * s <= room), SEGMENTS[-1])
        horizon = {} if "horizon" in settings else {"horizon": min(2 * segment, room)}
        return {"lookback": 7 * segment, "segment": segment, **horizon}

    def examples(self, part: Part) -> Windows:
        return part.windows(self.config.lookback, self.config.segment)

    def predictions(self, batch: Mapping[str, Tensor], scale: Scale | None = None) -> Predictions:
        """The segment behind each, all of the window's."""
        past, n = batch["past"], self.config.segment
        future = batch["future"][:, :n]
        value = self.behind(past, batch[f"past_{self.told}"], scale)
        length = past.shape[1]
        known = torch.arange(length) // n * n + n
        return Predictions(value, torch.cat([past[:, n:], future], 1), known)

    def behind(
        self, past: Float[Tensor, "b t c"], told: Tensor | None = None, scale: Scale | None = None
    ) -> Float[Tensor, "b t c"]:
        """What comes a segment behind each step, in the units of the lookback. told: of its rows, beside values."""
        scale = scale or Scale.of(past)
        return scale.off(channels_together(self.model(channels_apart(scale.on(past))), past.shape[2]))

    def rolled(self, past: Tensor, past_marks: Tensor, future_marks: Tensor) -> Tensor:
        length, n = past.shape[1], self.config.segment
        made, told = past, torch.cat([past_marks, future_marks], 1)
        while made.shape[1] < length + future_marks.shape[1]:
            begin = made.shape[1] - length
            made = torch.cat([made, self.behind(made[:, begin:], told[:, begin : begin + length])[:, -n:]], 1)
        return made[:, length : length + future_marks.shape[1]]


def patching(lookback: int, settings: Mapping[str, Any], default: Any) -> dict[str, int]:
    """Patches that are not named: those of the default config, or, where a lookback is no whole number of them, the
    longest of a few that it is, one every half."""
    if {"patch", "stride"} & set(settings):
        return {}
    for patch, stride in ((default.patch, default.stride), *((p, max(p // 2, 1)) for p in PATCHES)):
        if lookback >= patch and (lookback - patch) % stride == 0:
            return {"patch": patch, "stride": stride}
    raise ValueError(f"a lookback is at least 1, got {lookback}")


@lru_cache(maxsize=64)
def together(size: int) -> Plan:
    """So many slots that all see each other."""
    return plan_of(full(size), [0], [-1] * size, [], coord=torch.arange(size)[:, None])


@lru_cache(maxsize=64)
def in_line(size: int) -> Plan:
    """So many slots, each of which sees itself and what is before it."""
    return plan_of(inclusive(list(range(size))), [0], [-1] * size, [], coord=torch.arange(size)[:, None])


def layers(c: Any) -> Transformer:
    """A transformer of a config's `width`, `hidden`, `depth`, `heads` and `dropout` as the field's code has it: norms
    behind sums (Vaswani et al. 2017), biases, and weights drawn as torch draws those of `nn.Linear`."""
    config = TransformerConfig(
        c.width, c.depth, c.heads, hidden=c.hidden, norm="layer", place="sum", activation="gelu", bias=True,
        dropout=c.dropout, inner_dropout=c.dropout,
    )  # fmt: skip
    made = Transformer(config)
    named = dict(made.named_parameters())
    for name, p in named.items():
        if p.dim() == 2:
            bound = p.shape[1] ** -0.5
            nn.init.uniform_(p, -bound, bound)
            if f"{name}_bias" in named:
                nn.init.uniform_(named[f"{name}_bias"], -bound, bound)
    return made
