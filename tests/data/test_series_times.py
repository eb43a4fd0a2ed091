"""When the rows of a series are: working days, months, zones, and the marks that models are told."""

import datetime
import zoneinfo

import numpy as np
import pytest

from seriatim.data.calendar import Frequency, marks, read_times
from seriatim.data.series_files import read_series


def weekdays(begin: str, count: int) -> list[str]:
    return [str(np.busday_offset(begin, i, roll="forward")) for i in range(count)]


@pytest.mark.parametrize("begin", ["2020-01-06", "2020-01-10"])
def test_days_without_weekends_are_working_days(write, begin):
    """From a Monday, and from a Friday."""
    some = [f"{day},{i}" for i, day in enumerate(weekdays(begin, 100))]
    series = read_series(write(some[:50] + some[51:], "date,a"))
    assert series.frequency == Frequency(1, working=True) and series.frequency.season == 5
    assert series.values[:, 0].tolist() == pytest.approx(list(range(100))), "a holiday is filled, a weekend is none"
    assert [str(t)[:10] for t in series.after(6)] == weekdays(begin, 106)[100:]
    assert marks(series.time, series.frequency).shape == (100, 3)
    assert read_series(write(some, "date,a"), frequency="B").frequency == series.frequency


def test_two_weeks_of_working_days_are_not_taken_for_days(write):
    series = read_series(write([f"{day},{i}" for i, day in enumerate(weekdays("2020-01-06", 10))], "date,a"))
    assert series.frequency.working and len(series) == 10


def test_weekends_are_no_working_days(write):
    daily = [f"2020-01-{d:02},{d}" for d in range(1, 29)]
    assert str(read_series(write(daily, "date,a")).frequency) == "1 day"
    with pytest.raises(ValueError, match=r"row 5 .*2020-01-04.* lies on a weekend"):
        read_series(write(daily, "date,a"), frequency="B")
    with pytest.raises(ValueError, match=r"row 5 .*2020-01-04.* lies on a weekend"):  # and none on the Monday behind it
        read_series(write(daily[:4] + daily[6:10], "date,a"), frequency="B")


@pytest.mark.parametrize(("whole", "read"), [(80, True), (79, False)])
def test_at_least_80_percent_of_steps_are_of_one_length(write, whole, read):
    apart = np.array([2] * (100 - whole) + [1] * whole)
    times = np.datetime64("2020-01-01T00:00:00") + np.concatenate([[0], apart.cumsum()]) * np.timedelta64(1, "h")
    path = write([f"{t},{i}" for i, t in enumerate(times)], "date,a")
    if read:
        assert len(read_series(path)) == 121
    else:
        with pytest.raises(ValueError, match=r"only 79% of the steps .* at least 80% must be"):
            read_series(path)


def month_days(day: int, start: str = "2020-01", count: int = 30) -> list[str]:
    """That day of each month, or the last of a shorter one."""
    months = np.datetime64(start) + np.arange(count)
    last = (months + 1).astype("datetime64[D]") - 1
    return [str(t) for t in np.minimum(months.astype("datetime64[D]") + day - 1, last)]


@pytest.mark.parametrize(
    ("times", "after"),
    [
        ([f"{2021 + (m + 1) // 12}-{(m + 1) % 12 + 1:02}-28" for m in range(30)], "2023-08-28"),
        ([f"{2020 + m // 12}-{m % 12 + 1:02}-01T00:00+01:00" for m in range(30)], "2022-07-01"),
        (month_days(1), "2022-07-01"),
        (month_days(30), "2022-07-30"),
        (month_days(29, "2021-02"), "2023-08-29"),
        ([f"{day} 23:59:59" for day in month_days(31)], "2022-07-31"),
    ],
    ids=["the 28th, from February on", "with a zone", "the first", "the 30th", "the 29th", "the last, with a clock"],
)
def test_months_stay_on_the_day_that_they_are_told_by(write, times, after):
    series = read_series(write([f"{t},{i}" for i, t in enumerate(times)], "date,a"))
    assert series.frequency.monthly and series.frequency.step == 1
    want = [np.datetime64(t.removesuffix("+01:00"), "ms") for t in times]
    assert series.time.tolist() == np.array(want).tolist(), "times are those of the file"
    assert str(series.after(1)[0])[:10] == after
    assert (read_series(write([f"{t},0" for t in times], "date,a"), frequency="MS").time == series.time).all()


def test_a_missing_month_does_not_move_the_others(write):
    times = [t for i, t in enumerate(month_days(31, count=6)) if i in (0, 2, 4)]
    series = read_series(write([f"{t},1" for t in times], "date,a"), frequency="MS")
    assert [str(t)[:10] for t in series.time] == month_days(31, count=5)


@pytest.mark.parametrize("frequency", ["MS", None])
def test_months_that_are_told_by_working_days_keep_their_months(write, frequency):
    ends = [str(np.busday_offset(np.datetime64("2020-01") + m + 1, -1, roll="forward")) for m in range(30)]
    series = read_series(write([f"{t},{i}" for i, t in enumerate(ends)], "date,a"), frequency=frequency)
    assert [str(t)[:7] for t in series.time] == [t[:7] for t in ends]
    assert "told by the first of each" in series.notes[0]


def test_days_are_no_months(write):
    daily = [f"2020-01-{d:02},{d}" for d in range(1, 29)]
    with pytest.raises(ValueError, match=r"rows 2 and 3 .* fall into one step of 1 month"):
        read_series(write(daily, "date,a"), frequency="MS")


def test_rows_that_are_told_by_the_clock_of_the_first_are_counted(write):
    some = [f"{day} {'13' if i == 7 else '16'}:00,{i}" for i, day in enumerate(weekdays("2020-01-06", 60))]
    series = read_series(write(some, "date,a"))
    assert series.frequency.working and any("1 rows stand elsewhere" in note for note in series.notes)


def test_days_of_a_zone_whose_clocks_change_are_days(write):
    zone = zoneinfo.ZoneInfo("Europe/Berlin")
    days = [datetime.datetime(2020, 3, 20, tzinfo=zone) + datetime.timedelta(days=d) for d in range(20)]
    series = read_series(write([f"{day.isoformat()},{i}" for i, day in enumerate(days)], "date,a"))
    assert str(series.frequency) == "1 day" and str(series.time[-1])[:10] == "2020-04-08" and len(series) == 20
    assert series.notes == ("times have a zone: they are those on the wall",)


def test_days_of_utc_on_a_wall_whose_clock_changes_are_days(write):
    begin, zone = datetime.datetime(2020, 3, 20, tzinfo=datetime.UTC), zoneinfo.ZoneInfo("Europe/Berlin")
    days = [(begin + datetime.timedelta(days=d)).astimezone(zone) for d in range(20)]
    series = read_series(write([f"{day.isoformat()},{i}" for i, day in enumerate(days)], "date,a"))
    assert str(series.frequency) == "1 day" and str(series.time[0]) == "2020-03-20T00:00:00.000" and len(series) == 20
    assert series.notes == ("times have a zone: they are turned to UTC",)


def test_marks_of_weeks_are_those_of_iso_8601():
    times = np.array(["2020-12-31", "2021-01-03", "2021-01-04"], "datetime64[ms]")
    want = [52 / 52 - 0.5, 52 / 52 - 0.5, 0 / 52 - 0.5]  # weeks 53, 53 and 1
    assert marks(times, Frequency.named("W"))[:, 1].tolist() == pytest.approx(want)


@pytest.mark.parametrize(
    ("text", "step", "monthly"), [("15min", 900_000, False), ("H", 3_600_000, False), ("MS", 1, True), ("2Q", 6, True)]
)
def test_frequencies_by_name(text, step, monthly):
    assert Frequency.named(text) == Frequency(step, monthly)


@pytest.mark.parametrize("text", ["often", "0h", "9" * 20 + "h", "9" * 14 + "M", "9" * 14 + "B", "9" * 5000 + "h"])
def test_a_frequency_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match="as in 15min"):
        Frequency.named(text)


def test_months_follow_the_calendar():
    ends, _ = read_times(["2020-01-31", "2020-02-29", "2020-03-31", "2020-04-30"])
    step = Frequency.inferred(ends)
    assert step == Frequency(1, True, day=31)
    assert [str(t)[:10] for t in step.from_(ends[0], 2, 4)] == ["2020-05-31", "2020-06-30"]


def test_marks_of_hours_are_those_of_the_field():
    times, _ = read_times(["2016-07-01 13:00:00"])  # a Friday, the 183rd day of a leap year
    want = [13 / 23 - 0.5, 4 / 6 - 0.5, 0 / 30 - 0.5, 182 / 365 - 0.5]
    assert marks(times, Frequency.named("1h"))[0].tolist() == pytest.approx(want)
