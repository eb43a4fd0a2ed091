"""In which order a system draws a picture, watched while it draws one: nothing of it is typed in.

Each system is built at its default size with random weights and decodes one canvas by its own way; what is decided by
which forward, and how much at once, is read off the canvas after every step.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from seriatim.canvas import DECIDED
from seriatim.decoding.loop import decode
from seriatim.evaluation.order_svg import order_svg
from seriatim.random import Generator
from seriatim.systems.decoders import decoder_of
from seriatim.systems.image_system import ImageSystem
from seriatim.systems.meta import catalogue, load

Level = Literal["pixel", "token", "scale"]


@dataclass(frozen=True)
class ImageOrder:
    """What was watched. level: what a picture is made of: pixels, the ids or vectors of one map, or maps of several
    sizes; element: ids or vectors; coord: of each element that is not given; turn: the step that decided it, from 0;
    forwards: of the model, one after another; groups: least and most elements that a step decides; held: the most bytes
    of its cache between two steps."""

    key: str
    title: str
    level: Level
    element: Literal["ids", "vectors"]
    likelihood: str
    coord: Int[Tensor, "n axes"]
    turn: Int[Tensor, "n"]
    forwards: int
    groups: tuple[int, int]
    held: int

    @property
    def steps(self) -> int:
        """How many steps decide something."""
        return len(self.turn.unique())


def class_of(key: str) -> Any:
    """The class of a system. Raises KeyError for one that there is not."""
    module: Any = load(key)
    return next(c for _, c in inspect.getmembers(module, inspect.isclass) if getattr(c, "meta", None) is module.META)


def system_of(key: str) -> ImageSystem:
    """A system of pictures at its default size, with random weights and no tokenizer."""
    cls = class_of(key)
    torch.manual_seed(0)
    return cls(cls.Config(), None).eval().requires_grad_(False)


@torch.inference_mode()
def watched(key: str, system: ImageSystem | None = None, seed: int = 0) -> ImageOrder:
    """How a system draws one picture (None: at its default size), unguided. Raises KeyError for an unknown one,
    ValueError where it draws none."""
    meta = catalogue()[key][0]
    if meta.family != "image":
        raise ValueError(f"{key} is of the family {meta.family}: orders are watched of systems of pictures")
    system = system or system_of(key)
    sampling, label = replace(system.sampling, guidance=0.0), torch.tensor([0])
    canvas = system.blank(label, 1, sampling, seed)
    way = decoder_of(system, "own", sampling, ())
    target = system.target(system.condition(label, 1), sampling, **way.target)
    turn, forwards, held, due = torch.full((canvas.layout.size,), -1), 0, 0, canvas.open[0]
    for i, step in enumerate(decode(target, canvas, way.decider, way.proposer, Generator(seed))):
        forwards += step.forwards
        held = max(held, 0 if target.cache is None or canvas.done else target.cache.nbytes())
        turn = torch.where((canvas.status == DECIDED)[0] & (turn < 0), i, turn)
    turn, coord = turn[due], torch.cat([segment.coord for segment in canvas.layout.segments])[due]
    sizes = turn[turn >= 0].unique(return_counts=True)[1]
    vectors = canvas.value[canvas.layout.kinds[0]].is_floating_point()
    return ImageOrder(
        key, meta.title, level_of(system, coord), "vectors" if vectors else "ids", meta.likelihood, coord, turn,
        forwards, (int(sizes.min()), int(sizes.max())), held,
    )  # fmt: skip


def level_of(system: ImageSystem, coord: Int[Tensor, "n axes"]) -> Level:
    """By the sizes of its maps, and by what its usual tokenizer makes of a picture of 32x32 in grey."""
    if coord.shape[1] == 3 and len(coord[:, 0].unique(return_counts=True)[1].unique()) > 1:
        return "scale"
    return "pixel" if type(system).tokenizer_for((1, 32, 32)) == "pixels" else "token"


def animated(order: ImageOrder) -> str:
    """An order as an animation, SVG."""
    maps = [
        [(*place, int(order.turn[i])) for i, place in zip(index.tolist(), places.tolist(), strict=True)]
        for index, places in maps_of(order)
    ]
    return order_svg(maps, int(order.turn.max()) + 1)  # type: ignore[arg-type]


def maps_of(order: ImageOrder) -> list[tuple[Int[Tensor, "n"], Int[Tensor, "n 2"]]]:
    """Elements by the map they stand in, with row and column. A pyramid has several maps; a line is broken into
    rows."""
    coord, n = order.coord, torch.arange(len(order.turn))
    if coord.shape[1] == 1:
        side = round(len(n) ** 0.5)
        return [(n, torch.stack([n // side, n % side], 1))]
    if coord.shape[1] == 2:
        return [(n, coord)]
    return [(n[coord[:, 0] == i], coord[coord[:, 0] == i][:, 1:]) for i in coord[:, 0].unique()]
