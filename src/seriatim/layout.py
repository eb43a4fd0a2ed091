"""What is generated: elements in typed segments, whatever the order in which they are decided.

Knows nothing of orders, models or batches. An *element* is one thing that is generated (a token, a latent, a frame's
patch, an action). Elements are numbered through all segments; numbers are never reused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Segment:
    """A typed run of elements.

    `kind` routes embedding, head and loss. `coord` has one row an element (position, or scale/row/column, ...).
    `given` marks prompts and controls, which are never read out. `same_as` names the kind of another segment that
    holds the same datum and that this one is made from (the ids of an action vector): neither may leak into the other,
    but once the other is decided, this one may see its value.
    """

    kind: str
    coord: Int[Tensor, "n axes"]
    given: bool = False
    same_as: str | None = None

    def __post_init__(self) -> None:
        if self.coord.dim() != 2 or self.coord.is_floating_point():
            raise ValueError(
                f"segment {self.kind!r}: coord must be an integer tensor (elements, axes), got "
                f"{tuple(self.coord.shape)} {self.coord.dtype}"
            )

    def __len__(self) -> int:
        return self.coord.shape[0]


@dataclass(frozen=True, eq=False)
class Layout:
    """All elements of one sample, as a sequence of segments."""

    segments: tuple[Segment, ...]

    @cached_property
    def size(self) -> int:
        """Number of elements."""
        return sum(len(s) for s in self.segments)

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """The kinds that occur, in order of first appearance."""
        return tuple(dict.fromkeys(s.kind for s in self.segments))

    @cached_property
    def kind(self) -> Int[Tensor, "E"]:
        """Index into `kinds` of each element."""
        return torch.cat([torch.full((len(s),), self.kinds.index(s.kind)) for s in self.segments])

    @cached_property
    def coord(self) -> Int[Tensor, "E axes"]:
        """Coordinates of each element; segments with fewer axes are padded with zeros."""
        axes = max(s.coord.shape[1] for s in self.segments)
        return torch.cat([torch.nn.functional.pad(s.coord, (0, axes - s.coord.shape[1])) for s in self.segments])

    @cached_property
    def given(self) -> Tensor:
        """True for elements of given segments (boolean, one an element)."""
        return torch.cat([torch.full((len(s),), s.given) for s in self.segments])

    @cached_property
    def index(self) -> Int[Tensor, "E"]:
        """Where each element stands among the elements of its kind: its column in `Canvas.value[kind]`."""
        seen = dict.fromkeys(self.kinds, 0)
        parts = []
        for s in self.segments:
            parts.append(torch.arange(seen[s.kind], seen[s.kind] + len(s)))
            seen[s.kind] += len(s)
        return torch.cat(parts)

    @cached_property
    def datum(self) -> Int[Tensor, "E"]:
        """Equal numbers for segments that hold the same datum (`same_as`, whichever of them says so)."""
        number = {kind: i for i, kind in enumerate(self.kinds)}
        for s in self.segments:
            if s.same_as is None:
                continue
            if s.same_as not in number:
                raise ValueError(f"segment {s.kind!r} is the same as {s.same_as!r}, which is not in {self.kinds}")
            mine, other = number[s.kind], number[s.same_as]
            number = {kind: other if n == mine else n for kind, n in number.items()}
        return torch.cat([torch.full((len(s),), number[s.kind]) for s in self.segments])

    @cached_property
    def follows(self) -> Bool[Tensor, "E E"]:
        """follows[e, f]: the segment of e says that it is the same datum as that of f (`same_as`)."""
        says = torch.tensor([[s.same_as == other.kind for other in self.segments] for s in self.segments])
        sizes = torch.tensor([len(s) for s in self.segments])
        return says.repeat_interleave(sizes, 0).repeat_interleave(sizes, 1)

    def count(self, kind: str) -> int:
        """Number of elements of a kind."""
        return sum(len(s) for s in self.segments if s.kind == kind)

    def elements(self, kind: str) -> Int[Tensor, "n"]:
        """The element numbers of a kind, in order."""
        if kind not in self.kinds:
            raise KeyError(f"no segment of kind {kind!r}; this layout has {', '.join(self.kinds)}")
        return (self.kind == self.kinds.index(kind)).nonzero()[:, 0]

    def then(self, other: Layout) -> Layout:
        """Both, one after the other: text + image + action is one layout."""
        return Layout(self.segments + other.segments)


def line(length: int, kind: str = "token", given: bool = False, start: int = 0) -> Layout:
    """`length` elements in a row."""
    if length < 0:
        raise ValueError(f"a line needs a length of at least 0, got {length}")
    return Layout((Segment(kind, torch.arange(start, start + length, device="cpu")[:, None], given),))


def grid(*shape: int, kind: str = "token") -> Layout:
    """Rows x columns (or frames x rows x columns, ...), numbered in raster order."""
    if not shape or min(shape) < 1:
        raise ValueError(f"a grid needs positive sizes, got {shape}")
    axes = [torch.arange(n) for n in shape]
    return Layout((Segment(kind, torch.cartesian_prod(*axes).reshape(-1, len(shape))),))


def pyramid(scales: Sequence[int | tuple[int, int]], kind: str = "token") -> Layout:
    """Maps of growing size, coarse to fine, each by its side or by (rows, columns); coordinates are (scale, row,
    column)."""
    shapes = tuple((side, side) if isinstance(side, int) else tuple(side) for side in scales)
    if not shapes or any(len(shape) != 2 or min(shape) < 1 for shape in shapes):
        raise ValueError(f"a pyramid needs positive scales, got {tuple(scales)}")
    coord = [[k, i, j] for k, (rows, columns) in enumerate(shapes) for i in range(rows) for j in range(columns)]
    return Layout((Segment(kind, torch.tensor(coord)),))


def shapes_of(layout: Layout) -> tuple[tuple[int, int], ...]:
    """Rows and columns of each map of a pyramid."""
    scale, row, column = layout.coord.unbind(1)
    size = torch.zeros(int(scale.max()) + 1, 2, dtype=torch.long)
    size = size.scatter_reduce(0, scale[:, None].expand(-1, 2), torch.stack([row, column], 1) + 1, "amax")
    return tuple((rows, columns) for rows, columns in size.tolist())
