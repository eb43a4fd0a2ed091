"""Normal data, for which what a denoiser should say is known in closed form; and the exact law of what a sampler makes.

A sampler whose network is affine in what stands on the canvas is affine in its noise: run once without noise and once
for each single unit of noise, it shows its mean and covariance, to the last digit and without chance.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seriatim.decoding.loop import generate
from seriatim.decoding.solver import Noise
from seriatim.decoding.target import Target
from seriatim.heads.in_place import InPlaceHead


class Normal:
    """A joint normal law of all numbers of a sample (elements times dim)."""

    def __init__(self, elements: int, dim: int, seed: int = 0, deviation: float = 0.7):
        g, n = torch.Generator().manual_seed(seed), elements * dim
        mix = torch.randn(n, n, generator=g, dtype=torch.float64) / n**0.5
        self.mean = torch.randn(n, generator=g, dtype=torch.float64)
        self.cov = deviation**2 * (mix @ mix.T + 0.3 * torch.eye(n, dtype=torch.float64))
        self.dim = dim

    def given(self, some: Tensor, known: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (rows, n) and covariance of the elements `some`, given the values (rows, known, dim) of others."""
        a, b = (self._numbers(x) for x in (some, known))
        gain = self.cov[a][:, b] @ torch.linalg.inv(self.cov[b][:, b]) if len(b) else self.cov[a][:, b]
        mean = self.mean[a] + (value.flatten(1) - self.mean[b]) @ gain.T
        return mean, self.cov[a][:, a] - gain @ self.cov[b][:, a]

    def _numbers(self, elements: Tensor) -> Tensor:
        return (elements[:, None] * self.dim + torch.arange(self.dim)).flatten()


def expected(mean: Tensor, cov: Tensor, x: Tensor, alpha: float, sigma: float) -> Tensor:
    """The mean of a value, given that it and noise make up x (rows, n)."""
    gain = alpha * cov @ torch.linalg.inv(alpha**2 * cov + sigma**2 * torch.eye(len(cov), dtype=cov.dtype))
    return mean + (x - alpha * mean) @ gain.T


class Oracle(InPlaceHead):
    """Says of the noise that stands in a group what is to be expected, given what is known."""

    law: Normal

    def dist(self, h, reads, canvas):
        dist = super().dist(h, reads, canvas)
        some, known = reads.element[0], canvas.known[0].nonzero()[:, 0]
        mean, cov = self.law.given(some, known, canvas.value["token"][:, known].double())
        alpha, sigma = (float(x) for x in self.path.at(dist.level[0, 0]))
        value = expected(mean, cov, dist.x.flatten(1), alpha, sigma).view_as(dist.x)
        noise = (dist.x - alpha * value) / sigma
        dist.said = {"noise": noise, "velocity": value - noise, "value": value}[self.predicts]
        return dist


class Units:
    """Row 0 meets no noise, each other row one unit of it: in one number of one draw of one element. Draws are numbered
    as they come."""

    def __init__(self, elements: int, dim: int, draws: int):
        self.shape = draws, elements, dim
        self.rows = 1 + draws * elements * dim
        self.met: list[int] = []

    def normal(self, shape, key, device="cpu"):
        draw = torch.as_tensor(key.draw).flatten()[0].item()
        if draw not in self.met:
            self.met.append(draw)
        element = key.element.expand(shape[:2])
        table = torch.zeros(self.rows, *self.shape)
        table.view(self.rows, -1)[1:] = torch.eye(self.rows - 1)
        return table[torch.arange(self.rows)[:, None], self.met.index(draw), element.clamp(min=0)]


def sampled_law(model, decider, draws: int = 1, condition=None) -> tuple[Tensor, Tensor]:
    """Mean and covariance of all numbers of what a decider makes of an affine model."""
    (dim,) = model.heads["token"].value_shape
    units = Units(model.layout.size, dim, draws)
    raw = None if condition is None else {k: v.expand(units.rows) for k, v in condition.items()}
    canvas = model.blank(units.rows)
    canvas.value["token"] = canvas.value["token"].double()
    generate(Target(model, raw), canvas, decider, Noise(), units)
    y = canvas.value["token"].flatten(1)
    return y[0], (y[1:] - y[0]).T @ (y[1:] - y[0])
