"""Pixels themselves as ids: no training, nothing lost but depth of colour."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from seriatim.tokenizers.base import check_codes, check_pictures


@dataclass(frozen=True, kw_only=True)
class PixelConfig:
    """Square pictures of `channels` x `side` x `side` values in `levels` evenly spaced levels from -1 to 1."""

    side: int = 8
    channels: int = 1
    levels: int = 17

    def __post_init__(self) -> None:
        if min(self.side, self.channels) < 1 or self.levels < 2:
            raise ValueError(f"side and channels are at least 1, levels at least 2, got {self}")


class PixelTokenizer(nn.Module):
    """Pictures in [-1, 1] <-> levels in raster order: ids (n, pixels), or (n, pixels, channels) in colour.

    `encode(decode(ids))` is always `ids`. `decode(encode(images))` is `images` for pictures that lie on the levels (as
    `level / ((levels - 1) / 2) - 1` in float32: 17 levels for scikit-learn's digits, 256 for 8-bit pictures); any other
    value moves to the nearest level, by at most 1 / (levels - 1).
    """

    kind: ClassVar[str] = "pixels"

    def __init__(self, config: PixelConfig) -> None:
        super().__init__()
        self.config = config

    side = property(lambda self: self.config.side)
    channels = property(lambda self: self.config.channels)
    vocab = property(lambda self: self.config.levels)
    depth = property(lambda self: self.config.channels)
    grid = property(lambda self: (self.config.side, self.config.side))

    def encode(self, images: Float[Tensor, "b c h w"]) -> Int[Tensor, "b n *c"]:
        check_pictures(images, self.channels, self.side)
        top = self.config.levels - 1
        ids = ((images.clamp(-1, 1) + 1) * (top / 2)).round().long().flatten(2)
        return ids[:, 0] if self.channels == 1 else ids.transpose(1, 2)

    def decode(self, ids: Int[Tensor, "b n *c"]) -> Float[Tensor, "b c h w"]:
        c = self.config
        check_codes(ids, (c.side**2,) if c.channels == 1 else (c.side**2, c.channels), c.levels)
        planes = ids[:, None] if c.channels == 1 else ids.transpose(1, 2)
        return planes.unflatten(2, self.grid).float() / ((c.levels - 1) / 2) - 1

    def loss(
        self, images: Float[Tensor, "b c h w"], step: int, steps: int, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        """Raises TypeError: there is nothing to train."""
        raise TypeError("pixels need no training: use the tokenizer as it is")
