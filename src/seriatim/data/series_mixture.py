"""Several series as one set to train on, for systems that read each variate by itself.

A sample is a window of one variate of one series, on that series' own scale, and all have equal chances, so long and
wide series count more. What is shorter than a few windows is stretched by straight lines, and that is said.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from seriatim.data.base import Data, load_data
from seriatim.data.calendar import Frequency
from seriatim.data.series import Series, SeriesData, Windows, as_data

ENOUGH = 2  # times lookback and horizon: fewer training rows are stretched


@dataclass(frozen=True)
class Mixed:
    """Windows of several series, one variate each; they tell no calendar, as series of several frequencies have none
    in common."""

    windows: tuple[Windows, ...]

    @property
    def _ends(self) -> list[int]:
        return list(accumulate(len(w) * w.values.shape[1] for w in self.windows))

    def __len__(self) -> int:
        return self._ends[-1]

    def take(self, index: Int[Tensor, " b"], generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """past (b, lookback, 1), future (b, horizon, 1), and the times of both."""
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < len(self):
            raise IndexError(f"there are {len(self)} windows, asked for {int(index.min())} to {int(index.max())}")
        ends = torch.tensor(self._ends)
        which = torch.searchsorted(ends, index, right=True)
        rows: list[dict[str, Tensor]] = []
        places: list[Tensor] = []
        for i, windows in enumerate(self.windows):
            mine = torch.nonzero(which == i)[:, 0]
            if not len(mine):
                continue
            number = index[mine] - (int(ends[i - 1]) if i else 0)
            variates = windows.values.shape[1]
            batch = windows.take(number // variates)
            chosen = (number % variates)[:, None, None]
            for name in ("past", "future"):
                batch[name] = batch[name].gather(2, chosen.expand(-1, batch[name].shape[1], 1))
                batch[f"{name}_marks"] = batch[name][..., :0]
            rows.append(batch)
            places.append(mine)
        order = torch.cat(places).argsort()
        names = ("past", "future", "past_marks", "future_marks", "past_time", "future_time")
        return {name: torch.cat([batch[name] for batch in rows])[order] for name in names}


@dataclass(frozen=True)
class MixedPart:
    """One side of all series: `train`, `validation` or `test`."""

    of: tuple[SeriesData, ...]
    side: str

    def __len__(self) -> int:
        """How many numbers there are to forecast."""
        return sum(len(getattr(data, self.side)) for data in self.of)

    def windows(self, lookback: int, horizon: int) -> Mixed:
        """All windows of all series."""
        stretched = [stretch(data, lookback, horizon) for data in self.of]
        longer = [new.name for data, new in zip(self.of, stretched, strict=True) if new is not data]
        if longer and self.side == "train":
            warnings.warn(f"too short, and stretched by straight lines: {'; '.join(longer)}", stacklevel=2)
        return Mixed(tuple(getattr(data, self.side).windows(lookback, horizon) for data in stretched))


@dataclass(frozen=True)
class Mixture(Data):
    """Several series: `train`, `validation` and `test` are `MixedPart`s."""

    validation: Any = None
    of: tuple[SeriesData, ...] = ()

    @property
    def options(self) -> Mapping[str, str]:
        """How they were read."""
        return {name: value for data in self.of for name, value in data.options.items()}


def mixture(names: Sequence[str], **options: Any) -> Mixture:
    """Series by their names or paths, read with the same options."""
    names = [name.strip() for name in names]
    of: list[Any] = [load_data(name, "series", **options) for name in names]
    count = Counter(data.name for data in of)
    of = [replace(data, name=name) if count[data.name] > 1 else data for name, data in zip(names, of, strict=True)]
    if len({data.name for data in of}) < len(of):
        raise ValueError(f"a series is named twice in {','.join(names)}")
    notes = [f"{data.name}: {note}" for data in of for note in data.notes]
    parts = {side: MixedPart(tuple(of), side) for side in ("train", "validation", "test")}
    return Mixture(
        ",".join(names), "series", parts["train"], parts["test"], notes=tuple(notes), validation=parts["validation"],
        of=tuple(of),
    )  # fmt: skip


def stretch(data: SeriesData, lookback: int, horizon: int) -> SeriesData:
    """The series itself, or with so many values on straight lines between its own that the validation part holds a few
    windows and the training part some."""
    split, need = data.split, ENOUGH * (lookback + horizon)
    held_out = min(split.validation - split.train, split.test - split.validation)
    times = max(-(-need // split.train), -(-ENOUGH * horizon // held_out))
    if times == 1:
        return data
    series = data.series
    there = np.arange(len(series), dtype=np.float64)
    between = np.arange((len(series) - 1) * times + 1) / times
    values = np.stack([np.interp(between, there, column) for column in series.values.T], 1)
    step = Frequency(1)  # of no meaning: what is stretched has no calendar
    time = step.from_(series.time[0], len(values))
    name = f"{series.name}, {times} times as long"
    made = Series(name, time, values, series.columns, step)
    return as_data(made, replace(split, **{k: min(getattr(split, k) * times, len(values)) for k in SIDES}))


SIDES = ("train", "validation", "test")
