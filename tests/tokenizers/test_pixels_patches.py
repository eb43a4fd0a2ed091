"""Tokenizers that are never trained: exact where they say so."""

from __future__ import annotations

import pytest
import torch

from seriatim.data import load_digits
from seriatim.tokenizers import PatchConfig, PatchTokenizer, PixelConfig, PixelTokenizer


@pytest.mark.parametrize("levels", [2, 3, 17, 255, 256, 1024])
@pytest.mark.parametrize("channels", [1, 3])
def test_ids_of_pixels_come_back(levels: int, channels: int) -> None:
    tokenizer = PixelTokenizer(PixelConfig(side=8, channels=channels, levels=levels))
    shape = (50, 64) if channels == 1 else (50, 64, 3)
    ids = torch.randint(levels, shape, generator=torch.Generator().manual_seed(0))
    ids[0], ids[1] = 0, levels - 1
    images = tokenizer.decode(ids)
    assert torch.equal(tokenizer.encode(images), ids)
    assert images[0].unique() == -1 and images[1].unique() == 1
    assert torch.equal(tokenizer.decode(tokenizer.encode(images)), images)


def test_digits_are_kept_exactly_in_17_levels() -> None:
    digits = load_digits().train
    tokenizer = PixelTokenizer(PixelConfig())
    ids = tokenizer.encode(digits.images)
    assert torch.equal(ids, digits.levels.flatten(1))
    assert torch.equal(tokenizer.decode(ids), digits.images)
    fewer = PixelTokenizer(PixelConfig(levels=16))
    assert not torch.equal(fewer.decode(fewer.encode(digits.images)), digits.images)


def test_other_values_move_to_the_nearest_level() -> None:
    tokenizer = PixelTokenizer(PixelConfig(levels=5))
    images = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    moved = (tokenizer.decode(tokenizer.encode(images)) - images).abs()
    assert 0.2 < moved.max() <= 0.25 + 1e-6
    beyond = torch.full((1, 1, 8, 8), 1.7)
    assert tokenizer.encode(beyond).unique() == 4


def test_colour_stands_last_and_pixels_in_raster_order() -> None:
    tokenizer = PixelTokenizer(PixelConfig(side=2, channels=3, levels=3))
    images = torch.full((1, 3, 2, 2), -1.0)
    images[0, 2, 0, 1], images[0, 0, 1, 0] = 1.0, 0.0
    assert tokenizer.encode(images).tolist() == [[[0, 0, 0], [0, 0, 2], [1, 0, 0], [0, 0, 0]]]
    assert tokenizer.depth == 3 and tokenizer.vocab == 3


@pytest.mark.parametrize("patch", [1, 2, 4, 8])
def test_patches_lose_nothing(patch: int) -> None:
    tokenizer = PatchTokenizer(PatchConfig(side=8, channels=3, patch=patch))
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = tokenizer.encode(images)
    assert latents.shape == (4, (8 // patch) ** 2, 3 * patch**2) == (4, tokenizer.grid[0] ** 2, tokenizer.dim)
    assert torch.equal(tokenizer.decode(latents), images)


def test_a_patch_holds_its_own_pixels() -> None:
    tokenizer = PatchTokenizer(PatchConfig(side=8, channels=2, patch=4))
    images = torch.zeros(1, 2, 8, 8)
    images[0, :, 4:, :4] = 0.5  # the lower left patch: third in raster order
    latents = tokenizer.encode(images)
    assert latents.ne(0).any(2).tolist() == [[False, False, True, False]]
    assert latents[0, 2].unique() == 0.5


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="do not tile a side of 30"):
        PatchConfig(side=30, patch=4)
    with pytest.raises(ValueError, match="levels at least 2"):
        PixelConfig(levels=1)
