"""Continuous values by a rectified flow, one a read-out: straight paths from noise to data.

Liu et al. 2022, arXiv 2209.03003; Lipman et al. 2022, arXiv 2210.02747. Time runs from 0 (noise) to 1 (data) along
x_t = (1 - t) noise + t value; the network predicts the velocity value - noise, and a value is drawn by integrating it
from 0 to 1. (Some papers count time the other way; `Canvas.level`, 1 for pure noise, is 1 - t.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from seriatim.canvas import Canvas
from seriatim.heads.denoiser import Continuous, ContinuousHead
from seriatim.plan import Reads
from seriatim.random import Key, Random

CLOCK = 1000.0  # the denoiser counts time to a thousand


@dataclass(frozen=True)
class FlowConfig:
    """Sizes and choices of a flow head.

    hidden, blocks: the MLP; steps: of the integration, all of one length; sampler: "euler" (one evaluation a step),
    "midpoint" or "heun" (two, second order); times: how training draws time, "uniform" or "logit-normal" (the sigmoid
    of a standard normal: more in the middle; Esser et al. 2024, arXiv 2403.03206, section 3.1); draws: of noise a value
    in training.
    """

    hidden: int = 1024
    blocks: int = 3
    steps: int = 25
    sampler: Literal["euler", "midpoint", "heun"] = "euler"
    times: Literal["uniform", "logit-normal"] = "uniform"
    draws: int = 1

    def __post_init__(self) -> None:
        if self.sampler not in ("euler", "midpoint", "heun"):
            raise ValueError(f"a flow is integrated by 'euler', 'midpoint' or 'heun', not {self.sampler!r}")
        if self.times not in ("uniform", "logit-normal"):
            raise ValueError(f"times are 'uniform' or 'logit-normal', not {self.times!r}")
        if self.steps < 1:
            raise ValueError(f"at least 1 step is needed, got {self.steps}")

    def time(self, unit: Float[Tensor, "*rest"]) -> Float[Tensor, "*rest"]:
        """Times of training, from numbers uniform in [0, 1)."""
        if self.times == "uniform":
            return unit
        return torch.sigmoid(torch.special.ndtri(unit.clamp(min=2**-26)))


class Flow(Continuous):
    """The law of where noise (draw 0 of an element) is carried. Guidance mixes velocities; the temperature scales the
    noise that is carried."""

    __slots__ = ()

    def sample(self, random: Random, key: Key) -> Float[Tensor, "b m d"]:
        c, n = self.head.config, self.steps
        velocity, x = self.velocities(), self.start(random, key)
        for i in range(n):
            t, step = i / n, 1 / n
            v = velocity(x, t)
            if c.sampler == "midpoint":
                v = velocity(x + step / 2 * v, t + step / 2)
            elif c.sampler == "heun":
                v = (v + velocity(x + step * v, t + step)) / 2
            x = x + step * v
            self.met(x, i)
        return x

    @property
    def steps(self) -> int:
        """Of the integration."""
        return self.head.config.steps

    def start(self, random: Random, key: Key) -> Float[Tensor, "b m d"]:
        """What is carried."""
        return self.temperature * self.noise(random, key, 0, self.head.dim)

    def met(self, x: Float[Tensor, "b m d"], step: int) -> None:
        """Where it has been carried by a step."""

    def velocities(self) -> Callable[[Tensor, float], Tensor]:
        """The guided velocity of values (b, m, d) at a time."""
        net = self.head.net
        state = net.state(self.states)

        def velocity(x: Tensor, t: float) -> Tensor:
            clock = net.clock(torch.full((1,), CLOCK * t, dtype=state.dtype, device=state.device))
            said = net(x.to(state).expand(len(self.weights), -1, -1, -1), state + clock)
            return self.combine(said.to(x.dtype))

        return velocity


class FlowHead(ContinuousHead):
    """Vectors of `dim` numbers, of about unit variance, from a hidden state of `width`.

    `config` may be replaced at any time by one that samples in another way.
    """

    def __init__(self, width: int, dim: int, config: FlowConfig | None = None):
        c = self.config = config or FlowConfig()
        super().__init__(width, dim, dim, c.hidden, c.blocks, c.draws)

    def dist(self, h: Float[Tensor, "b m w"], reads: Reads | None, canvas: Canvas) -> Flow:
        return Flow(self, h[None])

    def loss(
        self,
        h: Float[Tensor, "b m w"],
        reads: Reads | None,
        value: Float[Tensor, "b m d"],
        random: Random | None = None,
        key: Key | None = None,
    ) -> Float[Tensor, "b m"]:
        """Squared error of the predicted velocity, mean over numbers and draws."""
        x, unit, noise = self.noises(h, value, random, key)
        t = self.config.time(unit)
        said = self.told(torch.lerp(noise, x.expand_as(noise), t[..., None]), CLOCK * t, h)
        return (said - (x - noise)).square().mean((-2, -1))
