"""Maps of vectors at several sizes: how one is made smaller or larger. Knows nothing of what stands in them."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

Shape = tuple[int, int]  # rows and columns of a map


def area_down(x: Float[Tensor, "b d h w"], shape: Shape) -> Float[Tensor, "b d h2 w2"]:
    """Means over areas; a map of this shape is left as it is."""
    return x if tuple(x.shape[2:]) == shape else F.interpolate(x, size=shape, mode="area")


def bicubic_up(x: Float[Tensor, "b d h w"], shape: Shape) -> Float[Tensor, "b d h2 w2"]:
    """Bicubic, corners not aligned; a map of this shape is left as it is."""
    return x if tuple(x.shape[2:]) == shape else F.interpolate(x, size=shape, mode="bicubic")


def nearest_up(x: Float[Tensor, "b d h w"], shape: Shape) -> Float[Tensor, "b d h2 w2"]:
    """Each vector in all places that it covers; a map of this shape is left as it is."""
    return x if tuple(x.shape[2:]) == shape else F.interpolate(x, size=shape, mode="nearest")
