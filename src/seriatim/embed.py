"""What stands in slots, as vectors: values, masks, noise, learned starts, conditions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from seriatim.canvas import Canvas
from seriatim.decoding.guess import Guess
from seriatim.factorization.line import LinePlan
from seriatim.heads.denoiser import FREQUENCIES, time_features
from seriatim.initial import drawn
from seriatim.plan import LEARNED, MASK, NOISE, Plan


class Embed(Protocol):
    """Vectors for the slots of a plan."""

    def __call__(
        self, canvas: Canvas, plan: Plan, guess: Guess | None = None, prefix: Tensor | None = None
    ) -> Float[Tensor, "b s d"]:
        """`prefix` (b, n, d) stands in the learned slots: a class, a learned start."""
        ...


class SlotEmbed(nn.Module):
    """What stands in slots of one kind: subclasses give `vectors`, the content; the rest is here.

    A slot that carries several elements gets the sum of their vectors; one that carries a mask the mask vector; one
    that carries noise the vector of `Canvas.noise`. Learned positions by coordinate, one table an axis, are added.
    """

    kind: str
    width: int
    start: nn.Parameter | None
    mask: nn.Parameter | None
    positions: nn.ParameterList

    def vectors(self, value: Tensor) -> Float[Tensor, "*rest d"]:
        """The vector of each value."""
        raise NotImplementedError

    def together(self, x: Float[Tensor, "b s c d"], there: Bool[Tensor, "b s c 1"]) -> Float[Tensor, "b s d"]:
        """One vector of those of the elements that a slot carries, where they are `there`: their sum."""
        return (x * there.to(x)).sum(2)

    def levels(self, level: Float[Tensor, "b s"]) -> Float[Tensor, "b s d"] | None:
        """What is added where noise of a level (1: pure noise) stands; None: nothing."""
        return None

    def _furnish(self, width: int, kind: str, positions: Sequence[int], mask: bool, start: bool, std: float) -> None:
        """The vectors that are not of values."""
        self.kind, self.width = kind, width
        self.start = nn.Parameter(drawn(width, std=std)) if start else None
        self.mask = nn.Parameter(drawn(width, std=std)) if mask else None
        self.positions = nn.ParameterList(nn.Parameter(drawn(n, width, std=std)) for n in positions)
        self._placed = len(positions) > 0

    def forward(
        self, canvas: Canvas, plan: Plan, guess: Guess | None = None, prefix: Tensor | None = None
    ) -> Float[Tensor, "b s d"]:
        if not isinstance(plan, LinePlan):
            x = self._slots(canvas, plan, guess, prefix)
        elif guess is None and plan.base >= plan.prefix:
            x = self.vectors(canvas.value[self.kind].narrow(1, plan.base - plan.prefix, plan.size))
        else:
            x = self._run(canvas, plan, guess, prefix)
        if self._placed:
            for axis, table in enumerate(self.positions):
                x = x + _positions(table, plan, axis)[..., : x.shape[1], :]
        return x if not plan.spawns else x[:, : plan.spawns[0].first]

    def _run(self, canvas: Canvas, plan: LinePlan, guess: Guess | None, prefix: Tensor | None) -> Tensor:
        first = plan.base - plan.prefix
        start = max(first, 0)
        value = canvas.value[self.kind].narrow(1, start, first + plan.shape.known - start)
        if guess is not None:
            value = torch.cat([value, _drafted(guess)], 1)
        x = self.vectors(value)
        if plan.masks:
            if self.mask is None:
                raise _no_mask(self)
            x = torch.cat([x, self.mask.to(x.dtype).expand(x.shape[0], plan.masks, -1)], 1)
        if first < 0:
            vectors = self._prefix(prefix, canvas.batch, plan.prefix)
            if vectors.shape[1] != plan.prefix:
                raise _misfit(vectors.shape[1], plan.prefix)
            x = torch.cat([vectors[:, first:].to(x.dtype), x], 1)
        return x

    def _prefix(self, prefix: Tensor | None, batch: int, n: int) -> Float[Tensor, "b n d"]:
        if prefix is not None:
            return prefix
        if self.start is None:
            raise ValueError("nothing stands in the prefix slots: give a condition with a prefix, or use start=True")
        return self.start.expand(batch, n, -1)

    def _slots(self, canvas: Canvas, plan: Plan, guess: Guess | None, prefix: Tensor | None) -> Tensor:
        slots, b = plan.slots, canvas.batch
        source = slots.source.to(canvas.value[self.kind].device)
        noisy, masked, learned = source == NOISE, source == MASK, source == LEARNED
        value = gather_values(canvas, slots.element, self.kind)
        if bool(noisy.any()):
            value = _where(noisy, gather_values(canvas, slots.element, self.kind, noise=True), value)
        if guess is not None and guess.size and slots.node is not None:
            node = slots.node.expand(b, -1)
            drafted = _drafted(guess)[torch.arange(b)[:, None], node.clamp(min=0)]
            value = _where(node >= 0, drafted[:, :, None], value)
        x = self.together(self.vectors(value), (slots.element >= 0)[..., None])
        noisy, masked, learned = noisy.to(x.device), masked.to(x.device), learned.to(x.device)
        if bool(noisy.any()) and canvas.level is not None:
            level = canvas.level.expand(b, -1).gather(1, slots.element[..., 0].clamp(min=0).expand(b, -1))
            more = self.levels(level.to(x))
            x = x if more is None else torch.where(noisy[..., None], x + more, x)
        if bool(learned.any()):
            index = torch.where(learned, slots.coord[..., 0].to(x.device), 0)
            needed = int(index.max()) + 1
            vector = self._prefix(prefix, b, needed).to(x.dtype)
            if vector.shape[1] < needed:
                raise _misfit(vector.shape[1], needed)
            vector = vector.gather(1, index.expand(b, -1)[..., None].expand(-1, -1, vector.shape[-1]))
            x = torch.where(learned[..., None], vector, x)
        if self.mask is not None:
            x = torch.where(masked[..., None], self.mask, x)
        elif bool(masked.any()):
            raise _no_mask(self)
        return x.expand(b, -1, -1)


def _no_mask(embed: SlotEmbed) -> ValueError:
    return ValueError(f"slots of this order hold masks, and {type(embed).__name__} has no mask: use mask=True")


def _positions(table: Float[Tensor, "n d"], plan: Plan, axis: int) -> Float[Tensor, "b s d"]:
    """Learned vectors of the slots' places on one axis: a slice for a run, else by coordinate."""
    if plan.run is not None and axis == 0:
        start, offset = plan.run
        if offset is None and start + plan.size <= table.shape[0]:
            return table[start : start + plan.size]
    coord = plan.slots.coord
    if axis >= coord.shape[-1]:
        raise ValueError(f"positions have {axis + 1} axes or more, the coordinates of these slots {coord.shape[-1]}")
    place = coord[..., axis].clamp(min=0)  # padding stands nowhere
    if place.numel() and int(place.max()) >= table.shape[0]:
        raise ValueError(f"coordinate {int(place.max())} on axis {axis}, but there are only {table.shape[0]} positions")
    return F.embedding(place.to(table.device), table)


class TokenEmbed(SlotEmbed):
    """Ids of one kind through a table; `scale` multiplies its vectors (Gemma: the root of the width)."""

    def __init__(
        self, vocab: int, width: int, kind: str = "token", positions: Sequence[int] = (), mask: bool = False,
        start: bool = True, std: float = 0.02, scale: float = 1.0,
    ):  # fmt: skip
        super().__init__()
        self.vocab, self.scale = vocab, scale
        self.table = nn.Parameter(drawn(vocab, width, std=std))
        self._furnish(width, kind, positions, mask, start, std)

    def vectors(self, value: Int[Tensor, "*rest"]) -> Float[Tensor, "*rest d"]:
        x = torch.embedding(self.table, value)
        return x if self.scale == 1 else x * _rounded(self.scale, x.dtype)


@lru_cache(maxsize=8)
def _rounded(number: float, dtype: torch.dtype) -> float:
    """As a number format has it: models were trained with that."""
    return torch.tensor(number, dtype=dtype, device="cpu").item()


class CodesEmbed(SlotEmbed):
    """D ids an element (residual quantization, parallel codebooks): the sum of their vectors, a table a depth."""

    def __init__(
        self, vocab: int, depth: int, width: int, kind: str = "token", positions: Sequence[int] = (),
        mask: bool = False, start: bool = True, std: float = 0.02,
    ):  # fmt: skip
        super().__init__()
        self.vocab = vocab
        self.table = nn.Parameter(drawn(depth, vocab, width, std=std))
        self._furnish(width, kind, positions, mask, start, std)

    def vectors(self, value: Int[Tensor, "*rest D"]) -> Float[Tensor, "*rest d"]:
        depth = torch.arange(self.table.shape[0], device=value.device)
        return self.table[depth, value].sum(-2)


class VectorEmbed(SlotEmbed):
    """Vectors of `dim` numbers through a linear map. With `noise`, the level of noise is told where noise stands, as in
    a denoiser: by a small network over its cosines and sines."""

    def __init__(
        self, dim: int, width: int, kind: str = "token", positions: Sequence[int] = (), mask: bool = False,
        noise: bool = False, start: bool = True, std: float = 0.02,
    ):  # fmt: skip
        super().__init__()
        self.project = nn.Linear(dim, width)
        self.level = None
        if noise:
            self.level = nn.Sequential(nn.Linear(2 * FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self._furnish(width, kind, positions, mask, start, std)

    def vectors(self, value: Float[Tensor, "*rest dim"]) -> Float[Tensor, "*rest d"]:
        return self.project(value.to(self.project.weight.dtype))

    def levels(self, level: Float[Tensor, "b s"]) -> Float[Tensor, "b s d"] | None:
        return None if self.level is None else self.level(time_features(1000 * level))


def gather_values(canvas: Canvas, element: Int[Tensor, "b s c"], kind: str, noise: bool = False) -> Tensor:
    """The values of elements of a kind, or the noise that stands in them, (b, s, c) or (b, s, c, d); anything where
    `element` is -1. Raises ValueError where the canvas holds no noise."""
    store = canvas.noise if noise else canvas.value
    if kind not in store:
        raise ValueError(f"slots of this order hold the noise of {kind!r}, and the canvas has none: set canvas.noise")
    value = store[kind]
    index = canvas.layout.index[element.clamp(min=0)].expand(value.shape[0], -1, -1).to(value.device)
    rows = torch.arange(value.shape[0], device=value.device)[:, None, None]
    return value[rows, index.clamp(max=value.shape[1] - 1)]


def _misfit(given: int, slots: int) -> ValueError:
    return ValueError(f"a condition gives a prefix of {given} vectors for {slots} prefix slots; make them equally many")


def _drafted(guess: Guess) -> Tensor:
    """The values of a guess's nodes; ids of missing ones (-1) become 0."""
    return guess.value if guess.value.is_floating_point() else guess.value.clamp(min=0)


def _where(chosen: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Values (b, s, c) or (b, s, c, d) of a at chosen slots (b, s), of b elsewhere."""
    return torch.where(chosen.reshape(*chosen.shape, *[1] * (b.dim() - 2)), a, b)
