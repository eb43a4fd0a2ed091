"""The reverse of discrete diffusion: ids that stand in open elements are revised step by step, and set in the last."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from seriatim.canvas import UNKNOWN, Canvas, Edit, Revise, Set, Truncate
from seriatim.decoding.guess import Guess
from seriatim.decoding.loop import Step, stop_ids
from seriatim.heads.dist import Categorical
from seriatim.heads.kernels import Kernel
from seriatim.model import Rows
from seriatim.random import ORDER, Key, Random, numbered


class Denoise:
    """One step of the reverse of a kernel for every element that was read: from x_k, which stands on the canvas with
    k / T as its noise level, to x_{k-1}, by the posterior in which the model's law of x_0 takes the place of x_0.

    A model says what it believes of an element without regard to what stands there; that is weighed in here, by Bayes'
    rule, so a belief is sharpened by temperature and filters as in any decoder. Where nothing stands yet, x_T is drawn
    first, from the kernel's prior. `stop` ids end a row with the last step. Has no memory: time stands on the canvas.
    """

    redraws: ClassVar[bool] = True

    def __init__(self, kernel: Kernel, stop: Iterable[int] = ()):
        self.kernel, self.stop = kernel, stop_ids(stop)

    def decide(self, canvas: Canvas, guess: Guess | None, rows: Rows, random: Random) -> Step:
        if guess is not None:
            raise ValueError("Denoise verifies nothing: use a verifier as decider, or no proposer")
        dist, kernel = rows.dist, self.kernel
        if not isinstance(dist, Categorical) or dist.logits.shape[-1] != kernel.vocab:
            raise TypeError(f"this noise is of {kernel.vocab} ids, and the model reads out {type(dist).__name__}")
        element = torch.as_tensor(rows.element).expand(canvas.batch, -1)
        k = steps_left(canvas, kernel.steps)
        x = self._standing(canvas, element, random).to(dist.logits.device)
        law = self.law(dist.probs(), x, k.to(x.device))
        last = (k == 1)[:, None]
        draw = torch.where(last, 0, numbered(ORDER, k[:, None] - 1))
        new = random.categorical(law.log(), Key(canvas.row, element, draw)).cpu()
        edits: list[Edit] = []
        if bool(last.any()):
            edits += self._decided(canvas, new, torch.where(last, element, -1))
        if not bool(last.all()):
            level = ((k - 1) / kernel.steps)[:, None].expand(element.shape)
            edits.append(Revise(torch.where(last, -1, element), new, level))
        return Step(tuple(edits))

    def _decided(self, canvas: Canvas, x: Int[Tensor, "b m"], element: Int[Tensor, "b m"]) -> list[Edit]:
        """Values for good; a row ends at its first stop id."""
        ended = torch.isin(x, torch.tensor(sorted(self.stop), dtype=torch.long)) & (element >= 0)
        if not bool(ended.any()):
            return [Set(x, element)]
        size = canvas.layout.size
        first = torch.where(ended, element, size).amin(1)
        return [Set(x, element), Truncate((first + 1).clamp(max=size))]

    def law(self, p: Float[Tensor, "b m v"], x: Int[Tensor, "b m"], k: Int[Tensor, "b"]) -> Float[Tensor, "b m s"]:
        """The law of x_{k-1}, where the model believes p of x_0."""
        return self.kernel.posterior(x, self.kernel.mixed(p, k - 1), k)

    def _standing(self, canvas: Canvas, element: Int[Tensor, "b m"], random: Random) -> Int[Tensor, "b m"]:
        """What stands in these elements; where nothing does, noise."""
        (kind,) = canvas.layout.kinds
        index = element.clamp(min=0)
        new = (element >= 0) & (canvas.status.gather(1, index) == UNKNOWN)
        there = canvas.noise[kind].gather(1, index) if kind in canvas.noise else torch.zeros_like(index)
        if not bool(new.any()):
            return there
        prior = self.kernel.prior.log().expand(*element.shape, -1)
        key = Key(canvas.row, torch.where(new, element, -1), numbered(ORDER, self.kernel.steps))
        return torch.where(new, random.categorical(prior, key).cpu(), there)


def steps_left(canvas: Canvas, steps: int) -> Int[Tensor, "b"]:
    """How many of so many steps of noise lie behind the open elements of each row, by their level; all where nothing
    stands in them yet. 1 in rows that are done. Raises ValueError where elements of a row stand at different levels."""
    level = torch.zeros(canvas.status.shape) if canvas.level is None else canvas.level.cpu()
    level = torch.where(canvas.status == UNKNOWN, 1.0, level)
    open_ = canvas.open
    k = (torch.where(open_, level, 0.0).amax(1) * steps).round().long().clamp(min=1)
    if bool((open_ & ((level * steps).round().long().clamp(min=1) != k[:, None])).any()):
        raise ValueError(
            "elements of a row are denoised together: they have one noise level, or nothing stands in them"
        )
    return k
