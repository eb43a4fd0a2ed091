"""What a system claims, and the rule by which a measurement says whether it holds: committed before it is run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Verdict = Literal["holds", "fails", "within noise", "not measurable here"]


@dataclass(frozen=True)
class Arm:
    """One training: a system, its settings, and how long. `measure` (None: the usual figures) judges it."""

    system: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    size: str | None = None
    tokenizer: str | None = None
    minutes: float | None = None
    steps: int | None = None
    measure: Callable[[Any], Mapping[str, float]] | None = None


@dataclass(frozen=True)
class Claim:
    """ours against baseline by one metric.

    text: what is claimed, in words; paper: the paper's figure; better: which direction of `metric` is better; margin:
    by which ratio ours must be better (1: any difference that exceeds noise); spread_arm: the arm whose five seeds give
    the seed spread, usually the baseline.
    """

    text: str
    paper: str
    metric: str
    arms: Mapping[str, Arm]
    ours: str
    baseline: str
    better: Literal["lower", "higher"] = "lower"
    margin: float = 1.0
    seeds: tuple[int, ...] = (0, 1, 2)
    spread_seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    data: str | None = None

    @property
    def rule(self) -> str:
        """The rule in words, as results carry it."""
        factor = "" if self.margin == 1 else f" by a factor of at least {self.margin:g}"
        return (
            f"{self.metric} of {self.ours} is {self.better} than that of {self.baseline}{factor}, and the means "
            f"differ by more than three standard deviations of {self.baseline} over {len(self.spread_seeds)} seeds"
        )

    def queue(self) -> list[tuple[str, int]]:
        """Arms and seeds, those that several claims need first."""
        first = [(self.baseline, s) for s in self.spread_seeds]
        return first + [(name, s) for name in self.arms if name != self.baseline for s in self.seeds]

    def verdict(self, ours: Sequence[float], baseline: Sequence[float]) -> Verdict:
        """By the rule. Raises ValueError where nothing was measured."""
        if not ours or len(baseline) < 2:
            raise ValueError("a verdict needs at least one measurement of ours and two of the baseline")
        mine, theirs = statistics.fmean(ours), statistics.fmean(baseline)
        gain = theirs - mine if self.better == "lower" else mine - theirs
        noise = 3 * statistics.stdev(baseline)
        if abs(gain) <= noise:
            return "within noise"
        if gain < 0:
            return "fails"
        small, large = sorted((abs(mine), abs(theirs)))
        return "holds" if small == 0 or large / small >= self.margin else "fails"
