"""How good forecasts are: errors over all windows of a part, intervals from the residuals of another, and plots.

MSE and MAE are on the scale of the training rows, as the field publishes them. MASE divides the mean absolute error of
each variate by that of repeating the last season within training; sMAPE is of values in their own units, 0 to 200
percent.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from seriatim.data.series import Series, SeriesData, Windows
from seriatim.evaluation.pictures import ACCENT, INK, PALE, write_beside

Batch = Mapping[str, Tensor]
Method = Callable[[Batch], Float[Tensor, "b h c"]]  # from windows, whose futures it may not look at
BATCH = 256
EXACT = 1e-6  # on the training scale: what changes less from season to season repeats itself
RESIDUALS = 200_000_000  # that are held at once


@dataclass(frozen=True)
class Errors:
    """Of all windows, steps and variates. mse, mae: on the training scale; smape in percent; mase: 1 is as good as the
    last season, repeated, was in training; variates of which that is exact are left out of it (none left: NaN)."""

    mse: float
    mae: float
    mase: float
    smape: float
    windows: int


@dataclass(frozen=True)
class Intervals:
    """Half widths (horizon, variates) on the training scale, and what they were found to be worth on the test part:
    the share of values inside, and the mean whole width."""

    half: Float[Tensor, "h c"]
    level: float
    coverage: float | None = None
    width: float | None = None


def steady(data: SeriesData, method: Method) -> Method:
    """The method, with variates that are constant in training forecast as that constant."""
    if not data.constant.any():
        return method
    constant = torch.from_numpy(data.constant)

    def forecast(batch: Batch) -> Tensor:
        return torch.where(constant, torch.zeros(()), method(batch))

    return forecast


def season_of(data: SeriesData) -> int:
    """Steps of a season, at most half of the training rows."""
    return max(1, min(data.series.frequency.season, data.split.train // 2))


@torch.no_grad()
def over(
    data: SeriesData, method: Method, windows: Windows, intervals: Intervals | None = None
) -> tuple[Errors, Intervals | None]:
    """Errors of a method over all of these windows, and what intervals are worth there."""
    method, season = steady(data, method), season_of(data)
    train = data.scaled[: data.split.train].double()
    naive = (train[season:] - train[:-season]).abs().mean(0)
    changing = naive > EXACT
    deviation, mean = torch.from_numpy(data.deviation), torch.from_numpy(data.mean)
    sums = torch.zeros(4, dtype=torch.float64)
    count = torch.zeros(4, dtype=torch.float64)
    inside = 0.0
    for part in torch.arange(len(windows)).split(BATCH):
        batch = windows.take(part)
        forecast, future = method(batch).double(), batch["future"].double()
        gap = forecast - future
        mine, theirs = forecast * deviation + mean, future * deviation + mean
        size = (mine.abs() + theirs.abs()).clamp(min=1e-8)
        smape = 200 * (mine - theirs).abs() / size
        mase = (gap.abs() / naive)[..., changing]
        sums += torch.stack([gap.square().sum(), gap.abs().sum(), mase.sum(), smape.sum()])
        count += torch.tensor([gap.numel(), gap.numel(), mase.numel(), gap.numel()])
        if intervals is not None:
            inside += float((gap.abs() <= intervals.half).sum())
    mse, mae, mase, smape_mean = (sums / count).tolist()
    errors = Errors(mse, mae, mase, smape_mean, len(windows))
    if intervals is None:
        return errors, None
    width = 2 * float(intervals.half.mean())
    return errors, Intervals(intervals.half, intervals.level, inside / float(count[0]), width)


@torch.no_grad()
def conformal(data: SeriesData, method: Method, windows: Windows, level: float = 0.9) -> Intervals:
    """Split-conformal intervals: for each step and variate, the quantile of absolute residuals on windows that were not
    trained on (the validation part's), which `level` of further residuals stay below if they are of the same law.

    Neighbouring windows share most of their values and series drift, so the promise is approximate: coverage on the
    test part is measured, and told. Of very wide or long forecasts, windows at a distance serve, as all would not fit
    into memory. Raises ValueError for a level outside of 0 to 1.
    """
    if not 0 < level < 1:
        raise ValueError(f"a level of intervals lies between 0 and 1, got {level}")
    method = steady(data, method)
    windows = windows.strided(max(RESIDUALS // (windows.horizon * len(data.series.columns)), 100))
    gaps = []
    for part in torch.arange(len(windows)).split(BATCH):
        batch = windows.take(part)
        gaps.append((method(batch) - batch["future"]).abs())
    residuals = torch.cat(gaps).sort(0).values
    place = min(math.ceil((len(residuals) + 1) * level), len(residuals)) - 1
    return Intervals(residuals[place], level)


def figures_of(errors: Errors, intervals: Intervals | None = None) -> dict[str, Any]:
    """As results carry them."""
    told: dict[str, Any] = asdict(errors)
    if intervals is not None:
        told |= {"level": intervals.level, "interval_coverage": intervals.coverage, "interval_width": intervals.width}
    return told


# ---- plots -----------------------------------------------------------------------------------------------------------
MOST = 6  # variates that are drawn
COLOURS = (ACCENT, "#5b8e7d", "#e0a030", "#7a5c99", "#3a7ca5", "#6b6b6b", "#b5651d")


@dataclass(frozen=True)
class Drawn:
    """Forecasts behind a history, in the units of the series. times, history: what is known; future: their times, and
    the truth, if it is known; forecasts: (horizon, c) by name; low, high: an interval of the first."""

    times: NDArray[Any]
    history: NDArray[np.float64]
    future: NDArray[Any]
    forecasts: Mapping[str, NDArray[np.float64]]
    truth: NDArray[np.float64] | None = None
    low: NDArray[np.float64] | None = None
    high: NDArray[np.float64] | None = None
    level: float | None = None


def save_forecast(
    drawn: Drawn, columns: Sequence[str], path: str | os.PathLike[str], title: str = "", most: int = MOST
) -> Path:
    """A panel for each of the first `most` variates: history, truth in grey, forecasts, an interval as a band."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
    from matplotlib.figure import Figure

    count = min(len(columns), most)
    across = 1 if count == 1 else 2
    down = -(-count // across)
    figure = Figure(figsize=(8.0 if across == 1 else 11.0, 0.6 + 2.6 * down), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(down, across, squeeze=False).flatten()
    for i, axes in enumerate(panels):
        axes.set_visible(i < count)
        if i >= count:
            continue
        axes.plot(drawn.times, drawn.history[:, i], color=INK, linewidth=1.0, label="known")
        if drawn.truth is not None:
            axes.plot(drawn.future, drawn.truth[:, i], color="#9a9a9a", linewidth=1.6, label="what came")
        if drawn.low is not None and drawn.high is not None:
            name = "interval" if drawn.level is None else f"{100 * drawn.level:g}% interval"
            axes.fill_between(
                drawn.future, drawn.low[:, i], drawn.high[:, i], color=COLOURS[0], alpha=0.18, linewidth=0, label=name
            )
        for (name, values), colour in zip(drawn.forecasts.items(), COLOURS * 3, strict=False):
            axes.plot(drawn.future, values[:, i], color=colour, linewidth=1.4, label=name)
        axes.set_title(columns[i], fontsize=10, loc="left", parse_math=False)
        locator = AutoDateLocator(minticks=2, maxticks=7)
        axes.xaxis.set_major_locator(locator)
        axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))
        axes.grid(color=PALE)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 7), frameon=False, fontsize=9)
    hidden = f" (the first {count} of {len(columns)} variates)" if len(columns) > count else ""
    figure.suptitle(title + hidden, fontsize=11, parse_math=False)
    return write_beside(path, lambda file: figure.savefig(file, format="png", dpi=130))


def drawn_of(lookback: int, horizon: int) -> int:
    """Steps of history beside a forecast: the lookback, where the forecast is not lost beside it."""
    return min(max(lookback, 2 * horizon), max(3 * horizon, 48))


def behind(data: SeriesData, lookback: int, at: int, horizon: int) -> tuple[NDArray[Any], NDArray[np.float64], Any]:
    """Times and values before a row, as many as are drawn, and the times behind it."""
    series: Series = data.series
    start = max(0, at - drawn_of(lookback, horizon))
    ahead = series.frequency.from_(series.time[0], horizon, at)
    return series.time[start:at], series.values[start:at], ahead
