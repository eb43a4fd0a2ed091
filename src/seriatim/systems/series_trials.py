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
from seriatim.systems.claim import Arm, Claim, Trial
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


def of_text(
    key: str, lookback: int, minutes: float, paper: str, horizons: tuple[int, int] = (96, 720), data: str = "ETTh1"
) -> Claim:
    """The claim of a system with a language model, of which the field asks what text has to do with it. A training for
    each horizon and each kind of weights; the longer horizon decides."""
    arms: dict[str, Arm | Trial] = {}
    for horizon in reversed(horizons):
        for weights in WEIGHTS:
            said = {"weights": weights, "horizon": horizon}
            arms[f"{weights} {horizon}"] = Arm(key, said, minutes=minutes, measure=partial(judged_at, most=FEW))
        arms[f"ridge {horizon}"] = Trial(None, partial(ridge_errors, lookback=lookback, horizon=horizon, most=FEW))
    short, long = horizons
    return Claim(
        text=f"Forecasts of {data} at {long} steps are better through a language model that was trained on text than "
        "through the same model with random matrices; no model at all and a ridge regression of the same lookback are "
        f"further arms, {short} steps a further horizon.",
        paper=paper, metric="mse", arms=arms, ours=f"pretrained {long}", baseline=f"random {long}", seeds=(0, 1, 2),
        spread_seeds=(0, 1, 2), other_seeds=(0,), data=data,
    )  # fmt: skip


def _plain(errors: Mapping[str, float]) -> Mapping[str, float]:
    return {name.partition("_")[0]: value for name, value in errors.items()}


def _errors(data: SeriesData, methods: Mapping[int, Method], lookback: int, most: int) -> Mapping[str, float]:
    out: dict[str, float] = {}
    for horizon, method in methods.items():
        errors, _ = over(data, method, data.test.windows(lookback, horizon).strided(most))
        out |= {f"mse_{horizon}": errors.mse, f"mae_{horizon}": errors.mae}
    return out
