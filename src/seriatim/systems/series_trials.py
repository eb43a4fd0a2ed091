"""What claims about series measure. Networks of language models take too long for all windows of a test part: there,
every arm is judged on the same few at one distance."""

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

FEW = 200  # windows


def errors_at(system: Any, data: Any, horizons: Sequence[int], most: int = FEW) -> Mapping[str, float]:
    """Errors of a trained system at horizons, on about `most` windows."""
    from seriatim.verbs.series import method_of  # which knows this file

    return _errors(data, {h: method_of(system) for h in horizons}, system.config.lookback, most)


def ridge_at(
    _: Any, seed: int, lookback: int, horizons: Sequence[int], data: str = "ETTh1", most: int = FEW
) -> Mapping[str, float]:
    """Those of ridge regressions, on the same windows."""
    loaded: Any = load_data(data, "series")
    methods = {h: ridge(loaded.train.windows(lookback, h)) for h in horizons}
    return _errors(loaded, methods, lookback, most)


def judged_at(trained: Any, horizon: int | None = None, most: int = 10**9) -> Mapping[str, float]:
    """`mse` and `mae` at one horizon (None: that of the training)."""
    steps = horizon or trained.system.config.horizon
    return _plain(errors_at(trained.system, trained.data, (steps,), most))


def ridge_errors(
    _: Any, seed: int, lookback: int, horizon: int, data: str = "ETTh1", most: int = 10**9
) -> Mapping[str, float]:
    """Those of a ridge regression."""
    return _plain(ridge_at(_, seed, lookback, (horizon,), data, most))


def ablation(
    key: str, lookback: int, minutes: float, horizons: Sequence[int] = (96, 720), **settings: Any
) -> dict[str, Arm | Trial]:
    """What a language model has to do with it: pretrained, with random matrices, none; and a ridge regression of the
    same lookback. A training for each horizon."""
    arms: dict[str, Arm | Trial] = {}
    for horizon in horizons:
        for weights in WEIGHTS:
            said = {**settings, "weights": weights, "horizon": horizon}
            arms[f"{weights} {horizon}"] = Arm(key, said, minutes=minutes, measure=partial(judged_at, most=FEW))
        arms[f"ridge {horizon}"] = Trial(None, partial(ridge_errors, lookback=lookback, horizon=horizon, most=FEW))
    return arms


def _plain(errors: Mapping[str, float]) -> Mapping[str, float]:
    return {name.partition("_")[0]: value for name, value in errors.items()}


def _errors(data: SeriesData, methods: Mapping[int, Method], lookback: int, most: int) -> Mapping[str, float]:
    out: dict[str, float] = {}
    for horizon, method in methods.items():
        errors, _ = over(data, method, data.test.windows(lookback, horizon).strided(most))
        out |= {f"mse_{horizon}": errors.mse, f"mae_{horizon}": errors.mae}
    return out
