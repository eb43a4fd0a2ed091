"""Continuous values denoised where they stand: the backbone itself is the denoiser.

Noise stands in a slot of the sequence (`Canvas.noise`, at `Canvas.level`), the backbone contextualises it, and a linear
map reads out which noise, velocity or clean value it saw. HybridVLA (arXiv 2503.10631) denoises an action so inside a
language model; diffusion forcing and its kin do it frame by frame. Heads that denoise on their own, outside of the
backbone, are in `diffusion` and `flow`.

A path says how much of a value and how much noise there is at a level from 0 (clean) to 1 (noise):
x = alpha value + sigma noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from seriatim.canvas import GIVEN, Canvas, Revise
from seriatim.heads.denoiser import precise
from seriatim.heads.diffusion import process
from seriatim.plan import Reads
from seriatim.random import Key, Random

Predicts = Literal["noise", "velocity", "value"]


class Path(Protocol):
    """From a value to noise."""

    def at(self, level: Float[Tensor, "*rest"]) -> tuple[Float[Tensor, "*rest"], Float[Tensor, "*rest"]]:
        """(alpha, sigma) at levels from 0 to 1."""
        ...

    def levels(self, steps: int) -> Float[Tensor, "n"]:
        """The levels that a solver of so many steps visits: from 1 down to 0, one more than steps."""
        ...


@dataclass(frozen=True)
class Straight:
    """alpha = 1 - level, sigma = level: rectified flow (Liu et al. 2022, arXiv 2209.03003)."""

    straight: ClassVar[bool] = True

    def at(self, level: Float[Tensor, "*rest"]) -> tuple[Float[Tensor, "*rest"], Float[Tensor, "*rest"]]:
        return 1 - level, level

    def levels(self, steps: int) -> Float[Tensor, "n"]:
        return torch.linspace(1, 0, steps + 1)


@dataclass(frozen=True)
class Cosine:
    """The cosine schedule of a diffusion of `train_steps` steps (Nichol & Dhariwal 2021, equation 17)."""

    train_steps: int = 1000

    def at(self, level: Float[Tensor, "*rest"]) -> tuple[Float[Tensor, "*rest"], Float[Tensor, "*rest"]]:
        signal = torch.cat([torch.ones(1, dtype=torch.float64), process(self.train_steps, self.train_steps).signal])
        here = signal.to(level)[(level * self.train_steps).round().long()]
        return here.sqrt(), (1 - here).sqrt()

    def levels(self, steps: int) -> Float[Tensor, "n"]:
        time = process(self.train_steps, steps).time.flip(0)
        return torch.cat([(time + 1) / self.train_steps, torch.zeros(1)])


@dataclass(frozen=True)
class Linear:
    """The schedule of DDPM (Ho et al. 2020, arXiv 2006.11239, section 4): each of `train_steps` steps adds a variance,
    from `first` to `last` in equal strides."""

    train_steps: int = 1000
    first: float = 1e-4
    last: float = 0.02

    def at(self, level: Float[Tensor, "*rest"]) -> tuple[Float[Tensor, "*rest"], Float[Tensor, "*rest"]]:
        beta = torch.linspace(self.first, self.last, self.train_steps, dtype=torch.float64)
        signal = torch.cat([torch.ones(1, dtype=torch.float64), (1 - beta).cumprod(0)])
        here = signal.to(level)[(level * self.train_steps).round().long()]
        return here.sqrt(), (1 - here).sqrt()

    def levels(self, steps: int) -> Float[Tensor, "n"]:
        return (torch.linspace(self.train_steps, 0, steps + 1).round()) / self.train_steps


class Denoised:
    """What the backbone says of noisy values `x` at their levels: no distribution of its own, but a direction.

    `towards` is one step of a deterministic solver: DDIM (Song et al. 2021, arXiv 2010.02502, equation 12 with eta 0),
    which on the straight path is Euler's method. Sampling from it at once is such a step to the clean value.
    """

    __slots__ = ("guided", "level", "path", "predicts", "said", "x")

    def __init__(
        self,
        said: Float[Tensor, "b m d"],
        x: Float[Tensor, "b m d"],
        level: Float[Tensor, "b m"],
        path: Path,
        predicts: Predicts,
        guided: Bool[Tensor, "d"] | None = None,
    ):
        self.said, self.x, self.level, self.path, self.predicts = said, x, level, path, predicts
        self.guided = guided

    def parts(self) -> tuple[Float[Tensor, "b m d"], Float[Tensor, "b m d"]]:
        """The value and the noise that `x` is taken to be made of."""
        alpha, sigma = (k[..., None] for k in self.path.at(self.level))
        if self.predicts == "noise":
            return (self.x - sigma * self.said) / alpha, self.said
        if self.predicts == "velocity":  # value - noise
            noise = (self.x - alpha * self.said) / (alpha + sigma)
            return noise + self.said, noise
        return self.said, _divided(self.x - alpha * self.said, sigma)

    def towards(self, level: Float[Tensor, "b m"]) -> Float[Tensor, "b m d"]:
        """The same value and noise at a lower level."""
        value, noise = self.parts()
        alpha, sigma = (k[..., None] for k in self.path.at(level.to(self.x)))
        return alpha * value + sigma * noise

    def sample(self, random: Random, key: Key) -> Float[Tensor, "b m d"]:
        return self.towards(torch.zeros_like(self.level))

    def loss(self, value: Float[Tensor, "b m d"]) -> Float[Tensor, "b m"]:
        """Squared error of what is predicted, mean over numbers, if `x` was made from these values."""
        value = value.to(self.x)
        alpha, sigma = (k[..., None] for k in self.path.at(self.level))
        noise = _divided(self.x - alpha * value, sigma)
        wanted = {"noise": noise, "velocity": value - noise, "value": value}[self.predicts]
        return (self.said - wanted).square().mean(-1)

    def log_prob(self, x: Tensor) -> Tensor:
        raise TypeError("a value that is denoised in place has no log_prob: only the path of a whole solver has one")

    def mix(self, others: Sequence[Denoised], weights: Sequence[float]) -> Denoised:
        """What the branches say, weighted: guidance, of those numbers of a vector that are guided."""
        said = self.said * weights[0]
        for other, weight in zip(others, weights[1:], strict=True):
            said = said + other.said * weight
        if self.guided is not None:
            said = torch.where(self.guided.to(said.device), said, self.said)
        return Denoised(said, self.x, self.level, self.path, self.predicts, self.guided)

    def take(self, index: Tensor) -> Denoised:
        where = index.clamp(min=0).expand(self.x.shape[0], -1)
        wide = where[..., None].expand(-1, -1, self.x.shape[-1])
        level = self.level.gather(1, where)
        return Denoised(self.said.gather(1, wide), self.x.gather(1, wide), level, self.path, self.predicts, self.guided)

    def warped(self, warper: object) -> Denoised:
        raise TypeError("temperature and filters have no meaning for a value denoised in place; scale its first noise")


class InPlaceHead(nn.Module):
    """Vectors of `dim` numbers from the hidden states of the slots where their noise stands.

    `predicts`: "noise", "velocity" (value - noise) or the "value". guided: the numbers of a vector that guidance is of
    (None: all); samplers of DiT guide three of four channels. Training: put noise on the canvas with `noised`;
    the loss of `Model.losses` then compares with that noise.
    """

    exact = False
    continuous = True
    in_place = True  # its loss asks the canvas how noisy each value was

    def __init__(
        self, width: int, dim: int, path: Path | None = None, predicts: Predicts = "noise",
        guided: Bool[Tensor, "d"] | None = None,
    ):  # fmt: skip
        super().__init__()
        self.guided = guided
        if predicts not in ("noise", "velocity", "value"):
            raise ValueError(f"a head in place predicts noise, velocity or value, not {predicts!r}")
        self.path, self.predicts = path or Cosine(), predicts
        if predicts == "noise" and not float(self.path.at(torch.ones(1))[0]):
            raise ValueError(
                f"{type(self.path).__name__} ends in noise alone, from which predicted noise tells no value; predict "
                "velocity or value, or take a path such as Cosine"
            )
        self.out = nn.Linear(width, dim)
        self.width, self.value_shape = width, (dim,)

    def dist(self, h: Float[Tensor, "b m w"], reads: Reads, canvas: Canvas) -> Denoised:
        element = reads.element.clamp(min=0).expand(canvas.batch, -1)
        kind = canvas.layout.kinds[int(canvas.layout.kind[reads.element.max()])]
        if kind not in canvas.noise or canvas.level is None:
            raise ValueError(
                f"no noise stands in the elements of kind {kind!r}: begin with `pure_noise` when decoding, with "
                "`noised` in training"
            )
        said = self.out(h)
        index = canvas.layout.index[element].to(h.device)
        x = canvas.noise[kind].to(h.device)[torch.arange(canvas.batch, device=h.device)[:, None], index]
        level = canvas.level.to(h.device).gather(1, element.to(h.device))
        exact = precise(said)
        return Denoised(said.to(exact), x.to(exact), level.to(exact), self.path, self.predicts, self.guided)


def noised(canvas: Canvas, kind: str, level: Float[Tensor, "b n"], path: Path, random: Random) -> Canvas:
    """Put noise in place of all elements of a kind that are not given: x = alpha value + sigma noise, with draw 0 of
    each element.

    `level` is that of each element. The values stay: they are what is to be found again."""
    element = canvas.layout.elements(kind).expand(canvas.batch, -1)
    value = canvas.value[kind]
    noise = random.normal(value.shape, Key(canvas.row, element), value.device).to(value)
    alpha, sigma = (k[..., None] for k in path.at(level.to(value)))
    element = element.masked_fill(canvas.status.gather(1, element) == GIVEN, -1)
    return canvas.apply([Revise(element, alpha * value + sigma * noise, level.float())])


def pure_noise(canvas: Canvas, kind: str, random: Random) -> Canvas:
    """Begin to denoise: noise alone in all elements of a kind that are not decided, draw 0 of each."""
    element = canvas.layout.elements(kind).expand(canvas.batch, -1)
    value = canvas.value[kind]
    noise = random.normal(value.shape, Key(canvas.row, element), value.device).to(value)
    open_ = ~canvas.known.gather(1, element)
    return canvas.apply([Revise(torch.where(open_, element, -1), noise, torch.ones(1, 1))])


def _divided(x: Tensor, sigma: Tensor) -> Tensor:
    """x / sigma; 0 where there is no noise."""
    return torch.where(sigma > 0, x / sigma.clamp(min=1e-12), 0.0)
