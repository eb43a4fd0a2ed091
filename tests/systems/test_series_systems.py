"""Systems of series from end to end on small tables: train, resume, evaluate, forecast, compare; and mistakes."""

import csv
import json

import numpy as np
import pytest
import torch

from seriatim.cli.main import main
from seriatim.data.base import load_data
from seriatim.evaluation.series_insight import Heat, Lines, Words, save_insight
from seriatim.systems.series.dlinear import Config as DLinearConfig
from seriatim.systems.series.dlinear import DLinear
from seriatim.systems.series.gpht import GPHT
from seriatim.systems.series.gpht import Config as GPHTConfig
from seriatim.systems.series.itransformer import Config, ITransformer
from seriatim.systems.series.s2ip_llm import S2IP
from seriatim.systems.series.s2ip_llm import Config as S2IPConfig
from seriatim.systems.series.time_llm import Config as TimeLLMConfig
from seriatim.systems.series.time_llm import TimeLLM
from seriatim.verbs.evaluate import evaluate
from seriatim.verbs.forecast import forecast
from seriatim.verbs.load import load
from seriatim.verbs.series import write_csv
from seriatim.verbs.train import train

SMALL = {"lookback": 24, "horizon": 8, "width": 16, "hidden": 16, "heads": 2, "depth": 1}


@pytest.fixture
def table(tmp_path):
    """Two seasons with noise, and a constant."""
    t = np.arange(500)
    rng = np.random.default_rng(0)
    a, b = (np.sin(2 * np.pi * (t / 24 + shift)) + 0.1 * rng.normal(size=500) for shift in (0, 0.3))
    times = np.datetime64("2020-01-01", "s") + t * np.timedelta64(3600, "s")
    path = tmp_path / "waves.csv"
    lines = [
        f"{str(time).replace('T', ' ')},{x:.4f},{100 + 10 * y:.4f},7" for time, x, y in zip(times, a, b, strict=True)
    ]
    path.write_text("date,a,b,still\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_trained_resumed_and_evaluated(table, tmp_path):
    out, settings = tmp_path / "run", {**SMALL, "steps": 30, "epoch": 10, "learning_rate": 3e-3}
    trained = train("itransformer", table, out=out, settings=settings)
    looks = [h["held_out_loss"] for h in trained.history if "held_out_loss" in h]
    assert looks[-1] < looks[0]
    again = train("itransformer", table, out=out, resume=True, settings=settings)
    batch = trained.data.test.windows(24, 8).take(torch.arange(3))
    given = batch["past"], batch["past_marks"], batch["future_marks"]
    want = trained.system.forecast(*given)
    assert torch.equal(again.system.forecast(*given), want)
    assert torch.allclose(load(out).forecast(*given), want, atol=1e-6)  # where weights lie in memory moves last digits
    figures = evaluate(out)
    assert figures["windows"] == 100 - 8 + 1 and figures["ridge, mse"] < figures["last value, mse"]
    assert 0 < figures["interval_coverage"] <= 1


def test_patience_keeps_the_weights_of_the_smallest_loss(table, tmp_path):
    """A learning rate that breaks what was learned: training ends early, and the best look at held-out data stays."""
    out = tmp_path / "run"
    settings = {**SMALL, "steps": 200, "epoch": 5, "validate_every": 5, "patience": 2, "learning_rate": 0.3}
    trained = train("itransformer", table, out=out, settings={**settings, "halving": False})
    losses = [h["held_out_loss"] for h in trained.history if "held_out_loss" in h]
    assert len(trained.history) < 200 and losses.index(min(losses)) == len(losses) - 3
    found = load(out).validate(load(out).examples(trained.data.validation))["loss"]
    assert found == pytest.approx(min(losses), rel=1e-4)
    again = train("itransformer", table, out=out, resume=True, settings={**settings, "halving": False})
    assert len(again.history) == len(trained.history)


def test_a_forecast_is_in_units_of_the_series_with_intervals(table, tmp_path):
    made = forecast("dlinear", table, 8, out=tmp_path / "f", settings={"lookback": 24, "steps": 60})
    rows = list(csv.reader((tmp_path / "f" / "forecast.csv").open()))
    assert rows[0][:4] == ["time", "a", "a low", "a high"] and len(rows) == 9
    assert rows[1][0] == "2020-01-21 20:00:00"
    assert np.abs(made.values[:, 1] - 100).max() < 30 and (made.values[:, 2] == 7).all()
    assert (made.low <= made.values).all() and (made.values <= made.high).all() and made.low[:, 2].tolist() == [7] * 8
    assert (tmp_path / "f" / "forecast.png").is_file()
    again = forecast(tmp_path / "f" / "model", table, 5, out=tmp_path / "g")
    assert np.allclose(again.values, made.values[:5])


def test_a_forecast_of_any_length_is_rolled_on(table, tmp_path):
    small = {"lookback": 48, "segment": 8, "rates": (2, 1), "width": 16, "hidden": 16, "heads": 2, "depth": 1}
    trained = train("gpht", table, out=tmp_path / "run", settings={**small, "steps": 10})
    made = forecast(tmp_path / "run", table, 60, out=tmp_path / "f")
    assert made.values.shape == (60, 3) and np.isfinite(made.values).all()
    tuned = train("gpht", table, from_=tmp_path / "run", out=tmp_path / "tuned", settings={"steps": 5})
    before, after = (dict(t.system.model.named_parameters()) for t in (trained, tuned))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(".head." in name for name in moved)


def test_compared_with_what_takes_seconds(table, tmp_path, capsys):
    options = ["--lookback", "48", "--horizon", "8", "--classical", "1", "--target", "a", "--minutes", "0.01"]
    assert main(["compare", "dlinear", "--data", str(table), "--out", str(tmp_path / "c"), *options]) == 0
    page = (tmp_path / "c" / "report.html").read_text(encoding="utf-8")
    for name in ("dlinear", "ridge 48", "last 24", "last value", "MASE", "data:image/"):
        assert name in page


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["forecast", "dlinear", "--horizon", "0"], "at least 1 step"),
        (["forecast", "dlinear", "--horizon", "400"], "too few"),
        (["forecast", "next-token"], "these do:"),
        (["forecast", "dlinear", "--level", "2"], "between 0 and 1"),
        (["forecast", "dlinear", "--target", "z"], "no column 'z'"),
        (["train", "dlinear", "--tokenizer", "bytes"], "leave out --tokenizer"),
        (["train", "dlinear", "--horizon", "0"], "at least 1"),
        (["train", "dlinear", "--lookback", "300", "--horizon", "96"], "too few for a lookback of 300"),
        (["train", "dlinear", "--halving", "true", "--epoch", "none"], "halved after turns"),
        (["forecast", "gpht", "--lookback", "50"], "whole number of segments"),
    ],
)
def test_mistakes_are_told(table, tmp_path, capsys, words, said):
    assert main([*words, "--data", str(table), "--out", str(tmp_path / "o")]) == 2
    assert said in capsys.readouterr().err


def test_how_a_series_was_read_is_remembered(table, tmp_path, capsys):
    small = {"lookback": 24, "horizon": 8, "steps": 3}
    trained = train("dlinear", table, out=tmp_path / "run", settings=small, target="b")
    assert trained.data.series.columns == ("b",)
    figures = evaluate(tmp_path / "run")
    want = evaluate(trained.system, trained.data)
    assert figures["mae"] == pytest.approx(want["mae"], rel=1e-5)
    assert forecast(tmp_path / "run", out=tmp_path / "f").columns == ("b",)
    assert main(["generate", str(tmp_path / "run")]) == 2
    assert "seriatim forecast" in capsys.readouterr().err


def test_a_lookback_that_is_not_named_suits_a_short_series(table):
    """350 rows of training hold no four of 96 and 8."""
    data = load_data(table, "series")
    assert DLinear.fitting(data, {"horizon": 8}, None) == {"lookback": 16, "horizon": 8}
    assert DLinear.fitting(data, {}, None) == {"lookback": 48, "horizon": 24}
    assert DLinear.fitting(data, {"lookback": 96}, None) == {}


@pytest.mark.parametrize("cls", [TimeLLM, S2IP])
@pytest.mark.parametrize("said", [{}, {"horizon": 5}, {"lookback": 31, "horizon": 3}, {"lookback": 336}])
def test_patches_suit_whatever_lookback_there_is(cls, said, table):
    """One that is no whole number of the published patches would be refused else."""
    fitted = cls.fitting(load_data(table, "series"), said, None)
    inner = {"inner": 4} if cls is TimeLLM else {}
    c = cls.Config(**{**fitted, **said, **inner}, model="tiny", layers=1)
    past = torch.randn(2, c.lookback, 1)
    assert cls(c).forecast(past, past[..., :0], torch.zeros(2, c.horizon, 0)).shape == (2, c.horizon, 1)


def test_more_steps_than_it_was_made_for_are_refused():
    with pytest.raises(ValueError, match="forecasts 8 steps in one forward, and 9"):
        ITransformer(Config(**SMALL)).check(24, 9)
    with pytest.raises(ValueError, match="lookbacks of 24"):
        ITransformer(Config(**SMALL)).check(25, 8)
    with pytest.raises(ValueError, match="odd"):
        DLinear(DLinearConfig(smooth=4))
    with pytest.raises(ValueError, match="whole number of segments"):
        GPHTConfig(lookback=100)


def test_any_number_of_variates_and_marks():
    system = ITransformer(Config(**SMALL)).eval()
    for variates, told in ((1, 0), (5, 4)):
        past, marks = torch.randn(2, 24, variates), torch.zeros(2, 24, told)
        assert system.forecast(past, marks, torch.zeros(2, 8, told)).shape == (2, 8, variates)


def test_stages_add_up_and_a_perfect_one_leaves_the_first_segment():
    system = GPHT(GPHTConfig(lookback=48, segment=8, rates=(4, 1), width=16, hidden=16, heads=2, depth=1)).eval()
    x = torch.randn(3, 48)
    with torch.no_grad():
        parts = system.model.contributions(x)
        assert torch.allclose(sum(parts), system.model(x))

        class Perfect(torch.nn.Module):
            def forward(self, x):
                return torch.cat([x[:, 8:], torch.zeros(len(x), 8)], 1)

        seen = []
        system.model.stages[0] = Perfect()
        system.model.stages[1].register_forward_pre_hook(lambda module, given: seen.append(given[0]))
        system.model(x)
    assert torch.equal(seen[0][:, :8], x[:, :8]) and (seen[0][:, 8:] == 0).all()


def test_the_figures_are_on_file(table, tmp_path):
    main(["train", "dlinear", "--data", str(table), "--out", str(tmp_path / "r"), "--steps", "5", "--lookback", "24",
          "--horizon", "8"])  # fmt: skip
    told = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert {"mse", "mae", "mase", "smape", "interval_coverage", "ridge, mse"} <= set(told)
    assert (tmp_path / "r" / "held-out.png").is_file()


@pytest.mark.parametrize(
    ("system", "files"),
    [
        (ITransformer(Config(**SMALL)), {"attention": Heat}),
        (GPHT(GPHTConfig(lookback=24, segment=8, rates=(2, 1), width=16, hidden=16, heads=2)), {"stages": Lines}),
        (TimeLLM(TimeLLMConfig(lookback=24, horizon=8, inner=4, model="tiny", layers=1)), {"prototypes": Words}),
        (
            S2IP(S2IPConfig(lookback=24, horizon=8, mean=12, period=4, prompt=3, model="tiny", layers=1)),
            {"parts": Lines, "anchors": Words},
        ),
    ],
    ids=lambda x: x.meta.key if hasattr(x, "meta") else "",
)
def test_a_system_shows_what_it_makes_of_a_window(system, files, table, tmp_path):
    data = load_data(table, "series")
    batch = data.test.windows(24, 8).take(torch.tensor([0]))
    found = system.eval().insights(batch, data.series.columns)
    assert {name: type(insight) for name, insight in found.items()} == files
    for name, insight in found.items():
        assert save_insight(insight, tmp_path / name).stat().st_size > 100
    if "attention" in found:
        rows = torch.stack(list(found["attention"].maps.values())).sum(-1)
        assert torch.allclose(rows, torch.ones_like(rows)), "each variate's attention is shared out"
        assert len(found["attention"].names) == rows.shape[1]
    if "stages" in found:
        *stages, whole = found["stages"].curves.values()
        assert torch.allclose(sum(stages), whole)
    if "parts" in found:
        window, *parts = found["parts"].curves.values()
        assert torch.allclose(sum(parts), window, atol=1e-5)


def test_a_series_that_changed_is_not_taken_for_the_one_that_was_trained_on(table, tmp_path):
    settings = {"steps": 3, "lookback": 24, "horizon": 8}
    forecast("dlinear", table, 8, out=tmp_path / "f", settings=settings)
    forecast("dlinear", table, 8, out=tmp_path / "f", settings=settings)
    with pytest.raises(ValueError, match=r"other settings \(read.target None, now 'a'\)"):
        forecast("dlinear", table, 8, out=tmp_path / "f", settings=settings, target="a")
    lines = table.read_text().splitlines()
    table.write_text("\n".join(lines[:-3]) + "\n")
    with pytest.raises(ValueError, match=r"series\.rows 500, now 497"):
        forecast("dlinear", table, 8, out=tmp_path / "f", settings=settings)


def test_several_series_are_found_again_as_they_were_read(table, tmp_path, monkeypatch):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / table.name).write_text(table.read_text())
    small = {"lookback": 48, "segment": 8, "rates": (1,), "width": 16, "hidden": 16, "heads": 2, "depth": 1, "steps": 3}
    monkeypatch.chdir(table.parent)
    both = f"{table.name}, {tmp_path / 'other' / table.name}"
    trained = train("gpht", both, out=tmp_path / "run", settings=small, target="a")
    assert trained.system.config.horizon == 50, "no more than the validation part holds"
    monkeypatch.chdir(tmp_path / "other")
    told = evaluate(tmp_path / "run")
    assert len([k for k in told if k.endswith(", windows")]) == 2, "two of one name are told apart"
    with pytest.raises(ValueError, match="named twice"):
        train("gpht", f"{table},{table}", out=tmp_path / "twice", settings=small)


def test_what_cannot_be_judged_is_not_trained(table, tmp_path):
    with pytest.raises(ValueError, match="of which 50 are for validation"):
        train("gpht", table, out=tmp_path / "run", settings={"lookback": 48, "segment": 8, "horizon": 90, "steps": 3})
    assert not (tmp_path / "run" / "run.json").exists()


def test_what_is_too_short_is_stretched_and_that_is_said(table, tmp_path):
    lines = table.read_text().splitlines()
    (tmp_path / "short.csv").write_text("\n".join(lines[:150]) + "\n")
    small = {"lookback": 48, "segment": 8, "rates": (1,), "width": 16, "hidden": 16, "heads": 2, "depth": 1, "steps": 2}
    with pytest.warns(UserWarning, match="stretched by straight lines: short, 2 times"):
        train("gpht", f"{table},{tmp_path / 'short.csv'}", out=tmp_path / "run", settings=small)


def test_a_forecast_is_written_with_its_digits_and_names(tmp_path):
    times = np.arange(2).astype("datetime64[s]") + np.timedelta64(100, "ms")
    big = 8_123_456_789.0 + np.arange(4.0).reshape(2, 2)
    path = write_csv(tmp_path / "f.csv", times, ("time", "a low"), {"": big, "low": big - 1})
    head, *rows = csv.reader(path.open())
    assert len(set(head)) == 5 and "time" in head
    assert [float(x) for x in rows[1][1:]] == [big[1, 0], big[1, 0] - 1, big[1, 1], big[1, 1] - 1]
    assert rows[0][0] != rows[1][0] and rows[0][0].endswith(".100")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "dlinear", "--lookback", "abc"], "lookback is a number, got 'abc'"),
        (["train", "dlinear", "--steps", "many"], "steps is a number, got 'many'"),
        (["train", "dlinear", "--smooth", "-3"], "an odd number of steps, got -3"),
        (["compare", "dlinear", "--classical", "-1"], "0 windows or more, got -1"),
        (["forecast", "dlinear", "--out", "taken"], "is a file, and a forecast is written into a folder"),
    ],
)
def test_settings_that_are_no_numbers_and_places_that_are_taken_are_refused(
    words, said, table, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("")
    assert main([*words, "--data", str(table)]) == 2
    assert said in capsys.readouterr().err
