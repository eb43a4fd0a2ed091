"""Rotary position embedding over one to three axes, from explicit coordinates (Su et al. 2021; axial as in ViT use).

Half-split convention: the first half of a head's dimensions is rotated against the second. With several axes the
frequencies are shared out among them, axis by axis.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from seriatim.plan import Plan


@dataclass(frozen=True)
class RoPE:
    """`theta` is the base; `axes` how many dimensions of a head each axis takes (None: one axis takes all)."""

    theta: float = 10_000.0
    axes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not self.theta > 0:
            raise ValueError(f"the base of rotary embedding is positive, got {self.theta}")


class RotaryTable:
    """Cosines and sines of coordinates; runs of one axis are slices of one table, made once."""

    def __init__(self, rope: RoPE, head_dim: int):
        axes = rope.axes or (head_dim,)
        if sum(axes) != head_dim or any(a % 2 for a in axes):
            raise ValueError(f"rotary axes {axes} must be even and add up to the head dimension {head_dim}")
        self.axes = len(axes)
        self.frequency = [rope.theta ** (-torch.arange(0, a, 2, dtype=torch.float64) / a) for a in axes]
        self._runs: dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}

    def at(self, coord: Int[Tensor, "b s axes"], dtype: torch.dtype) -> tuple[Float[Tensor, "b s 1 d"], Tensor]:
        """Cosine and signed sine for explicit coordinates."""
        if coord.shape[-1] < self.axes:
            raise ValueError(f"rotary embedding over {self.axes} axes met coordinates with {coord.shape[-1]}")
        angle = torch.cat([coord[..., i, None] * f.to(coord.device) for i, f in enumerate(self.frequency)], -1)
        cos, sin = angle.cos(), angle.sin()
        cos, sin = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
        return cos.to(dtype)[..., None, :], sin.to(dtype)[..., None, :]

    def of(self, plan: Plan, x: Tensor) -> tuple[Tensor, Tensor]:
        """For the slots of a plan, in the number format of the vectors x."""
        if plan.run is None:
            return self.at(plan.slots.coord.to(x.device), x.dtype)
        start, offset = plan.run
        return self.run(start, plan.size, x.dtype, x.device, offset)

    def run(
        self, start: int, n: int, dtype: torch.dtype, device: torch.device, offset: Int[Tensor, "s"] | None = None
    ) -> tuple[Tensor, Tensor]:
        """For positions start .. start + n - 1 of one axis, as slices; with offsets (a draft tree's depths, which
        reach no further) for start + offset."""
        cos, sin = self._runs.get((dtype, device)) or self._table(start + n, dtype, device)
        if start + n > cos.shape[0]:
            cos, sin = self._table(start + n, dtype, device)
        cos, sin = cos.narrow(0, start, n), sin.narrow(0, start, n)
        return (cos, sin) if offset is None else (cos[offset], sin[offset])

    def _table(self, needed: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        if self.axes > 1:
            raise ValueError(f"rotary embedding over {self.axes} axes met slots along a line, which have one")
        with torch.inference_mode(False):  # the table outlives the loop that first asks for it
            cos, sin = self.at(torch.arange(max(256, 2 * needed), device=device)[None, :, None], dtype)
        self._runs[dtype, device] = cos[0], sin[0]
        return cos[0], sin[0]


def rotate(x: Float[Tensor, "b s h d"], cos: Tensor, sin: Tensor) -> Float[Tensor, "b s h d"]:
    """Turn queries or keys; cos and sin are (s, 1, d) or (b, s, 1, d)."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)
