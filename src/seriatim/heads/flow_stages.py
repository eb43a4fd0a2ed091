"""A flow in stages of growing resolution, each of which goes only a part of the way from noise to data.

E-CAR (Yuan et al. 2024, arXiv 2412.14170); the algebra is that of pyramidal flow matching (Jin et al. 2024, arXiv
2410.05954). With Down the mean over 2x2 values and Up their repetition, a stage at resolution r carries
x_start = s Up(Down(x_r)) + (1 - s) n to x_end = e x_r + (1 - e) n, straight, with one noise n. From the end of a stage
the next one, twice as large, begins at x_start = (1 + s)/2 Up(x_end) + sqrt(3) (1 - s)/2 n', where n' has unit variance
and sums to zero in each 2x2 block. With e = 2 s / (1 + s) that has the law on which the stage was trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from seriatim.canvas import Canvas
from seriatim.heads.denoiser import precise
from seriatim.heads.flow_map import MapFlow, MapFlowConfig, MapFlowHead
from seriatim.layout import Layout, shapes_of
from seriatim.maps import area_down, nearest_up
from seriatim.plan import Plan, Reads
from seriatim.random import Key, Random
from seriatim.tokenizers.conv import map_to_rows, rows_to_map


@dataclass(frozen=True)
class Stages:
    """How far each stage goes: the shares of signal at which it starts; the first is 0, pure noise."""

    starts: tuple[float, ...] = (0.0,)

    def __post_init__(self) -> None:
        starts = tuple(float(s) for s in self.starts)
        object.__setattr__(self, "starts", starts)
        if not starts or starts[0] != 0 or any(not a < b < 1 for a, b in pairwise(starts)):
            raise ValueError(f"stages start at growing shares of signal below 1, the first at 0; got {starts}")

    @property
    def ends(self) -> tuple[float, ...]:
        """The share of signal at which each stage ends; the last is 1."""
        return (*(2 * s / (1 + s) for s in self.starts[1:]), 1.0)

    @classmethod
    def even(cls, count: int) -> Stages:
        """So many stages that start at 0, 1/count, 2/count, ..."""
        return cls(tuple(k / count for k in range(count)))


def zero_sum(noise: Float[Tensor, "b d h w"]) -> Float[Tensor, "b d h w"]:
    """Standard normal noise turned into noise of unit variance that sums to zero in each 2x2 block: two of a block have
    covariance -1/3."""
    shape = noise.shape[2] // 2, noise.shape[3] // 2
    coarse = nearest_up(area_down(noise, shape), tuple(noise.shape[2:]))  # type: ignore[arg-type]
    return math.sqrt(4 / 3) * (noise - coarse)


def jump(end: Float[Tensor, "b d h w"], s: float, noise: Float[Tensor, "b d h2 w2"]) -> Float[Tensor, "b d h2 w2"]:
    """Where the stage behind begins, which starts at the share s of signal. noise: standard normal, of its size."""
    up = nearest_up(end, tuple(noise.shape[2:]))  # type: ignore[arg-type]
    return (1 + s) / 2 * up + math.sqrt(3) * (1 - s) / 2 * zero_sum(noise)


def pyramid_noise(finest: Float[Tensor, "b d h w"], count: int) -> list[Float[Tensor, "b d h2 w2"]]:
    """The noise of all stages, coarse to fine, that jumps lead to: each is twice the mean of the next."""
    out = [finest]
    for _ in range(count - 1):
        shape = out[0].shape[2] // 2, out[0].shape[3] // 2
        out.insert(0, 2 * area_down(out[0], shape))
    return out


@dataclass(frozen=True)
class Cells:
    """Maps of elements as maps of single values: an element of a `side` x `side` map holds a cell of `patch` x `patch`
    of them, in each channel (1: elements are what the algebra speaks of)."""

    sides: tuple[int, ...]
    patch: int = 1

    def __post_init__(self) -> None:
        if not self.sides or self.patch < 1 or any(b != 2 * a for a, b in pairwise(self.sides)):
            raise ValueError(f"each stage is twice as large as the one before, got sides {self.sides}")

    def values(self, rows: Float[Tensor, "b n d"], stage: int) -> Float[Tensor, "b c h w"]:
        """The map of a stage."""
        side = self.sides[stage]
        return F.pixel_shuffle(rows_to_map(rows, (side, side)), self.patch)

    def elements(self, values: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """The elements of a map."""
        return map_to_rows(F.pixel_unshuffle(values, self.patch))

    def span(self, stage: int) -> slice:
        """The numbers of its elements."""
        first = sum(n * n for n in self.sides[:stage])
        return slice(first, first + self.sides[stage] ** 2)

    def pyramid(self, finest: Float[Tensor, "b n d"]) -> list[Float[Tensor, "b c h w"]]:
        """The means of a finest map at all sizes, coarse to fine."""
        x, last = self.values(finest, len(self.sides) - 1), self.sides[-1]
        return [area_down(x, (x.shape[2] * n // last, x.shape[3] * n // last)) for n in self.sides]


def staged(
    finest: Float[Tensor, "b n d"], noise: Float[Tensor, "b n d"], cells: Cells, stages: Stages
) -> tuple[Float[Tensor, "b E d"], Float[Tensor, "b E d"]]:
    """Where all stages begin and where they end, for a picture and noise of the finest size."""
    clean, last = cells.pyramid(finest), len(cells.sides) - 1
    noises = pyramid_noise(cells.values(noise, last), last + 1)
    starts, ends = [], []
    for k, (x, n) in enumerate(zip(clean, noises, strict=True)):
        s, e = stages.starts[k], stages.ends[k]
        coarse = nearest_up(clean[k - 1], tuple(x.shape[2:])) if k else torch.zeros_like(x)  # type: ignore[arg-type]
        starts.append(cells.elements(s * coarse + (1 - s) * n))
        ends.append(cells.elements(e * x + (1 - e) * n))
    return torch.cat(starts, 1), torch.cat(ends, 1)


@dataclass(frozen=True)
class StagedFlowConfig(MapFlowConfig):
    """Sizes and choices of a flow in stages, beside those of a flow over maps. split: the steps of each stage (none:
    `steps` each)."""

    split: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(n < 1 for n in self.split):
            raise ValueError(f"every stage takes at least 1 step, got {self.split}")


class StagedFlow(MapFlow):
    """The law of the end of a stage, behind the end of the stage before, which stands on the canvas. Draw 0 of an
    element is the noise of its stage: all of it in the first, that of the jump in the others."""

    __slots__ = ("canvas", "element")

    def __init__(
        self, head: Any, states: Float[Tensor, "k b m d"], weights: Sequence[float | Tensor] = (1.0,),
        warper: Any = None, plan: Plan | None = None, canvas: Canvas | None = None,
        element: Int[Tensor, "#b m"] | None = None,
    ):  # fmt: skip
        super().__init__(head, states, weights, warper, plan)
        self.canvas, self.element = canvas, element

    def _with(self, states: Float[Tensor, "k b m d"], weights: Sequence[float | Tensor], warper: Any) -> Self:
        return type(self)(self.head, states, weights, warper, self.plan, self.canvas, self.element)

    @property
    def stage(self) -> int:
        """That of what is read. Raises ValueError where that is no stage as a whole."""
        cells, element = self.head.cells, self.element
        assert element is not None
        stage = int(self.head.map[int(element[0].clamp(min=0)[0])])
        span = cells.span(stage)
        if element.shape[1] != span.stop - span.start or int(element.min()) != span.start:
            raise ValueError("a stage is drawn as a whole, and a part of it is known: stages are not filled in")
        return stage

    @property
    def steps(self) -> int:
        c = self.head.config
        return c.split[self.stage] if c.split else c.steps

    def start(self, random: Random, key: Key) -> Float[Tensor, "b m d"]:
        noise, stage, cells = super().start(random, key), self.stage, self.head.cells
        if not stage:
            self.met(noise, -1)
            return noise
        assert self.canvas is not None
        before = self.canvas.value["token"][:, cells.span(stage - 1)].to(noise)
        begun = jump(cells.values(before, stage - 1), self.head.stages.starts[stage], cells.values(noise, stage))
        x = cells.elements(begun)
        self.met(x, -1)
        return x

    def met(self, x: Float[Tensor, "b m d"], step: int) -> None:
        if self.head.watch is not None:
            self.head.watch(self.stage, step, x)

    def loss(self, value: Float[Tensor, "b m d"]) -> Float[Tensor, "b m"]:
        """Squared error of the predicted velocity of all that is read: from `Canvas.noise`, where each stage begins, to
        `value`, at times 1 - `Canvas.level`."""
        canvas, element = self.canvas, self.element
        assert canvas is not None and element is not None and self.plan is not None
        if "token" not in canvas.noise or canvas.level is None:
            raise TypeError("the loss of a stage needs its beginning on the canvas: train a `Staged` model")
        h = self.states[0]
        begin, t = (x[:, element[0]].to(h.device, precise(h)) for x in (canvas.noise["token"], 1 - canvas.level))
        value, net = value.to(begin), self.head.net
        said = net(torch.lerp(begin, value, t[..., None]), t, net.told(h, self.plan), self.plan)
        return (said.to(begin) - (value - begin)).square().mean(-1)


class StagedFlowHead(MapFlowHead):
    """Maps by a flow in stages: each map of a pyramid is the end of one, half denoised but for the last.

    patch: the side of a cell of single values in an element. watch: is told the stage, the step (-1: where it begins)
    and the vectors while something is drawn.
    """

    in_place = True

    def __init__(
        self, width: int, dim: int, layout: Layout, stages: Stages, patch: int = 1,
        config: StagedFlowConfig | None = None,
    ):  # fmt: skip
        super().__init__(width, dim, layout, config or StagedFlowConfig())
        self.stages = stages
        self.cells = Cells(tuple(rows for rows, _ in shapes_of(layout)), patch)
        split = getattr(self.config, "split", ())
        if len(stages.starts) != len(self.cells.sides) or len(split) not in (0, len(self.cells.sides)):
            raise ValueError(f"{len(self.cells.sides)} maps are as many stages: {stages.starts}, steps {split}")
        if dim % patch**2:
            raise ValueError(f"elements of {dim} numbers hold no cells of {patch} x {patch}")
        self.watch: Callable[[int, int, Tensor], None] | None = None

    def dist(self, h: Float[Tensor, "b m w"], reads: Reads, canvas: Canvas) -> StagedFlow:
        return StagedFlow(self, h[None], plan=self.plan(reads.element), canvas=canvas, element=reads.element)
