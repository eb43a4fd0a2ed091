"""Times of a series: reading them, the step between them, what comes next, and what a clock on the wall says.

A step is a number of milliseconds or of months, since months and years have no fixed length.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Times = NDArray[np.datetime64]  # datetime64[ms]
SECOND, MINUTE, HOUR, DAY = 1_000, 60_000, 3_600_000, 86_400_000
UNITS = {
    "s": SECOND, "sec": SECOND, "second": SECOND, "min": MINUTE, "t": MINUTE, "minute": MINUTE, "h": HOUR,
    "hour": HOUR, "d": DAY, "day": DAY, "w": 7 * DAY, "week": 7 * DAY, "ms": -1, "m": -1, "month": -1, "q": -3,
    "qs": -3, "quarter": -3, "y": -12, "ys": -12, "a": -12, "year": -12,
}  # fmt: skip


@dataclass(frozen=True)
class Frequency:
    """The step of a series: so many milliseconds, or, where `monthly`, months."""

    step: int
    monthly: bool = False

    @staticmethod
    def named(text: str) -> Frequency:
        """From `15min`, `1h`, `D`, `W`, `MS` (months), `Q`, `Y`. Raises ValueError for anything else."""
        found = re.fullmatch(r"(\d*)\s*([a-z]+)", text.strip().lower())
        unit = UNITS.get(found[2]) or UNITS.get(found[2].rstrip("s")) if found else None
        count = int(found[1] or 1) if found else 0
        if unit is None or count < 1:
            raise ValueError(f"a frequency is a number and s, min, h, D, W, MS (months), Q or Y, as in 15min: {text!r}")
        return Frequency(count * abs(unit), unit < 0)

    @staticmethod
    def inferred(times: Times) -> Frequency:
        """The commonest step between sorted times that differ. Raises ValueError for fewer than three."""
        if len(times) < 3:
            raise ValueError(f"a frequency is inferred from at least 3 times, there are {len(times)}: give --frequency")
        apart = _apart(times)
        if np.median(apart) >= 28 * DAY and _same_day(times):
            return Frequency(_commonest(_apart(times.astype("datetime64[M]"))), True)
        return Frequency(_commonest(apart))

    def ticks(self, times: Times) -> NDArray[np.int64]:
        """Times as whole numbers, milliseconds or months."""
        return times.astype("datetime64[M]" if self.monthly else "datetime64[ms]").astype(np.int64)

    def from_(self, start: np.datetime64, count: int, first: int = 0) -> Times:
        """Times at steps first, first + 1, ... behind `start`."""
        steps = self.step * np.arange(first, first + count)
        if not self.monthly:
            return start.astype("datetime64[ms]") + steps.astype("timedelta64[ms]")
        month = start.astype("datetime64[M]")
        day = start - month.astype("datetime64[ms]")
        wanted = month + steps
        if _is_month_end(start):
            return ((wanted + 1).astype("datetime64[D]") - 1).astype("datetime64[ms]")
        return wanted.astype("datetime64[ms]") + day

    @property
    def season(self) -> int:
        """Steps of the season that is usual for it: a day, a week of days, a year; 1 where there is none."""
        if self.monthly:
            return max(12 // self.step, 1)
        if self.step < DAY:
            return max(round(DAY / self.step), 1)
        return 7 if self.step == DAY else 52 if self.step == 7 * DAY else 1

    def __str__(self) -> str:
        if self.monthly:
            return {1: "1 month", 3: "1 quarter", 12: "1 year"}.get(self.step, f"{self.step} months")
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


def _is_month_end(time: np.datetime64) -> bool:
    day = time.astype("datetime64[D]")
    return (day + 1).astype("datetime64[M]") != day.astype("datetime64[M]")


def _same_day(times: Times) -> bool:
    """Whether all stand on one day of the month, or all on its last."""
    days = (times.astype("datetime64[D]") - times.astype("datetime64[M]").astype("datetime64[D]")).astype(np.int64)
    return len(np.unique(days)) == 1 or all(_is_month_end(t) for t in times[:120])


def read_times(cells: Sequence[object]) -> tuple[Times | None, int]:
    """Times of cells (ISO 8601, with / for -, a year, or what a table holds as a time), as UTC where a zone is given;
    or None and the place of the first cell that is no time."""
    out = np.empty(len(cells), "datetime64[ms]")
    for i, cell in enumerate(cells):
        time = _time(cell)
        if time is None:
            return None, i
        out[i] = time
    return out, -1


def _time(cell: object) -> np.datetime64 | None:
    if isinstance(cell, np.datetime64):
        return None if np.isnat(cell) else cell.astype("datetime64[ms]")
    if isinstance(cell, datetime.datetime | datetime.date):
        text = cell.isoformat()
    else:
        text = str(cell).strip().replace("/", "-")
    if re.fullmatch(r"\d{4}", text):
        return np.datetime64(text, "ms")
    if re.fullmatch(r"\d{4}-\d{2}", text):
        return np.datetime64(text, "ms")
    try:
        read = datetime.datetime.fromisoformat(_padded(text))
    except ValueError:
        return None
    if read.tzinfo is not None:
        read = read.astimezone(datetime.UTC).replace(tzinfo=None)
    return np.datetime64(read, "ms")


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
    say = {
        "minute": within // MINUTE % 60 / 59, "hour": within // HOUR / 23,
        "weekday": (day.astype(np.int64) + 3) % 7 / 6,  # the first of January 1970 was a Thursday
        "day": (day - month.astype("datetime64[D]")).astype(np.int64) / 30, "of year": of_year / 365,
        "week": of_year // 7 / 52, "month": (month - year.astype("datetime64[M]")).astype(np.int64) / 11,
    }  # fmt: skip
    columns = [say[name] - 0.5 for name in _told(frequency)]
    return np.stack(columns, 1).astype(np.float32) if columns else np.zeros((len(times), 0), np.float32)


def _told(frequency: Frequency) -> tuple[str, ...]:
    if frequency.monthly:
        return ("month",) if frequency.step % 12 else ()
    if frequency.step >= 7 * DAY:
        return ("day", "week")
    if frequency.step >= DAY:
        return ("weekday", "day", "of year")
    return (*(("minute",) if frequency.step < HOUR else ()), "hour", "weekday", "day", "of year")
