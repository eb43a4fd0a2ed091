"""Forecasters that a user has without us: the last value, the last season, a ridge regression, ETS and ARIMA.

The ridge is one matrix shared by all variates, in closed form: it takes seconds, and is better than several published
networks of equal lookback. ETS and ARIMA (statsmodels) are fitted anew to the lookback of each window, which takes so
long that they run on few windows; whoever is compared with them runs on the same.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from seriatim.data.series import SeriesData, Windows
from seriatim.evaluation.series import Batch, Method, season_of
from seriatim.tokenizers.series import channels_apart, channels_together

ROWS = 2048  # windows that are summed up at once
PENALTY = 1e-3  # of the ridge, for each window of training


def last_value(batch: Batch) -> Float[Tensor, "b h c"]:
    """The last value, repeated."""
    return batch["past"][:, -1:].expand(-1, batch["future_marks"].shape[1], -1)


def seasonal_naive(data: SeriesData, season: int) -> Method:
    """The last season before the future, repeated, also where it reaches further back than a lookback. Raises
    ValueError for windows before which there is no whole season."""

    def forecast(batch: Batch) -> Tensor:
        at, horizon = batch["at"], batch["future_marks"].shape[1]
        if int(at.min()) < season:
            raise ValueError(f"there is no whole season of {season} steps before row {int(at.min())} of {data.name}")
        return data.scaled[at[:, None] - season + torch.arange(horizon) % season]

    return forecast


def ridge(windows: Windows, penalty: float = PENALTY) -> Method:
    """A linear map from lookbacks to horizons, one for all variates; both are taken less the mean of the lookback. The
    penalty on its squares is `penalty` times the number of windows."""
    length, horizon = windows.lookback, windows.horizon
    gram = torch.zeros(length, length, dtype=torch.float64)
    cross = torch.zeros(length, horizon, dtype=torch.float64)
    for part in torch.arange(len(windows)).split(ROWS):
        batch = windows.take(part)
        x, y = channels_apart(batch["past"]).double(), channels_apart(batch["future"]).double()
        mean = x.mean(1, keepdim=True)
        gram += (x - mean).T @ (x - mean)
        cross += (x - mean).T @ (y - mean)
    matrix = torch.linalg.solve(gram + penalty * len(windows) * torch.eye(length, dtype=torch.float64), cross).float()

    def forecast(batch: Batch) -> Tensor:
        past = channels_apart(batch["past"])
        if past.shape[1] != length:
            raise ValueError(f"this ridge regression reads {length} steps, got {past.shape[1]}")
        mean = past.mean(1, keepdim=True)
        return channels_together((past - mean) @ matrix + mean, batch["past"].shape[2])

    return forecast


def simple(data: SeriesData, lookback: int, horizon: int) -> dict[str, Method]:
    """The methods that take seconds, by name."""
    season = season_of(data)
    named = f"last {season} steps" if season > 1 else "seasonal naive"
    methods: dict[str, Method] = {"last value": last_value}
    if season > 1:
        methods[named] = seasonal_naive(data, season)
    methods["ridge"] = ridge(data.train.windows(lookback, horizon))
    return methods


# ---- statsmodels -----------------------------------------------------------------------------------------------------
Fit = Callable[[np.ndarray[Any, Any], int, int], np.ndarray[Any, Any]]


def classical(season: int) -> dict[str, Fitted]:
    """ETS and ARIMA by name. Raises ValueError where statsmodels is not installed."""
    try:
        import statsmodels  # noqa: F401
    except ImportError:
        raise ValueError("ETS and ARIMA need an extra: pip install 'seriatim[series]'") from None
    return {"ETS": Fitted(_ets, season), "ARIMA": Fitted(_arima, season)}


@dataclass
class Fitted:
    """A method that is fitted to each variate of each window; what cannot be fitted is forecast by its last value, and
    counted: `failed` of `fits`."""

    fit: Fit
    season: int
    fits: int = 0
    failed: int = 0

    def __call__(self, batch: Batch) -> Float[Tensor, "b h c"]:
        past, horizon = batch["past"].double().numpy(), batch["future_marks"].shape[1]
        out = np.empty((len(past), horizon, past.shape[2]))
        for i, window in enumerate(past):
            for j in range(past.shape[2]):
                out[i, :, j] = self._one(window[:, j], horizon)
        return torch.from_numpy(out).float()

    def _one(self, y: np.ndarray[Any, Any], horizon: int) -> np.ndarray[Any, Any]:
        self.fits += 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of fits that do not converge
            try:
                values = self.fit(y, horizon, self.season)
            except (ValueError, IndexError, ZeroDivisionError, np.linalg.LinAlgError):  # of very short windows, too
                values = np.full(horizon, np.nan)
        good = np.isfinite(values)
        self.failed += not good.all()
        return np.where(good, values, y[-1])


def _ets(y: np.ndarray[Any, Any], horizon: int, season: int) -> np.ndarray[Any, Any]:
    """Additive errors and season, damped additive trend."""
    from statsmodels.tsa.holtwinters import ExponentialSmoothing

    seasonal = "add" if season > 1 and len(y) >= 2 * season else None
    model = ExponentialSmoothing(
        y, trend="add", damped_trend=True, seasonal=seasonal, seasonal_periods=season if seasonal else None,
        initialization_method="heuristic" if len(y) >= 10 else "estimated",
    )  # fmt: skip
    return np.asarray(model.fit().forecast(horizon))


def _arima(y: np.ndarray[Any, Any], horizon: int, season: int) -> np.ndarray[Any, Any]:
    """ARMA(2, 1) on seasonal differences, or ARIMA(2, 1, 1) where there is no season."""
    from statsmodels.tsa.arima.model import ARIMA

    if season <= 1 or len(y) < 3 * season:
        return np.asarray(ARIMA(y, order=(2, 1, 1)).fit().forecast(horizon))
    ahead = np.asarray(ARIMA(y[season:] - y[:-season], order=(2, 0, 1)).fit().forecast(horizon))
    whole = list(y)
    for value in ahead:
        whole.append(value + whole[-season])
    return np.asarray(whole[len(y) :])
