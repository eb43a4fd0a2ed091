"""Continuous values by a diffusion process of their own, one a read-out: MAR's head.

Li et al. 2024, "Autoregressive Image Generation without Vector Quantization", arXiv 2406.11838: the hidden state of a
slot conditions a small MLP that predicts the noise in a noisy value; the loss is the error of that prediction
(equation 1), and a value is drawn by running the process backwards (equation 2), with a temperature on the noise of
each step. Constants are those of the official code: cosine schedule, 1,000 training steps, 100 sampling steps, 4 draws
of noise a value, learned variance (Nichol & Dhariwal 2021, arXiv 2102.09672).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from seriatim.canvas import Canvas
from seriatim.heads.denoiser import Continuous, ContinuousHead
from seriatim.plan import Reads
from seriatim.random import Key, Random


@dataclass(frozen=True)
class DiffusionConfig:
    """Sizes and choices of a diffusion head.

    hidden, blocks: the MLP; train_steps: length of the process; steps: how many of them sampling visits; draws: of
    noise a value in training; sampler: "ddpm" (ancestral) or "ddim" (Song et al. 2021, arXiv 2010.02502: no noise but
    the first); learned_variance: the MLP also places the variance of each ddpm step between its bounds (else it is the
    larger one); clip: bound the numbers of the value that each step predicts, as Ho et al. 2020 do for pixels: where
    nearly all is noise, a network that was not trained for long errs by far more than values are large.
    """

    hidden: int = 1024
    blocks: int = 3
    train_steps: int = 1000
    steps: int = 100
    draws: int = 4
    sampler: Literal["ddpm", "ddim"] = "ddpm"
    learned_variance: bool = True
    clip: float | None = None

    def __post_init__(self) -> None:
        if self.sampler not in ("ddpm", "ddim"):
            raise ValueError(f"a diffusion head samples by 'ddpm' or 'ddim', not {self.sampler!r}")
        if not 1 <= self.steps <= self.train_steps:
            raise ValueError(f"sampling visits 1 to {self.train_steps} (train_steps) steps, got {self.steps}")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"values are clipped at a positive size, got {self.clip}")


@dataclass(frozen=True, eq=False)
class Process:
    """The steps of a diffusion that are visited, from clean to noise; tables over steps, in float64.

    `time` is a step's number in the whole process; `signal` is alpha-bar, the share of variance that is signal, and
    `before` that of the step before (1 for the first). `beta` is the variance a step adds; `low` and `high` bound the
    log-variance of the step back: the posterior's, and beta's.
    """

    time: Int[Tensor, "n"]
    signal: Float[Tensor, "n"]
    before: Float[Tensor, "n"]
    beta: Float[Tensor, "n"]
    low: Float[Tensor, "n"]
    high: Float[Tensor, "n"]


@cache
@torch.inference_mode(False)  # kept for training too
def process(train_steps: int, steps: int) -> Process:
    """The cosine schedule (Nichol & Dhariwal 2021, equation 17; beta at most 0.999), visited at `steps` evenly spaced
    steps, the first and the last among them; a single one is the last."""
    level = [math.cos((i / train_steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(train_steps + 1)]
    beta = torch.tensor([min(1 - b / a, 0.999) for a, b in pairwise(level)], dtype=torch.float64)
    stride = (train_steps - 1) / max(steps - 1, 1)
    time = torch.tensor([round(i * stride) for i in range(steps)] if steps > 1 else [train_steps - 1])
    signal = (1 - beta).cumprod(0)[time]
    before = torch.cat([torch.ones(1, dtype=torch.float64), signal[:-1]])
    beta = 1 - signal / before
    variance = beta * (1 - before) / (1 - signal)
    variance[0] = variance[1] if steps > 1 else beta[0]  # it is zero there: nothing is left to add
    return Process(time, signal, before, beta, variance.log(), beta.log())


class Diffusion(Continuous):
    """The law of a value under the process run backwards. Draw 0 of an element is the noise it starts from, draw i the
    noise of the i-th step back. Guidance mixes the predicted noise; the variance is that of the first branch."""

    __slots__ = ()

    def sample(self, random: Random, key: Key) -> Float[Tensor, "b m d"]:
        head, temperature = self.head, self.temperature
        c: DiffusionConfig = head.config
        p = process(c.train_steps, c.steps)
        x, predicted = self.noise(random, key, 0, head.dim), self.predictions(p)
        first = x
        for i in reversed(range(c.steps)):
            signal, before, beta = float(p.signal[i]), float(p.before[i]), float(p.beta[i])
            x = self.held(x, first, signal)
            said = predicted(x, i)
            eps = self.combine(said[..., : head.dim])
            if c.clip is not None:
                value = (x - math.sqrt(1 - signal) * eps) / math.sqrt(signal)
                eps = (x - math.sqrt(signal) * value.clamp(-c.clip, c.clip)) / math.sqrt(1 - signal)
            grow = math.sqrt(before / signal)
            if c.sampler == "ddim":
                x = grow * x + (math.sqrt(1 - before) - grow * math.sqrt(1 - signal)) * eps
                continue
            x = grow * (x - beta / math.sqrt(1 - signal) * eps)
            if i > 0:
                noise = self.noise(random, key, c.steps - i, head.dim)
                x = x + temperature * self._deviation(p, i, said[0, ..., head.dim :]) * noise
        return x

    def held(self, x: Float[Tensor, "b m d"], first: Float[Tensor, "b m d"], signal: float) -> Float[Tensor, "b m d"]:
        """What the network looks at in a step of this signal, in place of x; first: the noise that it began as."""
        return x

    def predictions(self, p: Process) -> Callable[[Tensor, int], Float[Tensor, "k b m out"]]:
        """What the network says for each branch of values (b, m, d) at the i-th step of a process."""
        net = self.head.net
        state = net.state(self.states)
        clock = net.clock(p.time.to(state))

        def predicted(x: Tensor, i: int) -> Tensor:
            return net(x.to(state).expand(len(self.weights), -1, -1, -1), state + clock[i]).to(x.dtype)

        return predicted

    def _deviation(self, p: Process, i: int, placed: Float[Tensor, "b m d"]) -> Tensor | float:
        """Standard deviation of a step back."""
        if not placed.shape[-1]:
            return math.exp(0.5 * float(p.high[i]))
        share = (placed + 1) / 2
        return torch.exp(0.5 * (share * float(p.high[i]) + (1 - share) * float(p.low[i])))


class DiffusionHead(ContinuousHead):
    """Vectors of `dim` numbers, of about unit variance, from a hidden state of `width`.

    `config` may be replaced at any time by one that samples in another way.
    """

    def __init__(self, width: int, dim: int, config: DiffusionConfig | None = None):
        c = self.config = config or DiffusionConfig()
        super().__init__(width, dim, 2 * dim if c.learned_variance else dim, c.hidden, c.blocks, c.draws)

    def dist(self, h: Float[Tensor, "b m w"], reads: Reads | None, canvas: Canvas) -> Diffusion:
        return Diffusion(self, h[None])

    def loss(
        self,
        h: Float[Tensor, "b m w"],
        reads: Reads | None,
        value: Float[Tensor, "b m d"],
        random: Random | None = None,
        key: Key | None = None,
    ) -> Float[Tensor, "b m"]:
        """Squared error of the predicted noise, mean over numbers and draws, at times drawn uniformly; with learned
        variance, plus the bound that trains it."""
        x, unit, noise = self.noises(h, value, random, key)
        p = process(self.config.train_steps, self.config.train_steps)
        step = (unit * len(p.time)).long()
        signal = p.signal.to(unit)[step][..., None]
        said = self.told(signal.sqrt() * x + (1 - signal).sqrt() * noise, step.to(unit.dtype), h)
        error = (said[..., : self.dim] - noise).square()
        loss = error.mean(-1)
        if self.config.learned_variance:
            loss = loss + self._bound(p, step, error.detach(), said[..., self.dim :])
        return loss.mean(-1)

    def _bound(self, p: Process, step: Int[Tensor, "b m n"], error: Tensor, placed: Tensor) -> Float[Tensor, "b m n"]:
        """The variational bound of a step, in bits a number as in the official code: the divergence of the step back
        from the posterior, at the first step the surprise at the value. The error of the mean is held fixed, so that
        this trains the variance alone."""
        rows = [x.to(error)[step][..., None] for x in (p.signal, p.beta, p.low, p.high)]
        signal, beta, low, high = rows
        share = (placed + 1) / 2
        spread = share * high + (1 - share) * low
        gap = error * beta.square() / ((1 - signal) * (1 - beta)) * torch.exp(-spread)
        divergence = 0.5 * (spread - low - 1 + torch.exp(low - spread) + gap)
        surprise = 0.5 * (math.log(2 * math.pi) + spread + gap)
        return torch.where(step[..., None] == 0, surprise, divergence).mean(-1) / math.log(2)
