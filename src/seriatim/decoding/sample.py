"""Deciders that sample what was read: everything at once, or a chosen part of the unknown elements."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from seriatim.canvas import Canvas, Set, Truncate, Unset
from seriatim.decoding.guess import Guess
from seriatim.decoding.loop import Step
from seriatim.model import Rows
from seriatim.random import Key, Random


class SampleAll:
    """Ancestral sampling: decide every element that was read. `stop` ids end a row."""

    def __init__(self, stop: tuple[int, ...] = ()):
        self.stop = frozenset(stop)

    def decide(self, canvas: Canvas, guess: Guess | None, rows: Rows, random: Random) -> Step:
        if guess is not None:
            raise ValueError("SampleAll verifies nothing: use a verifier as decider, or no proposer")
        element = rows.element
        if isinstance(element, int):
            x = rows.dist.sample(random, Key(canvas.row, element))
            if not self.stop:
                return Step((Set(x),))
            return self._stopped(canvas, x, torch.full((canvas.batch, 1), element))
        element = element.expand(canvas.batch, -1)
        x = rows.dist.sample(random, Key(canvas.row, element))
        if self.stop:
            return self._stopped(canvas, x, element)
        return Step((Set(x, element),))

    def _stopped(self, canvas: Canvas, x: Tensor, element: Tensor) -> Step:
        """End rows that emitted a stop id."""
        ended = torch.isin(x, torch.tensor(sorted(self.stop))) & (element >= 0)
        if not bool(ended.any()):
            return Step((Set(x) if canvas.length is not None else Set(x, element),))
        first = torch.where(ended, element, canvas.layout.size).amin(1)
        return Step((Set(x, element), Truncate(torch.minimum(first + 1, torch.tensor(canvas.layout.size)))))


Rule = Literal["random", "confidence", "margin", "entropy"]


@dataclass
class Select:
    """Sample every unknown element, decide only some: masked generation (MaskGIT, LLaDA and kin).

    rule: how unknown elements are ranked, best first: at random, by the probability of what was sampled, by the margin
    of the two likeliest, by entropy. `steps` spreads the elements evenly ("linear") or slowly at first ("cosine");
    `threshold` instead decides all whose score exceeds it, and at least one. `remask` makes that many of the least
    confident decided elements unknown again at each step but the last.
    """

    rule: Rule = "confidence"
    steps: int = 8
    schedule: Literal["linear", "cosine"] = "linear"
    threshold: float | None = None
    remask: int = 0
    _turn: int = field(default=0, init=False, repr=False)
    _score: Tensor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.rule not in ("random", "confidence", "margin", "entropy"):
            raise ValueError(f"rule is random, confidence, margin or entropy, not {self.rule!r}")
        if self.steps < 1:
            raise ValueError(f"at least one step is needed, got {self.steps}")

    def decide(self, canvas: Canvas, guess: Guess | None, rows: Rows, random: Random) -> Step:
        element = torch.as_tensor(rows.element).expand(canvas.batch, -1)
        live = element >= 0
        x = rows.dist.sample(random, Key(canvas.row, element))
        score = self.score(rows, x, element, canvas, random).masked_fill(~live, -torch.inf)
        chosen = self.choose(score, live, canvas)
        edits: list = [Set(x, torch.where(chosen, element, -1))]
        self._turn += 1
        if self.remask:
            edits += self._remask(canvas, element, chosen, score)
        if bool((chosen == live).all()) and not self.remask:
            self._turn = 0
        return Step(tuple(edits))

    def score(self, rows: Rows, x: Tensor, element: Tensor, canvas: Canvas, random: Random) -> Float[Tensor, "b m"]:
        """Larger is decided earlier."""
        if self.rule == "random":
            m = element.shape[1]
            uniform = torch.zeros(canvas.batch, 1, m).masked_fill((element < 0)[:, None], -torch.inf)
            return _random_ranks(uniform, element, canvas, random)
        p = rows.dist.probs()
        if self.rule == "confidence":
            return p.gather(-1, x[..., None])[..., 0]
        if self.rule == "entropy":
            return -rows.dist.entropy()
        top = p.topk(2, -1).values
        return top[..., 0] - top[..., 1]

    def choose(self, score: Tensor, live: Tensor, canvas: Canvas) -> Bool[Tensor, "b m"]:
        """The elements decided in this step."""
        order = score.argsort(dim=1, descending=True, stable=True).argsort(1)
        left = live.sum(1)
        if self.threshold is not None:
            return live & ((score > self.threshold) | (order == 0))
        total = (~torch.isin(canvas.status, torch.tensor([0, 4]))).sum(1)  # elements to be generated in all
        after = _left_after(min(self._turn + 1, self.steps), self.steps, total, self.schedule)
        count = torch.minimum((left - after).clamp(min=1), left)
        return live & (order < count[:, None])

    def _remask(self, canvas: Canvas, element: Tensor, chosen: Tensor, score: Tensor) -> list:
        if self._score is None:
            self._score = torch.full((canvas.batch, canvas.layout.size), torch.inf, dtype=score.dtype)
        b, m = chosen.nonzero(as_tuple=True)
        self._score[b, element[b, m]] = score[b, m]
        if self._turn >= self.steps:
            self._turn, self._score = 0, None
            return []
        mine = self._score.masked_fill(canvas.status == 0, torch.inf)
        worst = mine.topk(min(self.remask, mine.shape[1]), 1, largest=False)
        again = torch.where(worst.values < torch.inf, worst.indices, -1)
        self._score.scatter_(1, worst.indices, torch.inf)
        return [Unset(again)]


def _left_after(turn: int, steps: int, total: Int[Tensor, "b"], schedule: str) -> Int[Tensor, "b"]:
    """Unknown elements that remain after a number of steps."""
    share = turn / steps
    rest = 1 - share if schedule == "linear" else float(torch.cos(torch.tensor(share * torch.pi / 2)))
    return torch.zeros_like(total) if turn >= steps else (total * rest).floor().long()


def _random_ranks(weights: Tensor, element: Tensor, canvas: Canvas, random: Random) -> Float[Tensor, "b m"]:
    """A uniformly random order of the live entries: one categorical draw a place, so that it can be enumerated."""
    batch, _, m = weights.shape
    score = torch.full((batch, m), -torch.inf)
    left = weights.clone()
    rows = torch.arange(batch)
    for turn in range(m):
        some = (left > -torch.inf).any(-1)[:, 0]
        if not bool(some.any()):
            break
        key = Key(canvas.row, torch.where(some, element[:, 0].clamp(min=0), -1)[:, None], draw=1 + turn)
        pick = random.categorical(torch.where(some[:, None, None], left, torch.zeros_like(left)), key)[:, 0]
        score[rows[some], pick[some]] = float(m - turn)
        left[rows[some], 0, pick[some]] = -torch.inf
    return score
