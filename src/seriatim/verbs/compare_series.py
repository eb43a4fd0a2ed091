"""`compare` of systems of series: trained on one series, judged on its test part beside what a user has without us."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import seriatim
from seriatim.data.base import load_data
from seriatim.data.series import SeriesData, Windows
from seriatim.evaluation.cost import parameters
from seriatim.evaluation.report import Result, grid, write_report
from seriatim.evaluation.series import Method, over
from seriatim.evaluation.series_baselines import classical, last_value, ridge, season_of, seasonal_naive
from seriatim.verbs.load import plain
from seriatim.verbs.series import LEVEL, judged, method_of, save_window
from seriatim.verbs.train import Bar, train

BASELINE = "dlinear"  # trained beside whatever is compared


def compare_series(
    keys: Sequence[str], data: str | Path | None, *, lookback: int | None = None, horizon: int | None = None,
    minutes: float | None = None, size: str | None = None, out: str | Path = "runs/compare", seed: int = 0,
    windows: int = 100, bar: Bar | None = None, said: Callable[[str], None] = lambda text: None, **data_options: Any,
) -> Path:  # fmt: skip
    """Train each system, judge all alike on every window of the test part, write OUT/report.html.

    DLinear is trained too, and the last value, the last season and a ridge regression are judged beside them; ETS and
    ARIMA on `windows` windows at one distance (0: not), with everybody else on the same. A run that is there already is
    gone on with. Raises ValueError where horizons differ.
    """
    if windows < 0:
        raise ValueError(f"ETS and ARIMA run on 0 windows or more, got {windows}")
    loaded: Any = load_data(data, "series", **data_options)
    if not isinstance(loaded, SeriesData):
        raise ValueError(f"systems are compared on one series, and {loaded.name} are several")
    said_of = {k: v for k, v in (("lookback", lookback), ("horizon", horizon)) if v is not None}
    trained = {}
    for key in dict.fromkeys([*keys, BASELINE]):
        said(f"training {key}")
        trained[key] = train(
            key, data, out=Path(out) / key, size=size if key in keys else None, minutes=minutes, resume=True,
            settings={"seed": seed, **said_of}, bar=bar, **data_options,
        )  # fmt: skip
    systems: dict[str, Any] = {key: t.system for key, t in trained.items()}
    horizons = {key: s.config.horizon for key, s in systems.items() if not s.rolls}
    steps = horizon or next(iter(horizons.values()), next(iter(systems.values())).config.horizon)
    if set(horizons.values()) - {steps}:
        raise ValueError(f"systems of one horizon compare, these have {horizons}: say --horizon")
    said_too = {"horizon": steps, "lookback": lookback, "minutes": minutes, "size": size, "seed": seed or None}
    said_too |= data_options | ({} if windows == 100 else {"classical": windows})
    more = [str(word) for k, v in said_too.items() if v is not None for word in (f"--{k}", v)]
    command = shlex.join(["seriatim", "compare", *keys, "--data", str(data or loaded.name), *more])
    methods = {key: (method_of(s), s.config.lookback) for key, s in systems.items()}
    methods |= _simple(loaded, [look for _, look in methods.values()], steps)
    few, results = min((s.few for s in systems.values() if s.few), default=None), []
    for name, (method, look) in methods.items():
        said(f"judging {name}")
        result = _result(loaded, name, method, (look, steps, few), Path(out))
        if name in trained:
            result = _with_training(result, trained[name], command)
        results.append(result)
    sections = {}
    if windows:
        sections["With ETS and ARIMA"] = _classical(loaded, methods, steps, windows, said)
    notes = _notes(loaded, steps, few, command)
    title = f"{' · '.join(keys)} on {loaded.name}"
    return write_report(Path(out) / "report.html", title, results, notes, "MSE", sections)


def _notes(data: SeriesData, horizon: int, few: int | None, command: str) -> list[str]:
    """What is to be known of the figures."""
    rows = " / ".join(f"{part.end - part.begin:,}" for part in (data.train, data.validation, data.test))
    return [
        f"{data.name}: {rows} rows for training / validation / test, {len(data.series.columns)} variates, every "
        f"{data.series.frequency}.",
        f"A horizon of {horizon} steps, {f'about {few} windows at one distance' if few else 'every window'} of the "
        "test part. MSE and MAE are on the scale of training, and a longer lookback alone lowers both, so figures of "
        "different lookbacks are not to be compared.",
        f"Intervals of {100 * LEVEL:g}% by residuals on the validation part; windows overlap and series drift, so "
        "their coverage on the test part is measured.",
        "One seed: small differences mean nothing.",
        *data.notes,
        f"Made by {command} (version {seriatim.__version__}).",
    ]


def _simple(data: SeriesData, lookbacks: Sequence[int], horizon: int) -> dict[str, tuple[Method, int]]:
    """What needs no training, a ridge regression for each lookback."""
    out: dict[str, tuple[Method, int]] = {}
    for look in dict.fromkeys(lookbacks):
        out[f"ridge {look}"] = ridge(data.train.windows(look, horizon)), look
    season, longest = season_of(data), max(lookbacks)
    if season > 1:
        out[f"last {season}"] = seasonal_naive(data, season), longest
    out["last value"] = last_value, longest
    return out


TITLES = {"ridge": "ridge regression", "last": "the last season, repeated", "last value": "the last value, repeated"}


def _result(data: SeriesData, name: str, method: Method, sizes: tuple[int, int, int | None], out: Path) -> Result:
    """A row of the report, with a plot of one window. sizes: lookback, horizon, and windows (None: all)."""
    lookback, horizon, few = sizes
    figures, intervals = judged(data, method, lookback, horizon, most=few)
    test = data.test.windows(lookback, horizon)
    place = out / "plots" / f"{name.replace(' ', '-')}.png"
    place.parent.mkdir(parents=True, exist_ok=True)
    plot = save_window(data, {name: method}, test, len(test) // 2, place, name, intervals)
    title = TITLES.get(name, TITLES.get(name.split()[0], ""))
    shown = {"lookback": lookback, **{k: v for k, v in figures.items() if k != "level"}}
    return Result(name, title, shown, grid=plot, shows=f"{horizon} steps in the middle of the test part")


def _with_training(result: Result, trained: Any, command: str) -> Result:
    """The same with what the training took and was."""
    from dataclasses import replace

    system, history = trained.system, trained.history
    figures = {
        **result.figures, "parameters": parameters(system.model),
        "training_seconds": sum(h.get("seconds", 0.0) for h in history),
    }  # fmt: skip
    losses = {"training": [(h["step"], h["loss"]) for h in history]}
    return replace(
        result, title=system.meta.title, figures=figures, losses=losses, settings=plain(system.config), command=command
    )


def _classical(
    data: SeriesData, methods: dict[str, tuple[Method, int]], horizon: int, most: int, said: Callable[[str], None]
) -> str:
    """A table of everybody on the same few windows, ETS and ARIMA among them."""
    try:
        found = classical(season_of(data))
    except ValueError as error:
        return f"<p>{error}</p>"
    longest = max(look for _, look in methods.values())
    everybody: dict[str, tuple[Method, int]] = {**methods, **{k: (v, longest) for k, v in found.items()}}
    rows = []
    for name, (method, look) in everybody.items():
        said(f"judging {name} on {most} windows")
        windows: Windows = data.test.windows(look, horizon).strided(most)
        errors, _ = over(data, method, windows)
        rows.append((name, look, *(f"{x:.3f}" for x in (errors.mse, errors.mae, errors.mase)), f"{errors.smape:.1f}"))
    count = len(windows)
    apart = "at every step" if windows.stride == 1 else f"at a distance of {windows.stride} steps"
    caption = (
        f"{count} windows {apart}. ETS (additive season, damped trend) and ARIMA (of "
        "seasonal differences) are fitted anew to the lookback of each."
    )
    lost = [f"{method.failed} of {method.fits} by {name}" for name, method in found.items() if method.failed]
    if lost:
        caption += f" What could not be fitted ({', '.join(lost)}) is forecast by its last value."
    return grid(("method", "lookback", "MSE", "MAE", "MASE", "sMAPE"), rows, caption)
