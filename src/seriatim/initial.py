"""Fresh weights."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def drawn(*shape: int, std: float = 0.02) -> Float[Tensor, "..."]:
    """Normal numbers; empty on the meta device, where torch would load a compiler (40 MB) to draw none."""
    x = torch.empty(shape)
    return x if x.is_meta else torch.randn(shape, out=x).mul_(std)
