"""One head for the coarsest elements, another for the finer ones: a step reads one of both."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from seriatim.canvas import Canvas
from seriatim.layout import Layout
from seriatim.plan import Reads
from seriatim.random import Key, Random


class ByLevel(nn.Module):
    """`coarse` reads elements whose first coordinate is 0, `fine` all others; both say vectors of one size."""

    exact = False
    continuous = True

    def __init__(self, layout: Layout, coarse: nn.Module, fine: nn.Module):
        super().__init__()
        if coarse.value_shape != fine.value_shape:
            raise ValueError(f"values of one kind have one shape, got {coarse.value_shape} and {fine.value_shape}")
        self.coarse, self.fine, self.level = coarse, fine, layout.coord[:, 0].clamp(max=1)
        self.width, self.dim, self.value_shape = coarse.width, coarse.dim, coarse.value_shape

    def at(self, reads: Reads) -> Any:
        """The head of what is read. Raises ValueError where that is of both levels."""
        level = self.level[reads.element[reads.element >= 0]]
        if level.numel() and int(level.min()) != int(level.max()):
            raise ValueError("a step reads either the coarsest elements or finer ones, and this one both")
        return self.fine if level.numel() and int(level[0]) else self.coarse

    def dist(self, h: Float[Tensor, "b m w"], reads: Reads, canvas: Canvas) -> Any:
        return self.at(reads).dist(h, reads, canvas)

    def loss(
        self, h: Float[Tensor, "b m w"], reads: Reads, value: Tensor, random: Random | None = None,
        key: Key | None = None,
    ) -> Float[Tensor, "b m"]:  # fmt: skip
        return self.at(reads).loss(h, reads, value, random, key)
