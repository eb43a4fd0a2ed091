"""Errors, intervals and baselines of forecasts, against what can be worked out by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from seriatim.data.calendar import Frequency
from seriatim.data.series import Series, SeriesData, as_data
from seriatim.evaluation.series import Drawn, Intervals, conformal, drawn_of, over, save_forecast, season_of
from seriatim.evaluation.series_baselines import Fitted, classical, last_value, ridge, seasonal_naive
from seriatim.verbs.series import judged


def data_of(values: np.ndarray, name: str = "x") -> SeriesData:
    step = Frequency.named("1h")
    times = step.from_(np.datetime64("2020-01-01", "ms"), len(values))
    return as_data(Series(name, times, values, tuple(f"c{i}" for i in range(values.shape[1])), step))


def waves(count: int = 800, noise: float = 0.0) -> SeriesData:
    t = np.arange(count)[:, None]
    rng = np.random.default_rng(0)
    values = 10 + np.sin(2 * np.pi * (t / 24 + np.array([0, 0.3]))) + noise * rng.normal(size=(count, 2))
    return data_of(values)


def test_errors_are_means_over_all_windows_steps_and_variates():
    data = waves(noise=0.3)
    windows = data.test.windows(48, 12)
    errors, _ = over(data, last_value, windows)
    gaps, percent = [], []
    for i in range(len(windows)):
        batch = windows.take(torch.tensor([i]))
        gap = batch["past"][:, -1:] - batch["future"]
        mine, theirs = (data.unscaled(x) for x in (batch["past"][:, -1:].expand_as(batch["future"]), batch["future"]))
        gaps.append(gap)
        percent.append(200 * np.abs(mine - theirs) / (np.abs(mine) + np.abs(theirs)))
    gap = torch.cat(gaps).double()
    assert errors.windows == len(windows) == 160 - 12 + 1
    assert errors.mse == pytest.approx(float(gap.square().mean()), rel=1e-6)
    assert errors.mae == pytest.approx(float(gap.abs().mean()), rel=1e-6)
    assert errors.smape == pytest.approx(float(np.mean(percent)), rel=1e-5)
    train = data.scaled[: data.split.train].double()
    naive = (train[24:] - train[:-24]).abs().mean(0)
    assert errors.mase == pytest.approx(float((gap.abs() / naive).mean()), rel=1e-6)


def test_a_season_repeated_is_exact_on_a_pure_season_and_so_is_a_ridge():
    data = waves()
    windows = data.test.windows(48, 12)
    assert season_of(data) == 24
    assert over(data, seasonal_naive(data, 24), windows)[0].mse < 1e-9
    assert over(data, ridge(data.train.windows(48, 12), 1e-9), windows)[0].mse < 1e-6
    with pytest.raises(ValueError, match="reads 48 steps"):
        ridge(data.train.windows(48, 12))(data.test.windows(24, 12).take(torch.arange(1)))


def test_a_ridge_regression_solves_its_least_squares():
    data = waves(300, noise=1.0)
    windows = data.train.windows(8, 3)
    forecast = ridge(windows, 0.5)
    batch = windows.take(torch.arange(len(windows)))
    past, future = (batch[k].transpose(1, 2).flatten(0, 1).double() for k in ("past", "future"))
    mean = past.mean(1, keepdim=True)
    x, y = past - mean, future - mean
    w = torch.linalg.solve(x.T @ x + 0.5 * len(windows) * torch.eye(8, dtype=torch.float64), x.T @ y)
    want = (x @ w + mean).unflatten(0, (-1, 2)).transpose(1, 2)
    assert (forecast(batch) - want).abs().max() < 1e-4


def test_intervals_cover_what_they_promise_where_residuals_are_of_one_law():
    data = data_of(np.random.default_rng(1).normal(size=(6000, 1)))
    mean = lambda batch: torch.zeros_like(batch["future"])  # noqa: E731
    intervals = conformal(data, mean, data.validation.windows(4, 2), 0.8)
    _, found = over(data, mean, data.test.windows(4, 2), intervals)
    assert found is not None and found.coverage == pytest.approx(0.8, abs=0.05)  # 600 residuals: 3 standard deviations
    assert found.width == pytest.approx(2 * float(intervals.half.mean()))
    with pytest.raises(ValueError, match="between 0 and 1"):
        conformal(data, mean, data.validation.windows(4, 2), 1.0)


def test_a_constant_variate_is_forecast_as_it_is():
    values = np.random.default_rng(0).normal(size=(400, 2))
    values[:, 1] = 5.0
    data = data_of(values)
    seen = {}

    def wild(batch):
        return torch.full_like(batch["future"], 100.0)

    errors, _ = over(data, wild, data.test.windows(8, 4))
    seen["mae"] = errors.mae
    assert errors.mae == pytest.approx(50, rel=0.1)  # the other variate alone is wrong


def test_ets_and_arima_follow_a_season():
    pytest.importorskip("statsmodels")
    data = waves(noise=0.02)
    windows = data.test.windows(96, 12).strided(2)
    for name, method in classical(24).items():
        assert over(data, method, windows)[0].mse < 0.1, name


def test_a_plot_is_a_picture(tmp_path):
    data = waves()
    ahead = data.series.after(12)
    values = data.series.values[-12:]
    drawn = Drawn(
        data.series.time[-48:], data.series.values[-48:], ahead, {"a": values}, values, values - 1, values + 1
    )
    path = save_forecast(drawn, data.series.columns, tmp_path / "x.png", "title")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert Intervals(torch.zeros(1, 1), 0.9).coverage is None


def test_slow_systems_are_judged_on_windows_at_one_distance():
    data = waves(noise=0.3)
    figures, intervals = judged(data, seasonal_naive(data, 24), 48, 12, 0.8, most=20)
    windows = data.test.windows(48, 12)
    assert figures["windows"] == len(windows.strided(20)) and intervals.half.shape == (12, 2)
    assert windows.strided(None) is windows and len(windows.strided(10**6)) == len(windows)


@pytest.mark.parametrize("most", [1, 2, 19, 20, 100, 101])
def test_windows_at_one_distance_reach_over_all(most):
    """Of 199 windows every other is 100: their first 100 would leave out the last half."""
    windows = waves().test.windows(48, 12)
    few = windows.strided(most)
    at = few.take(torch.arange(len(few)))["at"]
    first, last = windows.take(torch.tensor([0, len(windows) - 1]))["at"].tolist()
    assert 1 <= len(few) <= most and at[0] == first and at[-1] <= last < at[-1] + few.stride
    assert len(few) == 1 or len(set(at.diff().tolist())) == 1


@pytest.mark.parametrize(
    ("lookback", "horizon", "drawn"), [(96, 96, 192), (512, 96, 288), (512, 720, 1440), (336, 8, 48)]
)
def test_a_forecast_is_not_lost_beside_its_history(lookback, horizon, drawn):
    assert drawn_of(lookback, horizon) == drawn


def test_what_cannot_be_fitted_is_the_last_value_and_counted():
    def fit(y, horizon, season):
        if y[-1] > 1:
            raise ValueError("does not converge")
        return np.full(horizon, 9.0)

    method = Fitted(fit, 1)
    past = torch.tensor([[[0.0, 5.0], [1.0, 3.0]]])
    made = method({"past": past, "future_marks": torch.zeros(1, 2, 0)})
    assert made.tolist() == [[[9.0, 3.0], [9.0, 3.0]]] and (method.fits, method.failed) == (2, 1)


def test_the_last_season_reaches_behind_a_short_lookback():
    data = waves()
    assert over(data, seasonal_naive(data, 24), data.test.windows(5, 12))[0].mse < 1e-9
    with pytest.raises(ValueError, match="no whole season"):
        seasonal_naive(data, 24)(data.train.windows(5, 12).take(torch.tensor([0])))


def test_mase_leaves_out_what_repeats_itself():
    """Of a variate that is exact from season to season any error would be beyond all measure."""
    data = waves(noise=0.3)
    noisy = over(data, seasonal_naive(data, 24), data.test.windows(48, 12))[0]
    values = data.series.values.copy()
    hour = np.arange(len(values))
    both = np.stack([values[:, 0], np.sin(2 * np.pi * hour / 24)], 1)
    mixed = as_data(replace(data.series, values=both, columns=("a", "exact")))
    found = over(mixed, last_value, mixed.test.windows(48, 12))[0]
    alone = as_data(replace(data.series, values=both[:, :1], columns=("a",)))
    want = over(alone, last_value, alone.test.windows(48, 12))[0]
    assert found.mase == pytest.approx(want.mase, rel=1e-6) and noisy.mase > 0
