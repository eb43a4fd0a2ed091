"""Several tokens a forward, each from what the model would say with those before it: approximate joint sampling
(ADJUST, Bansal & Sanghavi 2025, arXiv 2509.22738).

Tokens that are decided at once do not know of each other. Here one is decided, a small sampler says how the states of
all others change by it, the next one is decided from these, and so on: a full forward for so many tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from seriatim.canvas import Canvas, Edit
from seriatim.decoding.guess import Guess
from seriatim.decoding.loop import Decider, Step
from seriatim.decoding.target import Target
from seriatim.decoding.unmask import at_work
from seriatim.heads.dist import Categorical
from seriatim.model import Model, Rows
from seriatim.plan import Plan, Reads
from seriatim.random import Random
from seriatim.slots import gather, ragged

# What stands in the slots now, the states of their elements before, and who sees whom: the states now.
Sampler = Callable[[Float[Tensor, "b E d"], Float[Tensor, "b E d"], Plan], Float[Tensor, "b E d"]]


class Adjusted:
    """`one` decides `tokens` times on one forward of the model; in between, the sampler refreshes what it goes by.

    With 1 token it is `one` itself. It is proposer and decider: it drafts nothing, but hears so what law is sampled.
    """

    law: Target | None = None

    def __init__(self, one: Decider, sampler: Sampler, tokens: int):
        if tokens < 1:
            raise ValueError(f"at least 1 token is decided a forward, got {tokens}")
        self.one, self.sampler, self.tokens = one, sampler, tokens

    def propose(self, canvas: Canvas, target: Target, random: Random) -> None:
        self.law = target

    def observe(self, canvas: Canvas, rows: Rows, step: Step) -> None:
        """Learns nothing."""

    def decide(self, canvas: Canvas, guess: Guess | None, rows: Rows, random: Random) -> Step:
        if self.tokens == 1:
            return self.one.decide(canvas, guess, rows, random)
        if self.law is None:
            raise ValueError("what law is sampled is not known: give this decider as proposer, too")
        edits: tuple[Edit, ...] = ()
        now, h = canvas.copy(), described(rows.hidden, self.law.model)
        for turn in range(self.tokens):
            step = self.one.decide(now, guess, rows, random)
            edits += step.edits
            if turn + 1 == self.tokens or now.apply(step.edits).done:
                break
            rows = self.refreshed(now, h, self.law)
            h = rows.hidden
        return Step(edits)

    def refreshed(self, canvas: Canvas, h: Float[Tensor, "b E d"], law: Target) -> Rows:
        """What is said of the elements that may be decided next, after others were."""
        model = law.model
        plan = model.factorization.step(canvas, None, 0)
        assert plan is not None
        if plan.size != h.shape[1]:
            raise ValueError(
                f"{plan.size} slots are to be refreshed, and the last forward computed {h.shape[1]}: a sampler takes a "
                "model in which everybody sees everybody, and no cache"
            )
        h = self.sampler(model.vectors(plan, canvas), h, plan)
        element = at_work(canvas, Rows(None, plan.reads.element, h))
        element = gather(element, ragged(element >= 0))  # a head is as dear as a layer
        dist: Any = model.dist(h, replace(plan, reads=Reads(element, element)), canvas)[0]
        if law.suppress is not None:
            dist = law.suppress(dist, element, canvas)
        said = dist
        for shape in law.shapers:
            dist = Categorical(shape(dist.logits.float(), canvas, None))
        return Rows(dist if law.warp is None else law.warp(dist), element, h, element, said)


def described(h: Float[Tensor, "b E d"], model: Model) -> Float[Tensor, "b E d"]:
    """The state of each element, at which it is read: in a shifted order that stands one slot before its own."""
    return torch.cat([h[:, :1], h[:, :-1]], 1) if getattr(model.factorization, "shift", False) else h
