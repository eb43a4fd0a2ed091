"""How noisy what stands in a slot is, told to the norms of that slot: AdaLN of models that denoise in place."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from seriatim.backbones.driven import Driven
from seriatim.canvas import Canvas
from seriatim.heads.denoiser import FREQUENCIES, time_features
from seriatim.plan import MASK, NOISE, Plan

THOUSAND = 1000.0  # levels are told as times of a process of so many steps


class NoiseClock(nn.Module):
    """The vector that drives the norms of each slot: a small network over cosines and sines of its level of noise, plus
    the vector of the sample's condition, if any.

    Noise stands at `Canvas.level`, a mask at 1. values: the level that is told of what is decided or given: 0, or a
    little more, for models that met hardly any context without noise; None: the norms of such slots are plain, so that
    their keys and values depend neither on the time nor on the condition. begin: the time that is told of level 0; it
    is -1 where the first of a thousand steps of a diffusion is called 0; length: what is added to it at level 1. whole:
    times are cut to whole numbers.
    """

    def __init__(
        self, width: int, values: float | None = 0.0, begin: float = 0.0, whole: bool = False, length: float = THOUSAND
    ):
        super().__init__()
        if values is not None and not 0 <= values <= 1:
            raise ValueError(f"a level of noise lies in 0..1, got {values}")
        self.values, self.begin, self.whole, self.length = values, begin, whole, length
        first, last = nn.Linear(2 * FREQUENCIES, width), nn.Linear(width, width)
        self.net = nn.Sequential(first, nn.SiLU(), last)
        for layer in (first, last):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def levels(self, canvas: Canvas, plan: Plan) -> Float[Tensor, "#b s"]:
        """The level of noise of each slot; -1 where norms are plain."""
        slots = plan.slots
        noisy, masked = slots.source == NOISE, slots.source == MASK
        level = torch.where(masked, 1.0, -1.0 if self.values is None else self.values)
        if bool(noisy.any()):
            if canvas.level is None:
                raise ValueError("slots hold noise of no level: begin with `Noise` when decoding, `noised` in training")
            element = slots.element[..., 0].clamp(min=0).expand(canvas.batch, -1)
            level = torch.where(noisy, canvas.level.cpu().gather(1, element), level)
        return level

    def forward(self, canvas: Canvas, plan: Plan, vector: Float[Tensor, "b e"] | None) -> Driven:
        """`vector` may have the rows of the canvas several times, one below the other (branches of guidance)."""
        weight = self.net[0].weight
        level, group = self.levels(canvas, plan).unique(dim=1, return_inverse=True)
        plain = (level < 0).to(weight.device)
        time = self.begin + self.length * level.to(weight.device)
        told = self.net(time_features((time.floor() if self.whole else time).to(weight.dtype)))
        if vector is not None:
            if vector.dim() != 2:
                raise ValueError(f"a clock adds to one vector a sample (batch, e), got {tuple(vector.shape)}")
            copies = len(vector) // len(told) if len(told) > 1 else 1
            told, plain = told.repeat(copies, 1, 1) + vector[:, None], plain.repeat(copies, 1)
        return Driven(told, group.to(weight.device), plain if bool(plain.any()) else None)
