"""The only source of randomness, with four backends.

`Generator` draws as usual. `Keyed` draws noise keyed by (seed, row, element, draw), so that decoders that visit
elements in different company or order meet the same noise. `Enumerator` walks every outcome with its weight: exact
laws. `Forced` returns a given sample and adds up its log-probability. A draw is named by a `Key`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple, Protocol, TypeVar, overload

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

T = TypeVar("T")


class Key(NamedTuple):
    """What is drawn: rows (batch,), elements (batch or 1, n; -1: nothing is drawn) or the first of a run, and which
    draw of that element: one number, or one for each (batch or 1, n). Draw 0 is the value itself in plain sampling; the
    numbers of all others come from `numbered`, so that no noise is used twice."""

    row: Int[Tensor, "b"]
    element: Int[Tensor, "b n"] | int
    draw: int | Int[Tensor, "b n"] = 0


VALUE, COIN, DRAFT, ORDER = 0, 1, 2, 3  # what a draw is for


@overload
def numbered(purpose: int, turn: int = 0, index: int = 0) -> int: ...
@overload
def numbered(purpose: int, turn: Tensor, index: int = 0) -> Tensor: ...
def numbered(purpose: int, turn: int | Tensor = 0, index: int = 0) -> int | Tensor:
    """The number of a draw of an element: what for, in which turn of the decoder at this element (how far a draft is
    ahead of what is known, the step of a masked decoder), and which of several (up to 4096) in that turn."""
    return purpose + 4 * (index + 4096 * turn)


class Random(Protocol):
    """The only randomness."""

    def categorical(self, logits: Float[Tensor, "b n v"], key: Key) -> Int[Tensor, "b n"]:
        """One index for each row of logits (unnormalised log-probabilities; -inf is impossible)."""
        ...

    def heads(self, probability: Float[Tensor, "b n"], key: Key) -> Int[Tensor, "b"]:
        """How many coins of each row show heads before the first that shows tails; what follows is not looked at.

        Every accept-or-reject goes through here: unlike a uniform number, it can be enumerated."""
        ...

    def uniform(self, shape: Sequence[int], key: Key, device: torch.device | str = "cpu") -> Tensor:
        """Uniform in [0, 1), float32; the first two sizes are batch and elements."""
        ...

    def normal(self, shape: Sequence[int], key: Key, device: torch.device | str = "cpu") -> Tensor:
        """Standard normal, float32; the first two sizes are batch and elements."""
        ...


class Generator:
    """Ordinary pseudo-random numbers from one seed."""

    def __init__(self, seed: int = 0, device: torch.device | str = "cpu"):
        self.generator = torch.Generator(device=device).manual_seed(seed)

    def categorical(self, logits: Tensor, key: Key) -> Tensor:
        shape, device = logits.shape[:-1], self.generator.device
        u = torch.rand(shape, generator=self.generator, device=device, dtype=torch.float64)
        return _inverse(torch.softmax(logits.float(), -1), u.to(logits.device))

    def heads(self, probability: Tensor, key: Key) -> Tensor:
        u = torch.rand(probability.shape, generator=self.generator, device=self.generator.device, dtype=torch.float64)
        return _leading(u.to(probability.device) < probability)

    def uniform(self, shape: Sequence[int], key: Key, device: torch.device | str = "cpu") -> Tensor:
        return torch.rand(*shape, generator=self.generator, device=self.generator.device).to(device)

    def normal(self, shape: Sequence[int], key: Key, device: torch.device | str = "cpu") -> Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.generator.device).to(device)


class Keyed:
    """Noise that depends on (seed, row, element, draw) only: one keyed uniform and the inverse distribution function.

    Two decoders that sample the same law therefore emit the same string, in any order and company.
    """

    def __init__(self, seed: int = 0):
        self.seed = mix(torch.tensor([seed & (2**62 - 1)]))

    def begin(self, key: Key) -> Int[Tensor, "b 1"]:
        """What all noise of a row begins with."""
        return mix(self.seed + key.row.cpu()[:, None] * 0x632BE59BD9B4E019)

    def _unit(self, shape: Sequence[int], key: Key, device: torch.device | str) -> Tensor:
        batch, n = shape[0], shape[1]
        element = torch.arange(key.element, key.element + n)[None] if isinstance(key.element, int) else key.element
        h = self.begin(key)
        draw = torch.as_tensor(key.draw)
        h = mix(h + element.cpu() * 0x1E3779B97F4A7C15 + draw * 0x3C6EF372FE94F82B).expand(batch, n)
        extra = 1
        for size in shape[2:]:
            extra *= size
        h = mix(h[..., None] + torch.arange(extra) * 0x2545F4914F6CDD1D)
        unit = ((h >> 11) & ((1 << 52) - 1)).double() / float(1 << 52)
        return unit.reshape(*shape).to(device)

    def categorical(self, logits: Tensor, key: Key) -> Tensor:
        return _inverse(torch.softmax(logits.double(), -1), self._unit(logits.shape[:-1], key, logits.device))

    def heads(self, probability: Tensor, key: Key) -> Tensor:
        return _leading(self._unit(probability.shape, key, probability.device) < probability)

    def uniform(self, shape: Sequence[int], key: Key, device: torch.device | str = "cpu") -> Tensor:
        return self._unit(shape, key, device).float().clamp(max=1 - 2**-24)

    def normal(self, shape: Sequence[int], key: Key, device: torch.device | str = "cpu") -> Tensor:
        u = self._unit(shape, key, device).clamp(min=2**-52)
        return (torch.erfinv(2 * u - 1) * 2**0.5).clamp(-8, 8).float()


def mix(x: Tensor) -> Tensor:
    """A 64-bit step and finaliser (SplitMix64, Steele et al. 2014), in wrapping int64 arithmetic."""
    x = x - 7046029254386353131  # the golden ratio; without it zero would stay zero
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * -4658895280553007687
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * -7723592293110705685
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def _inverse(p: Float[Tensor, "*n v"], unit: Float[Tensor, "*n"]) -> Int[Tensor, "*n"]:
    """The inverse of the distribution function, in float64; never an index of probability 0."""
    total = p.cumsum(-1, dtype=torch.float64)
    whole = total[..., -1]
    at = torch.minimum(unit * whole, whole * (1 - 2**-52))
    return torch.searchsorted(total, at[..., None], right=True)[..., 0].clamp(max=p.shape[-1] - 1)


def _leading(heads: Bool[Tensor, "b n"]) -> Int[Tensor, "b"]:
    return heads.long().cumprod(1).sum(1)


class Enumerator:
    """Replays one path of choices; `enumerate_law` drives it through all of them.

    Draws of several elements are enumerated one by one. Coins are tossed one by one too, and none after the first tail.
    A uniform or normal number has no finite set of outcomes and is refused.
    """

    def __init__(self, path: Sequence[int] = ()):
        self.path = list(path)
        self.weight = 1.0
        self.branch: list[tuple[int, int]] = []  # (choice taken, number of choices that are possible)

    def _choose(self, p: Sequence[float]) -> int:
        options = [i for i, x in enumerate(p) if x > 0]
        if not options:
            raise ValueError("a distribution without any possible outcome was drawn from")
        depth = len(self.branch)
        i = self.path[depth] if depth < len(self.path) else 0
        self.branch.append((i, len(options)))
        self.weight *= p[options[i]]
        return options[i]

    def categorical(self, logits: Tensor, key: Key) -> Tensor:
        shape = logits.shape[:-1]
        p = torch.softmax(logits.double(), -1).reshape(-1, logits.shape[-1]).tolist()
        if isinstance(key.element, int):
            return torch.tensor([self._choose(row) for row in p]).reshape(shape)
        live = (key.element >= 0).expand(shape).reshape(-1).tolist()
        return torch.tensor([self._choose(r) if a else 0 for r, a in zip(p, live, strict=True)]).reshape(shape)

    def heads(self, probability: Tensor, key: Key) -> Tensor:
        counts = []
        for row in probability.double().clamp(0, 1).tolist():
            count = 0
            while count < len(row) and self._choose((1 - row[count], row[count])):
                count += 1
            counts.append(count)
        return torch.tensor(counts)

    def uniform(self, shape: Sequence[int], key: Key, device: torch.device | str = "cpu") -> Tensor:
        raise TypeError("a uniform number cannot be enumerated; toss coins by `heads`, or draw by `categorical`")

    def normal(self, shape: Sequence[int], key: Key, device: torch.device | str = "cpu") -> Tensor:
        raise TypeError("a normal number cannot be enumerated")


def enumerate_law(run: Callable[[Random], T]) -> dict[Hashable, float]:
    """The exact law of what `run` returns (made hashable by `tuple` where it is a list), over every outcome of its
    draws: depth first, probabilities in float64."""
    parts: dict[Hashable, list[float]] = {}
    path: list[int] = []
    while True:
        random = Enumerator(path)
        result = run(random)
        outcome = tuple(result) if isinstance(result, list) else result
        parts.setdefault(outcome, []).append(random.weight)  # type: ignore[arg-type]
        branch = random.branch
        while branch and branch[-1][0] + 1 >= branch[-1][1]:
            branch.pop()
        if not branch:
            return {outcome: math.fsum(weights) for outcome, weights in parts.items()}
        path = [c for c, _ in branch[:-1]] + [branch[-1][0] + 1]


class Forced:
    """Returns given values and adds up their log-probability per row: scores a sample under a decoder's own steps.

    `value` is (batch, elements) of ids; `log_prob` (batch,) in float64. Where a decoder draws an order, which is no
    value, it gets the first that is possible, and nothing is added.
    """

    def __init__(self, value: Int[Tensor, "b E"]):
        self.value = value
        self.log_prob = torch.zeros(value.shape[0], dtype=torch.float64)
        self.met: dict[int, Tensor] = {}

    def categorical(self, logits: Tensor, key: Key) -> Tensor:
        if int(torch.as_tensor(key.draw).flatten()[0]) % 4 == ORDER:
            return (logits > -torch.inf).int().argmax(-1)
        n = logits.shape[-2]
        element = key.element
        if isinstance(element, int):
            element = torch.arange(element, element + n)[None]
        element = element.expand(logits.shape[0], n)
        x = self.value.gather(1, element.clamp(min=0))
        lp = torch.log_softmax(logits.double(), -1)
        picked = lp.gather(-1, x[..., None])[..., 0].masked_fill(element < 0, 0.0)
        self.log_prob += picked.sum(1)
        for j in range(n):
            if bool((element[:, j] == element[0, j]).all()):
                self.met[int(element[0, j])] = lp[:, j]
        return x

    def heads(self, probability: Tensor, key: Key) -> Tensor:
        raise TypeError("coins cannot be forced to a sample: score it by plain decoding, or drafts by a walk")

    def uniform(self, shape: Sequence[int], key: Key, device: torch.device | str = "cpu") -> Tensor:
        raise TypeError("a uniform number cannot be forced to a sample")

    def normal(self, shape: Sequence[int], key: Key, device: torch.device | str = "cpu") -> Tensor:
        raise TypeError("a normal number cannot be forced to a sample")
