"""Times of a series: reading them, the step between them, what comes next, and what a clock on the wall says.

A step is a number of milliseconds, of months, since months and years have no fixed length, or of working days.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Times = NDArray[np.datetime64]  # datetime64[ms]
REGULAR = 0.8  # share of steps that are of one length, where no frequency is given
SECOND, MINUTE, HOUR, DAY = 1_000, 60_000, 3_600_000, 86_400_000
UNITS = {
    "s": SECOND, "sec": SECOND, "second": SECOND, "min": MINUTE, "t": MINUTE, "minute": MINUTE, "h": HOUR,
    "hour": HOUR, "d": DAY, "day": DAY, "w": 7 * DAY, "week": 7 * DAY, "ms": -1, "m": -1, "month": -1, "q": -3,
    "qs": -3, "quarter": -3, "y": -12, "ys": -12, "a": -12, "year": -12,
}  # fmt: skip
YEARS = 10_000  # the longest step


@dataclass(frozen=True)
class Frequency:
    """The step of a series: so many milliseconds; or, where `monthly`, months, told by their `day`, or by the last of
    those that are shorter (31: by the last days; 0: by the day of the first row); or, where `working`, days from Monday
    to Friday."""

    step: int
    monthly: bool = False
    day: int = 0
    working: bool = False

    @staticmethod
    def named(text: str, times: Times | None = None) -> Frequency:
        """From `15min`, `1h`, `D`, `B` (working days), `W`, `MS` (months), `Q`, `Y`. times: all of the series, which
        show what day of a month is its own. Raises ValueError for anything else."""
        found = re.fullmatch(r"(\d{0,15})\s*([a-z]+)", text.strip().lower())
        count = int(found[1] or 1) if found else 0
        working = found is not None and found[2] == "b"
        unit = DAY if working else (UNITS.get(found[2]) or UNITS.get(found[2].rstrip("s"))) if found else None
        most = 0 if unit is None else 12 * YEARS // -unit if unit < 0 else 366 * YEARS * DAY // unit
        if unit is None or not 1 <= count <= most:
            raise ValueError(
                "a frequency is a number and s, min, h, D, B (working days), W, MS (months), Q or Y, as in 15min, and "
                f"at most {YEARS:,} years: {text[:40]!r}"
            )
        if working:
            return Frequency(count, working=True)
        if unit < 0:
            return Frequency(count * -unit, True, 0 if times is None else _told_by(times) or 0)
        return Frequency(count * unit)

    @staticmethod
    def inferred(times: Times) -> Frequency:
        """The commonest step between sorted times that differ. Raises ValueError for fewer than three."""
        if len(times) < 3:
            raise ValueError(f"a frequency is inferred from at least 3 times, there are {len(times)}: give --frequency")
        apart = _apart(times)
        step = _commonest(apart)
        if np.median(apart) >= 28 * DAY:
            months, day = _apart(times.astype("datetime64[M]")), _told_by(times)
            of_months = _commonest(months)
            irregular = _share(apart, step) < REGULAR <= _share(months, of_months)
            if day is not None or (irregular and of_months > 0):
                return Frequency(of_months, True, day or 0)
        if step == DAY and bool(np.is_busday(_days(times)).all()):
            working = Frequency(1, working=True)
            if (np.diff(working.ticks(times)) < apart // DAY).any():  # a weekend is left out
                return working
        return Frequency(step)

    def ticks(self, times: Times) -> NDArray[np.int64]:
        """Times as whole numbers, milliseconds, months or working days."""
        if self.working:
            return np.busday_count(np.datetime64("1970-01-05"), _days(times)).astype(np.int64)
        return times.astype("datetime64[M]" if self.monthly else "datetime64[ms]").astype(np.int64)

    def from_(self, start: np.datetime64, count: int, first: int = 0) -> Times:
        """Times at steps first, first + 1, ... behind `start`."""
        steps = self.step * np.arange(first, first + count)
        if self.working:
            begin = start.astype("datetime64[D]")
            return np.busday_offset(begin, steps, roll="forward").astype("datetime64[ms]") + (start - begin)
        if not self.monthly:
            return start.astype("datetime64[ms]") + steps.astype("timedelta64[ms]")
        month, begin = start.astype("datetime64[M]"), start.astype("datetime64[D]")
        day = self.day or int((begin - month.astype("datetime64[D]")).astype(np.int64)) + 1
        return _on_day(month + steps, day).astype("datetime64[ms]") + (start - begin)

    @property
    def season(self) -> int:
        """Steps of the season that is usual for it: a day, a week of days, a year; 1 where there is none."""
        if self.monthly:
            return max(12 // self.step, 1)
        if self.working:
            return max(5 // self.step, 1)
        if self.step < DAY:
            return max(round(DAY / self.step), 1)
        return 7 if self.step == DAY else 52 if self.step == 7 * DAY else 1

    def __str__(self) -> str:
        if self.monthly:
            return {1: "1 month", 3: "1 quarter", 12: "1 year"}.get(self.step, f"{self.step} months")
        if self.working:
            return "1 working day" if self.step == 1 else f"{self.step} working days"
        for size, name in ((7 * DAY, "week"), (DAY, "day"), (HOUR, "hour"), (MINUTE, "minute"), (SECOND, "second")):
            if self.step % size == 0:
                count = self.step // size
                return f"{count} {name}{'s' if count > 1 else ''}"
        return f"{self.step} ms"


def _apart(times: NDArray[np.datetime64]) -> NDArray[np.int64]:
    """From each to the next, in its unit."""
    return np.diff(times).astype(np.int64)


def _commonest(steps: NDArray[np.int64]) -> int:
    values, counts = np.unique(steps, return_counts=True)
    return int(values[counts.argmax()])


def _days(times: Times) -> NDArray[np.datetime64]:
    return times.astype("datetime64[D]")


def _share(steps: NDArray[np.int64], of: int) -> float:
    return int((steps == of).sum()) / len(steps)


def _on_day(months: NDArray[np.datetime64], day: int) -> NDArray[np.datetime64]:
    """That day of each month, or the last of one that is shorter."""
    return np.minimum(months.astype("datetime64[D]") + (day - 1), (months + 1).astype("datetime64[D]") - 1)


def _told_by(times: Times) -> int | None:
    """The day of the month on which all stand, or on the last of a month that is shorter: 31 where all are last days, 0
    where all are of one number; None where they stand on several."""
    days, months = _days(times), times.astype("datetime64[M]")
    numbers = (days - months.astype("datetime64[D]")).astype(np.int64) + 1
    if (numbers == numbers[0]).all():
        return 0
    return next((day for day in (31, int(numbers.max())) if (days == _on_day(months, day)).all()), None)


def by_first_days(times: Times, frequency: Frequency) -> bool:
    """Whether months have to be told by their first days, as rows stand on several days of them."""
    return frequency.monthly and _told_by(times) is None


def read_times(cells: Sequence[object], notes: list[str] | None = None) -> tuple[Times | None, int]:
    """Times of cells (ISO 8601, with / for -, a year, or what a table holds as a time), or None and the place of the
    first cell that is no time. Where a zone is given, they are turned to UTC; but those of one time of day are left as
    the wall shows them, with a note, since days are no whole days in UTC where clocks change. Raises ValueError for
    parts of milliseconds."""
    out, wall = np.empty(len(cells), "datetime64[ms]"), np.empty(len(cells), "datetime64[ms]")
    for i, cell in enumerate(cells):
        time = _time(cell)
        if time is None:
            return None, i
        out[i], wall[i] = time
    if len(cells) > 1 and (out != wall).any():
        one_clock = len(np.unique(wall - _days(wall))) == 1
        if notes is not None:
            notes.append(f"times have a zone: they are {'those on the wall' if one_clock else 'turned to UTC'}")
        return (wall if one_clock else out), -1
    return out, -1


def _time(cell: object) -> tuple[np.datetime64, np.datetime64] | None:
    """In UTC, and as the wall shows it."""
    if isinstance(cell, np.datetime64):
        time = None if np.isnat(cell) else cell.astype("datetime64[ms]")
        return None if time is None else (time, time)
    if isinstance(cell, datetime.datetime | datetime.date):
        text = cell.isoformat()
    else:
        text = str(cell).strip().replace("/", "-")
    if re.fullmatch(r"\d{4}(-\d{2})?", text):
        time = np.datetime64(text, "ms")
        return time, time
    try:
        read = datetime.datetime.fromisoformat(_padded(text))
    except ValueError:
        return None
    if re.search(r"[.,]\d{3}\d*[1-9]", text):
        raise ValueError(f"times are read to the millisecond, and {text} has parts of one: round them")
    wall = np.datetime64(read.replace(tzinfo=None), "ms")
    if read.tzinfo is None:
        return wall, wall
    return np.datetime64(read.astimezone(datetime.UTC).replace(tzinfo=None), "ms"), wall


def _padded(text: str) -> str:
    """2020-1-5 7:00 as 2020-01-05 07:00."""
    found = re.fullmatch(r"(\d{4})-(\d{1,2})-(\d{1,2})(?:([ T])(\d{1,2}):(.*))?", text)
    if not found:
        return text
    year, month, day, between, hour, rest = found.groups()
    date = f"{year}-{int(month):02}-{int(day):02}"
    return date if hour is None else f"{date}{between}{int(hour):02}:{rest}"


def marks(times: Times, frequency: Frequency) -> NDArray[np.float32]:
    """What clock and calendar say of each time, (n, marks), from -0.5 to 0.5, as the field's data loaders give it: by
    the hour, its hour, weekday, day of the month and of the year (Zhou et al. 2021, Informer)."""
    day = times.astype("datetime64[D]")
    month, year = times.astype("datetime64[M]"), times.astype("datetime64[Y]")
    within = (times - day.astype("datetime64[ms]")).astype(np.int64)
    of_year = (day - year.astype("datetime64[D]")).astype(np.int64)
    thursday = day + (3 - (day.astype(np.int64) + 3) % 7)  # to whose year a week of ISO 8601 belongs
    week = (thursday - thursday.astype("datetime64[Y]").astype("datetime64[D]")).astype(np.int64) // 7
    say = {
        "minute": within // MINUTE % 60 / 59, "hour": within // HOUR / 23,
        "weekday": (day.astype(np.int64) + 3) % 7 / 6,  # the first of January 1970 was a Thursday
        "day": (day - month.astype("datetime64[D]")).astype(np.int64) / 30, "of year": of_year / 365,
        "week": week / 52, "month": (month - year.astype("datetime64[M]")).astype(np.int64) / 11,
    }  # fmt: skip
    columns = [say[name] - 0.5 for name in _told(frequency)]
    return np.stack(columns, 1).astype(np.float32) if columns else np.zeros((len(times), 0), np.float32)


def _told(frequency: Frequency) -> tuple[str, ...]:
    if frequency.monthly:
        return ("month",) if frequency.step % 12 else ()
    if frequency.working:
        return ("weekday", "day", "of year")
    if frequency.step >= 7 * DAY:
        return ("day", "week")
    if frequency.step >= DAY:
        return ("weekday", "day", "of year")
    return (*(("minute",) if frequency.step < HOUR else ()), "hour", "weekday", "day", "of year")
