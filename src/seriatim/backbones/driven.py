"""What drives adaptive norms where slots differ: each group of slots by a vector of its own, or not at all."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Driven(NamedTuple):
    """AdaLN by groups of slots: `vector` of each group, and the `group` of each slot. Norms of groups that are `plain`
    have neither shift nor scale nor gate, whatever their vector (the clean stream of ACDiT). Vectors are few where
    slots are many, and so are the products with them."""

    vector: Float[Tensor, "b g e"]
    group: Int[Tensor, "s"]
    plain: Bool[Tensor, "b g"] | None = None


Vector = Tensor | Driven


def active(vector: Vector) -> Vector:
    """The vectors as the linear maps of adaptive norms take them: (b, 1, e), (b, s, e), or by groups."""
    if isinstance(vector, Driven):
        return vector._replace(vector=F.silu(vector.vector))
    return F.silu(vector if vector.dim() == 3 else vector[:, None])


def modulation(
    vector: Vector, weight: Float[Tensor, "n e"], bias: Tensor | None, parts: int
) -> Float[Tensor, "b s n"] | Float[Tensor, "b 1 n"]:
    """What active vectors say: shift and scale, and a gate behind them where there are more than two `parts`."""
    if not isinstance(vector, Driven):
        return F.linear(vector, weight, bias)
    said = F.linear(vector.vector, weight, bias)
    if vector.plain is not None:
        nothing = said.new_zeros(parts, said.shape[-1] // parts)
        nothing[2::3] = 1
        said = torch.where(vector.plain[..., None], nothing.flatten(), said)
    return said[:, vector.group]
