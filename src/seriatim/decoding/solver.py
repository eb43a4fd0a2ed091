"""Denoising in place: what stands in an element is revised step by step, and set in the last one."""

from __future__ import annotations

import torch

from seriatim.canvas import Canvas, Edit, Revise, Set
from seriatim.decoding.guess import Guess
from seriatim.decoding.loop import Step
from seriatim.model import Rows
from seriatim.random import Random


class SolverStep:
    """One step of a deterministic solver for every element that was read, from its own level of noise to the next.

    `steps` is how many the whole way has. Where an element stands is read off the canvas (`Canvas.level`), so elements
    at different levels may be read together, and a half-denoised canvas can be taken up again. Begin with `pure_noise`.
    """

    def __init__(self, steps: int = 10):
        if steps < 1:
            raise ValueError(f"a solver takes at least one step, got {steps}")
        self.steps = steps

    def decide(self, canvas: Canvas, guess: Guess | None, rows: Rows, random: Random) -> Step:
        if guess is not None:
            raise ValueError("SolverStep verifies nothing: use a verifier as decider, or no proposer")
        dist = rows.dist
        if not hasattr(dist, "towards"):
            raise TypeError(f"{type(dist).__name__} cannot be denoised in place: that needs an InPlaceHead")
        element = torch.as_tensor(rows.element).expand(canvas.batch, -1)
        grid = dist.path.levels(self.steps).to(dist.level)
        below = grid < dist.level[..., None] - 1e-6  # levels are kept in single precision
        level = torch.where(below, grid, 0.0).amax(-1)
        x, clean = dist.towards(level), (level <= 0).cpu()
        edits: list[Edit] = []
        if bool((clean & (element >= 0)).any()):
            edits.append(Set(x, torch.where(clean, element, -1)))
        if bool((~clean & (element >= 0)).any()):
            edits.append(Revise(torch.where(clean, -1, element), x, level.float()))
        return Step(tuple(edits))
