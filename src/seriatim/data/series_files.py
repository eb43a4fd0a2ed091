"""Series from tables (CSV, TSV, Parquet): a column of times, and columns of numbers. Nothing is dropped unsaid.

Rows are sorted by time; gaps of up to three steps, and as many missing cells, are filled by a straight line and
counted; what is longer, equal times, and steps of several lengths are errors that name the row.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seriatim.data.base import suffix
from seriatim.data.calendar import REGULAR, Frequency, Times, by_first_days, read_times
from seriatim.data.series import Series

LONGEST_GAP = 3  # steps that are filled
LARGEST = 1e100  # of numbers, and of the parts of one that their spread is: squares of others overflow
JOINED = (  # columns that tell times together
    ("date", "time"), ("date", "hour"), ("year", "month", "day", "time"), ("year", "month", "day", "hour"),
    ("year", "month", "day"), ("year", "month"),
)  # fmt: skip
CLOCK = ("time", "hour", "minute", "second")
PARTS = ("date", "year", "quarter", "month", "week", "day", *CLOCK)  # of a time
COMMAS = re.compile(r"\s*[+-]?[\d.]*(,\d+)+(\.\d+)?(e[+-]?\d+)?\s*", re.IGNORECASE)  # numbers that hold some
DECIMAL = re.compile(r"\s*[+-]?\d*(,\d+)?(e[+-]?\d+)?\s*", re.IGNORECASE)  # with a comma, or without
MISSING = {"", "nan", "na", "n/a", "null", "none", "-"}
Cells = dict[str, list[Any]]


def read_series(
    path: str | Path, time: str | None = None, target: str | Sequence[str] | None = None,
    frequency: str | None = None, duplicates: str | None = None,
) -> Series:  # fmt: skip
    """The series of a table. time: its column of times (found, where there is one); target: the columns to keep, a name
    or several with commas (all that hold numbers); frequency: the step, as in `1h` (inferred); duplicates: of rows with
    one time, their `mean` or the `last`.

    Raises ValueError that names column and row for times that are none, equal times, gaps of more than three steps,
    steps of several lengths, text among numbers, and columns that end at different times.
    """
    path, notes = Path(path), list[str]()
    if duplicates not in (None, "mean", "last"):
        raise ValueError(f"duplicates is mean or last, not {duplicates!r}")
    cells, row = _cells(path, notes)
    name, times = _times(path, cells, row, time, notes)
    values, columns = _numbers(path, cells, row, name, target, notes)
    times, values, row = _sorted(times, values, row, notes)
    advice = _advice(cells, name, times, time)
    times, values, row = _once(path, times, values, row, duplicates, advice, notes)
    times, values, row = _trimmed(path, times, values, row, columns, notes)
    step = Frequency.named(frequency, times) if frequency else Frequency.inferred(times)
    if by_first_days(times, step):
        notes.append("rows stand on several days of their months, and are told by the first of each")
        times = times.astype("datetime64[M]").astype("datetime64[ms]")
    if step.working:
        notes.append("no row lies on a weekend: steps are working days")
    times, values, filled = _regular(path, times, values, row, step, frequency is not None, notes)
    values, cells_filled = _filled(path, values, columns, times)
    if cells_filled - filled * len(columns):
        notes.append(f"{cells_filled - filled * len(columns)} missing cells were filled by straight lines")
    return Series(path.stem, times, values, columns, step, tuple(notes))


# ---- cells -----------------------------------------------------------------------------------------------------------
def _cells(path: Path, notes: list[str]) -> tuple[Cells, NDArray[np.int64]]:
    """The columns of a table by name, and the number of each row: its line, as an editor counts them, or of Parquet its
    place from 1. Raises ValueError for what is no table or holds none."""
    kind = suffix(path.name)
    if kind == ".parquet":
        return _parquet(path)
    if kind not in (".csv", ".tsv", ".txt"):
        raise ValueError(f"a series is read from .csv, .tsv or .parquet, and {path} is none of them")
    rows, lines, between = _rows_of(path, "\t" if kind == ".tsv" else None)
    empty = 0
    while rows and not any(cell.strip() for cell in rows[-1]):
        rows.pop()
        empty += 1
    if len(rows) < 2:
        raise ValueError(f"{path} holds no rows below its head")
    if empty:
        notes.append(f"{empty} rows at the end are empty, and were dropped")
    head = [cell.strip() for cell in rows[0]]
    if _no_names(head, rows[1]):
        raise ValueError(f"the first row of {path} holds values, not names of columns: put a row of names above it")
    if len(set(head)) < len(head):
        twice = sorted({name for name in head if head.count(name) > 1})
        raise ValueError(f"{path} has columns of one name: {', '.join(map(repr, twice))}; rename them")
    for line, row in zip(lines, rows, strict=False):
        if len(row) != len(head):
            raise ValueError(f"row {line} of {path} has {len(row)} cells, and the head {len(head)}")
    columns = {name: [row[i] for row in rows[1:]] for i, name in enumerate(head)}
    for name in ("", "Unnamed: 0"):
        if name in columns and columns[name] in ([str(i + k) for i in range(len(rows) - 1)] for k in (0, 1)):
            del columns[name]
            notes.append("a column without a name that counts the rows is not used")
    return columns if between == "," else _with_points(columns, notes), np.array(lines[1 : len(rows)])


def _parquet(path: Path) -> tuple[Cells, NDArray[np.int64]]:
    """Columns of a Parquet file, and numbers of its rows."""
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise ValueError(f"reading {path} needs an extra: pip install 'seriatim[datasets]'") from None
    try:
        table = parquet.read_table(path)
        columns = {str(name): table.column(i).to_pylist() for i, name in enumerate(table.column_names)}
    except Exception as error:  # of any kind that the library raises
        raise ValueError(f"{path} cannot be read as Parquet: {error}") from None
    if not table.num_rows:
        raise ValueError(f"{path} holds no rows")
    return columns, np.arange(table.num_rows) + 1


def _no_names(head: Sequence[str], below: Sequence[str]) -> bool:
    """Whether the first row holds values: only numbers and times, or a whole date above another."""
    if all(_number(cell) or read_times([cell])[0] is not None for cell in head):
        return True
    dates = [[len(cell) > 7 and read_times([cell])[0] is not None for cell in row] for row in (head, below)]
    return any(map(all, zip(*dates, strict=False)))


def _rows_of(path: Path, between: str | None) -> tuple[list[list[str]], list[int], str]:
    """Rows that are not empty, the lines that they end in, and what stands between cells. between: the same, where it
    is known (None: a comma, semicolon or tab, whichever the head has most of outside of quotes). Raises ValueError for
    other encodings, and quotes that are not closed."""
    rows, lines = list[list[str]](), list[int]()
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            head = re.sub(r'"[^"]*"', "", file.readline())
            if "\0" in head:  # UTF-16 without its mark
                raise UnicodeError
            file.seek(0)
            between = between or max(",;\t", key=head.count)
            reader = csv.reader(file, delimiter=between)
            for row in reader:
                if row:
                    rows.append(row)
                    lines.append(reader.line_num)
    except UnicodeError:
        raise ValueError(f"{path} is not written in UTF-8: save it so (other encodings are not guessed)") from None
    except csv.Error as error:
        raise ValueError(
            f"{path} cannot be read behind line {lines[-1] if lines else 0}: {error}; look there for a quote that is "
            "not closed"
        ) from None
    return rows, lines, between


def _times(path: Path, cells: Cells, row: NDArray[np.int64], asked: str | None, notes: list[str]) -> tuple[str, Times]:
    """The column of times; several that tell them together become one of `cells`. Raises ValueError where there is
    none, or a cell of it is no time."""
    if asked is not None and asked not in cells:
        raise ValueError(f"{path} has no column {asked!r}; it has {', '.join(cells)}")
    joined = None if asked is not None else _joined(cells, notes)
    if joined is not None:
        return joined
    suspect = None
    for name in [asked] if asked is not None else list(cells):
        times, wrong = read_times(cells[name], said := list[str]())
        if times is not None and (asked is not None or not _all_whole(cells[name]) or _is_time(name)):
            notes += said
            return name, times
        meant = _is_time(name) or (wrong > 0 and not _number(cells[name][0]))
        if times is None and suspect is None and (asked is not None or meant):
            suspect = name, wrong
    if suspect is not None:
        name, wrong = suspect
        raise ValueError(
            f"row {row[wrong]} of {path}: {cells[name][wrong]!r} in column {name!r} is no time; write times as "
            "2016-07-01 00:00:00"
        )
    raise ValueError(
        f"{path} has no column of times such as 2016-07-01 00:00:00 among {', '.join(cells)}: name it with --time"
    )


def _joined(cells: Cells, notes: list[str]) -> tuple[str, Times] | None:
    """Columns that tell the times together, as one of `cells`; None where a column tells as many of them alone."""
    lower = [name.strip().lower() for name in cells]
    groups = [
        [name for part in names for name, low in zip(cells, lower, strict=True) if low == part]
        for names in JOINED if all(lower.count(part) == 1 for part in names)
    ]  # fmt: skip
    if not groups:
        return None
    alone = [read_times(column)[0] for column in cells.values() if not _all_whole(column)]
    most = max((len(np.unique(times)) for times in alone if times is not None), default=0)
    for found in groups:
        parts = [[str(cell).strip() for cell in cells[name]] for name in found]
        last = found[-1].strip().lower()
        if last == "time" and not all(":" in cell for cell in parts[-1]):
            continue
        clock = parts.pop() if last in ("time", "hour") else [""] * len(parts[0])
        clock = [f" {cell}:00" if last == "hour" else f" {cell}".rstrip() for cell in clock]
        dates = ["-".join(some) for some in zip(*parts, strict=True)]
        dates = [re.sub(r"-(\d)(?=-|$)", r"-0\1", text) for text in dates]
        times, _ = read_times([date + time for date, time in zip(dates, clock, strict=True)], said := list[str]())
        if times is not None and len(np.unique(times)) > most - (last == "time"):
            notes += [f"columns {', '.join(found)} tell the times together", *said]
            for name in found[1:]:
                del cells[name]
            return found[0], times
    return None


def _advice(cells: Cells, name: str, times: Times, asked: str | None) -> str:
    """What to do about equal times: other columns may hold the finer parts of them."""
    finer = PARTS if (times == times.astype("datetime64[M]")).all() else CLOCK
    parts = [other for other in cells if other != name and other.strip().lower() in finer]
    if not parts:
        return "say --duplicates mean or --duplicates last"
    return (
        f"if columns {', '.join((name, *parts))} tell the times together, join them into one such as "
        f"2016-07-01 00:00:00{'' if asked is None else ', or leave --time out'}"
    )


def _is_time(name: str) -> bool:
    return name.strip().lower() in ("date", "time", "datetime", "timestamp", "ds", "year", "month")


def _all_whole(column: Sequence[Any]) -> bool:
    """Cells such as 1984, which may be years or just numbers."""
    return all(str(cell).strip().isdigit() for cell in column)


def _number(cell: Any) -> bool:
    try:
        float(cell)
    except (TypeError, ValueError):
        return False
    return True


def _missing(cell: Any) -> bool:
    return cell is None or (isinstance(cell, str) and cell.strip().lower() in MISSING) or cell != cell


def _numbers(
    path: Path, cells: Cells, row: NDArray[np.int64], time: str, target: str | Sequence[str] | None, notes: list[str]
) -> tuple[NDArray[np.float64], tuple[str, ...]]:
    """The columns of numbers that are wanted, missing cells as NaN. Raises ValueError for text among numbers."""
    rest = [name for name in cells if name != time]
    wanted = rest
    if target is not None:
        wanted = [t.strip() for t in target.split(",")] if isinstance(target, str) else list(target)
        wanted = list(dict.fromkeys(wanted))
        unknown = [name for name in wanted if name not in rest]
        if unknown:
            raise ValueError(
                f"{path} has no column {', '.join(map(repr, unknown))} of numbers; it has {', '.join(rest)}"
            )
        others = [name for name in rest if name not in wanted]
        if others:
            notes.append(f"columns that are not forecast, and not used: {', '.join(others)}")
    kept, values, text = [], [], []
    for name in wanted:
        there = [i for i, cell in enumerate(cells[name]) if not _missing(cell)]
        numeric = [i for i in there if _number(cells[name][i])]
        wrong = [cells[name][i] for i in there if not _number(cells[name][i])]
        commas = bool(wrong) and all(COMMAS.fullmatch(str(cell)) for cell in wrong)
        if not commas and (len(numeric) * 2 < len(there) or not there):
            text.append(name)
            continue
        if wrong:
            i = next(i for i in there if not _number(cells[name][i]))
            if commas:
                raise ValueError(
                    f"row {row[i]} of {path}: {cells[name][i]!r} in column {name!r} has a comma, and it is not clear "
                    "what for: write numbers with a point for decimals and nothing between thousands, as 1234.5"
                )
            raise ValueError(f"row {row[i]} of {path}: {cells[name][i]!r} in column {name!r} is no number")
        column = np.full(len(cells[name]), np.nan)
        column[there] = [float(cells[name][i]) for i in there]
        if np.isinf(column).any():
            raise ValueError(f"row {row[np.isinf(column).argmax()]} of {path}: column {name!r} is infinite there")
        _bounded(path, name, column)
        kept.append(name)
        values.append(column)
    if not wanted:
        raise ValueError(f"{path} has no column of numbers beside that of times, {time!r}")
    if text and (target is not None or not kept):
        raise ValueError(f"columns of {path} that hold no numbers: {', '.join(text)}; name others with --target")
    if text:
        notes.append(f"columns that hold no numbers, and are not used: {', '.join(text)}")
    return np.stack(values, 1), tuple(kept)


def _with_points(cells: Cells, notes: list[str]) -> Cells:
    """The same, commas of decimals replaced by points; as it is where some numbers have commas and others points."""
    kinds = {
        name: "," if any("," in str(cell) for cell in column) else "."
        for name, column in cells.items()
        if all(_missing(cell) or DECIMAL.fullmatch(cell) for cell in column)
        or all(_missing(cell) or _number(cell) for cell in column)
    }
    commas = [name for name, kind in kinds.items() if kind == ","]
    points = any("." in cell for name, kind in kinds.items() if kind == "." for cell in cells[name])
    if not commas or points:
        return cells
    notes.append(f"commas are taken for decimal points in {', '.join(commas)}")
    return cells | {
        name: [cell if _missing(cell) else cell.replace(",", ".") for cell in cells[name]] for name in commas
    }


def _bounded(path: Path, name: str, column: NDArray[np.float64]) -> None:
    """Raises ValueError for numbers whose squares are none."""
    size, spread = float(np.nanmax(np.abs(column))), float(np.nanmax(column) - np.nanmin(column))
    if size > LARGEST or 0 < spread < 1 / LARGEST:
        raise ValueError(
            f"{path}: numbers of column {name!r} reach {size:.3g} and differ by {spread:.3g}: bring them to a usual "
            "scale"
        )


# ---- rows ------------------------------------------------------------------------------------------------------------
Rows = tuple[Times, NDArray[np.float64], NDArray[np.int64]]


def _sorted(times: Times, values: NDArray[np.float64], row: NDArray[np.int64], notes: list[str]) -> Rows:
    if (np.diff(times.astype(np.int64)) >= 0).all():
        return times, values, row
    order = np.argsort(times, kind="stable")
    notes.append("rows were not in the order of their times, and were sorted")
    return times[order], values[order], row[order]


def _once(
    path: Path, times: Times, values: NDArray[np.float64], row: NDArray[np.int64], how: str | None, advice: str,
    notes: list[str],
) -> Rows:  # fmt: skip
    """Rows of different times. Raises ValueError for equal ones, unless it is said what becomes of them."""
    same = np.flatnonzero(np.diff(times.astype(np.int64)) == 0)
    if not len(same):
        return times, values, row
    if how is None:
        i = int(same[0])
        raise ValueError(
            f"rows {row[i]} and {row[i + 1]} of {path} have one time, {times[i]} ({len(same)} such rows): " + advice
        )
    notes.append(f"{len(same)} rows had the time of another: the {how} was taken")
    kept, group = np.unique(times, return_inverse=True)
    if how == "last":
        last = np.zeros(len(kept), np.int64)
        last[group] = np.arange(len(times))
        return kept, values[last], row[last]
    total, count = np.zeros((len(kept), values.shape[1])), np.zeros((len(kept), values.shape[1]))
    np.add.at(total, group, np.nan_to_num(values))
    np.add.at(count, group, ~np.isnan(values))
    first = np.zeros(len(kept), np.int64)
    first[group[::-1]] = np.arange(len(times))[::-1]
    with np.errstate(invalid="ignore"):
        return kept, total / np.where(count == 0, np.nan, count), row[first]


def _trimmed(
    path: Path, times: Times, values: NDArray[np.float64], row: NDArray[np.int64], columns: Sequence[str],
    notes: list[str],
) -> Rows:  # fmt: skip
    """Without missing rows at both ends. Raises ValueError where columns end far apart: future values of some that
    others lack are not used."""
    there = ~np.isnan(values)
    ends = [int(np.flatnonzero(there[:, i])[-1]) for i in range(len(columns))]
    if max(ends) - min(ends) > LONGEST_GAP:
        early, late = columns[int(np.argmin(ends))], columns[int(np.argmax(ends))]
        raise ValueError(
            f"{path}: column {early!r} ends in row {row[min(ends)]}, and {late!r} goes on to row {row[max(ends)]}. "
            "Values that are known ahead (exogenous columns) are not used: leave those rows out, or name the columns "
            "to forecast with --target"
        )
    whole = np.flatnonzero(there.all(1))
    if not len(whole):
        raise ValueError(f"{path} has no row without a missing value")
    first, last = int(whole[0]), int(whole[-1])
    if last + 1 < len(times):
        notes.append(f"{len(times) - 1 - last} rows at the end have missing values, and were dropped")
    if first:
        notes.append(f"{first} rows at the beginning have missing values, and were dropped")
    kept = slice(first, last + 1)
    return times[kept], values[kept], row[kept]


def _regular(
    path: Path, times: Times, values: NDArray[np.float64], row: NDArray[np.int64], step: Frequency, given: bool,
    notes: list[str],
) -> tuple[Times, NDArray[np.float64], int]:  # fmt: skip
    """Rows at every step, missing ones as NaN, and how many they are. Raises ValueError for steps
    of other lengths, and gaps that are too long."""
    weekend = ~np.is_busday(times.astype("datetime64[D]"))
    if step.working and weekend.any():
        i = int(weekend.argmax())
        raise ValueError(
            f"row {row[i]} of {path}: {times[i]} lies on a weekend, and steps are working days: leave such rows out, "
            "or give --frequency D"
        )
    apart = np.diff(step.ticks(times))
    wrong = np.flatnonzero(apart % step.step != 0)
    if len(wrong):
        i = int(wrong[0])
        raise ValueError(
            f"row {row[i + 1]} of {path}: from {times[i]} to {times[i + 1]} is no whole number of steps of {step}: "
            "frequencies are mixed; resample the series to one" + ("" if given else ", or give --frequency")
        )
    steps = apart // step.step
    if len(steps) and not steps.all():
        i = int(steps.argmin())
        raise ValueError(
            f"rows {row[i]} and {row[i + 1]} of {path} fall into one step of {step}: give another --frequency"
        )
    long = np.flatnonzero(steps > LONGEST_GAP + 1)
    regular = float((steps == 1).mean()) if len(steps) else 1.0
    if regular < REGULAR and not given:
        raise ValueError(
            f"{path}: only {math.floor(1000 * regular) / 10:g}% of the steps are {step}, the commonest, and at least "
            f"{100 * REGULAR:g}% must be: frequencies are mixed; give "
            "--frequency, or resample the series to one"
        )
    if len(long):
        i = int(long[0])
        raise ValueError(
            f"row {row[i + 1]} of {path}: {steps[i] - 1} rows are missing between {times[i]} and {times[i + 1]}, and "
            f"at most {LONGEST_GAP} are filled; fill them yourself, or use the longest part without such a gap"
        )
    place = np.concatenate([[0], np.cumsum(steps)]).astype(np.int64)
    whole = np.full((int(place[-1]) + 1, values.shape[1]), np.nan)
    whole[place] = values
    gaps, told = int((steps > 1).sum()), step.from_(times[0], len(whole))
    filled = len(whole) - len(times)
    if gaps:
        notes.append(f"{filled} missing rows in {gaps} gaps were filled by straight lines")
    moved = int((told[place] != times).sum())
    if moved:
        notes.append(f"{moved} rows stand elsewhere within their {step}, and are told as the first row is")
    return told, whole, filled


def _filled(
    path: Path, values: NDArray[np.float64], columns: Sequence[str], times: Times
) -> tuple[NDArray[np.float64], int]:
    """Missing cells on straight lines, and how many there were. Raises ValueError for more than three in a row."""
    count = 0
    for i, name in enumerate(columns):
        gone = np.isnan(values[:, i])
        there = np.flatnonzero(~gone)
        longest = np.diff(there).max(initial=1) - 1
        if longest > LONGEST_GAP:
            at = int(there[np.diff(there).argmax()]) + 1
            raise ValueError(
                f"{path}: column {name!r} misses {longest} values in a row from {times[at]} on, and at most "
                f"{LONGEST_GAP} are filled; fill them yourself, or leave the column out with --target"
            )
        count += int(gone.sum())
        values[gone, i] = np.interp(np.flatnonzero(gone), there, values[there, i])
    return values, count
