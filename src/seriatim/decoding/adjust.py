"""Several tokens a forward, each from what the model would say with those before it: approximate joint sampling
(ADJUST, Bansal & Sanghavi 2025, arXiv 2509.22738).

Tokens that are decided at once do not know of each other. Here one is decided, a small sampler says how the states of
all others change by it, the next one is decided from these, and so on: a full forward for so many tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from jaxtyping import Float
from torch import Tensor

from seriatim.canvas import Canvas, Edit
from seriatim.decoding.filters import Warper
from seriatim.decoding.guess import Guess
from seriatim.decoding.loop import Decider, Step
from seriatim.decoding.shaping import Shaper
from seriatim.decoding.unmask import at_work
from seriatim.heads.dist import Categorical
from seriatim.model import Model, Rows
from seriatim.plan import Plan, Reads
from seriatim.random import Random
from seriatim.slots import gather, ragged

# What stands in the slots now, their states before, and how they see each other: their states now.
Sampler = Callable[[Float[Tensor, "b s d"], Float[Tensor, "b s d"], Plan], Float[Tensor, "b s d"]]


class Adjusted:
    """`one` decides `tokens` times on one forward of the model; in between, the sampler refreshes what it goes by.

    With 1 token it is `one` itself. warp, shapers: those of the target.
    """

    def __init__(
        self, one: Decider, sampler: Sampler, model: Model, tokens: int, warp: Warper | None = None,
        shapers: Sequence[Shaper] = (),
    ):  # fmt: skip
        if tokens < 1:
            raise ValueError(f"at least 1 token is decided a forward, got {tokens}")
        self.one, self.sampler, self.model, self.tokens = one, sampler, model, tokens
        self.warp = None if warp is None or warp.neutral else warp
        self.shapers = tuple(shapers)

    def decide(self, canvas: Canvas, guess: Guess | None, rows: Rows, random: Random) -> Step:
        edits: tuple[Edit, ...] = ()
        now = canvas if self.tokens == 1 else canvas.copy()
        for turn in range(self.tokens):
            step = self.one.decide(now, guess, rows, random)
            edits += step.edits
            if turn + 1 == self.tokens or now.apply(step.edits).done:
                break
            rows = self.refreshed(now, rows)
        return Step(edits)

    def refreshed(self, canvas: Canvas, rows: Rows) -> Rows:
        """What is said of the elements that may be decided next, after others were."""
        plan = self.model.factorization.step(canvas, None, 0)
        assert plan is not None
        if plan.size != rows.hidden.shape[1]:
            raise ValueError(
                f"{plan.size} slots are to be refreshed, and the last forward computed {rows.hidden.shape[1]}: a "
                "sampler takes a model in which everybody sees everybody, and no cache"
            )
        h = self.sampler(self.model.vectors(plan, canvas), rows.hidden, plan)
        next_ = ragged(at_work(canvas, rows._replace(element=plan.reads.element)) >= 0)
        reads = Reads(gather(plan.reads.slot, next_), gather(plan.reads.element, next_))  # a head is as dear as a layer
        dist: Any
        dist, element, slot = self.model.dist(h, replace(plan, reads=reads), canvas)
        said = dist
        for shape in self.shapers:
            dist = Categorical(shape(dist.logits.float(), canvas, None))
        if self.warp is not None:
            dist = self.warp(dist)
        return Rows(dist, element, h, slot, said)
