"""Noise schedules of absorbing diffusion: which share of the elements is hidden at a time from 0 to 1.

Training draws a time, hides by the schedule and weighs the loss by -alpha'/(1 - alpha), alpha the share that is shown;
the bound is the same under all of them (MDLM, Sahoo et al. 2024, arXiv 2406.07524; Shi et al. 2024, arXiv 2406.04329),
only what is met often, and so the variance, differs. Decoding in T steps leaves `hidden(1 - k/T)` unknown after step k.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor


class Noise(Protocol):
    """A schedule: a value."""

    def hidden(self, t: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """1 - alpha(t), the share that is hidden: from 0 at time 0 to 1 at time 1, never falling."""
        ...

    def weight(self, t: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """-alpha'(t) / (1 - alpha(t)), for times above 0: the weight of the loss of what is hidden."""
        ...


@dataclass(frozen=True)
class Polynomial:
    """alpha(t) = 1 - t^power. With a power of 1 the log-linear schedule, of weight 1/t; with more, little is hidden at
    most times, and many elements are decided at the first steps."""

    power: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.power < math.inf:
            raise ValueError(f"the power of a noise schedule is positive and finite, got {self.power}")

    def hidden(self, t: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        return t**self.power

    def weight(self, t: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        return self.power / t


@dataclass(frozen=True)
class Cosine:
    """alpha(t) = 1 - cos(pi/2 (1 - t)): much is hidden at most times, and few elements are decided at the first steps
    (as in MaskGIT, Chang et al. 2022)."""

    def hidden(self, t: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        return torch.sin(math.pi / 2 * t)

    def weight(self, t: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        return (math.pi / 2 / torch.tan(math.pi / 2 * t)).clamp(min=0)  # 0 at time 1, rounded to either side


LINEAR = Polynomial()
NOISES: Mapping[str, Noise] = MappingProxyType({"linear": LINEAR, "cosine": Cosine(), "quadratic": Polynomial(2.0)})


def noise_of(name: str) -> Noise:
    """A schedule by its name. Raises ValueError for one that there is not."""
    if name not in NOISES:
        raise ValueError(f"noise is {', '.join(NOISES)}, not {name!r}")
    return NOISES[name]
