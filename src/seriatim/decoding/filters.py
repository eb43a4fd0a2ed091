"""Temperature, the sampling filters, and ids that are not written: part of the law that is sampled, applied to target
and draft alike.

Order: temperature, top-k, top-p, min-p, typical, as in common practice. The likeliest token always stays, but for
typical sampling, which may leave it out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from seriatim.canvas import DELETED, GIVEN, Canvas
from seriatim.heads.dist import Categorical, Greedy


@dataclass(frozen=True)
class Warper:
    """temperature (0: greedy); top_k (exactly so many, the first of equals); top_p (Holtzman et al. 2020); min_p
    (Nguyen et al. 2024); typical (Meister 2022).

    None switches a filter off.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"the temperature is 0 (greedy) or more, and finite, got {self.temperature}")
        if self.top_k is not None and (not isinstance(self.top_k, int) or self.top_k < 1):
            raise ValueError(f"top_k keeps a whole number of tokens, at least 1, got {self.top_k}")
        for name in ("top_p", "min_p", "typical"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name} lies in (0, 1], got {value}")

    @property
    def neutral(self) -> bool:
        """Changes nothing."""
        return self.temperature == 1 and all(x is None for x in (self.top_k, self.top_p, self.min_p, self.typical))

    def __call__(self, dist: Any) -> Any:
        """The filtered distribution; others than `Categorical` say themselves what temperature and filters mean."""
        if not isinstance(dist, Categorical):
            if not hasattr(dist, "warped"):
                raise TypeError(f"temperature and filters mean nothing for {type(dist).__name__}: it has no `warped`")
            return dist.warped(self)
        if self.temperature == 0:
            return Greedy(dist.logits)
        x = dist.logits
        x = x if x.dtype == torch.float64 else x.float()
        if self.temperature != 1:
            x = x - x.amax(-1, keepdim=True)  # the largest becomes 0, so that nothing overflows
            x = x / max(self.temperature, torch.finfo(x.dtype).tiny)
        if self.top_k is not None and self.top_k < x.shape[-1]:
            x = _top(x, self.top_k)
        if self.top_p is not None and self.top_p < 1:
            x = _nucleus(x, self.top_p)
        if self.min_p is not None:
            p = torch.softmax(x, -1)
            x = x.masked_fill(p < self.min_p * p.amax(-1, keepdim=True), -torch.inf)
        if self.typical is not None and self.typical < 1:
            x = _typical(x, self.typical)
        return Categorical(x)


@dataclass(frozen=True)
class Suppress:
    """Ids that are never written, and those that are not written as the `first` new element of a row, whenever it is
    decided (`suppress_tokens` and `begin_suppress_tokens` of Hugging Face's generation). They are impossible from the
    model's own law on: confidences, penalties and filters do not see them."""

    ids: tuple[int, ...] = ()
    first: tuple[int, ...] = ()

    @property
    def neutral(self) -> bool:
        """Changes nothing."""
        return not self.ids and not self.first

    def check(self, vocab: int) -> None:
        """Raises ValueError for ids that a model does not have, and where none is left."""
        wrong = sorted({i for i in (*self.ids, *self.first) if not 0 <= i < vocab})
        if wrong:
            raise ValueError(f"id {wrong[0]} cannot be suppressed: this model's ids are 0 to {vocab - 1:,}")
        if len({*self.ids, *self.first}) >= vocab:
            raise ValueError(f"all {vocab:,} ids are suppressed: nothing is left to write")

    def __call__(self, dist: Any, element: Int[Tensor, "b m"] | int, canvas: Canvas) -> Any:
        """The law of these elements (a number: of that one and of those behind it) without the ids."""
        if not isinstance(dist, Categorical):
            raise TypeError(f"ids are suppressed, and {type(dist).__name__} is no law of ids")
        logits = dist.logits
        if self.ids:
            logits = logits.index_fill(-1, torch.tensor(self.ids, device=logits.device), -torch.inf)
        if self.first and bool((here := _begins(canvas, element)).any()):
            barred = torch.zeros(logits.shape[-1], dtype=torch.bool).index_fill(0, torch.tensor(self.first), True)
            logits = logits.masked_fill((here[..., None] & barred).to(logits.device), -torch.inf)
        return dist if logits is dist.logits else Categorical(logits)


def _begins(canvas: Canvas, element: Int[Tensor, "b m"] | int) -> Bool[Tensor, "b m"]:
    """Which of the elements that are read are the first of their row that was not given."""
    if canvas.length is not None:
        first: int | Tensor = canvas.given_length
    else:
        new = (canvas.status != GIVEN) & (canvas.status != DELETED)
        first = canvas.place.masked_fill(~new, canvas.layout.size).argmin(1, keepdim=True)
    if isinstance(element, int):  # drafts are read behind it
        return torch.as_tensor(first == element).view(-1, 1)
    return element == first


def _top(x: Float[Tensor, "... v"], k: int) -> Tensor:
    """The k likeliest tokens, the first of equals."""
    least = x.topk(k, -1).values[..., -1:]
    above, level = x > least, x == least
    keep = above | (level & (level.cumsum(-1) <= k - above.sum(-1, keepdim=True)))
    return x.masked_fill(~keep, -torch.inf)


def _nucleus(x: Float[Tensor, "... v"], mass: float) -> Tensor:
    """The smallest set of likeliest tokens that holds at least `mass`."""
    ordered, order = x.sort(-1, descending=True)
    p = torch.softmax(ordered, -1)
    drop = p.cumsum(-1) - p >= mass
    return x.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), -torch.inf)


def _typical(x: Float[Tensor, "... v"], mass: float) -> Tensor:
    """Tokens whose surprise is nearest to the entropy, up to `mass`."""
    lp = torch.log_softmax(x, -1)
    p = lp.exp()
    entropy = -(p * lp.masked_fill(p == 0, 0.0)).sum(-1, keepdim=True)
    order = (-lp - entropy).abs().argsort(-1)
    sorted_p = p.gather(-1, order)
    drop = sorted_p.cumsum(-1) - sorted_p >= mass
    return x.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), -torch.inf)
