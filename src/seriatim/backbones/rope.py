"""Rotary position embedding over one to three axes, from explicit coordinates (Su et al. 2021; axial as in ViT use).

Half-split convention: the first half of a head's dimensions is rotated against the second. With several axes the
frequencies are shared out among them, axis by axis.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from seriatim.plan import LEARNED, Plan


@dataclass(frozen=True)
class Stretch:
    """How frequencies are changed for texts longer than those of the first training, of `length` tokens.

    linear: all divided by `factor` (position interpolation, Chen et al. 2023). dynamic: the base grows with the text,
    beyond `length` (NTK). yarn: slow ones divided, fast ones kept, between them a ramp over the dimensions that turn
    `fast` to `slow` times within `length` (Peng et al. 2023, arXiv 2309.00071). llama3: the same over wavelengths from
    `length / fast` to `length / slow`, smooth in their inverse. longrope: each divided by its own number, `near` up to
    `length` and `far` beyond (Ding et al. 2024, arXiv 2402.13753). attention: the factor on queries and keys (None: as
    the method says); truncate: yarn's ramp begins and ends at whole dimensions.
    """

    kind: Literal["linear", "dynamic", "yarn", "llama3", "longrope"]
    factor: float
    length: int = 0
    fast: float = 32.0
    slow: float = 1.0
    attention: float | None = None
    truncate: bool = True
    near: tuple[float, ...] = ()
    far: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.factor > 0 or (self.kind != "linear" and self.length < 1):
            raise ValueError(
                f"a stretch ({self.kind}) has a positive factor and the length of the first training, got "
                f"{self.factor} and {self.length}"
            )

    @property
    def grows(self) -> bool:
        """Whether frequencies depend on the length of the text."""
        return self.kind in ("dynamic", "longrope")

    @property
    def scale(self) -> float:
        """The factor on cosines and sines."""
        if self.attention is not None:
            return self.attention
        if self.kind == "yarn" and self.factor > 1:
            return 0.1 * math.log(self.factor) + 1
        if self.kind == "longrope" and self.factor > 1:
            return math.sqrt(1 + math.log(self.factor) / math.log(self.length))
        return 1.0

    def frequencies(self, theta: float, dims: int, length: Float[Tensor, "b 1"]) -> Float[Tensor, "b half"]:
        """Of texts of these lengths."""
        turns = torch.arange(0, dims, 2, dtype=torch.float64, device=length.device) / dims
        plain = theta ** -turns[None]
        if self.kind == "linear":
            return plain / self.factor
        if self.kind == "dynamic":
            grown = (self.factor * length / self.length - (self.factor - 1)).clamp(min=1)
            return (theta * grown ** (dims / (dims - 2))) ** -turns
        if self.kind == "longrope":
            near, far = (torch.tensor(x, dtype=torch.float64, device=length.device) for x in (self.near, self.far))
            return plain / torch.where(length > self.length, far, near)
        if self.kind == "llama3":
            kept = (self.length * plain / (2 * math.pi) - self.slow) / (self.fast - self.slow)
        else:
            first, last = (
                dims * math.log(self.length / (r * 2 * math.pi)) / (2 * math.log(theta)) for r in (self.fast, self.slow)
            )
            if self.truncate:
                first, last = math.floor(first), math.ceil(last)
            first, last = max(first, 0), min(last, dims - 1)
            kept = 1 - (torch.arange(dims // 2, device=length.device) - first) / max(last - first, 0.001)
        kept = kept.clamp(0, 1).to(plain)
        return plain * kept + plain / self.factor * (1 - kept)


@dataclass(frozen=True)
class RoPE:
    """`theta` is the base; `axes` how many dimensions of a head each axis takes (None: one axis takes all); `dims` how
    many are turned at all, from the first (None: all). crossed: a dimension of the first half of a head is paired with
    one of the second half, each with the angle of its own axis, and the slowest frequency of an axis is one over its
    base (the released ACDiT; no rotation in the strict sense). raster: slots along a line are so many in front, whose
    queries and keys become zero, then a grid of so many columns in raster order: its rows and columns are the two axes
    (the released LlamaGen). still: the same of slots that hold what is learned, wherever they are: their queries and
    keys become zero (the released NAR)."""

    theta: float = 10_000.0
    axes: tuple[int, ...] | None = None
    dims: int | None = None
    stretch: Stretch | None = None
    crossed: bool = False
    raster: tuple[int, int] | None = None
    still: bool = False

    def __post_init__(self) -> None:
        if not self.theta > 0:
            raise ValueError(f"the base of rotary embedding is positive, got {self.theta}")
        if self.stretch is not None and self.axes is not None:
            raise ValueError("frequencies are stretched along a line, not over several axes")
        if self.raster is not None and (len(self.axes or ()) != 2 or self.crossed or self.raster[1] < 1):
            raise ValueError(f"a line becomes a grid of two axes with at least one column, got {self}")


class RotaryTable:
    """Cosines and sines of coordinates; runs of one axis are slices of one table, made once."""

    def __init__(self, rope: RoPE, head_dim: int):
        turned = head_dim if rope.dims is None else rope.dims
        axes = rope.axes or (turned,)
        if sum(axes) != turned or turned > head_dim or any(a % 2 for a in axes):
            raise ValueError(f"rotary axes {axes} must be even and add up to the head dimension {turned}")
        self.axes, self.rope = len(axes), rope
        turns = [torch.arange(0, a, 2, dtype=torch.float64, device="cpu") / a for a in axes]
        if rope.crossed:
            turns = [torch.linspace(0, 1, a // 2, dtype=torch.float64, device="cpu") for a in axes]
        self.frequency = [rope.theta ** (-turn) for turn in turns]
        stretch = rope.stretch
        if (
            stretch is not None
            and stretch.kind == "longrope"
            and not len(stretch.near) == len(stretch.far) == axes[0] // 2
        ):
            raise ValueError(f"longrope names a factor for each of {axes[0] // 2} frequencies, near and far")
        self.grows = stretch is not None and stretch.grows
        self._runs: dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}

    def at(
        self, coord: Int[Tensor, "b s axes"], dtype: torch.dtype, near: bool = False
    ) -> tuple[Float[Tensor, "b s 1 d"], Tensor]:
        """Cosine and signed sine for explicit coordinates; `near`: as for a text as short as in the first training."""
        there = None
        if self.rope.raster is not None:
            place = coord[..., 0] - self.rope.raster[0]
            there, columns = place >= 0, self.rope.raster[1]
            coord = torch.stack([place.clamp(min=0) // columns, place.clamp(min=0) % columns], -1)
        if coord.shape[-1] < self.axes:
            raise ValueError(f"rotary embedding over {self.axes} axes met coordinates with {coord.shape[-1]}")
        scale, stretch = 1.0, self.rope.stretch
        if stretch is None:
            parts = [coord[..., i, None] * f.to(coord.device) for i, f in enumerate(self.frequency)]
            if self.rope.crossed:
                angle = torch.cat([x for part in parts for x in (part, part)], -1)[..., None, :]
                sign = torch.ones(angle.shape[-1], device=coord.device)
                sign[: len(sign) // 2] = -1
                return angle.cos().to(dtype), (angle.sin() * sign).to(dtype)
            angle = torch.cat(parts, -1)
        else:
            length = coord[..., 0].amax(1, keepdim=True).double() + 1
            length = torch.zeros_like(length) if near else length
            frequency = stretch.frequencies(self.rope.theta, 2 * len(self.frequency[0]), length)
            angle, scale = coord[..., 0, None] * frequency[:, None], stretch.scale
        cos, sin = angle.cos() * scale, angle.sin() * scale
        cos, sin = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
        if there is not None:
            cos, sin = (torch.where(there[..., None], x, 0) for x in (cos, sin))
        return cos.to(dtype)[..., None, :], sin.to(dtype)[..., None, :]

    def of(self, plan: Plan, x: Tensor) -> tuple[Tensor, Tensor]:
        """For the slots of a plan, in the number format of the vectors x."""
        if self.rope.still:
            cos, sin = self.at(plan.slots.coord.to(x.device), x.dtype)
            turned = (plan.slots.source != LEARNED).to(x.device)[..., None, None]
            return cos * turned, sin * turned
        if plan.run is None:
            return self.at(plan.slots.coord.to(x.device), x.dtype)
        start, offset = plan.run
        return self.run(start, plan.size, x.dtype, x.device, offset)

    def run(
        self, start: int, n: int, dtype: torch.dtype, device: torch.device, offset: Int[Tensor, "s"] | None = None
    ) -> tuple[Tensor, Tensor]:
        """For positions start .. start + n - 1 of one axis, as slices; with offsets (a draft tree's depths, which
        reach no further) for start + offset."""
        if self.grows and start + n > self.rope.stretch.length:  # type: ignore[union-attr]
            place = start + (torch.arange(n) if offset is None else offset)
            cos, sin = self.at(place.to(device)[None, :, None], dtype)
            return cos[0], sin[0]
        cos, sin = self._runs.get((dtype, device)) or self._table(start + n, dtype, device)
        if start + n > cos.shape[0]:
            cos, sin = self._table(start + n, dtype, device)
        cos, sin = cos.narrow(0, start, n), sin.narrow(0, start, n)
        return (cos, sin) if offset is None else (cos[offset], sin[offset])

    def _table(self, needed: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        if self.axes > 1 and self.rope.raster is None:
            raise ValueError(f"rotary embedding over {self.axes} axes met slots along a line, which have one")
        with torch.inference_mode(False):  # the table outlives the loop that first asks for it
            place = torch.arange(max(256, 2 * needed), device=device)[None, :, None]
            cos, sin = self.at(place, dtype, near=True)
        self._runs[dtype, device] = cos[0], sin[0]
        return cos[0], sin[0]


def rotate(x: Float[Tensor, "b s h d"], cos: Tensor, sin: Tensor) -> Float[Tensor, "b s h d"]:
    """Turn queries or keys; cos and sin are (s, 1, d) or (b, s, 1, d). Where they are narrower than a head, the rest
    of it stays."""
    turned = cos.shape[-1]
    if turned < x.shape[-1]:
        return torch.cat([rotate(x[..., :turned], cos, sin), x[..., turned:]], -1)
    return torch.addcmul(x * cos, x.roll(turned // 2, -1), sin)
