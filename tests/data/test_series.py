"""Series from tables: what is mended is said, what is not is refused with its row; splits, scaling and windows."""

import sys

import numpy as np
import pytest
import torch

from seriatim.data.base import load_data
from seriatim.data.calendar import Frequency
from seriatim.data.series import Series, Split, as_data
from seriatim.data.series_files import read_series


def hours(count: int, start: str = "2020-01-01") -> list[str]:
    times = np.datetime64(start, "s") + np.arange(count) * np.timedelta64(3600, "s")
    return [str(t).replace("T", " ") for t in times]


def rows(count: int) -> list[str]:
    return [f"{time},{i},{i % 5}" for i, time in enumerate(hours(count))]


def test_a_regular_series_is_read_as_it_is(write):
    series = read_series(write(rows(30)))
    assert series.columns == ("a", "b") and len(series) == 30 and series.notes == ()
    assert str(series.frequency) == "1 hour" and series.frequency.season == 24
    assert series.values[:, 0].tolist() == list(range(30))
    assert str(series.after(2)[1]) == "2020-01-02T07:00:00.000"


def test_gaps_of_up_to_three_rows_and_cells_are_filled_and_counted(write):
    some = rows(40)
    some[20] = some[20].rsplit(",", 2)[0] + ",,1"
    series = read_series(write(some[:5] + some[8:]))
    assert series.values[:, 0].tolist() == pytest.approx(list(range(40)))
    assert any("3 missing rows in 1 gaps" in note for note in series.notes)
    assert any("1 missing cells" in note for note in series.notes)


def test_a_longer_gap_is_refused_with_its_row(write):
    with pytest.raises(ValueError, match=r"row 7 .*4 rows are missing"):
        read_series(write(rows(40)[:5] + rows(40)[9:]))
    some = [r if not 9 < i < 14 else r.rsplit(",", 1)[0] + "," for i, r in enumerate(rows(40))]
    with pytest.raises(ValueError, match="column 'b' misses 4 values in a row"):
        read_series(write(some))


def test_equal_times_are_refused_unless_it_is_said_what_becomes_of_them(write):
    some = rows(20)
    some.insert(4, some[3].rsplit(",", 2)[0] + ",13,13")
    path = write(some)
    with pytest.raises(ValueError, match=r"rows 5 and 6 .*--duplicates"):
        read_series(path)
    assert read_series(path, duplicates="last").values[3].tolist() == [13, 13]
    series = read_series(path, duplicates="mean")
    assert series.values[3].tolist() == [8, 8] and "mean" in series.notes[0]


def test_unsorted_rows_are_sorted_with_a_note(write):
    series = read_series(write(rows(20)[::-1]))
    assert series.values[:, 0].tolist() == list(range(20)) and "sorted" in series.notes[0]


def test_missing_rows_at_the_end_are_dropped_with_a_note(write):
    series = read_series(write([*rows(20), *(f"{t},," for t in hours(23)[20:])]))
    assert len(series) == 20 and "3 rows at the end" in series.notes[0]


def test_values_that_are_known_ahead_are_refused(write):
    ahead = [f"{time},,7" for time in hours(30)[20:]]
    with pytest.raises(ValueError, match="exogenous"):
        read_series(write([*rows(20), *ahead]))


def test_columns_without_numbers_are_named_and_text_among_numbers_is_refused(write):
    some = [f"{r},on" for r in rows(20)]
    series = read_series(write(some, "date,a,b,state"))
    assert series.columns == ("a", "b") and "state" in series.notes[0]
    with pytest.raises(ValueError, match="state"):
        read_series(write(some, "date,a,b,state"), target="state")
    broken = rows(20)
    broken[4] = broken[4].replace(",4,", ",four,")
    with pytest.raises(ValueError, match=r"row 6 .*'four' in column 'a'"):
        read_series(write(broken))


def test_targets_are_kept_and_the_others_named(write):
    series = read_series(write(rows(20)), target="b")
    assert series.columns == ("b",) and "not used: a" in series.notes[0]
    with pytest.raises(ValueError, match="no column 'c'"):
        read_series(write(rows(20)), target="c")


def test_mixed_frequencies_are_refused(write):
    half = [f"2020-01-02 {h:02}:{m:02}:00,1,1" for h in range(3, 9) for m in (0, 30)]
    with pytest.raises(ValueError, match="frequencies are mixed"):
        read_series(write([*rows(24), *half]))
    every_other = [r for i, r in enumerate(rows(60)) if i < 30 or i % 2]
    with pytest.raises(ValueError, match="frequencies are mixed"):
        read_series(write(every_other))
    assert len(read_series(write(every_other), frequency="1h")) == 60


def test_times_are_found_or_named(write):
    with pytest.raises(ValueError, match="--time"):
        read_series(write([f"{i},{i}" for i in range(20)], "a,b"))
    with pytest.raises(ValueError, match=r"row 4 .*'yesterday'"):
        read_series(write(["2020-01-01,1", "2020-01-02,2", "yesterday,3"], "date,a"))
    years = read_series(write([f"{year},{year % 7}" for year in range(1900, 1950)], "year,a"))
    assert str(years.frequency) == "1 year" and years.frequency.season == 1
    named = read_series(write([f"{i},{t}" for i, t in enumerate(hours(9))], "a,when"), time="when")
    assert named.columns == ("a",)


def test_a_row_is_named_by_its_line_even_behind_empty_lines(write):
    some = rows(20)
    some[9] = some[9].replace(",9,", ",nine,")
    with pytest.raises(ValueError, match=r"row 13 .*'nine'"):
        read_series(write([*some[:4], "", "", *some[4:]]))
    with pytest.raises(ValueError, match=r"row 5 .* has 2 cells, and the head 3"):
        read_series(write([*some[:3], "2020-01-01 03:00:00,1", *some[4:]]))
    with pytest.raises(ValueError, match=r"row 5 .*'' in column 'date' is no time"):
        read_series(write([*some[:3], ",,", *some[4:9]]))


def test_empty_rows_at_the_end_are_dropped_with_a_note(write):
    series = read_series(write([*rows(20), ",,", ",,"]))
    assert len(series) == 20 and "2 rows at the end are empty" in series.notes[0]


@pytest.mark.parametrize(
    ("text", "name", "said"),
    [
        ("date,a\n", "x.csv", "no rows below its head"), ("", "x.csv", "no rows"),
        ("date,a,a\n2020-01-01,1,2\n", "x.csv", "columns of one name: 'a'"), ("a", "x.xlsx", "none of them"),
        ("date,a\n2020-01-01,1\n2020-01-02,inf\n2020-01-03,2\n", "x.csv", "row 3 .*infinite"),
        ("date,a\n2020-01-01,1\n2020-01-02,2\n", "x.csv", "at least 3 times"),
        ("date\n2020-01-01\n2020-01-02\n2020-01-03\n", "x.csv", "no column of numbers"),
    ],
)  # fmt: skip
def test_what_is_no_series_is_refused(tmp_path, text, name, said):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=said):
        read_series(path)
    with pytest.raises(ValueError, match="folder"):
        load_data(tmp_path, "series")


def test_a_series_of_a_few_rows_is_refused(write):
    with pytest.raises(ValueError, match="too few for training, validation and test"):
        load_data(write(rows(4)), "series")


def test_parquet_needs_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match=r"pip install 'seriatim\[datasets\]'"):
        read_series(tmp_path / "x.parquet")


def test_semicolons_slashes_zones_and_tabs(write):
    series = read_series(write([f"2020/1/{d} 07:00;{d}" for d in range(1, 29)], "when;a"))
    assert str(series.time[0]) == "2020-01-01T07:00:00.000" and str(series.frequency) == "1 day"
    zoned = read_series(write([f"2020-01-0{d}T00:00:00+02:00\t{d}" for d in range(1, 9)], "t\tx", "x.tsv"))
    assert str(zoned.time[0]) == "2020-01-01T00:00:00.000", "days are those on the wall"
    hours = read_series(write([f"2020-01-01T0{h}:00:00+02:00\t{h}" for h in range(1, 9)], "t\tx", "x.tsv"))
    assert str(hours.time[0]) == "2019-12-31T23:00:00.000"


@pytest.mark.parametrize(("head", "between"), [('"a,b";t;c', ";"), ("a\tt\tc", "\t")])
def test_what_stands_between_cells_is_found_outside_of_quotes(write, head, between):
    lines = [between.join((str(d), f"2020-01-{d:02}", "1")) for d in range(1, 29)]
    series = read_series(write(lines, head))
    assert len(series.columns) == 2 and len(series) == 28


def test_commas_for_decimals_are_read_with_a_note(write):
    series = read_series(write([f"2020-01-{d:02};{d},5;{d}" for d in range(1, 29)], "t;a;b"))
    assert series.values[0].tolist() == [1.5, 1.0] and series.notes == ("commas are taken for decimal points in a",)


@pytest.mark.parametrize(
    ("cells", "head", "named"),
    [
        (lambda i: f'2020-01-{i:02},"{i},234"', "t,a", "'1,234'"),
        (lambda i: f"2020-01-{i:02};1.00{i},5", "t;a", r"'1\.001,5'"),
        (lambda i: f"2020-01-{i:02};{i},5;{i}.5", "t;a;b", "'1,5'"),
        (lambda i: f"2020-01-{i:02};{i}{',' if i == 1 else '.'}5", "t;a", "'1,5'"),
    ],
    ids=["thousands in quotes", "both in a number", "another column has points", "another row has a point"],
)
def test_commas_that_may_be_of_thousands_are_refused(write, cells, head, named):
    with pytest.raises(ValueError, match=f"row 2 .*{named} in column 'a' has a comma"):
        read_series(write([cells(i) for i in range(1, 29)], head))


CLOCKS = [(f"2020-01-{1 + h // 24:02}", h % 24) for h in range(72)]


@pytest.mark.parametrize(
    ("head", "some", "first", "together"),
    [
        ("date,time,a", [f"{day},{h:02}:00,{h}" for day, h in CLOCKS], "2020-01-01T00:00", "date, time"),
        ("date,hour,a", [f"{day},{h},{h}" for day, h in CLOCKS], "2020-01-01T00:00", "date, hour"),
        ("date,time,a", [f"2020-01-{d:02},16:00,{d}" for d in range(1, 29)], "2020-01-01T16:00", "date, time"),
        ("year,month,a", [f"{2000 + m // 12},{m % 12 + 1},{m}" for m in range(40)], "2000-01-01T00", "year, month"),
        ("Year,Month,Day,a", [f"2020,2,{d},{d}" for d in range(1, 29)], "2020-02-01T00", "Year, Month, Day"),
        (
            "year,month,day,hour,a", [f"2020,1,{int(day[8:])},{h},{h}" for day, h in CLOCKS], "2020-01-01T00",
            "year, month, day, hour",
        ),
    ],
)  # fmt: skip
def test_columns_that_tell_times_together_are_joined_with_a_note(write, head, some, first, together):
    series = read_series(write(some, head))
    assert str(series.time[0]).startswith(first) and series.columns == ("a",) and len(series) == len(some)
    assert series.notes == (f"columns {together} tell the times together",)


@pytest.mark.parametrize(
    ("head", "some"),
    [
        ("date,year,month,day,a", [f"{day} {h:02}:00,2020,1,{int(day[8:])},{h}" for day, h in CLOCKS]),
        ("date,year,month,a", [f"2020-01-{d:02},2020,1,{d}" for d in range(1, 29)]),
        ("date,time,a", [f"2020-01-{d:02},{d % 20:02},{d}" for d in range(1, 29)]),
    ],
)
def test_a_column_that_tells_all_times_is_not_joined_with_its_parts(write, head, some):
    series = read_series(write(some, head))
    assert len(series) == len(some) and series.columns == tuple(head.split(",")[1:])


@pytest.mark.parametrize(
    ("head", "some", "options", "said"),
    [
        ("date,time,a", [f"{day},{h % 12} PM,{h}" for day, h in CLOCKS], {}, "columns date, time tell .*, join them"),
        ("year,quarter,a", [f"{2000 + q // 4},{q % 4 + 1},{q}" for q in range(40)], {}, "columns year, quarter"),
        ("date,time,a", [f"{day},{h:02}:00,{h}" for day, h in CLOCKS], {"time": "date"}, "or leave --time out"),
    ],
)
def test_parts_of_times_that_are_not_joined_are_named(write, head, some, options, said):
    with pytest.raises(ValueError, match=said) as raised:
        read_series(write(some, head), **options)
    assert "--duplicates" not in str(raised.value)


def test_equal_days_are_no_matter_of_the_months_beside_them(write):
    days = [1, 2, 3, 3, *range(4, 29)]
    with pytest.raises(ValueError, match="--duplicates mean"):
        read_series(write([f"2020-01-{d:02},2020,1,{d}" for d in days], "date,year,month,a"))


@pytest.mark.parametrize(("name", "first"), [("", 0), ("", 1), ("Unnamed: 0", 0)])
def test_a_column_that_counts_the_rows_is_not_used(write, name, first):
    series = read_series(write([f"{i + first},{r}" for i, r in enumerate(rows(30))], f"{name},date,a,b"))
    assert series.columns == ("a", "b") and "counts the rows" in series.notes[0]


def test_numbers_are_names_of_columns_beside_a_column_without_a_name(write):
    assert read_series(write(rows(30), ",0,1")).columns == ("0", "1")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("2020-01-01,7.5\n2020-01-02,8\n", "holds values, not names"),
        ("2020-01-01,1,1\n2020-01-02,8,8\n", "holds values, not names"),
        ("2020-01-01,1,on\n2020-01-02,8,off\n", "holds values, not names"),
        ("date,a\n2020-01-01,7\n2020-01-02,8\n".encode("utf-16-le"), "is not written in UTF-8"),
        ("date,a\n2020-01-01T00:00:00.00000001,7\n2020-01-01T00:00:00.00000002,8\n", "to the millisecond"),
        ("date,Größe\n2020-01-01,7\n".encode("latin-1"), "is not written in UTF-8"),
        ("date,a\n2020-01-01,7\n".encode("utf-16"), "is not written in UTF-8"),
        ('date,a\n2020-01-01,"7' + "x" * 200_000, "behind line 1: .*a quote that is not closed"),
        ("date,a\n2020-01-01T00:00:00.0005,7\n2020-01-01T00:00:00.0010,8\n", "to the millisecond"),
        ("date,a\n2020-01-01,1e160\n2020-01-02,2e160\n", "bring them to a usual scale"),
        ("date,a\n2020-01-01,1e-200\n2020-01-02,2e-200\n", "bring them to a usual scale"),
    ],
)
def test_what_would_be_misread_is_refused(tmp_path, content, said):
    path = tmp_path / "x.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ValueError, match=said):
        read_series(path)


def test_a_target_that_is_named_twice_is_kept_once(write):
    assert read_series(write(rows(30)), target="b,b").columns == ("b",)


@pytest.mark.parametrize("end", [".tsv", ".parquet"])
def test_other_tables_kept_at_home_go_by_their_names(write, tmp_path, monkeypatch, end):
    monkeypatch.setattr("seriatim.data.base.HOME", tmp_path)
    (tmp_path / "data").mkdir()
    if end == ".tsv":
        write([r.replace(",", "\t") for r in rows(40)], "date\ta\tb", "data/mine.tsv")
    else:
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        table = pa.table({"date": np.array(hours(40), "datetime64[ms]"), "a": np.arange(40.0)})
        pq.write_table(table, tmp_path / "data" / "mine.parquet")
    assert load_data("mine", "series").name == "mine"


def test_a_table_kept_at_home_goes_by_its_name(write, tmp_path, monkeypatch):
    monkeypatch.setattr("seriatim.data.base.HOME", tmp_path)
    (tmp_path / "data").mkdir()
    write(rows(40)).rename(tmp_path / "data" / "mine.csv")
    assert load_data("mine", "series").name == "mine"
    with pytest.raises(FileNotFoundError, match="'yours'"):
        load_data("yours", "series")


def test_parquet_is_read_as_csv_is(write, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    series = read_series(write(rows(20)))
    table = pyarrow.table({"date": series.time, "a": series.values[:, 0], "b": series.values[:, 1]})
    parquet.write_table(table, tmp_path / "x.parquet")
    again = read_series(tmp_path / "x.parquet")
    assert (again.values == series.values).all() and (again.time == series.time).all()


# ---- sides and windows -----------------------------------------------------------------------------------------------
def made(count: int, name: str = "x", columns: int = 2) -> Series:
    step = Frequency.named("1h")
    values = np.random.default_rng(0).normal(size=(count, columns)).cumsum(0)
    times = step.from_(np.datetime64("2016-07-01", "ms"), count)
    return Series(name, times, values, tuple(f"c{i}" for i in range(columns)), step)


@pytest.mark.parametrize(("horizon", "count"), [(96, 2785), (192, 2689), (336, 2545), (720, 2161)])
def test_an_ett_set_has_the_windows_of_the_field(horizon, count):
    data = as_data(made(17_420, "ETTh1"))
    assert data.split == Split(8640, 11_520, 14_400)
    for lookback in (96, 512):
        assert len(data.test.windows(lookback, horizon)) == len(data.validation.windows(lookback, horizon)) == count
        assert len(data.train.windows(lookback, horizon)) == 8640 - lookback - horizon + 1


def test_others_are_split_by_shares():
    assert as_data(made(1000)).split == Split(700, 800, 1000)


def test_the_scale_is_that_of_training_rows_alone():
    data = as_data(made(1000))
    train = data.scaled[:700].double()
    assert train.mean(0).abs().max() < 1e-6 and (train.std(0, unbiased=False) - 1).abs().max() < 1e-6
    assert np.abs(data.unscaled(data.scaled) - data.series.values).max() < 1e-4


def test_windows_hold_every_row_of_their_side_and_lookbacks_reach_before_it():
    data = as_data(made(1000))
    windows = data.test.windows(48, 24)
    batch = windows.take(torch.tensor([0, len(windows) - 1]))
    assert torch.equal(batch["future"][0], data.scaled[800:824]) and torch.equal(batch["past"][0], data.scaled[752:800])
    assert torch.equal(batch["future"][1], data.scaled[976:1000])
    assert batch["past_marks"].shape == (2, 48, 4)
    with pytest.raises(IndexError):
        windows.take(torch.tensor([len(windows)]))
    few = windows.strided(10)
    assert len(few) == 10 and torch.equal(few.take(torch.tensor([1]))["at"], torch.tensor([800 - -len(windows) // 10]))


def test_a_series_that_is_too_short_is_refused():
    data = as_data(made(120))
    with pytest.raises(ValueError, match="too few for a lookback of 96 and a horizon of 96"):
        data.train.windows(96, 96)
    with pytest.raises(ValueError, match="at least 1"):
        data.train.windows(96, 0)


def test_a_constant_variate_is_told():
    series = made(200)
    series.values[:, 1] = 3.0
    data = as_data(series)
    assert data.constant.tolist() == [False, True] and "c1" in data.notes[-1]


def test_built_in_series_and_wrong_options(write):
    pytest.importorskip("statsmodels")
    for name, count in (("co2", 526), ("elnino", 732), ("sunspots", 309), ("nile", 100), ("macrodata", 203)):
        data = load_data(name, "series")
        assert len(data.series) == count and np.isfinite(data.series.values).all()
    with pytest.raises(TypeError, match="takes time, target, frequency, duplicates"):
        load_data(write(rows(20)), "series", image_size=3)
    with pytest.raises(ValueError, match="series data"):
        load_data("co2", "text")
