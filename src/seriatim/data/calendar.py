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
LEAST_WEEKENDS = 2  # that are left out, for days to be taken for working days
SECOND, MINUTE, HOUR, DAY = 1_000, 60_000, 3_600_000, 86_400_000
UNITS = {
    "s": SECOND, "sec": SECOND, "second": SECOND, "min": MINUTE, "t": MINUTE, "minute": MINUTE, "h": HOUR,
    "hour": HOUR, "d": DAY, "day": DAY, "w": 7 * DAY, "week": 7 * DAY, "ms": -1, "m": -1, "month": -1, "q": -3,
    "qs": -3, "quarter": -3, "y": -12, "ys": -12, "a": -12, "year": -12,
}  # fmt: skip
LONGEST = 10_000 * 366 * DAY  # of a step


@dataclass(frozen=True)
class Frequency:
    """The step of a series: so many milliseconds, or, where `monthly`, months, told by their last days where they
    `end`; or, where `working`, days from Monday to Friday."""

    step: int
    monthly: bool = False
    end: bool = False
    working: bool = False

    @staticmethod
    def named(text: str, times: Times | None = None) -> Frequency:
        """From `15min`, `1h`, `D`, `B` (working days), `W`, `MS` (months), `Q`, `Y`. times: whose months may be told by
        their last days. Raises ValueError for anything else."""
        found = re.fullmatch(r"(\d*)\s*([a-z]+)", text.strip().lower())
        if found and found[2] == "b":
            return Frequency(int(found[1] or 1), working=True)
        unit = UNITS.get(found[2]) or UNITS.get(found[2].rstrip("s")) if found else None
        count = int(found[1] or 1) if found else 0
        if unit is None or count < 1 or count * abs(unit) > LONGEST:
            raise ValueError(
                "a frequency is a number and s, min, h, D, B (working days), W, MS (months), Q or Y, as in 15min: "
                f"{text!r}"
            )
        return Frequency(count * abs(unit), unit < 0, unit < 0 and times is not None and _month_ends(times))

    @staticmethod
    def inferred(times: Times) -> Frequency:
        """The commonest step between sorted times that differ. Raises ValueError for fewer than three."""
        if len(times) < 3:
            raise ValueError(f"a frequency is inferred from at least 3 times, there are {len(times)}: give --frequency")
        apart = _apart(times)
        if np.median(apart) >= 28 * DAY and _same_day(times):
            return Frequency(_commonest(_apart(times.astype("datetime64[M]"))), True, _month_ends(times))
        step = _commonest(apart)
        if step == DAY and (apart == 3 * DAY).sum() >= LEAST_WEEKENDS and bool(np.is_busday(_days(times)).all()):
            return Frequency(1, working=True)
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
        month = start.astype("datetime64[M]")
        day = start - month.astype("datetime64[ms]")
        wanted = month + steps
        if self.end:
            return ((wanted + 1).astype("datetime64[D]") - 1).astype("datetime64[ms]")
        return wanted.astype("datetime64[ms]") + day

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


def _month_ends(times: Times) -> bool:
    """Whether all stand on the last day of a month, and not all on one of a number."""
    days = _days(times)
    last = (days + 1).astype("datetime64[M]") != days.astype("datetime64[M]")
    return bool(last.all()) and len(np.unique(_of_month(times))) > 1


def _of_month(times: Times) -> NDArray[np.int64]:
    return (_days(times) - times.astype("datetime64[M]").astype("datetime64[D]")).astype(np.int64)


def _same_day(times: Times) -> bool:
    """Whether all stand on one day of the month, or all on its last."""
    return len(np.unique(_of_month(times))) == 1 or _month_ends(times)


def by_first_days(times: Times, frequency: Frequency) -> bool:
    """Whether months have to be told by their first days, as rows stand on several days of them."""
    return frequency.monthly and not _same_day(times)


def read_times(cells: Sequence[object]) -> tuple[Times | None, int]:
    """Times of cells (ISO 8601, with / for -, a year, or what a table holds as a time), as UTC where a zone is given,
    but days and longer steps as the wall shows them, since they are no whole days in UTC where clocks change; or None
    and the place of the first cell that is no time. Raises ValueError for parts of milliseconds."""
    out, wall = np.empty(len(cells), "datetime64[ms]"), np.empty(len(cells), "datetime64[ms]")
    for i, cell in enumerate(cells):
        time = _time(cell)
        if time is None:
            return None, i
        out[i], wall[i] = time
    if len(cells) > 1 and (out != wall).any() and np.median(np.abs(_apart(np.sort(wall)))) >= DAY:
        return wall, -1
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
    if read.microsecond % 1000:
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
