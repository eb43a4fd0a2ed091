"""Series of numbers over time: the field's splits and scaling, windows of them, and what stands beside each.

A window is a lookback (what is known) and the horizon behind it (what is forecast). Windows begin at every step, and
none is left out: a loader that drops the last batch would drop the hardest of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from seriatim.data.base import Data
from seriatim.data.calendar import DAY, Frequency, Times, marks

BUILT_IN_SERIES = ("co2", "elnino", "sunspots", "nile", "macrodata")
MONTHS = (12, 4, 4)  # of 30 days: train, validation and test of the ETT sets (Zhou et al. 2021)


@dataclass(frozen=True)
class Series:
    """Values (time, variate) in their own units, at every step of `frequency`; `notes` are for whoever gave them."""

    name: str
    time: Times
    values: NDArray[np.float64]
    columns: tuple[str, ...]
    frequency: Frequency
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.time)

    def after(self, count: int) -> Times:
        """The times behind the last one."""
        return self.frequency.from_(self.time[0], count, len(self))


@dataclass(frozen=True)
class Split:
    """Ends of training, validation and test, in rows from the beginning; what is behind the last is not used."""

    train: int
    validation: int
    test: int

    @staticmethod
    def of(series: Series) -> Split:
        """12, 4 and 4 months of 30 days of what is called ETT...; else 70, 10 and 20 percent, as the field splits."""
        day = 0 if series.frequency.monthly else DAY // series.frequency.step
        ends = [30 * day * sum(MONTHS[: i + 1]) for i in range(3)]
        if series.name.upper().startswith("ETT") and day and len(series) >= ends[2]:
            return Split(*ends)
        train, test = int(0.7 * len(series)), int(0.2 * len(series))
        return Split(train, len(series) - test, len(series))


@dataclass(frozen=True)
class Windows:
    """Windows of standardised values, each told by the first row behind its lookback; at every step, or `stride`."""

    values: Float[Tensor, "n c"]
    marks: Float[Tensor, "n m"]
    time: Int[Tensor, "n 1"]
    lookback: int
    horizon: int
    first: int
    end: int
    stride: int = 1

    def __len__(self) -> int:
        return max((self.end - self.horizon - self.first) // self.stride + 1, 0)

    def take(self, index: Int[Tensor, " b"], generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """past (b, lookback, c), future (b, horizon, c), the marks and times (ms) of both, and `at`, the first row of
        the future."""
        at = self.first + self.stride * index
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < len(self):
            raise IndexError(f"there are {len(self)} windows, asked for {int(index.min())} to {int(index.max())}")
        past = at[:, None] + torch.arange(-self.lookback, 0)
        future = at[:, None] + torch.arange(self.horizon)
        return {
            "past": self.values[past], "future": self.values[future], "past_marks": self.marks[past],
            "future_marks": self.marks[future], "past_time": self.time[past], "future_time": self.time[future],
            "at": at,
        }  # fmt: skip

    def strided(self, most: int | None) -> Windows:
        """At most so many of them (None: all), at one distance from each other that reaches over all: none of the last,
        which are hard, is out of reach."""
        if most is None or len(self) <= most:
            return self
        stride = -(-len(self) // most)
        kept = self.first + self.stride * stride * ((len(self) - 1) // stride) + self.horizon
        return replace(self, end=kept, stride=self.stride * stride)


@dataclass(frozen=True)
class Part:
    """One side of a series: the rows in which futures lie. Lookbacks reach into what is before, but not of training."""

    data: SeriesData
    begin: int
    end: int

    def __len__(self) -> int:
        """How many numbers there are to forecast."""
        return (self.end - self.begin) * len(self.data.series.columns)

    def windows(self, lookback: int, horizon: int) -> Windows:
        """All windows of the part. Raises ValueError where not one fits."""
        if horizon < 1 or lookback < 1:
            raise ValueError(f"lookback and horizon are at least 1, got {lookback} and {horizon}")
        first = self.begin if self.begin else lookback
        out = Windows(self.data.scaled, self.data.marks, self.data.time, lookback, horizon, first, self.end)
        if first < lookback or not len(out):
            name = {0: "training", self.data.split.train: "validation"}.get(self.begin, "test")
            raise ValueError(
                f"{self.data.name} has {len(self.data.series):,} rows, of which {self.end - self.begin:,} are for "
                f"{name}: too few for a lookback of {lookback} and a horizon of {horizon}; give a longer series, or a "
                "smaller --lookback or --horizon"
            )
        return out


@dataclass(frozen=True)
class SeriesData(Data):
    """A series as data: `train`, `validation` and `test` are `Part`s, on the scale of the training rows; `options`:
    what was said of how to read it."""

    series: Any = None
    validation: Any = None
    split: Split = field(default_factory=lambda: Split(0, 0, 0))
    options: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def mean(self) -> NDArray[np.float64]:
        """Of each variate, over the training rows."""
        return self.series.values[: self.split.train].mean(0)

    @cached_property
    def constant(self) -> NDArray[np.bool_]:
        """Variates that never move in training: they are forecast as what they are."""
        return np.ptp(self.series.values[: self.split.train], axis=0) == 0

    @cached_property
    def deviation(self) -> NDArray[np.float64]:
        """Of each variate, over the training rows (by their number, not one less); 1 where it is constant."""
        return np.where(self.constant, 1.0, self.series.values[: self.split.train].std(0))

    @cached_property
    def scaled(self) -> Float[Tensor, "n c"]:
        return torch.tensor((self.series.values - self.mean) / self.deviation, dtype=torch.float32)

    @cached_property
    def marks(self) -> Float[Tensor, "n m"]:
        return torch.from_numpy(marks(self.series.time, self.series.frequency))

    @cached_property
    def time(self) -> Int[Tensor, "n 1"]:
        """In milliseconds since 1970."""
        return torch.from_numpy(self.series.time.astype("datetime64[ms]").astype(np.int64))[:, None]

    def unscaled(self, x: Float[Tensor, "*rest c"]) -> NDArray[np.float64]:
        """In the units of the series."""
        return x.double().numpy() * self.deviation + self.mean


def as_data(series: Series, split: Split | None = None, options: Mapping[str, str] | None = None) -> SeriesData:
    """A series with its sides. Raises ValueError where it has too few rows for three."""
    split = split or Split.of(series)
    if not 0 < split.train < split.validation < split.test:
        raise ValueError(
            f"{series.name} has {len(series)} rows, too few for training, validation and test: give at least 10"
        )
    notes = list(series.notes)
    if split.test < len(series):
        notes.append(f"rows from {split.test:,} on are in no part: the field splits this set so")
    data = SeriesData(
        series.name, "series", None, None, notes=tuple(notes), series=series, split=split, options=options or {}
    )
    steady = [name for name, is_so in zip(series.columns, data.constant, strict=True) if is_so]
    if steady:
        object.__setattr__(data, "notes", (*notes, f"constant in training, and forecast so: {', '.join(steady)}"))
    for name, begin, end in (
        ("train", 0, split.train), ("validation", split.train, split.validation), ("test", split.validation, split.test)
    ):  # fmt: skip
        object.__setattr__(data, name, Part(data, begin, end))
    return data


def series_table(
    path: Path, time: str | None = None, target: str | None = None, frequency: str | None = None,
    duplicates: str | None = None,
) -> SeriesData:  # fmt: skip
    """A series from a table, by the rules of `series_files.read_series`."""
    from seriatim.data.series_files import read_series

    if path.is_dir():
        raise ValueError(f"a series is one table (.csv, .tsv, .parquet), and {path} is a folder")
    said = {"time": time, "target": target, "frequency": frequency, "duplicates": duplicates}
    options = {name: value for name, value in said.items() if value is not None}
    return as_data(read_series(path, time, target, frequency, duplicates), options=options)


def built_in_series(name: str) -> SeriesData:
    """A series that statsmodels brings. Raises ValueError where it is not installed."""
    try:
        from statsmodels import datasets
    except ImportError:
        raise ValueError("the built-in series need an extra: pip install 'seriatim[series]', or give --data") from None
    table = getattr(datasets, name).load_pandas().data
    notes: tuple[str, ...] = ()
    if name == "co2":  # weekly with gaps: means of months, as it is usually analysed
        months = table["co2"].resample("MS").mean()
        gone = int(months.isna().sum())
        notes = (f"weeks became means of months; {gone} months without a week were filled by straight lines",)
        values, start, step = months.interpolate().to_numpy()[:, None], "1958-03", Frequency(1, True)
    elif name == "elnino":  # a row a year, a column a month
        values, start, step = table.iloc[:, 1:].to_numpy().reshape(-1, 1), "1950", Frequency(1, True)
    elif name == "macrodata":
        values, start, step = table.iloc[:, 2:].to_numpy(), "1959", Frequency(3, True)
    else:
        values, start, step = table.iloc[:, 1:].to_numpy(), str(int(table.iloc[0, 0])), Frequency(12, True)
    columns = tuple(table.columns[2:]) if name == "macrodata" else (name,)
    times = step.from_(np.datetime64(start, "ms"), len(values))
    return as_data(Series(name, times, values.astype(np.float64), columns, step, notes))
