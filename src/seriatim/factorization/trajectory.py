"""Pictures at falling levels of noise, one after another: an order over time rather than over elements."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from seriatim.canvas import GUESSED, Canvas
from seriatim.decoding.guess import Guess
from seriatim.factorization.groups import Groups
from seriatim.layout import Layout
from seriatim.plan import MASK, NOISE, VALUE, OrderError, Plan, Reads, Slots
from seriatim.random import Random
from seriatim.view import inclusive


class Trajectory(Groups):
    """In training several pictures of `size` elements, each seeing itself and what stands in those before it, noisy as
    it is (`noisy`); they should be ever cleaner. In sampling one picture, whose every step sees where it stood in all
    earlier ones, as if they were other pictures: each step is a chunk of slots, and all of them are kept.

    What is given or decided stands in its place as it is. Where a picture has been stands in the cache alone: without
    one (`Target(cached=False)`) every step is on its own.
    """

    def __init__(self, size: int):
        super().__init__(None, NOISE)
        if size < 1:
            raise ValueError(f"a picture has at least one element, got {size}")
        self.size = size

    def of(self, layout: Layout) -> Int[Tensor, "E"]:
        """The picture of each element."""
        if layout.size % self.size:
            raise ValueError(f"pictures have {self.size} elements each, and the layout has {layout.size}")
        return torch.arange(layout.size) // self.size

    def order(self, layout: Layout, random: Random | None = None) -> Int[Tensor, "1 E"]:
        return self.of(layout)[None]

    def packed(self, canvas: Canvas) -> Plan:
        return self.noisy(canvas)

    def step(self, canvas: Canvas, guess: Guess | None, cached: int | Tensor) -> Plan | None:
        if guess is not None:
            raise OrderError("a picture that is denoised as a whole verifies no drafts; decode it without a guess")
        if canvas.done:
            return None
        layout = canvas.layout
        if layout.size != self.size:
            raise OrderError(f"one picture of {self.size} elements is drawn at a time, and not {layout.size} elements")
        e, open_ = torch.arange(self.size)[None], canvas.open
        source = torch.where(canvas.status == GUESSED, NOISE, torch.where(open_, MASK, VALUE))
        slots = Slots(e[..., None], source, layout.coord[None], torch.full_like(source, -1))
        read, turn = torch.where(open_, e, -1), torch.as_tensor(cached).reshape(-1, 1) // self.size
        view = inclusive(turn.expand(-1, self.size))
        kept = self.remembered(e)
        return Plan(slots, {"all": view}, Reads(read, read), torch.where(open_, 0, -1), layout=layout, kept=kept)

    def remembered(self, slots: Int[Tensor, "1 s"]) -> Int[Tensor, "1 m"]:
        """Which slots of a step later steps see."""
        return slots


class Moments(Trajectory):
    """The same, but no step of sampling remembers another one: the context of training is erased."""

    def remembered(self, slots: Int[Tensor, "1 s"]) -> Int[Tensor, "1 m"]:
        return slots[:, :0]
