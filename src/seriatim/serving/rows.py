"""What is asked of each row of a batch: temperature, filters, penalties, grammars and noise, all rows at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from seriatim.canvas import Canvas
from seriatim.decoding.filters import Warper
from seriatim.decoding.guess import Guess
from seriatim.decoding.shaping import Constraint, counts
from seriatim.heads.dist import Categorical, Greedy, largest
from seriatim.random import Key, Keyed, mix
from seriatim.serving.request import Request

TINY = torch.finfo(torch.float32).tiny


class RowWarper:
    """`Warper`, with other settings in each row. What a row becomes is, bit for bit, what its own warper makes of it.

    Stands in the place of a `Target`'s warper; `follow` tells it the rows of the next step.
    """

    neutral = False

    def __init__(self) -> None:
        self.follow(())

    def follow(self, warpers: Sequence[Warper]) -> None:
        """The settings of the rows from here on."""
        self.warpers = tuple(warpers)
        self.greedy = torch.tensor([w.temperature == 0 for w in warpers], dtype=torch.bool)
        self.temperature = _column([w.temperature for w in warpers])
        self.top_k = _some([w.top_k for w in warpers])
        self.top_p = _some([None if w.top_p == 1 else w.top_p for w in warpers])
        self.min_p = _some([w.min_p for w in warpers])
        self.typical = [w.typical for w in warpers]

    def __call__(self, dist: Any) -> Any:
        """The filtered distribution. Raises TypeError for a law of something else than ids."""
        if not isinstance(dist, Categorical):
            raise TypeError(f"rows are filtered of laws of ids, not of {type(dist).__name__}")
        if bool(self.greedy.all()):
            return Greedy(dist.logits)
        if len(set(self.warpers)) == 1:
            return self.warpers[0](dist)
        x = dist.logits
        x = x if x.dtype == torch.float64 else x.float()
        device, raw = x.device, x
        if bool((self.temperature != 1).any()):
            t = self.temperature.to(x).clamp(min=TINY)
            x = torch.where(t == 1, x, (x - x.amax(-1, keepdim=True)) / t)
        if self.top_k is not None:
            x = _top(x, self.top_k.nan_to_num(posinf=x.shape[-1]).clamp(max=x.shape[-1]).long().to(device))
        if self.top_p is not None:
            x = _nucleus(x, self.top_p.to(x))
        if self.min_p is not None:
            p = torch.softmax(x, -1)
            least = self.min_p.nan_to_num(posinf=0).to(x)
            x = x.masked_fill(p < least * p.amax(-1, keepdim=True), -torch.inf)
        for b, share in enumerate(self.typical):  # seldom asked for
            if share is not None and share < 1:
                x = x.index_copy(
                    0, torch.tensor([b], device=device), Warper(typical=share)(Categorical(x[b, None])).logits
                )
        if bool(self.greedy.any()):
            only = torch.full_like(raw, -torch.inf).scatter(-1, largest(raw)[..., None], 0.0)
            x = torch.where(self.greedy[:, None, None].to(device), only, x)
        return Categorical(x)


def _column(values: Sequence[float]) -> Float[Tensor, "b 1 1"]:
    return torch.tensor(values, dtype=torch.float64)[:, None, None]


def _some(values: Sequence[float | None]) -> Float[Tensor, "b 1 1"] | None:
    """A filter's setting in each row, infinity where it is switched off; None: in all."""
    if all(v is None for v in values):
        return None
    return _column([math.inf if v is None else float(v) for v in values])


def _top(x: Float[Tensor, "b m v"], k: Int[Tensor, "b 1 1"]) -> Tensor:
    """The k likeliest tokens of each row, the first of equals."""
    most = int(k[k < x.shape[-1]].max()) if bool((k < x.shape[-1]).any()) else 1
    ordered = x.topk(most, -1).values
    least = ordered.gather(-1, (k - 1).clamp(max=most - 1).expand(-1, x.shape[1], -1))
    above, level = x > least, x == least
    keep = above | (level & (level.cumsum(-1) <= k - above.sum(-1, keepdim=True)))
    return x.masked_fill(~(keep | (k >= x.shape[-1])), -torch.inf)


def _nucleus(x: Float[Tensor, "b m v"], mass: Float[Tensor, "b 1 1"]) -> Tensor:
    """The smallest set of likeliest tokens that holds at least `mass` in each row."""
    ordered, order = x.sort(-1, descending=True)
    p = torch.softmax(ordered, -1)
    drop = p.cumsum(-1) - p >= mass
    return x.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), -torch.inf)


class RowPenalties:
    """`Penalties`, with others in each row."""

    def __init__(self) -> None:
        self.follow(())

    def follow(self, requests: Sequence[Request]) -> None:
        said = [r.sampling for r in requests]
        self.repetition = _column([s.repetition_penalty for s in said])
        self.presence = _column([s.presence_penalty for s in said])
        self.frequency = _column([s.frequency_penalty for s in said])
        self.neutral = not any(s.shapers for s in said)

    def __call__(self, logits: Float[Tensor, "b m v"], canvas: Canvas, guess: Guess | None) -> Float[Tensor, "b m v"]:
        if self.neutral:
            return logits
        known, made = counts(logits, canvas, guess)
        r, presence, frequency = (x.to(logits) for x in (self.repetition, self.presence, self.frequency))
        smaller = torch.where(logits > 0, logits / r, logits * r)
        logits = torch.where((known > 0) & (r != 1), smaller, logits)
        return logits - presence * (made > 0) - frequency * made


class Free:
    """The matcher of a row that no grammar binds."""

    def __init__(self, vocab: int):
        self.mask = torch.ones(vocab, dtype=torch.bool)

    def allowed(self) -> Bool[Tensor, "v"]:
        return self.mask

    def take(self, ids: Sequence[int]) -> None: ...

    def back(self, n: int) -> None: ...


class RowConstraint(Constraint):
    """`Constraint`, whose rows come and go."""

    def __init__(self, vocab: int):
        super().__init__([])
        self.free, self.bound = Free(vocab), False

    def follow(self, rows: Sequence[int], new: Sequence[Any | None], given: Sequence[int]) -> None:
        """rows: as of `select_rows`; new: matchers of the rows that are new (None: free), and how many tokens of each
        were given."""
        taken, coming = self.taken or [], iter(zip(new, given, strict=True))
        both = [(self.matchers[r], taken[r]) if r >= 0 else next(coming) for r in rows]
        self.matchers = [self.free if matcher is None else matcher for matcher, _ in both]
        self.taken = [count for _, count in both]
        self.bound = any(matcher is not self.free for matcher in self.matchers)

    def __call__(self, logits: Float[Tensor, "b m v"], canvas: Canvas, guess: Guess | None) -> Float[Tensor, "b m v"]:
        return super().__call__(logits, canvas, guess) if self.bound else logits


class RowKeyed(Keyed):
    """`Keyed`, where each row has a seed of its own, and the number that it would have in a batch of that seed."""

    def __init__(self) -> None:
        super().__init__(0)
        self.follow([], ())

    def follow(self, names: Sequence[int], requests: Sequence[Request]) -> None:
        """names: of the rows (`Canvas.row`)."""
        order = sorted(range(len(names)), key=names.__getitem__)
        self.names = torch.tensor([names[i] for i in order], dtype=torch.long)
        seeds = mix(torch.tensor([requests[i].seed & (2**62 - 1) for i in order], dtype=torch.long))
        copies = torch.tensor([requests[i].copy for i in order], dtype=torch.long)
        self.start = mix(seeds + copies * 0x632BE59BD9B4E019)

    def begin(self, key: Key) -> Int[Tensor, "b 1"]:
        return self.start[torch.searchsorted(self.names, key.row.cpu())][:, None]
