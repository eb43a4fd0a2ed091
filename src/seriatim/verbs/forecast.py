"""`forecast`: what comes behind the end of a series, in its own units, with intervals, as a table and a plot."""

from __future__ import annotations

import time as clock
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from seriatim.data.base import load_data
from seriatim.data.calendar import Times, marks
from seriatim.data.series import SeriesData
from seriatim.evaluation.report import seconds_text
from seriatim.evaluation.series import Drawn, Intervals, conformal, drawn_of, figures_of, over, save_forecast, steady
from seriatim.systems.meta import catalogue
from seriatim.systems.series_system import SeriesSystem
from seriatim.training.run import RunFolder
from seriatim.verbs.load import load, system_class
from seriatim.verbs.series import LEVEL, method_of, write_csv
from seriatim.verbs.train import Bar, train

ROLLED = 500  # windows that tell the intervals of what is rolled on, which takes long
Said = Callable[[str], None]


@dataclass(frozen=True)
class Forecast:
    """times, and values (horizon, variates) in the units of the series, with the ends of an interval (None: the
    validation part is too short for one). figures: errors on the test part, coverage and width of intervals there."""

    times: Times
    columns: tuple[str, ...]
    values: NDArray[np.float64]
    low: NDArray[np.float64] | None
    high: NDArray[np.float64] | None
    figures: Mapping[str, Any]
    notes: tuple[str, ...]
    files: tuple[Path, ...] = field(default=())


def forecast(
    source: str | Path, data: str | Path | None = None, horizon: int | None = None, *, level: float = LEVEL,
    out: str | Path | None = None, settings: Mapping[str, Any] | None = None, bar: Bar | None = None,
    said: Said = lambda text: None, **data_options: Any,
) -> Forecast:  # fmt: skip
    """Forecast a series from its end, and write OUT/forecast.csv and OUT/forecast.png.

    source: the folder of a run, or the key of a system, which is trained on the series first, or taken as it is where
    OUT/model has been trained before; data: of a series (None: what the run was trained on, or built-in co2); horizon:
    steps (None: what the system was made for, or its own); level: of the intervals, by residuals on the validation
    part; settings: of the training; data_options: `time`, `target`, `frequency`, `duplicates`. A run reads the series
    on the scale of that series' own training part. Raises ValueError, OSError that say what is wrong.
    """
    if horizon is not None and horizon < 1:
        raise ValueError(f"a horizon is at least 1 step, got {horizon}")
    if not 0 < level < 1:
        raise ValueError(f"a level of intervals lies between 0 and 1, got {level}")
    card = RunFolder(Path(source)).card
    if data is None and card.is_file():
        data, read = RunFolder(Path(source)).trained_on()
        data_options = read | data_options
    loaded: Any = load_data(data, "series", **data_options)
    if not isinstance(loaded, SeriesData):
        raise ValueError(f"one series is forecast at a time, and {loaded.name} are several")
    system, folder = _system(source, (data, loaded, data_options), horizon, out, dict(settings or {}), bar, said)
    steps = horizon or system.config.horizon
    system.check(system.config.lookback, steps)
    made = behind_the_end(system, loaded, steps, level)
    values = {"": made.values} | ({} if made.low is None else {"low": made.low, "high": made.high})
    table = write_csv(folder / "forecast.csv", made.times, made.columns, values)  # type: ignore[arg-type]
    keep = drawn_of(system.config.lookback, steps)
    drawn = Drawn(
        loaded.series.time[-keep:], loaded.series.values[-keep:], made.times, {system.meta.key: made.values},
        low=made.low, high=made.high, level=level,
    )  # fmt: skip
    plot = save_forecast(drawn, made.columns, folder / "forecast.png", f"{loaded.name}: the next {steps} steps")
    return Forecast(made.times, made.columns, made.values, made.low, made.high, made.figures, made.notes, (table, plot))


def behind_the_end(system: SeriesSystem, data: SeriesData, horizon: int, level: float = LEVEL) -> Forecast:
    """The forecast from the last row. Raises ValueError for a series that is shorter than a lookback."""
    lookback, series = system.config.lookback, data.series
    if len(series) < lookback:
        raise ValueError(f"{data.name} has {len(series)} rows, and {system.meta.key} reads {lookback}: give more rows")
    method = method_of(system)
    intervals, figures, notes = _intervals(system, data, horizon, level)
    times = series.after(horizon)
    ahead = torch.from_numpy(marks(times, series.frequency))[None]
    later = torch.from_numpy(times.astype(np.int64))[None, :, None]
    batch = {
        "past": data.scaled[None, -lookback:], "past_marks": data.marks[None, -lookback:], "future_marks": ahead,
        "past_time": data.time[None, -lookback:], "future_time": later,
    }  # fmt: skip
    values = data.unscaled(steady(data, method)(batch)[0])
    low = high = None
    if intervals is not None:
        half = intervals.half.double().numpy() * data.deviation
        low, high = values - half, values + half
    return Forecast(times, series.columns, values, low, high, figures, (*data.notes, *notes))


def _intervals(
    system: SeriesSystem, data: SeriesData, horizon: int, level: float
) -> tuple[Intervals | None, dict[str, Any], tuple[str, ...]]:
    """Intervals, what they and the system are worth on the test part, and what is to be said of them."""
    lookback, method = system.config.lookback, method_of(system)
    try:
        most = system.few or (ROLLED if system.rolls else None)
        before, test = (part.windows(lookback, horizon).strided(most) for part in (data.validation, data.test))
    except ValueError as error:
        return None, {}, (f"no intervals, and no errors on held-out rows: {error}",)
    intervals = conformal(data, method, before, level)
    errors, found = over(data, method, test, intervals)
    few = len(before) < 1 / (1 - level)
    notes = (f"{len(before)} windows tell the intervals: few for a level of {level:g}",) if few else ()
    return intervals, figures_of(errors, found), notes


def _folder(place: str | Path) -> Path:
    """Where to write. Raises ValueError for a file."""
    if Path(place).is_file():
        raise ValueError(f"{place} is a file, and a forecast is written into a folder: name another --out")
    return Path(place)


def _system(
    source: str | Path, what: tuple[str | Path | None, SeriesData, Mapping[str, Any]], horizon: int | None,
    out: str | Path | None, settings: dict[str, Any], bar: Bar | None, said: Said,
) -> tuple[SeriesSystem, Path]:  # fmt: skip
    """A system with weights, trained now where only its key is given, and the folder to write to."""
    key, (place, data, options) = str(source), what
    if key not in catalogue() or Path(key).is_dir():
        if settings:
            raise ValueError(f"{', '.join(settings)}: settings are of a training, and {source} is trained already")
        system: Any = load(source)
        if not isinstance(system, SeriesSystem):
            raise ValueError(f"{source} is {system.meta.key}, which forecasts no series")
        return system, _folder(out or source)
    cls: Any = system_class(key)
    if not issubclass(cls, SeriesSystem):
        known = ", ".join(k for k, (meta, _) in catalogue().items() if meta.family == "series")
        raise ValueError(f"{key} forecasts no series; these do: {known}")
    folder = _folder(out or f"runs/forecast-{key}-{data.name}")
    if horizon is not None and not cls.rolls:
        settings.setdefault("horizon", horizon)
        if settings["horizon"] < horizon:
            raise ValueError(f"{horizon} steps cannot be forecast by training on a horizon of {settings['horizon']}")
    start = clock.monotonic()
    there = f"; goes on with {folder / 'model'}, another --out begins anew" if (folder / "model").exists() else ""
    said(f"training {key} on {data.name} ({data.split.train:,} rows; the time left is shown{there})")
    trained = train(key, place, out=folder / "model", resume=True, settings=settings, bar=bar, **options)
    said(f"trained for {len(trained.history)} steps in {seconds_text(clock.monotonic() - start)}")
    trained_system: Any = trained.system
    return trained_system, folder
