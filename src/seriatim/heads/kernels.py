"""Transition kernels of discrete diffusion: how ids turn into noise step by step, and what is known on the way back.

After k of T steps an element is in state x_k. Q_k is the matrix of step k (row: from, column: to) and Q_1 ... Q_k that
of all steps until then. States are the `vocab` values and, where a kernel masks, one more, the mask, which is the last.
What is believed of x_{k-1} before x_k is looked at, be it a row of the matrices (x_0 is known) or a mixture of rows (a
network's law of x_0), becomes a posterior in one way, by Bayes' rule (D3PM, Austin et al. 2021, arXiv 2107.03006,
equations 3 and 4). A kernel is a value, and the twin, for ids, of a `Path` of vectors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

LARGEST = 2**27  # numbers in the matrices of a kernel


class Kernel:
    """A chain of `steps` steps over ids. Subclasses give `step`, and `upto` where it has a closed form; k is from 1 to
    `steps`, and `upto(0)` changes nothing."""

    vocab: int
    steps: int
    masks = False  # is there a mask among the states?

    @property
    def states(self) -> int:
        return self.vocab + self.masks

    def step(self, k: int) -> Float[Tensor, "s s"]:
        """Q_k, in float64."""
        raise NotImplementedError

    def upto(self, k: int) -> Float[Tensor, "s s"]:
        """Q_1 ... Q_k, in float64."""
        return _products(self)[k]

    @property
    def prior(self) -> Float[Tensor, "s"]:
        """What a sample begins with: the law of noise, whatever the value was."""
        return torch.full((self.states,), 1 / self.states, dtype=torch.float64)

    def prior_loss(self) -> Float[Tensor, "v"]:
        """What each value has not forgotten after all steps: KL(q(x_T | x_0) || prior), in nats."""
        last = self.upto(self.steps)[: self.vocab]
        return (torch.xlogy(last, last) - torch.xlogy(last, self.prior)).sum(-1).clamp(min=0)

    # ---- of many elements: k is (batch,) ----------------------------------------------------------------------------

    def rows(
        self, x: Int[Tensor, "b m"], k: Int[Tensor, "b"], dtype: torch.dtype = torch.float64
    ) -> Float[Tensor, "b m s"]:
        """q(x_k | x_0 = x)."""
        return _tables(self, dtype, x.device)[0][k[:, None], x]

    def mixed(self, p: Float[Tensor, "b m v"], k: Int[Tensor, "b"]) -> Float[Tensor, "b m s"]:
        """The law of x_k where p is that of x_0."""
        return p @ _tables(self, p.dtype, p.device)[0][k, : self.vocab]

    def ways(
        self, x: Int[Tensor, "b m"], k: Int[Tensor, "b"], dtype: torch.dtype = torch.float64
    ) -> Float[Tensor, "b m s"]:
        """q(x_k = x | x_{k-1}), by x_{k-1}: a column of Q_k."""
        return _tables(self, dtype, x.device)[1][k[:, None], x]

    def posterior(
        self, x: Int[Tensor, "b m"], before: Float[Tensor, "b m s"], k: Int[Tensor, "b"]
    ) -> Float[Tensor, "b m s"]:
        """The law of x_{k-1} where x_k = x and it would be `before` if x were not known: `rows(x_0, k - 1)` gives
        q(x_{k-1} | x_k, x_0), `mixed(p, k - 1)` what a model says. Where all that can have become x was impossible,
        `before` counts for nothing; where nothing can have, x does."""
        ways = self.ways(x, k, before.dtype)
        law = ways * before
        possible = ways.sum(-1, keepdim=True) > 0
        law = torch.where(law.sum(-1, keepdim=True) > 0, law, torch.where(possible, ways, before))
        return law / law.sum(-1, keepdim=True)


@lru_cache(maxsize=8)
def _products(kernel: Kernel) -> Float[Tensor, "k s s"]:
    """Products of the first k steps, from none to all."""
    _room(kernel)
    out = [torch.eye(kernel.states, dtype=torch.float64)]
    for k in range(1, kernel.steps + 1):
        out.append(out[-1] @ kernel.step(k))
    return torch.stack(out)


@lru_cache(maxsize=8)
def _tables(
    kernel: Kernel, dtype: torch.dtype, device: torch.device
) -> tuple[Float[Tensor, "k s s"], Float[Tensor, "k s s"]]:
    """Products of steps by the state they begin with; single steps by the state they end in (none at k = 0)."""
    _room(kernel)
    ks = range(1, kernel.steps + 1)
    upto = torch.stack([kernel.upto(k) for k in range(kernel.steps + 1)])
    steps = torch.stack([torch.zeros_like(upto[0]), *(kernel.step(k).T for k in ks)])
    return upto.to(device, dtype), steps.to(device, dtype)


def _room(kernel: Kernel) -> None:
    if (kernel.steps + 1) * kernel.states**2 > LARGEST:
        raise ValueError(
            f"{type(kernel).__name__} holds a matrix for each of {kernel.steps} steps, too large for {kernel.vocab} "
            "ids: take fewer steps or ids, or absorbing, uniform or mixed noise, which need none"
        )


def _check(kernel: Kernel) -> None:
    if kernel.vocab < 2 or kernel.steps < 1:
        raise ValueError(
            f"a kernel turns at least 2 values into noise in at least 1 step, got {kernel.vocab} and {kernel.steps}"
        )


@dataclass(frozen=True)
class Mixture(Kernel):
    """Masks and random values: after k of T steps a value has met no noise with chance 1 - k/T.

    uniform: which share of the noise, by its rate, are random values; the rest are masks, which stay. 0 is absorbing
    diffusion, Q = a I + (1 - a) 1 e_mask; 1 is uniform diffusion, Q = (1 - b) I + b 1 1^T / V, and there is no mask.
    Closed forms in all: no matrix is ever multiplied.
    """

    vocab: int
    steps: int
    uniform: float = 0.0

    def __post_init__(self) -> None:
        _check(self)
        if not 0 <= self.uniform <= 1:
            raise ValueError(f"uniform is a share of the noise from 0 to 1, got {self.uniform}")

    @property
    def masks(self) -> bool:  # type: ignore[override]
        return self.uniform < 1

    def _kept(self, k: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """Chances to meet no mask, and no random value, in the steps behind `last` up to k."""
        clean = ((self.steps - k).double() / (self.steps - last).clamp(min=1)).clamp(max=1)
        return clean ** (1 - self.uniform), clean**self.uniform

    def _matrix(self, k: int, last: int) -> Float[Tensor, "s s"]:
        _inside(self, k)
        seen, same = (float(x) for x in self._kept(torch.tensor(k), torch.tensor(last)))
        values = same * torch.eye(self.vocab, dtype=torch.float64) + (1 - same) / self.vocab
        out = torch.zeros(self.states, self.states, dtype=torch.float64)
        out[: self.vocab, : self.vocab] = seen * values
        if self.masks:
            out[: self.vocab, -1], out[-1, -1] = 1 - seen, 1.0
        return out

    def step(self, k: int) -> Float[Tensor, "s s"]:
        return self._matrix(k, k - 1)

    def upto(self, k: int) -> Float[Tensor, "s s"]:
        return self._matrix(k, 0)

    @property
    def prior(self) -> Float[Tensor, "s"]:
        return self.upto(self.steps)[0]

    def rows(
        self, x: Int[Tensor, "b m"], k: Int[Tensor, "b"], dtype: torch.dtype = torch.float64
    ) -> Float[Tensor, "b m s"]:
        return self.mixed(F.one_hot(x, self.vocab).to(dtype), k)

    def mixed(self, p: Float[Tensor, "b m v"], k: Int[Tensor, "b"]) -> Float[Tensor, "b m s"]:
        seen, same = (c.to(p)[:, None, None] for c in self._kept(k, torch.zeros_like(k)))
        out = seen * (same * p + (1 - same) / self.vocab)
        return torch.cat([out, (1 - seen).expand(*p.shape[:2], 1)], -1) if self.masks else out

    def ways(
        self, x: Int[Tensor, "b m"], k: Int[Tensor, "b"], dtype: torch.dtype = torch.float64
    ) -> Float[Tensor, "b m s"]:
        seen, same = (c.to(x.device, dtype)[:, None, None] for c in self._kept(k, k - 1))
        masked = (x == self.vocab)[..., None] if self.masks else torch.zeros_like(x, dtype=torch.bool)[..., None]
        values = F.one_hot(x.clamp(max=self.vocab - 1), self.vocab).to(dtype)
        out = torch.where(masked, 1 - seen, seen * (same * values + (1 - same) / self.vocab))
        return torch.cat([out, masked.to(dtype)], -1) if self.masks else out


def absorbing(vocab: int, steps: int) -> Mixture:
    """Masks only."""
    return Mixture(vocab, steps, 0.0)


def uniform(vocab: int, steps: int) -> Mixture:
    """Random values only."""
    return Mixture(vocab, steps, 1.0)


@dataclass(frozen=True)
class Gaussian(Kernel):
    """Values move to near ones: ids are levels in order (D3PM, appendix A.2.3). A step from i to j has probability
    exp(-(i - j)^2 / w) over the sum of this for all distances; what is left stays. Uniform in the end; products of
    steps have no closed form.

    w follows from the variance of a step, so that small steps are no smaller than they should be between whole numbers.
    Variances add up to `noise` times V^2, and grow exponentially (there: linearly), from less than a level to all of
    them, so that what is known is lost evenly.
    """

    vocab: int
    steps: int
    noise: float = 1.5

    def __post_init__(self) -> None:
        _check(self)
        if not self.noise > 0:
            raise ValueError(f"the noise of all steps together is positive, got {self.noise}")

    def step(self, k: int) -> Float[Tensor, "s s"]:
        _inside(self, k)
        now, last = (_grown(n / self.steps, (2 * self.vocab) ** 2) for n in (k, k - 1))
        chance = _spread(self.vocab, self.noise * self.vocab**2 * (now - last))
        level = torch.arange(self.vocab)
        out = chance[(level[:, None] - level) + self.vocab - 1].fill_diagonal_(0)
        return out + torch.diag(1 - out.sum(1))


def _grown(share: float, growth: float) -> float:
    """From 0 to 1, the faster the later, `growth` times as fast in the end."""
    return (growth**share - 1) / (growth - 1)


def _spread(vocab: int, variance: float) -> Float[Tensor, "2v-1"]:
    """Chances of all distances below `vocab`, of a discretised Gaussian of this variance, or of all alike where it is
    larger than theirs: its width by bisection."""
    far = torch.arange(1 - vocab, vocab, dtype=torch.float64)
    low, high = -12.0, 30.0  # logarithms of the width
    for _ in range(60):
        middle = (low + high) / 2
        chance = torch.softmax(-(far**2) / math.exp(middle), 0)
        low, high = (middle, high) if float((chance * far**2).sum()) < variance else (low, middle)
    return chance


@dataclass(frozen=True)
class Nearest(Kernel):
    """Values move to those that are alike: jumps along a graph of neighbours in continuous time (D3PM, appendix A.2.4),
    a share `anywhere` of them to any value, so that all are reached.

    near: neighbours of each value, equally many. A jump is as likely back as forth: uniform in the end. Time goes by
    the faster the later, first within neighbourhoods and then between them, until e^-`noise` is left of what is slowest
    to go. Exponentials of one symmetric matrix, so all products have a closed form.
    """

    vocab: int
    steps: int
    near: tuple[tuple[int, ...], ...]
    anywhere: float = 0.05
    noise: float = 6.0

    def __post_init__(self) -> None:
        _check(self)
        if len(self.near) != self.vocab or len({len(n) for n in self.near}) != 1 or not self.near[0]:
            raise ValueError(f"each of {self.vocab} values has equally many neighbours, and one at least")
        if not 0 < self.anywhere <= 1 or not self.noise > 0:
            raise ValueError(
                f"a share of the jumps above 0 and up to 1 goes anywhere, and noise is positive; got {self.anywhere}, "
                f"{self.noise}"
            )

    @classmethod
    def of(cls, embedding: Float[Tensor, "v d"], steps: int, near: int = 3, anywhere: float = 0.05) -> Nearest:
        """Neighbours are the nearest vectors, the first of equals."""
        vocab = len(embedding)
        if not 1 <= near < vocab:
            raise ValueError(f"a value has 1 to {vocab - 1} neighbours, got {near}")
        x = embedding.double()
        distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(math.inf)
        nearest = distance.sort(dim=1, stable=True).indices[:, :near]
        return cls(vocab, steps, tuple(map(tuple, nearest.tolist())), anywhere)

    def _between(self, k: int, last: int) -> Float[Tensor, "s s"]:
        _inside(self, k)
        if k == last:
            return torch.eye(self.vocab, dtype=torch.float64)
        vectors, speed = _modes(self)
        now, then = (_grown(n / self.steps, 40 * float(speed.max())) for n in (k, last))
        out = ((vectors * torch.exp(-speed * self.noise * (now - then))) @ vectors.T).clamp(min=0)
        return out / out.sum(1, keepdim=True)

    def step(self, k: int) -> Float[Tensor, "s s"]:
        return self._between(k, k - 1)

    def upto(self, k: int) -> Float[Tensor, "s s"]:
        return self._between(k, 0)


@lru_cache(maxsize=8)
def _modes(kernel: Nearest) -> tuple[Float[Tensor, "v v"], Float[Tensor, "v"]]:
    """Eigenvectors of the rates of jumps, and how fast each fades, in units of the slowest; the last never does."""
    v = kernel.vocab
    graph = torch.zeros(v, v, dtype=torch.float64)
    graph.scatter_(1, torch.tensor(kernel.near), 1.0)
    graph = (graph + graph.T) / (2 * len(kernel.near[0]))
    rates = (1 - kernel.anywhere) * graph + kernel.anywhere / v
    rates = rates - torch.diag(rates.sum(1))
    values, vectors = torch.linalg.eigh(rates)
    speed = (-values).clamp(min=0)
    speed[-1] = 0
    return vectors, speed / speed[-2]


def _inside(kernel: Kernel, k: int) -> None:
    if not 0 <= k <= kernel.steps:
        raise ValueError(f"a step from 1 to {kernel.steps} was meant, got {k}")


KERNELS = ("absorbing", "uniform", "mixed", "gaussian", "nearest")


def kernel_of(
    name: str,
    vocab: int,
    steps: int,
    embedding: Float[Tensor, "v d"] | None = None,
    share: float = 0.1,
    near: int = 3,
) -> Kernel:
    """By name; share: of random values in "mixed" noise; near: neighbours of each value by an embedding (None: of
    levels in order) in "nearest". Raises ValueError for what is none."""
    if name not in KERNELS:
        raise ValueError(f"noise is {', '.join(KERNELS)}, not {name!r}")
    if name == "gaussian":
        return Gaussian(vocab, steps)
    if name == "nearest":
        return Nearest.of(torch.arange(vocab)[:, None] if embedding is None else embedding, steps, near)
    return Mixture(vocab, steps, {"absorbing": 0.0, "uniform": 1.0, "mixed": share}[name])


def in_turns(kernel: Kernel, steps: int | None) -> Kernel:
    """The same noise in another number of steps (None: the kernel's own)."""
    return kernel if steps is None else replace(kernel, steps=steps)  # type: ignore[type-var]


def spelled(texts: Sequence[str | None]) -> Float[Tensor, "v d"]:
    """An embedding of ids by what they are: the kinds of their letters, and which letters, whether small or large.
    None: an id that stands for no text; these are alike."""
    import unicodedata

    features: list[dict[str, float]] = []
    for text in texts:
        found = {"none": 4.0} if text is None else {"length": float(len(text))}
        for letter in text or "":
            kind = unicodedata.category(letter)
            vowel = "vowel" if letter.lower() in "aeiou" else "other"
            for name, weight in ((kind[0], 2.0), (kind, 0.5), (kind[0] + vowel, 0.5), (letter.lower(), 1.0)):
                found[name] = found.get(name, 0.0) + weight / len(text or "")
        features.append(found)
    names = {name: i for i, name in enumerate(sorted({name for f in features for name in f}))}
    out = torch.zeros(len(features), len(names), dtype=torch.float64)
    for row, found in enumerate(features):
        for name, weight in found.items():
            out[row, names[name]] = weight
    return out
