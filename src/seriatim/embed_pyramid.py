"""What stands in the slots of a pyramid: at every scale something that the coarser scales say, and a place.

What they say is a *feed*, an interchangeable value: the sum of all of them (VAR and its kin), or the map before alone
(FlexVAR, SAR, FlowAR). Places are a table of every place of every scale, or one grid that is resized to any scale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from seriatim.canvas import GUESSED, Canvas
from seriatim.decoding.guess import Guess
from seriatim.initial import drawn
from seriatim.layout import Layout, shapes_of
from seriatim.maps import Shape, area_down, bicubic_up
from seriatim.plan import MASK, VALUE, Plan
from seriatim.tokenizers.conv import map_to_rows, rows_to_map

# ---- feeds -----------------------------------------------------------------------------------------------------------


class Feed(Protocol):
    """What coarser scales say to some scale. A value: the same in training and decoding, number for number."""

    def __call__(
        self, codes: Any, known: Tensor, shapes: Sequence[Shape], first: int, last: int
    ) -> list[Float[Tensor, "b n d"]]:
        """For each of the scales first to last (from 0, of which scale 0 is told nothing and left out) what is fed, in
        raster order. codes: what turns ids into vectors; known: the values of all scales before `last`."""
        ...


def accumulated(
    codes: Any, known: Int[Tensor, "b n"], shapes: Sequence[Shape], first: int, last: int
) -> list[Float[Tensor, "b n d"]]:
    """The sum of all coarser scales, area-downed (VAR, Tian et al. 2024, algorithm 2). codes: a `MultiScaleVQ`."""
    sums = codes.partial_latents(known) if last else []
    return [codes.next_input(sums[k - 1], k - 1) for k in range(max(first, 1), last + 1)]


def previous(codes: Any, known: Tensor, shapes: Sequence[Shape], first: int, last: int) -> list[Float[Tensor, "b n d"]]:
    """The map before alone, bicubic-up (FlexVAR, Jiao et al. 2025). codes: a quantizer; None: values are vectors."""
    begin = (0, *accumulate(rows * columns for rows, columns in shapes))
    out = []
    for k in range(max(first, 1), last + 1):
        values = known[:, begin[k - 1] : begin[k]]
        vectors = values if codes is None else codes.decode_ids(values)
        out.append(map_to_rows(bicubic_up(rows_to_map(vectors, shapes[k - 1]), shapes[k])))
    return out


# ---- places ----------------------------------------------------------------------------------------------------------


class Places(Protocol):
    """Vectors of the places of a pyramid."""

    def fresh(self, width: int, std: float) -> Tensor:
        """The parameter to begin with."""
        ...

    def __call__(self, table: Tensor, shapes: Sequence[Shape], first: int, last: int) -> Float[Tensor, "n d"]:
        """Vectors of all places of the scales first to last."""
        ...


@dataclass(frozen=True)
class PlaceTable:
    """One vector for each place of each scale, `total` in all: a pyramid of fixed sizes."""

    total: int

    def fresh(self, width: int, std: float) -> Float[Tensor, "n d"]:
        return torch.randn(self.total, width) * std

    def __call__(self, table: Tensor, shapes: Sequence[Shape], first: int, last: int) -> Float[Tensor, "n d"]:
        begin = (0, *accumulate(rows * columns for rows, columns in shapes))
        if begin[-1] != self.total:
            raise ValueError(
                f"this model has a place for each of the {self.total} elements of its own scales, and a pyramid of "
                f"{begin[-1]} is asked for; models with a grid of places (flexvar) draw other sizes"
            )
        return table[begin[first] : begin[last + 1]]


@dataclass(frozen=True)
class PlaceGrid:
    """One grid of `side` x `side` vectors, area-resized to the map of any scale, seen before or not (FlexVAR). It
    begins as waves: sines of the row in even channels, cosines of the column in odd ones."""

    side: int = 32

    def fresh(self, width: int, std: float) -> Float[Tensor, "d side side"]:
        place = torch.arange(self.side).float()[:, None]
        turns = place * torch.exp(torch.arange(0, width, 2) * -(math.log(10_000.0) / width))
        grid = torch.zeros(self.side, self.side, width)
        grid[..., 0::2] = turns.sin()[:, None]
        grid[..., 1::2] = turns.cos()[:, : width // 2]
        return grid.permute(2, 0, 1).contiguous()

    def __call__(self, table: Tensor, shapes: Sequence[Shape], first: int, last: int) -> Float[Tensor, "n d"]:
        maps = [area_down(table[None], shapes[k]) for k in range(first, last + 1)]
        return torch.cat([map_to_rows(x)[0] for x in maps])


# ---- the embedding ---------------------------------------------------------------------------------------------------


class PyramidEmbed(nn.Module):
    """What a slot of a pyramid carries: what its feed says, projected, plus place and (`scales` of them) scale; at the
    first scale a learned start, with the class where there is one.

    A slot that holds its own element (refinement of a scale, HMAR) carries in addition what that element adds to its
    scale, projected by the same matrix, or where it is hidden the vector of the mask. A guess that stands where it is
    hidden reaches its neighbours by what it adds to them. The codebook belongs to the tokenizer and is frozen.
    """

    def __init__(
        self, quantizer: nn.Module | None, dim: int, width: int, feed: Feed, places: Places, scales: int = 0,
        mask: bool = False, std: float = 0.02,
    ):  # fmt: skip
        super().__init__()
        self.quantizer = None if quantizer is None else quantizer.requires_grad_(False)
        self.feed, self.places, self.width = feed, places, width
        self.project = nn.Linear(dim, width)
        self.start = nn.Parameter(torch.randn(width) * std)
        self.position = nn.Parameter(places.fresh(width, std))
        self.scale = nn.Parameter(torch.randn(scales, width) * std) if scales else None
        self.mask = nn.Parameter(drawn(width, std=std)) if mask else None

    def forward(
        self, canvas: Canvas, plan: Plan, guess: Guess | None = None, prefix: Tensor | None = None
    ) -> Float[Tensor, "b s d"]:
        shapes, b = _shapes(canvas.layout), canvas.batch
        coord = plan.slots.coord.to(self.start.device)
        scale, row, column = coord.clamp(min=0).unbind(2)
        first, last = int(scale.min()), int(scale.max())
        begin = [0, *accumulate(rows * columns for rows, columns in shapes)]
        (kind,) = canvas.layout.kinds
        where = self.places(self.position, shapes, first, last)
        start = self.start.expand(b, 1, -1) if prefix is None else prefix + self.start
        parts = [start.expand(-1, begin[1], -1)] if first == 0 else []
        told = self.feed(self.quantizer, canvas.value[kind][:, : begin[last]], shapes, first, last)
        parts += [self.project(x.to(start.dtype)) for x in told]
        wide = torch.tensor([columns for _, columns in shapes], device=scale.device)
        at = torch.tensor(begin, device=scale.device)[scale] + row * wide[scale] + column - begin[first]
        x = _picked(torch.cat(parts, 1), at)
        if bool(((plan.slots.source == VALUE) | (plan.slots.source == MASK)).any()):
            x = x + self._own(canvas, plan, shapes, scale, at)
        x = x + where[at]
        return x if self.scale is None else x + self.scale[scale]

    def _own(
        self, canvas: Canvas, plan: Plan, shapes: Sequence[Shape], scale: Tensor, at: Tensor
    ) -> Float[Tensor, "b s d"]:
        """What each slot's own element adds to its scale, of those that are shown or guessed; the mask where they are
        hidden. The scales stand there as a whole, in order."""
        if self.mask is None or self.quantizer is None:
            raise ValueError("slots of this order hold their own elements: make the embedding with a mask")
        (kind,) = canvas.layout.kinds
        ids = canvas.value[kind]
        hidden: Bool[Tensor, "b s"] = (plan.slots.source == MASK).to(at.device).expand(len(ids), -1)
        guessed = torch.zeros_like(ids, dtype=torch.bool)
        if kind in canvas.noise:
            guessed = (canvas.status == GUESSED).to(ids.device)
            ids = torch.where(guessed, canvas.noise[kind], ids)
        begin = (0, *accumulate(rows * columns for rows, columns in shapes))
        parts, done = [], 0
        for k in range(int(scale.min()), int(scale.max()) + 1):
            n = begin[k + 1] - begin[k]
            own = ids[:, begin[k] : begin[k + 1]]
            shown = ~hidden[:, done : done + n] | guessed[:, begin[k] : begin[k + 1]]
            parts.append(self.quantizer.own_part(own, k, shown))  # type: ignore[operator]
            done += n
        own = F.linear(torch.cat(parts, 1).to(self.project.weight.dtype), self.project.weight)
        return torch.where(hidden[..., None], self.mask, own)


@lru_cache(maxsize=64)
def _shapes(layout: Layout) -> tuple[Shape, ...]:
    return shapes_of(layout)


def _picked(x: Float[Tensor, "b n d"], at: Int[Tensor, "b s"]) -> Float[Tensor, "b s d"]:
    """Rows of x, the same ones of every sample or (b, s) its own."""
    if at.shape[0] == 1:
        return x[:, at[0]]
    return x.gather(1, at[..., None].expand(-1, -1, x.shape[2]))
