"""The built-in digits: the split that every figure on them rests on."""

from __future__ import annotations

import torch

from seriatim.data import levels_to_images, load_digits, shift_sideways


def test_the_split_is_stratified_disjoint_and_fixed() -> None:
    digits, again = load_digits(), load_digits()
    assert (len(digits.train), len(digits.test)) == (1397, 400)
    assert torch.equal(digits.test.images, again.test.images)
    share = digits.train.labels.bincount() / 1397 - digits.test.labels.bincount() / 400
    assert share.abs().max() < 0.002
    both = torch.cat([digits.train.levels, digits.test.levels]).flatten(1)
    assert len(both) == 1797 and len(both.unique(dim=0)) == 1797
    assert not torch.equal(load_digits(seed=1).test.labels, digits.test.labels)


def test_grey_levels_and_pictures_agree() -> None:
    train = load_digits().train
    assert train.images.shape == (1397, 1, 8, 8) and train.levels.shape == (1397, 8, 8)
    assert train.levels.unique().tolist() == list(range(17))
    assert (train.images.min(), train.images.max()) == (-1, 1)
    assert torch.equal(levels_to_images(train.levels), train.images)


def test_the_shift_is_sideways_whole_and_fills_with_background() -> None:
    images = load_digits().train.images[:300]
    shifted = shift_sideways(images, torch.Generator().manual_seed(0))
    left, right = images.roll(-1, dims=3), images.roll(1, dims=3)
    left[..., -1], right[..., 0] = -1, -1
    matches = [(shifted == candidate).flatten(1).all(dim=1) for candidate in (left, images, right)]
    assert torch.stack(matches).any(dim=0).all()
    assert all(60 < int(match.sum()) < 140 for match in matches)  # 100 expected, standard deviation 8
