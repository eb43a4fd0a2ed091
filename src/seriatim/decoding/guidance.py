"""How strongly a condition is followed, as a function of progress (classifier-free guidance, Ho & Salimans 2022)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

Schedule = Literal["constant", "linear", "half-linear", "cosine"]


@dataclass(frozen=True)
class Guidance:
    """What the head says = (1 + w) conditional - w null, with w = `scale` shaped by progress from 0 to 1.

    "constant": w = scale throughout; "linear": from 0 to scale (VAR); "half-linear": so over the first half, then it
    stays (Token-Shuffle); "cosine": from 0 to scale, slowly at first. Of logits, noise or velocity, as the head defines
    it. Papers that write null + s (conditional - null) mean s = 1 + w. begin: what grows linearly begins there (D-AR).
    """

    scale: float
    schedule: Schedule = "constant"
    begin: float = 0.0

    def __post_init__(self) -> None:
        if self.schedule not in get_args(Schedule):
            raise ValueError(f"guidance is one of {', '.join(get_args(Schedule))}, not {self.schedule!r}")
        if not math.isfinite(self.scale):
            raise ValueError(f"the guidance scale must be finite, got {self.scale}")
        if self.begin and (self.schedule != "linear" or not math.isfinite(self.begin)):
            raise ValueError(f"linear guidance begins at a finite number, got {self.begin} of {self.schedule}")

    def of(self, phase: int) -> Guidance:
        """That of a phase, where an order has several: here the same in all."""
        return self

    def weight(self, progress: float) -> float:
        """w, when this share (0 to 1) of the steps is done."""
        if self.schedule == "constant":
            return self.scale
        if self.schedule == "linear":
            return self.begin + (self.scale - self.begin) * progress
        if self.schedule == "half-linear":
            return self.scale * min(2 * progress, 1.0)
        return self.scale * (1 - math.cos(math.pi * progress)) / 2


@dataclass(frozen=True)
class Ahead(Guidance):
    """Guidance that grows with what is known behind a step, the elements of which are drawn under it, rather than
    before it (MAR's code): `total` elements, of which `left` remain unknown after each step. Of the last step, one
    element less than all are known."""

    total: int = 1
    left: tuple[int, ...] = ()

    def weight(self, progress: float) -> float:
        unknown = self.total - round(progress * (self.total - 1))
        after = next((n for n in self.left if n < unknown), 0)
        return super().weight((self.total - max(after, 1)) / self.total)


@dataclass(frozen=True)
class ByPhase(Guidance):
    """One guidance in each phase of an order (Hi-MAR: pivots, then fine elements)."""

    phases: tuple[Guidance, ...] = ()

    def of(self, phase: int) -> Guidance:
        return self.phases[phase]
