"""Distributions of what slots read out, as objects: sample, log_prob, mix, residual.

A `Dist` covers the reads of one forward: batch x reads. Nothing here knows networks; a distribution whose law is a
network's (`FromStates`) holds the hidden states and asks its head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from seriatim.canvas import Canvas
from seriatim.plan import Reads
from seriatim.random import VALUE, Key, Random, numbered


class Dist(Protocol):
    """The distribution of each read-out."""

    def sample(self, random: Random, key: Key) -> Tensor:
        """One value a read-out: (batch, reads) or (batch, reads, d)."""
        ...

    def log_prob(self, x: Tensor) -> Float[Tensor, "b m"]:
        """Log-probability (or density) of values; raises where it is intractable, saying so."""
        ...

    def mix(self, others: Sequence[Dist], weights: Sequence[float | Tensor]) -> Dist:
        """This and others combined as the head defines it: guidance. Weights: ours first; numbers, or (b, 1, 1)."""
        ...

    def take(self, index: Int[Tensor, "b m"]) -> Dist:
        """The distributions of some read-outs only."""
        ...


class Head(Protocol):
    """From hidden states to distributions.

    exact: the loss is the negative log-probability under the head's own law; continuous: values are vectors, not ids;
    value_shape: the shape of one value, () for an id. A head that also says its `width` (that of the hidden states) and
    its `vocab` (how many ids) is compared with what it is joined to.
    """

    exact: bool
    continuous: bool
    value_shape: tuple[int, ...]

    def dist(self, h: Float[Tensor, "b m d"], reads: Reads | None, canvas: Canvas) -> Dist:
        """The distribution of each read-out."""
        ...

    def loss(
        self,
        h: Float[Tensor, "b m d"],
        reads: Reads | None,
        value: Tensor,
        random: Random | None = None,
        key: Key | None = None,
    ) -> Float[Tensor, "b m"]:
        """What training minimises for each read-out; nats where `exact`.

        Only heads whose loss is an expectation over noise draw from `random`, as `key`: they raise without it."""
        ...


class Categorical:
    """Independent choices among V values, from unnormalised log-probabilities; -inf is impossible."""

    __slots__ = ("logits",)

    def __init__(self, logits: Float[Tensor, "b m v"]):
        self.logits = logits

    def sample(self, random: Random, key: Key) -> Int[Tensor, "b m"]:
        return random.categorical(self.logits, key)

    def mode(self) -> Int[Tensor, "b m"]:
        """The likeliest, the first of equals."""
        return largest(self.logits)

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
        """Weighted sum of logits: classifier-free guidance is mix([null], [1 + w, -w]). What is impossible in one is
        impossible in all."""
        total, impossible = self.logits * weights[0], self.logits == -torch.inf
        for other, weight in zip(others, weights[1:], strict=True):
            total = total + other.logits * weight
            impossible = impossible | (other.logits == -torch.inf)
        return Categorical(total.masked_fill(impossible, -torch.inf))

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
        return largest(self.logits)

    def log_probs(self) -> Float[Tensor, "b m v"]:
        best = largest(self.logits)[..., None]
        lp = torch.full_like(self.logits, -torch.inf, dtype=torch.float64)
        return lp.scatter(-1, best, 0.0)


RUN, MANY = 64, 8192  # numbers of which first only the largest is looked at; so many that this pays


def largest(x: Float[Tensor, "*n v"]) -> Int[Tensor, "*n"]:
    """`x.argmax(-1)`, several times as fast where there are many numbers: by the runs that the largest are in."""
    if x.shape[-1] < MANY or x.shape[-1] % RUN or not x.is_cpu:
        return x.argmax(-1)
    x = x if x.dtype == torch.float64 else x.float()  # 16-bit numbers are compared one by one
    runs = x.unflatten(-1, (-1, RUN))
    best = runs.amax(-1).argmax(-1, keepdim=True)
    there = runs.gather(-2, best[..., None].expand(*best.shape, RUN))[..., 0, :]
    return best[..., 0] * RUN + there.argmax(-1)


def drawn(key: Key, index: int) -> Key:
    """The key of the index-th of several draws that make up one value: a code of several, the noise of a step."""
    return key._replace(draw=key.draw + numbered(VALUE, 0, index))


class FromStates:
    """A distribution that a head's own network computes from hidden states, when asked.

    `states` (branches, b, m, d) are hidden states at the slots that are read. What the network says of the branches
    (logits, noise, velocity) is combined with `weights`, ours first, wherever it is asked: guidance. A weight is a
    number, or (b, 1, 1) where rows differ. `warper` changes the law as temperature and filters do; what it can mean is
    each head's business.
    """

    __slots__ = ("head", "states", "warper", "weights")

    def __init__(
        self,
        head: Any,
        states: Float[Tensor, "k b m d"],
        weights: Sequence[float | Tensor] = (1.0,),
        warper: Any = None,
    ):
        if states.shape[0] != len(weights):
            raise ValueError(f"{states.shape[0]} branches need as many weights, got {len(weights)}")
        self.head, self.states, self.weights, self.warper = head, states, tuple(weights), warper

    def combine(self, x: Float[Tensor, "k b *rest"]) -> Float[Tensor, "b *rest"]:
        """What the branches say, weighted; one that is alone is left as it is, bit for bit."""
        if len(self.weights) == 1:
            return x[0]
        total = torch.zeros_like(x[0])
        for branch, weight in zip(x, self.weights, strict=True):
            if isinstance(weight, Tensor):
                weight = weight.reshape(-1, *[1] * (branch.dim() - 1))
            total = total + branch * weight
        return total

    def mix(self, others: Sequence[Self], weights: Sequence[float | Tensor]) -> Self:
        """Branches side by side: classifier-free guidance is mix([null], [1 + w, -w])."""
        if len(weights) != 1 + len(others) or not others:
            raise ValueError(f"{1 + len(others)} distributions need as many weights, and two at least: {len(weights)}")
        parts = (self, *others)
        if any(p.warper is not None for p in parts):
            raise ValueError("mix first, then warp: temperature and filters apply to the guided law")
        states = torch.cat([p.states for p in parts])
        return self._with(states, [v * w for p, w in zip(parts, weights, strict=True) for v in p.weights], None)

    def _with(self, states: Float[Tensor, "k b m d"], weights: Sequence[float | Tensor], warper: Any) -> Self:
        """The same with other states of the same read-outs."""
        return type(self)(self.head, states, weights, warper)

    def take(self, index: Int[Tensor, "b m"]) -> Self:
        """The distributions of some read-outs only."""
        k, b, _, d = self.states.shape
        where = index.clamp(min=0).expand(b, -1)[None, ..., None].expand(k, -1, -1, d)
        return type(self)(self.head, self.states.gather(2, where), self.weights, self.warper)

    def warped(self, warper: Any) -> Self:
        """The same with temperature and filters (a `Warper`)."""
        if self.warper is not None:
            raise ValueError("this distribution is already warped; put all filters into one Warper")
        return self._with(self.states, self.weights, warper)
