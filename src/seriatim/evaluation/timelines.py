"""When requests came, were written and ended: figures, and a picture of every one of them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from seriatim.evaluation.pictures import ACCENT, INK, PALE, write_beside


class Story(Protocol):
    """What `serving.workload` tells of a request."""

    arrived: float
    begun: float
    ended: float
    tokens: list[float]

    @property
    def first(self) -> float: ...
    @property
    def latency(self) -> float: ...
    @property
    def gaps(self) -> list[float]: ...


def figures_of(stories: Sequence[Story]) -> dict[str, float]:
    """tokens_per_second, from the first arrival to the last end; latency: mean seconds until the end; first: median
    seconds until the first token, and its 99th percentile; gap_median, gap_99: seconds between tokens."""
    spent = max(s.ended for s in stories) - min(s.arrived for s in stories)
    firsts, gaps = [s.first for s in stories], [g for s in stories for g in s.gaps]
    return {
        "tokens_per_second": sum(len(s.tokens) for s in stories) / spent,
        "latency": statistics.fmean(s.latency for s in stories), "first": statistics.median(firsts),
        "first_99": percentile(firsts, 0.99), "gap_median": statistics.median(gaps) if gaps else 0.0,
        "gap_99": percentile(gaps, 0.99) if gaps else 0.0, "seconds": spent,
    }  # fmt: skip


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that so many of them do not exceed."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def save_timelines(ways: Mapping[str, Sequence[Story]], path: str | Path) -> Path:
    """A row a way: a line a request (pale: it waits; dark: it is written), and how long requests took. Raises
    ValueError where there is nothing to draw."""
    if not ways or not all(ways.values()):
        raise ValueError("there are no requests to draw")
    figure = Figure(figsize=(10, 2.3 * len(ways)), layout="constrained")
    FigureCanvasAgg(figure)
    rows: Any = figure.subplots(len(ways), 2, squeeze=False, width_ratios=(3, 1), sharex="col")
    most = max(s.latency for stories in ways.values() for s in stories)
    for (lines, bars), (name, stories) in zip(rows, ways.items(), strict=True):
        for i, s in enumerate(stories):
            lines.plot([s.arrived, s.tokens[0]], [i, i], color=PALE, linewidth=1.6, solid_capstyle="butt")
            lines.plot([s.tokens[0], s.ended], [i, i], color=INK, linewidth=1.6, solid_capstyle="butt")
        said = figures_of(stories)
        lines.set_title(
            f"{name}: {said['tokens_per_second']:.0f} tokens/s, {said['latency']:.1f} s a request on the mean",
            fontsize=10, color=INK, loc="left",
        )  # fmt: skip
        lines.set_ylabel("request", fontsize=9)
        lines.invert_yaxis()
        bars.hist([s.latency for s in stories], bins=20, range=(0, most), color=ACCENT)
        for axes in (lines, bars):
            axes.spines[["top", "right"]].set_visible(False)
    rows[-1][0].set_xlabel("seconds", fontsize=9)
    rows[-1][1].set_xlabel("seconds until the end", fontsize=9)
    return write_beside(path, lambda file: figure.savefig(file, format="png", dpi=120))
