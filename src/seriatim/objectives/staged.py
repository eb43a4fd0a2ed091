"""Training of flows in stages: all stages of a sample at once, each at a time of its own, by noise that jumps share."""

from __future__ import annotations

from collections.abc import Mapping

from jaxtyping import Bool, Float
from torch import Tensor

from seriatim.canvas import Canvas
from seriatim.conditions.condition import Condition
from seriatim.heads.flow_stages import StagedFlowHead, staged
from seriatim.model import Model
from seriatim.random import ORDER, VALUE, Generator, Key, Random, numbered


class Staged(Model):
    """A model of maps, coarse to fine, drawn by a `StagedFlowHead`. Samples are given with the clean map in the finest
    place (what stands in coarser ones is not looked at)."""

    def losses(
        self,
        canvas: Canvas,
        condition: Mapping[str, Tensor] | Condition | None = None,
        drop: Bool[Tensor, "b"] | None = None,
        strict: bool = False,
        random: Random | None = None,
    ) -> Float[Tensor, "b E"]:
        """The loss of each element under one draw of noise, and of a time for each stage, from `random`."""
        if strict:
            raise TypeError("values that are denoised have no likelihood; average `losses` over draws of noise")
        return super().losses(self.noised(canvas, random or Generator()), condition, drop)

    def noised(self, canvas: Canvas, random: Random) -> Canvas:
        """The same samples as decoding meets them: at the ends of all stages; with where they begin as noise, and their
        times. Times of a batch are spread evenly."""
        (kind,) = canvas.layout.kinds
        head = self.heads[kind]
        assert isinstance(head, StagedFlowHead)
        last = head.cells.span(len(head.cells.sides) - 1)
        finest = canvas.value[kind][:, last]
        element = canvas.layout.elements(kind)[None, last]
        noise = random.normal(finest.shape, Key(canvas.row, element, numbered(VALUE, 0, 1)), finest.device)
        begin, end = staged(finest, noise.to(finest), head.cells, head.stages)
        shape = canvas.batch, len(head.cells.sides)
        unit, place = (random.uniform(shape, Key(canvas.row, 0, numbered(ORDER, 0, i))) for i in range(2))
        time = head.config.time((place.argsort(0) + unit) / canvas.batch)
        out = canvas.copy()
        out.value[kind], out.noise[kind], out.level = end.to(finest), begin, (1 - time)[:, head.map]
        return out
