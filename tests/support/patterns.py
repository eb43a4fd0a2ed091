"""What a published attention pattern is: labels, the rule of the paper, and what is known of its decoding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

Rule = Callable[[int, int], bool]


@dataclass
class Pattern:
    """A function that returns (plan or view, rule), and what is known of its decoding."""

    build: Callable
    cost: dict[str, int] = field(default_factory=dict)
    view: str | None = None  # the kind of layer that `cost` counts
    mixers: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.build.__name__


PATTERNS: list[Pattern] = []


def pattern(view: str | None = None, mixers: dict[str, str] | None = None, **cost: int):
    def note(build):
        PATTERNS.append(Pattern(build, cost, view, mixers or {}))
        return build

    return note


def itself(n: int) -> list[tuple[int, int]]:
    """Slot i reads element i."""
    return [(i, i) for i in range(n)]


def pyramid(sides: tuple[int, ...]) -> list[int]:
    """The scale of each token."""
    return [k for k, side in enumerate(sides) for _ in range(side * side)]


SIDES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
