"""What a trained system of series is worth: errors and intervals on the test part, plots of forecasts against truth."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seriatim.data.series import SeriesData, Windows
from seriatim.data.series_mixture import Mixture
from seriatim.evaluation.series import (
    Batch,
    Drawn,
    Intervals,
    Method,
    behind,
    conformal,
    figures_of,
    over,
    save_forecast,
)
from seriatim.evaluation.series_baselines import simple
from seriatim.evaluation.series_insight import save_insight
from seriatim.systems.series_system import SeriesSystem

LEVEL = 0.9


def method_of(system: SeriesSystem) -> Method:
    """A system as a function of windows."""
    device = system.model.device

    def forecast(batch: Batch) -> Tensor:
        return system.forecast(*(x.to(device) for x in system.given(batch))).cpu()

    return forecast


def told_apart(data: SeriesData | Mixture) -> dict[str, Any]:
    """What tells series from others under the same names: rows, and a checksum of all values."""
    of = [data] if isinstance(data, SeriesData) else data.of
    told = hashlib.sha256()
    for one in of:
        told.update(np.ascontiguousarray(one.series.values).tobytes())
    return {"rows": sum(len(one.series) for one in of), "values": told.hexdigest()[:16]}


def judgeable(data: SeriesData | Mixture, system: Any) -> SeriesData:
    """The series, or the first of several, whose held-out parts hold a window of a system. Raises ValueError where
    there is none: what is trained could not be judged."""
    c = system.config
    errors = []
    for one in [data] if isinstance(data, SeriesData) else data.of:
        try:
            one.test.windows(c.lookback, c.horizon)
            one.validation.windows(c.lookback, c.horizon)
            return one
        except ValueError as error:
            errors.append(error)
    raise errors[0]


def judged(
    data: SeriesData, method: Method, lookback: int, horizon: int, level: float = LEVEL, most: int | None = None
) -> tuple[dict[str, Any], Intervals | None]:
    """Figures of a method on all windows of the test part, or about `most`, with intervals by its residuals on the
    validation part, where that holds a window."""
    test = data.test.windows(lookback, horizon).strided(most)
    try:
        before = data.validation.windows(lookback, horizon).strided(most)
    except ValueError:
        return figures_of(over(data, method, test)[0]), None
    intervals = conformal(data, method, before, level)
    errors, found = over(data, method, test, intervals)
    return figures_of(errors, found), intervals


def series_figures(system: SeriesSystem, data: SeriesData | Mixture, horizon: int | None = None) -> dict[str, Any]:
    """Errors of a system, and beside them, on the same windows, those of what takes seconds: a ridge regression of the
    same lookback, the last season, the last value. Of several series, those of each that is long enough. Raises
    ValueError for a horizon that it cannot forecast, and where the test part is too short."""
    if isinstance(data, SeriesData):
        return _figures(system, data, horizon or system.config.horizon)[0]
    told: dict[str, Any] = {}
    for one in data.of:
        try:
            told |= {f"{one.name}, {k}": v for k, v in series_figures(system, one, horizon).items()}
        except ValueError as error:
            told[f"{one.name}, not judged"] = str(error)
    return told


def _figures(system: SeriesSystem, data: SeriesData, horizon: int) -> tuple[dict[str, Any], Intervals | None]:
    lookback, most = system.config.lookback, system.few
    system.check(lookback, horizon)
    figures, intervals = judged(data, method_of(system), lookback, horizon, most=most)
    told: dict[str, Any] = {"lookback": lookback, "horizon": horizon, **figures}
    windows = data.test.windows(lookback, horizon).strided(most)
    for name, method in simple(data, lookback, horizon).items():
        errors, _ = over(data, method, windows)
        told |= {f"{name}, mse": errors.mse, f"{name}, mae": errors.mae}
    return told, intervals


def save_window(
    data: SeriesData, methods: Mapping[str, Method], windows: Windows, number: int, path: Path, title: str = "",
    intervals: Intervals | None = None,
) -> Path:  # fmt: skip
    """A plot of forecasts of one window against what came, with the interval of the first method."""
    batch = windows.take(torch.tensor([number]))
    at = int(batch["at"])
    times, history, ahead = behind(data, windows.lookback, at, windows.horizon)
    forecasts = {name: data.unscaled(method(batch)[0]) for name, method in methods.items()}
    low = high = None
    if intervals is not None:
        half = intervals.half.double().numpy() * data.deviation
        first = next(iter(forecasts.values()))
        low, high = first - half, first + half
    truth = data.series.values[at : at + windows.horizon]
    level = None if intervals is None else intervals.level
    drawn = Drawn(times, history, ahead, forecasts, truth, low, high, level)
    return save_forecast(drawn, data.series.columns, path, title)


def show_series(system: SeriesSystem, data: SeriesData | Mixture, folder: Path) -> dict[str, Any]:
    """The figures of a finished training, a plot of forecasts of a window in the middle of the test part, and what else
    the system shows of that window; of several series, of the first that is long enough."""
    c, one = system.config, judgeable(data, system)
    figures, intervals = _figures(system, one, c.horizon)
    windows = one.test.windows(c.lookback, c.horizon)
    methods = {system.meta.key: method_of(system), "ridge": simple(one, c.lookback, c.horizon)["ridge"]}
    title = f"{system.meta.title} on {one.name}: {c.horizon} steps from {c.lookback}"
    middle = len(windows) // 2
    save_window(one, methods, windows, middle, folder / "held-out.png", title, intervals)
    batch = {k: v.to(system.model.device) for k, v in windows.take(torch.tensor([middle])).items()}
    for name, insight in system.insights(batch, one.series.columns).items():
        save_insight(insight, folder / name)
    return figures if one is data else series_figures(system, data)


def _names(columns: tuple[str, ...], kinds: tuple[str, ...]) -> list[str]:
    """Of the columns of a forecast, all different."""
    for between in (" ", ", ", " / ", " : "):
        names = [f"{c}{between}{kind}" if kind else c for c in columns for kind in kinds]
        time = next(name for name in ("time", "date", "when", "timestamp", "time of forecast") if name not in names)
        if len(set(names)) == len(names):
            return [time, *names]
    raise ValueError(f"no names are left for the columns of a forecast of {', '.join(columns)}")


def write_csv(path: Path, times: Any, columns: tuple[str, ...], values: Mapping[str, np.ndarray[Any, Any]]) -> Path:
    """A table of forecasts: a column of times, then of each variate its value and whatever else there is of it (`low`,
    `high`), each number with as many digits as tell a millionth of the values' spread. No two columns have one name."""
    import csv
    import io

    from seriatim.evaluation.pictures import write_beside

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_names(columns, tuple(values)))
    whole = bool((np.asarray(times) == np.asarray(times).astype("datetime64[s]")).all())
    spread = np.stack(list(values.values())).std((0, 1))
    places = [max(0, 6 - math.floor(math.log10(s))) if s > 0 and math.isfinite(s) else 9 for s in spread.tolist()]
    for i, time in enumerate(times):
        shown = str(time.astype("datetime64[s]" if whole else "datetime64[ms]")).replace("T", " ")
        writer.writerow([shown, *(f"{v[i, j]:.{p}f}" for j, p in enumerate(places) for v in values.values())])
    return write_beside(path, lambda file: file.write(text.getvalue().encode("utf-8")))
