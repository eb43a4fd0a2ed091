"""Patches of pixels as continuous vectors: no training, nothing lost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from seriatim.tokenizers.base import check_codes, check_pictures


@dataclass(frozen=True, kw_only=True)
class PatchConfig:
    """Square pictures of `channels` x `side` x `side` values, cut into patches of `patch` x `patch` pixels."""

    side: int = 32
    channels: int = 1
    patch: int = 4

    def __post_init__(self) -> None:
        if min(self.side, self.channels, self.patch) < 1 or self.side % self.patch:
            raise ValueError(f"patches of {self.patch} pixels do not tile a side of {self.side}")


class PatchTokenizer(nn.Module):
    """Pictures in [-1, 1] <-> vectors (n, patches, channels * patch * patch) in raster order; exact both ways for
    pictures in [-1, 1]."""

    kind: ClassVar[str] = "patches"
    vocab = None

    def __init__(self, config: PatchConfig) -> None:
        super().__init__()
        self.config = config

    side = property(lambda self: self.config.side)
    channels = property(lambda self: self.config.channels)
    dim = property(lambda self: self.config.channels * self.config.patch**2)

    @property
    def grid(self) -> tuple[int, int]:
        n = self.config.side // self.config.patch
        return n, n

    def encode(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        check_pictures(images, self.channels, self.side)
        return F.pixel_unshuffle(images, self.config.patch).flatten(2).transpose(1, 2)

    def decode(self, latents: Float[Tensor, "b n d"]) -> Float[Tensor, "b c h w"]:
        check_codes(latents, (self.grid[0] * self.grid[1], self.dim), None)
        cells = latents.transpose(1, 2).unflatten(2, self.grid)
        return F.pixel_shuffle(cells, self.config.patch).clamp(-1, 1)

    def loss(
        self, images: Float[Tensor, "b c h w"], step: int, steps: int, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        """Raises TypeError: there is nothing to train."""
        raise TypeError("patches need no training: use the tokenizer as it is")
