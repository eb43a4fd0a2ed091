"""How strongly a condition is followed, as a function of progress (classifier-free guidance, Ho & Salimans 2022)."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Guidance:
    """logits = (1 + w) conditional - w null, with w = `scale` shaped by progress from 0 to 1.

    "constant": w = scale throughout; "linear": from 0 to scale (VAR); "cosine": from 0 to scale, slowly at first.
    """

    scale: float
    schedule: str = "constant"

    def __post_init__(self) -> None:
        if self.schedule not in ("constant", "linear", "cosine"):
            raise ValueError(f"guidance is constant, linear or cosine, not {self.schedule!r}")
        if not math.isfinite(self.scale):
            raise ValueError(f"the guidance scale must be finite, got {self.scale}")

    def weight(self, progress: float) -> float:
        if self.schedule == "constant":
            return self.scale
        if self.schedule == "linear":
            return self.scale * progress
        return self.scale * (1 - math.cos(math.pi * progress)) / 2
