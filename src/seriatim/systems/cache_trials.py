"""What an approximate cache does to the law of a model that decides tokens in any order, step after step.

While a text is written with the cache, every step is computed a second time from nothing, on the same canvas; what the
two say about every token that could be decided then is compared. A cache that is exact shows no difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from seriatim.canvas import Canvas
from seriatim.decoding.filters import Warper
from seriatim.decoding.guess import Guess
from seriatim.decoding.loop import Decider, Step
from seriatim.decoding.target import Target
from seriatim.model import Rows
from seriatim.posttraining.parallel import begun, written
from seriatim.random import Random
from seriatim.systems.decoders import decoder_of


@dataclass
class Beside:
    """Decides as `decider` does, and compares what it is told with what the model says without any cache.

    asked: distributions compared; divergence: the sum of their Kullback-Leibler divergences in nats, of the uncached
    law from the cached one; agreed: how many have the same likeliest token; worst: the largest divergence.
    """

    decider: Decider
    model: Any
    asked: int = 0
    divergence: float = 0.0
    agreed: int = 0
    worst: float = 0.0

    def decide(self, canvas: Canvas, guess: Guess | None, rows: Rows, random: Random) -> Step:
        afresh = Target(self.model, warp=Warper(0), cached=False)
        plan = afresh.plan(canvas, guess)
        assert plan is not None  # the cached target had one
        self._compare(rows, afresh.forward(plan, canvas, guess), canvas)
        return self.decider.decide(canvas, guess, rows, random)

    def _compare(self, ours: Rows, exact: Rows, canvas: Canvas) -> None:
        p, q = (_by_element(rows, canvas) for rows in (exact, ours))
        for row in range(canvas.batch):
            for e in sorted(p[row].keys() & q[row].keys()):
                law, other = p[row][e].double().log_softmax(-1), q[row][e].double().log_softmax(-1)
                gap = max(float((law.exp() * (law - other)).sum()), 0.0)
                self.asked += 1
                self.divergence += gap
                self.worst = max(self.worst, gap)
                self.agreed += int(law.argmax() == other.argmax())


def _by_element(rows: Rows, canvas: Canvas) -> list[dict[int, torch.Tensor]]:
    """Logits before filters by element, for each row."""
    logits = (rows.said or rows.dist).logits
    element = rows.element
    if isinstance(element, int):
        element = torch.arange(element, element + logits.shape[1]).expand(canvas.batch, -1)
    return [{e: logits[row, i] for i, e in enumerate(element[row].tolist()) if e >= 0} for row in range(canvas.batch)]


def drift(system: Any, decoder: str, prompts: Sequence[Sequence[int]], new: int) -> dict[str, float]:
    """Of a decoder by its name, greedily, behind prompts of one length: nats by which its cache moves a distribution,
    at worst, too; how often the likeliest token stays; slots computed of those that no cache would save."""
    way = decoder_of(system, decoder, system.sampling, ())
    if way.proposer is not None:
        raise ValueError(f"{decoder} drafts: only what is decided from masks is compared here")
    beside = Beside(way.decider, system.model)
    canvas = begun(system, torch.tensor(prompts), new, way.block)
    _, _, steps = written(system, canvas, beside, **way.target)
    whole = len(steps) * (len(prompts[0]) + new)
    return {
        "divergence": beside.divergence / beside.asked, "worst": beside.worst, "agreed": beside.agreed / beside.asked,
        "asked": beside.asked, "forwards": len(steps), "slots_share": sum(step.slots for step in steps) / whole,
    }  # fmt: skip
