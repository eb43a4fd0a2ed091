"""Distributions of what slots read out, as objects: sample, log_prob, mix, residual.

A `Dist` covers the reads of one forward: batch x reads. Nothing here knows networks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from seriatim.random import Key, Random


class Dist(Protocol):
    """The distribution of each read-out."""

    def sample(self, random: Random, key: Key) -> Tensor:
        """One value a read-out: (batch, reads) or (batch, reads, d)."""
        ...

    def log_prob(self, x: Tensor) -> Float[Tensor, "b m"]:
        """Log-probability (or density) of values; raises where it is intractable, saying so."""
        ...

    def mix(self, others: Sequence[Dist], weights: Sequence[float]) -> Dist:
        """This and others combined as the head defines it: guidance. Weights: ours first."""
        ...

    def take(self, index: Int[Tensor, "b m"]) -> Dist:
        """The distributions of some read-outs only."""
        ...


class Categorical:
    """Independent choices among V values, from unnormalised log-probabilities; -inf is impossible."""

    __slots__ = ("logits",)

    def __init__(self, logits: Float[Tensor, "b m v"]):
        self.logits = logits

    def sample(self, random: Random, key: Key) -> Int[Tensor, "b m"]:
        return random.categorical(self.logits, key)

    def mode(self) -> Int[Tensor, "b m"]:
        return self.logits.argmax(-1)

    def log_probs(self) -> Float[Tensor, "b m v"]:
        """Normalised log-probabilities, float32 or better."""
        x = self.logits
        return torch.log_softmax(x if x.dtype == torch.float64 else x.float(), -1)

    def probs(self) -> Float[Tensor, "b m v"]:
        return self.log_probs().exp()

    def log_prob(self, x: Int[Tensor, "b m"]) -> Float[Tensor, "b m"]:
        return self.log_probs().gather(-1, x[..., None])[..., 0]

    def entropy(self) -> Float[Tensor, "b m"]:
        """In nats."""
        lp = self.log_probs()
        return -(lp.exp() * lp.masked_fill(lp == -torch.inf, 0.0)).sum(-1)

    def mix(self, others: Sequence[Categorical], weights: Sequence[float | Tensor]) -> Categorical:
        """Weighted sum of logits: classifier-free guidance is mix([null], [1 + w, -w])."""
        total = self.logits * weights[0]
        for other, weight in zip(others, weights[1:], strict=True):
            total = total + other.logits * weight
        return Categorical(total)

    def residual(self, q: Categorical) -> Categorical:
        """norm(max(p - q, 0)), what is left of p where a draft from q was rejected (Leviathan et al. 2023, eq. 2)."""
        rest = (self.probs() - q.probs()).clamp(min=0)
        empty = rest.sum(-1, keepdim=True) <= 0
        return Categorical(torch.where(empty, self.log_probs(), rest.log()))

    def take(self, index: Int[Tensor, "b m"]) -> Categorical:
        where = index.clamp(min=0)[..., None].expand(self.logits.shape[0], -1, self.logits.shape[-1])
        return type(self)(self.logits.gather(1, where))


class Greedy(Categorical):
    """The limit of temperature 0: all mass on the largest logit (the first of equals)."""

    __slots__ = ()

    def sample(self, random: Random, key: Key) -> Int[Tensor, "b m"]:
        return self.logits.argmax(-1)

    def log_probs(self) -> Float[Tensor, "b m v"]:
        best = self.logits.argmax(-1, keepdim=True)
        lp = torch.full_like(self.logits, -torch.inf, dtype=torch.float64)
        return lp.scatter(-1, best, 0.0)
