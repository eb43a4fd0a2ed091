"""Scikit-learn's handwritten digits: 1,797 pictures of 8x8 pixels in 17 grey levels, shipped inside the package.

They are the test part of UCI's "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak, 1998). This file
loads, splits and shifts them; it knows nothing about tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from seriatim.data.base import Data

GREY_LEVELS = 17
TEST_SIZE = 400


@dataclass(frozen=True)
class DigitSplit:
    """One side of the split; row i of the three tensors is the same digit.

    Background is -1 and full ink +1: `images = levels / 8 - 1`.
    """

    images: Float[Tensor, "n 1 8 8"]
    levels: Int[Tensor, "n 8 8"]
    labels: Int[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Int[Tensor, " n"], generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """ "image" (n, 1, 8, 8) and "label" (n,); with a generator, shifted sideways by up to one column."""
        images = self.images[index]
        if generator is not None:
            images = shift_sideways(images, generator)
        return {"image": images, "label": self.labels[index]}


@dataclass(frozen=True)
class Digits:
    """1,397 digits for training and 400 held out, with equal shares of each class on both sides."""

    train: DigitSplit
    test: DigitSplit


def load_digits(seed: int = 0) -> Digits:
    """The digits, split by class; the same `seed` gives the same split, in the same order, everywhere."""
    import numpy as np
    from sklearn.datasets import load_digits as load_from_sklearn
    from sklearn.model_selection import train_test_split

    bunch = load_from_sklearn()
    rows = np.arange(len(bunch.target))
    train, test = train_test_split(rows, test_size=TEST_SIZE, stratify=bunch.target, random_state=seed)
    levels = torch.from_numpy(bunch.images).long()
    labels = torch.from_numpy(bunch.target).long()

    def side(chosen: np.ndarray) -> DigitSplit:
        index = torch.from_numpy(chosen)
        return DigitSplit(levels_to_images(levels[index]), levels[index], labels[index])

    return Digits(train=side(train), test=side(test))


def digits(seed: int = 0) -> Data:
    """The digits as a data set; a label is its digit."""
    both = load_digits(seed)
    return Data("digits", "image", both.train, both.test, tuple("0123456789"))


def levels_to_images(levels: Int[Tensor, "n 8 8"]) -> Float[Tensor, "n 1 8 8"]:
    """Grey levels 0..16 as a picture with one channel in [-1, 1]."""
    return (levels.float() / ((GREY_LEVELS - 1) / 2) - 1).unsqueeze(1)


def shift_sideways(
    images: Float[Tensor, "n c h w"], generator: torch.Generator, most: int = 1
) -> Float[Tensor, "n c h w"]:
    """Move each picture by -most..most whole columns, drawn evenly; the columns that come free are background (-1).

    The only augmentation that suits these digits: they touch the top and the bottom of their frame, so a vertical
    shift cuts ink off, and a mirrored 2 is no digit.
    """
    if most < 0:
        raise ValueError(f"most is a number of columns and cannot be negative: {most}")
    n, channels, height, width = images.shape
    shift = torch.randint(-most, most + 1, (n, 1, 1, 1), generator=generator)
    wide = torch.nn.functional.pad(images, (most, most), value=-1.0)
    columns = torch.arange(width).view(1, 1, 1, width) + most + shift
    return wide.gather(3, columns.expand(n, channels, height, width))
