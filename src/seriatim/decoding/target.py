"""The law that is sampled, whatever the way: a model, conditions and guidance, filters, a cache policy.

Composes values and has no algorithm of its own. What changes the law is here; what changes the way (drafts, selection,
remasking) is a `Proposer` or a `Decider`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from seriatim.backbones.cache import Keep
from seriatim.canvas import Canvas
from seriatim.decoding.filters import Warper
from seriatim.decoding.guess import Guess
from seriatim.decoding.guidance import Guidance
from seriatim.model import Model, Rows
from seriatim.plan import Plan


class Target:
    """What is sampled.

    condition: raw conditions by name; guidance: how strongly they are followed (needs conditions with a null);
    warp: temperature and filters; cached: use the exact cache (False recomputes everything, for tests).
    """

    def __init__(
        self,
        model: Model,
        condition: Mapping[str, Tensor] | None = None,
        guidance: Guidance | None = None,
        warp: Warper | None = None,
        cached: bool = True,
    ):
        self.model, self.guidance = model, guidance
        self.warp = None if warp is None or warp.neutral else warp
        self.copies = 1 if guidance is None else 2
        if guidance is not None and not model.conditions:
            raise ValueError("guidance needs a condition with a null; this model is unconditional")
        self.condition = self._encode(condition)
        self.cached = cached
        self.cache = None
        self._checked = False

    def _encode(self, raw: Mapping[str, Tensor] | None):
        if self.guidance is None:
            return self.model.encode(raw)
        assert raw is not None
        batch = next(iter(raw.values())).shape[0]
        both = {k: torch.cat([v, v]) for k, v in raw.items()}
        return self.model.encode(both, torch.arange(2 * batch) >= batch)

    def plan(self, canvas: Canvas, guess: Guess | None = None) -> Plan | None:
        """The next forward; None when everything is decided."""
        if guess is not None and not self.model.factorization.draftable:
            name = type(self.model.factorization).__name__
            raise ValueError(f"{name} cannot verify drafts; use a decider without a proposer")
        cache = self.cache
        plan = self.model.factorization.step(canvas, guess, 0 if cache is None else cache.length)
        if not self._checked and plan is not None:
            plan.check(self.model.mixers)
            self._checked = True
        return plan

    def forward(self, plan: Plan, canvas: Canvas, guess: Guess | None = None) -> Rows:
        """Distributions of what the plan reads, guided and filtered; cache entries are left pending."""
        model = self.model
        if self.cache is None and self.cached:
            self.cache = model.new_cache(canvas.batch * self.copies)
        h = model.hidden(plan, canvas, self.cache, self.condition, guess, self.copies)
        if self.guidance is None:
            dist, element, slot = model.dist(h, plan, canvas)
        else:
            dist, element, slot = self._guided(h, plan, canvas)
        logits = getattr(dist, "logits", None)
        if logits is not None and not math.isfinite(float(logits.sum())):
            raise FloatingPointError(
                "the model returned NaN or infinite logits: its weights or inputs are broken (check the checkpoint "
                "and the number format; bfloat16 needs no loss scaling, float16 does)"
            )
        if self.warp is not None:
            dist = self.warp(dist)
        return Rows(dist, element, h, slot)

    def _guided(self, h: Tensor, plan: Plan, canvas: Canvas):
        """Mix the two branches: logits of the condition, away from those of the null."""
        assert self.guidance is not None
        b = canvas.batch
        yes, element, slot = self.model.dist(h[:b], plan, canvas)
        no, _, _ = self.model.dist(h[b:], plan, canvas)
        weight = self.guidance.weight(progress(plan, canvas))
        return yes.mix([no], [1 + weight, -weight]), element, slot

    def commit(self, keep: Keep | None, plan: Plan) -> None:
        """Keep pending entries: what the decider names, or (None) what the plan says is worth keeping."""
        cache = self.cache
        if cache is None:
            return
        if keep is None:
            keep = plan.size if plan.kept is None else _plain_keep(plan.kept)
        elif isinstance(keep, Tensor) and self.copies > 1:
            keep = keep.repeat(self.copies, 1)
        cache.commit(keep, plan)
        if plan.retain is not None:
            cache.evict(plan.retain)

    def select(self, rows: Tensor, batch: int) -> None:
        """Follow the canvas: keep, copy or drop rows."""
        copies = torch.cat([rows + i * batch for i in range(self.copies)])
        if self.cache is not None:
            self.cache.select(copies)
        self.condition = self.condition.select(copies)


def progress(plan: Plan, canvas: Canvas) -> float:
    """How far generation is before this step: the share of steps done, from 0 to 1."""
    if canvas.length is not None:
        done, total = canvas.length - canvas.given_length, canvas.layout.size - canvas.given_length
        return done / max(total - 1, 1)
    ranks = canvas.rank[~canvas.known]
    last = int(canvas.rank.max())
    return 0.0 if last <= 0 or not ranks.numel() else int(ranks.min()) / last


def _plain_keep(kept: Tensor) -> Keep:
    """A row shared by the batch as a list, which costs no ragged commit."""
    if kept.shape[0] == 1:
        row = kept[0].tolist()
        return len(row) if row == list(range(len(row))) else row
    return kept
