"""Training of values that are denoised in place: every group of a sample at a level of its own, in one forward.

The backbone itself is the network of a flow or a diffusion (`heads.in_place`); the order says what a group may see
besides its own noise: the clean values of earlier groups (two streams), or what stands in them, noisy as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from seriatim.canvas import Canvas
from seriatim.conditions.condition import Condition
from seriatim.factorization.groups import Groups
from seriatim.heads.in_place import InPlaceHead, noised
from seriatim.model import Model
from seriatim.random import ORDER, Generator, Key, Random, numbered


class Times(Protocol):
    """The law of levels of noise in training. A value."""

    def __call__(self, unit: Float[Tensor, "*rest"]) -> Float[Tensor, "*rest"]:
        """Levels in [0, 1], from numbers uniform in [0, 1)."""
        ...


@dataclass(frozen=True)
class Uniform:
    """All levels alike, but for those at which noise drowns in rounding."""

    def __call__(self, unit: Float[Tensor, "*rest"]) -> Float[Tensor, "*rest"]:
        return unit.clamp(min=1e-3)


@dataclass(frozen=True)
class LogitNormal:
    """The sigmoid of a normal number: more in the middle, hardly any at the ends (Esser et al. 2024, arXiv 2403.03206,
    section 3.1)."""

    mean: float = 0.0
    deviation: float = 1.0

    def __call__(self, unit: Float[Tensor, "*rest"]) -> Float[Tensor, "*rest"]:
        normal = torch.special.ndtri(unit.double().clamp(2**-40, 1 - 2**-40))
        return torch.sigmoid(self.mean + self.deviation * normal).to(unit)


@dataclass(frozen=True)
class EachStep:
    """The steps of a diffusion, all alike: 1/n, 2/n, ..., 1."""

    steps: int = 1000

    def __call__(self, unit: Float[Tensor, "*rest"]) -> Float[Tensor, "*rest"]:
        return ((unit * self.steps).floor() + 1).clamp(max=self.steps) / self.steps


class Denoising(Model):
    """A model of `Groups` whose losses are those of one draw of noise, at levels by the law `times`.

    noisy_context: earlier groups are seen as noisy as they are drawn, in one stream (noisy context learning: Ren et al.
    2025, xAR); else clean, in a stream of their own (ACDiT, Hu et al. 2024).
    """

    factorization: Groups

    def __init__(self, *parts: Any, times: Times, noisy_context: bool = False, **more: Any):
        super().__init__(*parts, **more)
        self.times, self.noisy_context = times, noisy_context

    def losses(
        self,
        canvas: Canvas,
        condition: Mapping[str, Tensor] | Condition | None = None,
        drop: Bool[Tensor, "b"] | None = None,
        strict: bool = False,
        random: Random | None = None,
    ) -> Float[Tensor, "b E"]:
        """The loss of each element under one draw of levels and noise, from `random`."""
        if strict:
            raise TypeError("values that are denoised have no likelihood; average `losses` over draws of noise")
        random = random or Generator()
        return self.losses_of(self.noised(canvas, random), condition, drop, random)

    def noised(self, canvas: Canvas, random: Random) -> Canvas:
        """The same samples with noise in all elements that are not given: one level for each group of each row."""
        group = self.factorization.of(canvas.layout)
        return self.at_levels(canvas, self.levels(canvas, int(group.max()) + 1, random)[:, group], random)

    def levels(self, canvas: Canvas, groups: int, random: Random) -> Float[Tensor, "b g"]:
        """The level of each group of each row. Those of a batch are spread evenly over their law, which varies less
        than if each was drawn alone."""
        shape = canvas.batch, groups
        unit, place = (random.uniform(shape, Key(canvas.row, 0, numbered(ORDER, 0, i))) for i in range(2))
        return self.times((place.argsort(0) + unit) / canvas.batch)

    def at_levels(self, canvas: Canvas, level: Float[Tensor, "b E"], random: Random) -> Canvas:
        """The same samples with noise of these levels."""
        (kind,) = canvas.layout.kinds
        head = self.heads[kind]
        if not isinstance(head, InPlaceHead):
            raise TypeError(f"{type(head).__name__} does not denoise in place; take an InPlaceHead, or a plain Model")
        return noised(canvas.copy(), kind, level, head.path, random)

    def losses_of(
        self,
        canvas: Canvas,
        condition: Mapping[str, Tensor] | Condition | None = None,
        drop: Bool[Tensor, "b"] | None = None,
        random: Random | None = None,
    ) -> Float[Tensor, "b E"]:
        """The losses where the noise stands on the canvas."""
        plan = self.factorization.noisy(canvas) if self.noisy_context else self.factorization.packed(canvas)
        if self._sound is not self.factorization:
            plan.check(self.mixers, self.factorization.due(canvas))
            self._sound = self.factorization
        encoded = condition if isinstance(condition, Condition) else self.encode(condition, drop)
        return self.losses_by(plan, canvas, encoded, random=random)


class Falling(Denoising):
    """The same behind noisy groups whose levels fall from the first group of a row to its last: each is seen by cleaner
    ones alone (ARFlow, Hui et al. 2025)."""

    def __init__(self, *parts: Any, times: Times, **more: Any):
        super().__init__(*parts, times=times, noisy_context=True, **more)

    def levels(self, canvas: Canvas, groups: int, random: Random) -> Float[Tensor, "b g"]:
        return super().levels(canvas, groups, random).sort(1, descending=True).values
