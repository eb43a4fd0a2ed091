"""Several series as one set: every window of every variate once, stretched where they are short."""

import numpy as np
import pytest
import torch

from seriatim.data.base import load_data
from seriatim.data.series_mixture import Mixture, stretch
from seriatim.systems.series.gpht import GPHT, Config
from seriatim.verbs.evaluate import evaluate
from seriatim.verbs.forecast import forecast
from seriatim.verbs.train import train

SMALL = {"lookback": 16, "segment": 8, "horizon": 8, "rates": (2, 1), "width": 16, "hidden": 16, "heads": 2, "depth": 1}


@pytest.fixture
def two(tmp_path):
    """Two tables: one long and of two variates, the other short and of one."""
    paths = []
    for name, count, columns in (("long", 300, 2), ("short", 60, 1)):
        times = np.datetime64("2020-01-01", "s") + np.arange(count) * np.timedelta64(3600, "s")
        rows = [",".join([str(t), *(f"{1000 * c + i}" for c in range(columns))]) for i, t in enumerate(times)]
        path = tmp_path / f"{name}.csv"
        path.write_text("\n".join([",".join(["date", "a", "b"][: columns + 1]), *rows]), encoding="utf-8")
        paths.append(str(path))
    return paths


def test_every_window_of_every_variate_comes_once(two):
    data = load_data(",".join(two), "series")
    assert isinstance(data, Mixture) and [one.name for one in data.of] == ["long", "short"]
    windows = data.train.windows(16, 8)
    counts = [len(w) * w.values.shape[1] for w in windows.windows]
    assert len(windows) == sum(counts) and counts[0] == (210 - 24 + 1) * 2
    batch = windows.take(torch.arange(len(windows)))
    assert batch["past"].shape == (len(windows), 16, 1) and batch["future"].shape == (len(windows), 8, 1)
    first = data.of[0].scaled
    assert torch.equal(batch["past"][3, :, 0], first[1:17, 1]) and torch.equal(
        batch["future"][3, :, 0], first[17:25, 1]
    )
    order = torch.tensor([5, 400, 2, 380])
    mixed = windows.take(order)
    assert torch.equal(mixed["past"], batch["past"][order])
    with pytest.raises(IndexError):
        windows.take(torch.tensor([len(windows)]))


def test_short_series_are_stretched_by_straight_lines(two):
    data = load_data(two[1], "series")
    longer = stretch(data, 16, 8)
    times = 3  # 42 rows for training and 6 held out, where 48 and 16 are asked for
    assert "3 times as long" in longer.name and len(longer.series) == 59 * times + 1
    assert np.allclose(longer.series.values[::times], data.series.values)
    assert np.allclose(np.diff(longer.series.values[:, 0]), 1 / times)
    assert longer.split.train == times * data.split.train
    assert stretch(data, 4, 2) is data


def test_one_model_for_all_is_trained_judged_and_forecasts_each(two, tmp_path):
    data = ",".join(two)
    trained = train("gpht", data, out=tmp_path / "run", settings={**SMALL, "steps": 5, "batch": 8})
    figures = evaluate(trained.system, trained.data, horizon=20)
    assert figures["long, horizon"] == 20 and figures["long, windows"] == 60 - 20 + 1
    assert "too few" in figures["short, not judged"]
    made = forecast(tmp_path / "run", two[0], 30, out=tmp_path / "f")
    assert made.values.shape == (30, 2)
    with pytest.raises(ValueError, match="one series is forecast at a time"):
        forecast(tmp_path / "run", data)
    with pytest.raises(ValueError, match="are several"):
        train("itransformer", data, out=tmp_path / "other")


def test_variates_apart_or_together_are_forecast_alike():
    system = GPHT(Config(**SMALL)).eval()
    past, none = torch.randn(2, 16, 3), torch.zeros(2, 16, 0)
    together = system.forecast(past, none, none)
    for i in range(3):
        assert torch.allclose(system.forecast(past[..., i : i + 1], none, none), together[..., i : i + 1], atol=1e-5)
