"""Relative positions: what a key scores depends on how far it stands from its query (T5, Raffel et al. 2020, arXiv
1910.10683, section 2.1)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from seriatim.plan import OrderError, Plan


@dataclass(frozen=True)
class Relative:
    """Distances in `buckets`: the first half of them one distance each, then ever more, all from `distance` on in the
    last. `both`: keys ahead have buckets of their own, half of all; else they count as if they stood at the query."""

    buckets: int = 32
    distance: int = 128
    both: bool = False

    def __post_init__(self) -> None:
        if self.buckets < (4 if self.both else 2) or self.buckets % (4 if self.both else 2):
            raise ValueError(f"buckets halve into near and far{' on both sides' * self.both}, got {self.buckets}")
        if self.distance <= self.exact:
            raise ValueError(f"far distances begin beyond {self.exact}, got a distance of {self.distance}")

    @property
    def exact(self) -> int:
        """Distances that have a bucket each."""
        return self.buckets // (4 if self.both else 2)

    @cached_property
    def bucket(self) -> Int[Tensor, "offsets"]:
        """The bucket of a key `distance` behind its query, ..., of one `distance` ahead."""
        with torch.inference_mode(False):  # the table outlives the loop that first asks for it
            far = torch.arange(self.distance + 1, device="cpu")
            widening = torch.log(far.clamp(min=1).float() / self.exact) / math.log(self.distance / self.exact)
            behind = torch.where(far < self.exact, far, self.exact + (widening * self.exact).long())
            behind = behind.clamp(max=2 * self.exact - 1)
            ahead = behind[1:] + 2 * self.exact if self.both else behind[:1].expand(self.distance)
            return torch.cat([behind.flip(0), ahead])


def with_distances(
    r: Relative, table: Float[Tensor, "buckets h"], mask: Tensor | str | None, plan: Plan, kind: str, cache: Any,
    dtype: torch.dtype,
) -> Float[Tensor, "#b h q k"]:  # fmt: skip
    """What is added to the scores: the number of each distance, and what `mask` says (None: all is seen; "causal"; or
    what is added for it)."""
    query, key = _places(plan, kind, cache)
    offset = (key[:, None] - query[:, :, None]).clamp(-r.distance, r.distance) + r.distance
    numbers = table.to(dtype)[r.bucket.to(table.device)]
    scores = numbers[offset.to(table.device)].permute(0, 3, 1, 2)
    if mask is None:
        return scores
    if isinstance(mask, str):
        mask = torch.full((plan.size, plan.size), -torch.inf, dtype=dtype, device=table.device).triu(1)
    return scores + mask


def _places(plan: Plan, kind: str, cache: Any) -> tuple[Int[Tensor, "#b q"], Int[Tensor, "#b k"]]:
    """Where the slots stand; and where that which is cached stands, they behind it. A cache knows clock times only:
    raises `OrderError` where these are no places."""
    if plan.run is None:
        new = plan.slots.coord[..., 0]
    else:
        start, depth = plan.run
        new = start + (torch.arange(plan.size) if depth is None else depth)[None]
    if cache is None:
        return new, new
    if plan.run is None:
        view = (plan.settled or plan.views)[kind]
        timeless = view.at != new
        if view.lane is not None:
            timeless = timeless & (view.lane >= 0)
        if plan.slots.node is not None:
            timeless = timeless & (plan.slots.node < 0)
        if bool(timeless.any()):
            raise OrderError(
                "how far a cached entry stands from a slot is known along a line only; decode this order without a "
                "cache, or use rotary embedding"
            )
    labels = cache.labels(kind)
    old = torch.arange(cache.columns)[None] if labels is None else labels.at
    rows = max(len(old), len(new))
    return new, torch.cat([old.expand(rows, -1), new.expand(rows, -1)], 1)
