"""Elements of several kinds in one sample, each kind decided in its own way."""

from __future__ import annotations

from collections.abc import Mapping

from seriatim.canvas import Canvas
from seriatim.decoding.guess import Guess
from seriatim.decoding.loop import Decider, Step
from seriatim.model import Rows, read_kind
from seriatim.plan import Reads
from seriatim.random import Random


class PerKind:
    """Hands each step to the decider of the kind of element that it reads: words are sampled, actions denoised."""

    def __init__(self, deciders: Mapping[str, Decider]):
        if not deciders:
            raise ValueError("PerKind needs the decider of at least one kind of element")
        self.deciders = dict(deciders)

    def decide(self, canvas: Canvas, guess: Guess | None, rows: Rows, random: Random) -> Step:
        if isinstance(rows.element, int):
            kind = canvas.layout.kinds[0]
        else:
            kind = read_kind(canvas, Reads(rows.element, rows.element))
        if kind not in self.deciders:
            raise ValueError(f"no decider for elements of kind {kind!r}; there are {', '.join(self.deciders)}")
        return self.deciders[kind].decide(canvas, guess, rows, random)
