"""Patches of scikit-learn's two sample photographs (a temple in China, a flower; 427x640 pixels, RGB).

The right fifth of each photograph is held out: no pixel is on both sides.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from seriatim.data.base import Data

NAMES = ("china", "flower")
HELD_OUT = 0.2  # of the width
SMALLEST, LARGEST = 8, 128


@dataclass(frozen=True)
class Patches:
    """Squares of `size` pixels whose corners stand on a grid, `step` apart, in each of the pictures."""

    pictures: UInt8[Tensor, "pictures 3 h w"]
    size: int
    step: int

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of corners in a picture."""
        height, width = self.pictures.shape[-2:]
        return (height - self.size) // self.step + 1, (width - self.size) // self.step + 1

    def __len__(self) -> int:
        rows, columns = self.grid
        return len(self.pictures) * rows * columns

    def take(self, index: Int[Tensor, " n"], generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """ "image" (n, 3, size, size) and "label" (n,), the photograph.

        With a generator, a patch is moved by less than a step and mirrored every other time.
        """
        index = torch.arange(len(self))[index]  # refuses numbers that no sample has
        rows, columns = self.grid
        label, place = index // (rows * columns), index % (rows * columns)
        top, left = place // columns * self.step, place % columns * self.step
        mirrored = torch.zeros(len(index), dtype=torch.bool)
        if generator is not None:
            height, width = self.pictures.shape[-2:]
            down, right, mirror = torch.rand(len(index), 3, generator=generator).unbind(1)
            top = (top + (down * self.step).long()).clamp(max=height - self.size)
            left = (left + (right * self.step).long()).clamp(max=width - self.size)
            mirrored = mirror < 0.5
        span = torch.arange(self.size)
        y, x = top[:, None] + span, left[:, None] + torch.where(mirrored[:, None], span.flip(0), span)
        patches = self.pictures[label[:, None, None], :, y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2)
        return {"image": patches.contiguous().float() / 127.5 - 1, "label": label}


def photos(image_size: int = 32) -> Data:
    """Patches of `image_size` pixels a side, 8 to 128; their corners are half a patch apart. The classes are the two
    photographs. Raises ValueError for other sizes: the held-out strip is narrow."""
    if not SMALLEST <= image_size <= LARGEST:
        raise ValueError(f"patches of photos have {SMALLEST} to {LARGEST} pixels a side, got {image_size}")
    pictures = _pictures()
    edge = round(pictures.shape[-1] * (1 - HELD_OUT))
    train, test = (Patches(part, image_size, image_size // 2) for part in (pictures[..., :edge], pictures[..., edge:]))
    return Data("photos", "image", train, test, NAMES)


@lru_cache(maxsize=1)
def _pictures() -> UInt8[Tensor, "2 3 427 640"]:
    from sklearn.datasets import load_sample_image

    pictures = [torch.from_numpy(load_sample_image(f"{name}.jpg").copy()) for name in NAMES]
    return torch.stack(pictures).permute(0, 3, 1, 2)
