"""What each scale of a pyramid costs: pairs of attention and numbers kept, counted; seconds and bytes, measured."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from seriatim.decoding.loop import decode
from seriatim.decoding.sample import SampleAll
from seriatim.decoding.target import Target
from seriatim.evaluation.pictures import ACCENT, INK, write_beside
from seriatim.random import Keyed

SCHEDULES = {
    256: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    512: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
    1024: (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
}
"""Sides of token maps by pixels: VAR's for 256 and 512 (Tian et al. 2024), HART's for 1,024 (Tang et al. 2024)."""


@dataclass(frozen=True)
class Counted:
    """Of one picture in one layer: (query, key) pairs of attention in which scales see all coarser ones (`every`) or
    themselves alone (`own`), and the numbers that are kept, at most, from one scale to the next: keys and values, or
    the state of a mixer with what its convolution looks back on."""

    every: int
    own: int
    keys: int
    state: int


def counted(sides: Sequence[int], width: int, mixer: Any) -> Counted:
    """For a pyramid of square maps and layers of a width, whose mixers are of a `backbones.mamba.MambaConfig`."""
    sizes = [side * side for side in sides]
    every = sum(n * upto for n, upto in zip(sizes, accumulate(sizes), strict=True))
    state = mixer.inner * mixer.state + mixer.channels * (mixer.kernel - 1)
    return Counted(every, sum(n * n for n in sizes), 2 * width * sum(sizes[:-1]), state if len(sizes) > 1 else 0)


@dataclass(frozen=True)
class Measured:
    """Of one model: median seconds of each scale, and bytes that its cache holds after it."""

    seconds: tuple[float, ...]
    held: tuple[int, ...]


@torch.inference_mode()
def measured(models: Mapping[str, Any], rows: int = 8, runs: int = 5) -> dict[str, Measured]:
    """Of pyramids that are drawn a scale a forward, without guidance, turn by turn, behind one run that warms up. Bytes
    are those that are still held once a scale is decided. Seconds mean something on a quiet machine only."""
    took: dict[str, list[list[float]]] = {name: [] for name in models}
    held: dict[str, tuple[int, ...]] = {}
    for run in range(runs + 1):
        for name, model in models.items():
            seconds, bytes_ = _drawn(model, rows, run)
            held[name] = bytes_
            if run:
                took[name].append(seconds)
    each = {name: zip(*all_, strict=True) for name, all_ in took.items()}
    return {name: Measured(tuple(map(statistics.median, by)), held[name]) for name, by in each.items()}


def _drawn(model: Any, rows: int, seed: int) -> tuple[list[float], tuple[int, ...]]:
    target = Target(model, {"class": torch.zeros(rows, dtype=torch.long)})
    seconds, held, start = [], [], time.perf_counter()
    for _ in decode(target, model.blank(rows), SampleAll(), random=Keyed(seed)):
        seconds.append(time.perf_counter() - start)
        held.append(target.cache.nbytes())
        start = time.perf_counter()
    return seconds, tuple(held)


COLOURS = (INK, ACCENT, "#5b8e7d", "#e0a030")


def save_scale_costs(
    found: Mapping[str, Measured], sides: Sequence[int], path: str | os.PathLike[str], title: str = ""
) -> Path:
    """Bars of each model, scale by scale: seconds, and KiB that are kept."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    share = 0.8 / len(found)
    for n, (name, of) in enumerate(found.items()):
        for axes, values in zip(panels, (of.seconds, [b / 1024 for b in of.held]), strict=True):
            places = [k + (n - (len(found) - 1) / 2) * share for k in range(len(sides))]
            axes.bar(places, values, share, label=name, color=COLOURS[n % len(COLOURS)])
    for axes, what in zip(panels, ("seconds", "KiB kept after it"), strict=True):
        axes.set_xticks(range(len(sides)), [f"{side}x{side}" for side in sides], fontsize=8)
        axes.set(xlabel="scale", ylabel=what)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(fontsize=8, frameon=False)
    figure.suptitle(title)
    return write_beside(path, lambda file: figure.savefig(file, format="png", dpi=130))
