"""Series as tokens: windows on their own scale, and patches of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

LEAST = 1e-5  # added to variances


class Scale(NamedTuple):
    """Mean and deviation of each window and variate, (b, 1, c)."""

    mean: Float[Tensor, "b 1 c"]
    deviation: Float[Tensor, "b 1 c"]

    @staticmethod
    def of(past: Float[Tensor, "b t c"]) -> Scale:
        """Of a lookback, by its own rows; what is added to the variance keeps a flat one finite. No gradient goes
        through it (Liu et al. 2022, arXiv 2205.14415; RevIN without its affine map, Kim et al. 2022)."""
        past = past.detach()
        return Scale(past.mean(1, keepdim=True), (past.var(1, keepdim=True, unbiased=False) + LEAST).sqrt())

    def on(self, x: Float[Tensor, "b t c"]) -> Float[Tensor, "b t c"]:
        """On this scale: about mean 0 and variance 1."""
        return (x - self.mean) / self.deviation

    def off(self, x: Float[Tensor, "b t c"]) -> Float[Tensor, "b t c"]:
        """Back in the units that it came in."""
        return x * self.deviation + self.mean


def channels_apart(x: Float[Tensor, "b t c"]) -> Float[Tensor, "bc t"]:
    """Every variate a sample of its own."""
    return x.transpose(1, 2).flatten(0, 1)


def channels_together(x: Float[Tensor, "bc t"], channels: int) -> Float[Tensor, "b t c"]:
    """Samples of one variate as those of all."""
    return x.unflatten(0, (-1, channels)).transpose(1, 2)


def patches(x: Float[Tensor, "n t"], length: int, stride: int | None = None) -> Float[Tensor, "n p length"]:
    """Stretches of `length` steps, one every `stride` (None: side by side). Raises ValueError where they do not come
    out even."""
    stride = stride or length
    if x.shape[1] < length or (x.shape[1] - length) % stride:
        raise ValueError(f"{x.shape[1]} steps are no whole number of patches of {length}, one every {stride}")
    return x.unfold(1, length, stride)


def smoothed(x: Float[Tensor, "n t"], width: int) -> Float[Tensor, "n t"]:
    """Means of `width` steps around each (an odd number), whose first and last are repeated beyond the ends."""
    side = (width - 1) // 2
    ends = x[:, :1].expand(-1, side), x, x[:, -1:].expand(-1, side)
    return torch.cat(ends, 1).unfold(1, width, 1).mean(-1)


def patch_count(steps: int, length: int, stride: int) -> int:
    """Of `overlapping`. Raises ValueError where they do not come out even."""
    if steps < length or (steps - length) % stride:
        raise ValueError(f"a lookback of {steps} is no whole number of patches of {length}, one every {stride}")
    return (steps - length) // stride + 2


def overlapping(x: Float[Tensor, "n t"], length: int, stride: int) -> Float[Tensor, "n p length"]:
    """Patches one every `stride`, the last of which reaches as far beyond the end, where the last value stands."""
    return patches(torch.cat([x, x[:, -1:].expand(-1, stride)], 1), length, stride)


class Parts(NamedTuple):
    """A series as a sum, (n, t) each."""

    trend: Float[Tensor, "n t"]
    season: Float[Tensor, "n t"]
    rest: Float[Tensor, "n t"]


def parted(x: Float[Tensor, "n t"], width: int, period: int) -> Parts:
    """The mean of `width` steps around each, which stays as it is where these would reach beyond an end; the mean over
    periods of what is left, phase by phase; and the rest. Raises ValueError for fewer steps than `width`."""
    steps = x.shape[1]
    if not 1 <= width <= steps or period < 1:
        raise ValueError(f"a mean of {width} steps and a period of {period} do not fit into {steps} steps")
    place = (torch.arange(steps, device=x.device) - width // 2).clamp(0, steps - width)
    trend = x.unfold(1, width, 1).mean(-1)[:, place]
    phase = torch.arange(steps, device=x.device) % period
    turns = torch.bincount(phase, minlength=period).clamp(min=1)
    sums = torch.zeros(len(x), period, dtype=x.dtype, device=x.device).index_add(1, phase, x - trend)
    season = (sums / turns)[:, phase]
    return Parts(trend, season, x - trend - season)
