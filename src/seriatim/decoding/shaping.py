"""What changes the law by the text so far: penalties for repeating, and constraints.

A shaper is asked for the logits behind the last known element of each row and, where a draft is looked at, behind each
of its nodes: there the text is that of the node's own path, so that drafts are verified against the law that plain
decoding would follow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from seriatim.canvas import DELETED, GIVEN, Canvas
from seriatim.decoding.guess import Guess


class Shaper(Protocol):
    """Logits (batch, read-outs, v), as they are after the text behind which each stands."""

    def __call__(
        self, logits: Float[Tensor, "b m v"], canvas: Canvas, guess: Guess | None
    ) -> Float[Tensor, "b m v"]: ...


@dataclass(frozen=True)
class Penalties:
    """repetition: logits of all tokens in the text, the prompt's included, are divided by it where positive and
    multiplied where negative (CTRL, Keskar et al. 2019; 1: none). presence, frequency: what is taken from the logits of
    generated tokens, once and for each time they stand there (0: nothing)."""

    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.repetition < math.inf:
            raise ValueError(f"a repetition penalty is positive (1: none), got {self.repetition}")
        if not all(map(math.isfinite, (self.presence, self.frequency))):
            raise ValueError(f"penalties are finite, got presence {self.presence} and frequency {self.frequency}")

    @property
    def neutral(self) -> bool:
        return self.repetition == 1 and not self.presence and not self.frequency

    def __call__(self, logits: Float[Tensor, "b m v"], canvas: Canvas, guess: Guess | None) -> Float[Tensor, "b m v"]:
        known, made = counts(logits, canvas, guess)
        if self.repetition != 1:
            smaller = torch.where(logits > 0, logits / self.repetition, logits * self.repetition)
            logits = torch.where(known > 0, smaller, logits)
        if self.presence or self.frequency:
            logits = logits - self.presence * (made > 0) - self.frequency * made
        return logits


@dataclass(frozen=True)
class Without:
    """Everything but these ids: that of a mask, or ends of text where a text has to go on."""

    ids: tuple[int, ...]

    def __call__(self, logits: Float[Tensor, "b m v"], canvas: Canvas, guess: Guess | None) -> Float[Tensor, "b m v"]:
        return logits.index_fill(-1, torch.tensor(self.ids, device=logits.device), -torch.inf)


def counts(
    logits: Float[Tensor, "b m v"], canvas: Canvas, guess: Guess | None
) -> tuple[Float[Tensor, "b m v"], Float[Tensor, "b m v"]]:
    """How often each token stands in the text behind which each read-out stands, and how often of these it was
    generated."""
    b, m, v = logits.shape
    ids = canvas.value[canvas.layout.kinds[0]].to(logits.device)
    status = canvas.status.to(logits.device)
    there = (canvas.known.to(logits.device) & (status != DELETED)).to(logits.dtype)
    known = logits.new_zeros(b, v).scatter_add(1, ids, there)
    made = logits.new_zeros(b, v).scatter_add(1, ids, there * (status != GIVEN))
    known, made = known[:, None].repeat(1, m, 1), made[:, None].repeat(1, m, 1)
    if guess is not None:
        drafted = guess.value.to(logits.device)
        ones = torch.ones(b, 1, dtype=logits.dtype, device=logits.device)
        for node, parent in enumerate(guess.parents()):  # parents come first
            token = drafted[:, node, None]
            live = ones * (token >= 0)
            for count in (known, made):
                count[:, node + 1] = count[:, parent + 1].scatter_add(1, token.clamp(min=0), live)
    return known, made


class Constraint:
    """Only what a matcher of each row allows: a grammar, a schema. `matchers` follow the rows of one canvas.

    A matcher says which tokens may come next (`allowed() -> Bool[v]`), takes tokens in (`take(ids)`), and takes so many
    back (`back(n)`). Where the text is complete it allows what ends a text.
    """

    def __init__(self, matchers: list):
        self.matchers = matchers
        self.taken: list[int] | None = None  # how far the matcher of each row has read

    def __call__(self, logits: Float[Tensor, "b m v"], canvas: Canvas, guess: Guess | None) -> Float[Tensor, "b m v"]:
        if len(self.matchers) != canvas.batch:
            raise ValueError(f"{len(self.matchers)} matchers for {canvas.batch} rows: each row needs its own")
        mask = torch.stack([self._allowed(b, logits.shape[1], canvas, guess) for b in range(canvas.batch)])
        v = logits.shape[-1]
        wide = torch.zeros(*mask.shape[:2], v, dtype=torch.bool)  # ids beyond the tokenizer's are padding
        wide[..., : min(v, mask.shape[-1])] = mask[..., :v]
        return logits.masked_fill(~wide.to(logits.device), -torch.inf)

    def _allowed(self, b: int, m: int, canvas: Canvas, guess: Guess | None) -> Bool[Tensor, "m v"]:
        matcher = self.matchers[b]
        given = int((canvas.status[b] == GIVEN).sum())
        end = canvas.length if canvas.length is not None else int(canvas.lengths()[b])
        if self.taken is None:
            self.taken = [int((canvas.status[r] == GIVEN).sum()) for r in range(canvas.batch)]
        new = canvas.value[canvas.layout.kinds[0]][b, max(self.taken[b], given) : end].tolist()
        matcher.take(new)
        self.taken[b] = end
        out = [matcher.allowed()]
        if guess is None:
            return torch.stack(out * m)
        paths: list[list[int]] = []
        value = guess.value[b].tolist()
        for node, parent in enumerate(guess.parents()):
            path = [*(paths[parent] if parent >= 0 else []), value[node]]
            paths.append(path)
            out.append(_behind(matcher, path, out[0]))
        return torch.stack(out)


def _behind(matcher, path: list[int], start: Bool[Tensor, "v"]) -> Bool[Tensor, "v"]:
    """What is allowed behind a path; everything behind one that is itself not allowed: it is never reached."""
    done = 0
    for token in path:
        if token < 0 or not bool(matcher.allowed()[token]):
            break
        matcher.take([token])
        done += 1
    mask = matcher.allowed() if done == len(path) else torch.ones_like(start)
    matcher.back(done)
    return mask
