"""Denoising in place: what stands in an element is revised step by step, and set in the last one.

Solvers are deciders; noise to begin with is put there by a proposer (`Noise`), or by `pure_noise` before decoding. The
loop, the order and the cache are those of every other decoder: while a group is denoised its step is repeated, and what
the noise does not reach (the values of the group before) is brought into the cache by the first of these forwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from seriatim.canvas import UNKNOWN, Canvas, Edit, Revise, Set
from seriatim.decoding.guess import Guess, moved
from seriatim.decoding.loop import Step
from seriatim.model import Rows
from seriatim.random import VALUE, Key, Random, numbered

NEAR = 1e-6  # levels are kept in single precision


@dataclass(frozen=True)
class Noise:
    """The proposer of who denoises in place: noise alone (draw 0 of an element) in whatever is unknown, before anything
    of it is decided. It drafts nothing."""

    kind: str = "token"

    def propose(self, canvas: Canvas, target: Any, random: Random) -> None:
        element = canvas.layout.elements(self.kind).expand(canvas.batch, -1)
        fresh = canvas.status.gather(1, element) == UNKNOWN
        if bool(fresh.any()):
            value = canvas.value[self.kind]
            noise = random.normal(value.shape, Key(canvas.row, element), value.device).to(value)
            canvas.apply([Revise(torch.where(fresh, element, -1), noise, torch.ones(1, 1))])

    def observe(self, canvas: Canvas, rows: Rows, step: Step) -> None:
        """Nothing is remembered."""


class SolverStep:
    """One step of a solver for every element that was read, from its own level of noise to the next: here DDIM (Song et
    al. 2021, arXiv 2010.02502), which on the straight path is Euler's method.

    `steps` is how many the whole way has. Where an element stands is read off the canvas (`Canvas.level`), so elements
    at different levels may be read together, and a half-denoised canvas can be taken up again.
    """

    def __init__(self, steps: int = 10):
        if steps < 1:
            raise ValueError(f"a solver takes at least one step, got {steps}")
        self.steps = steps

    def levels(self, path: Any) -> Float[Tensor, "n"]:
        """The levels that are visited: from 1 down to 0, one more than steps."""
        return path.levels(self.steps)

    def moved(
        self, dist: Any, level: Float[Tensor, "b m"], turn: Int[Tensor, "b m"], key: Key, canvas: Canvas, random: Random
    ) -> Float[Tensor, "b m d"]:
        """What stands in the elements of `key` at their next levels; turn: how many steps each has made."""
        return dist.towards(level)

    def decide(self, canvas: Canvas, guess: Guess | None, rows: Rows, random: Random) -> Step:
        if guess is not None:
            raise ValueError(f"{type(self).__name__} verifies nothing: use a verifier as decider, or no draft")
        dist = rows.dist
        if not hasattr(dist, "towards"):
            raise TypeError(f"{type(dist).__name__} cannot be denoised in place: that needs an InPlaceHead")
        element = torch.as_tensor(rows.element).expand(canvas.batch, -1)
        grid = self.levels(dist.path).to(dist.level)
        below = grid < dist.level[..., None] - NEAR
        turn = (~below).sum(-1) - 1
        level = torch.where(below, grid, 0.0).amax(-1)
        x = self.moved(dist, level, turn.clamp(min=0), Key(canvas.row, element), canvas, random)
        clean = (level <= 0).cpu()
        edits: list[Edit] = []
        if bool((clean & (element >= 0)).any()):
            edits.append(Set(x, torch.where(clean, element, -1)))
        if bool((~clean & (element >= 0)).any()):
            edits.append(Revise(torch.where(clean, -1, element), x, level.float()))
        return Step(tuple(edits))


class StochasticStep(SolverStep):
    """Euler-Maruyama steps of the reverse SDE of a rectified flow, with diffusion 2 t at level t (SiT, Ma et al. 2024,
    arXiv 2401.08740): `steps` levels evenly from 1 to `last`, and from there one step of the mean to 0.

    It has the same marginals as the flow, and forgets on its way the errors of earlier steps. Raises TypeError for
    other paths than the straight one.
    """

    def __init__(self, steps: int = 50, last: float = 0.04):
        super().__init__(steps)
        if not 0 < last < 1:
            raise ValueError(f"the last level with noise lies between 0 and 1, got {last}")
        self.last = last

    def levels(self, path: Any) -> Float[Tensor, "n"]:
        if not getattr(path, "straight", False):
            raise TypeError(f"the diffusion of these steps is that of a straight path, not of {type(path).__name__}")
        return torch.cat([torch.linspace(1, self.last, self.steps, dtype=torch.float64), torch.zeros(1)])

    def moved(
        self, dist: Any, level: Float[Tensor, "b m"], turn: Int[Tensor, "b m"], key: Key, canvas: Canvas, random: Random
    ) -> Float[Tensor, "b m d"]:
        value, noise = dist.parts()
        now, ahead = dist.level[..., None], (dist.level - level)[..., None]
        # along a level t that falls: dx = (noise - value - t score) dt + sqrt(2 t) dw, and the score is -noise / t
        x = dist.x - ahead * (2 * noise - value)
        if not bool((level > 0).any()):
            return x
        fresh = random.normal(tuple(x.shape), key._replace(draw=numbered(VALUE, 1 + turn.cpu())), x.device).to(x)
        return x + (2 * now * ahead).sqrt() * torch.where(level[..., None] > 0, fresh, 0.0)


class MultiStep(SolverStep):
    """DPM-Solver++ of second order, in its multi-step form (Lu et al. 2022, arXiv 2211.01095, algorithm 2): the value
    that is predicted now, and how it has changed since the step before, say where to go. The first step and the last
    are of first order.

    Remembers the last prediction of each element, of one canvas at a time: one that is taken up in the middle of a
    group begins there with a step of first order.
    """

    def __init__(self, steps: int = 25):
        super().__init__(steps)
        self._canvas: Canvas | None = None
        self._row: Tensor
        self._before: tuple[Tensor, Tensor]  # (b, E, d) the value that was predicted, (b, E) at which level; NaN: none

    def moved(
        self, dist: Any, level: Float[Tensor, "b m"], turn: Int[Tensor, "b m"], key: Key, canvas: Canvas, random: Random
    ) -> Float[Tensor, "b m d"]:
        value, _ = dist.parts()
        assert isinstance(key.element, Tensor)
        element = key.element.clamp(min=0).to(value.device)
        self._follow(canvas, value)
        old, then = self._before
        rows = torch.arange(len(element), device=value.device)[:, None]
        log_ratio = [_log_ratio(dist.path, at) for at in (then[rows, element], dist.level, level)]
        h, last = log_ratio[2] - log_ratio[1], log_ratio[1] - log_ratio[0]
        share = h / (2 * last)  # NaN where nothing is remembered, 0 behind a step from pure noise
        share = torch.where((level > 0) & (last > 0) & torch.isfinite(share), share, 0.0)[..., None]
        slope = torch.where(share != 0, value - old[rows, element], 0.0)
        alpha, sigma = (k[..., None] for k in dist.path.at(level.to(dist.x)))
        now = dist.path.at(dist.level)
        kept = sigma / now[1][..., None]
        x = kept * dist.x + (alpha - kept * now[0][..., None]) * (value + share * slope)
        old[rows, element], then[rows, element] = value, dist.level
        return x

    def _follow(self, canvas: Canvas, like: Tensor) -> None:
        """Another canvas starts anew; rows may have come and gone."""
        if canvas is not self._canvas:
            self._canvas, self._row = canvas, canvas.row
            shape = canvas.batch, canvas.layout.size
            self._before = like.new_zeros(*shape, like.shape[-1]), like.new_full(shape, torch.nan)
        rows = moved(self._row, canvas.row)
        if rows is not None:
            self._row, (old, then) = canvas.row, self._before
            new = (rows < 0)[:, None].to(then.device)
            self._before = old[rows], then[rows].masked_fill(new, torch.nan)


def _log_ratio(path: Any, level: Tensor) -> Tensor:
    """log(alpha / sigma); NaN where there is no level."""
    alpha, sigma = path.at(level.nan_to_num(1.0))
    return (alpha.log() - sigma.log()).masked_fill(level.isnan(), torch.nan)
