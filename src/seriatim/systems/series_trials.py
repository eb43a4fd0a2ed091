"""What claims about series measure: errors on windows of the test part at one distance, the same for every arm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from seriatim.data.base import load_data
from seriatim.data.series import SeriesData
from seriatim.evaluation.series import Method, over
from seriatim.evaluation.series_baselines import ridge
from seriatim.systems.claim import Arm, Trial
from seriatim.systems.frozen_text import WEIGHTS

WINDOWS = 200  # of the test part, at one distance: networks of language models take too long for all


def errors_at(system: Any, data: SeriesData, horizons: Sequence[int]) -> Mapping[str, float]:
    """Errors of a trained system at horizons."""
    from seriatim.verbs.series import method_of  # which knows this file

    return _errors(data, {h: method_of(system) for h in horizons}, system.config.lookback)


def ridge_at(_: Any, seed: int, lookback: int, horizons: Sequence[int], data: str = "ETTh1") -> Mapping[str, float]:
    """Those of ridge regressions, on the same windows."""
    loaded: Any = load_data(data, "series")
    methods = {h: ridge(loaded.train.windows(lookback, h)) for h in horizons}
    return _errors(loaded, methods, lookback)


def _judged(trained: Any) -> Mapping[str, float]:
    """At the horizon that it was trained for, as `mse` and `mae`."""
    horizon = trained.system.config.horizon
    errors = errors_at(trained.system, trained.data, (horizon,))
    return {"mse": errors[f"mse_{horizon}"], "mae": errors[f"mae_{horizon}"]}


def _ridge(_: Any, seed: int, lookback: int, horizon: int) -> Mapping[str, float]:
    errors = ridge_at(_, seed, lookback, (horizon,))
    return {"mse": errors[f"mse_{horizon}"], "mae": errors[f"mae_{horizon}"]}


def ablation(
    key: str, lookback: int, minutes: float, horizons: Sequence[int] = (96, 720), **settings: Any
) -> dict[str, Arm | Trial]:
    """What a language model has to do with it: pretrained, with random matrices, none; and a ridge regression of the
    same lookback. A training for each horizon."""
    arms: dict[str, Arm | Trial] = {}
    for horizon in horizons:
        for weights in WEIGHTS:
            said = {**settings, "weights": weights, "horizon": horizon}
            arms[f"{weights} {horizon}"] = Arm(key, said, minutes=minutes, measure=_judged)
        arms[f"ridge {horizon}"] = Trial(None, partial(_ridge, lookback=lookback, horizon=horizon))
    return arms


def _errors(data: SeriesData, methods: Mapping[int, Method], lookback: int) -> Mapping[str, float]:
    out: dict[str, float] = {}
    for horizon, method in methods.items():
        errors, _ = over(data, method, data.test.windows(lookback, horizon).strided(WINDOWS))
        out |= {f"mse_{horizon}": errors.mse, f"mae_{horizon}": errors.mae}
    return out
