"""What a system claims, and the rule by which a measurement says whether it holds: committed before it is run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Verdict = Literal["holds", "fails", "within noise", "not measurable here"]


@dataclass(frozen=True)
class Arm:
    """One training: a system, its settings, and how long. sampling: changes of how it samples when it is judged;
    measure: judges it (None: the usual figures); base: a model that there is already, which is trained further, or
    beside which a part is trained; options: of the claim's data."""

    system: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    size: str | None = None
    tokenizer: str | None = None
    minutes: float | None = None
    steps: int | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    measure: Callable[[Any], Mapping[str, float]] | None = None
    base: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


def brief(
    system: str, tokenizer: str, measure: Callable[[Any], Mapping[str, float]] | None = None, **settings: Any
) -> Arm:
    """An arm of a generator of pictures at its first size: three minutes are too short for dropout, and averaged
    weights draw better."""
    settings = {"dropout": 0.0, "ema": 0.98, **settings}
    return Arm(system, settings, tokenizer=tokenizer, minutes=3, measure=measure)


@dataclass(frozen=True)
class Trial:
    """An arm that is no training of a system: what a function measures on a loaded model (whatever `load` takes; None:
    it has a model of its own) with a seed."""

    model: str | None
    measure: Callable[[Any, int], Mapping[str, float]]


@dataclass(frozen=True)
class Claim:
    """ours against baseline by one metric.

    text: what is claimed, in words; paper: the paper's figure; better: the better direction of `metric`; margin: by
    which factor ours must be better (below 1: how much of the baseline's quality it must reach); spread_seeds: of the
    baseline, whose spread counts as noise; seeds: of ours; other_seeds: of arms that the verdict does not need (None:
    as ours).
    """

    text: str
    paper: str
    metric: str
    arms: Mapping[str, Arm | Trial]
    ours: str
    baseline: str
    better: Literal["lower", "higher"] = "lower"
    margin: float = 1.0
    seeds: tuple[int, ...] = (0, 1)
    spread_seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    other_seeds: tuple[int, ...] | None = None
    data: str | None = None

    @property
    def rule(self) -> str:
        """The rule in words, as results carry it."""
        turned = "divided" if self.better == "lower" else "multiplied"
        factor = "" if self.margin == 1 else f" {turned} by {self.margin:g}"
        return (
            f"the mean {self.metric} of {self.ours} is {self.better} than that of {self.baseline}{factor}, by more "
            f"than three standard deviations of {self.baseline} over {len(self.spread_seeds)} seeds"
        )

    def queue(self) -> list[tuple[str, int]]:
        """Arms and seeds, the baseline first."""
        others = self.seeds if self.other_seeds is None else self.other_seeds
        return [(self.baseline, s) for s in self.spread_seeds] + [
            (name, seed)
            for name in self.arms
            if name != self.baseline
            for seed in (self.seeds if name == self.ours else others)
        ]

    def verdict(self, ours: Sequence[float], baseline: Sequence[float]) -> Verdict:
        """By the rule. Raises ValueError where nothing was measured."""
        if not ours or len(baseline) < 2:
            raise ValueError("a verdict needs at least one measurement of ours and two of the baseline")
        mine, theirs, noise = statistics.fmean(ours), statistics.fmean(baseline), 3 * statistics.stdev(baseline)
        gain = theirs / self.margin - mine if self.better == "lower" else mine - theirs * self.margin
        if abs(gain) <= noise:
            return "within noise"
        return "holds" if gain > 0 else "fails"

    def interval(self, ours: Sequence[float], baseline: Sequence[float]) -> tuple[float, float] | None:
        """Where the difference of the means (ours less the baseline) lies with 95% confidence, by Welch's t test, which
        takes seeds for draws of one normal law; None where one of them was measured once."""
        if min(len(ours), len(baseline)) < 2:
            return None
        from scipy.stats import ttest_ind

        gap = statistics.fmean(ours) - statistics.fmean(baseline)
        if statistics.pvariance(ours) + statistics.pvariance(baseline) == 0:
            return gap, gap
        found = ttest_ind(ours, baseline, equal_var=False).confidence_interval(0.95)
        return float(found.low), float(found.high)
