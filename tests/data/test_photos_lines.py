"""Photographs cut into patches, and lines of text drawn: what is held out is nowhere in training."""

import pytest
import torch
from sklearn.datasets import load_sample_image

from seriatim.data.base import load_data, share
from seriatim.data.fonts import built_in_fonts
from seriatim.data.lines import CAP_HEIGHT, words_that_fit
from seriatim.data.stdlib import docstrings


# ---- photos ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [8, 32, 128])
def test_patches_are_cut_from_the_photograph_they_are_labelled_with(size):
    data = load_data("photos", "image", image_size=size)
    batch = data.train.take(torch.tensor([0, len(data.train) - 1]))
    assert batch["image"].shape == (2, 3, size, size) and batch["label"].tolist() == [0, 1]
    china = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1)
    assert torch.equal(((batch["image"][0] + 1) * 127.5).round().byte(), china[:, :size, :size])


def test_no_pixel_is_on_both_sides():
    data = load_data("photos", "image", image_size=32)
    assert data.train.pictures.shape[-1] + data.test.pictures.shape[-1] == 640
    assert len(data.train) > 1000 and len(data.test) > 200


def test_augmented_patches_stay_in_their_strip_and_half_are_mirrored():
    data = load_data("photos", "image", image_size=64)
    side = data.test
    ramp = torch.arange(side.pictures.shape[-1], dtype=torch.uint8).expand_as(side.pictures)
    patches = type(side)(ramp, side.size, side.step)
    images = patches.take(torch.arange(len(patches)).repeat(5), torch.Generator().manual_seed(0))["image"]
    step = ((images[:, 0, 0].diff(dim=1)) * 127.5).round()
    assert set(step.flatten().tolist()) == {-1.0, 1.0}
    assert float((step[:, 0] < 0).float().mean()) == pytest.approx(0.5, abs=0.2)
    assert len(set(images[:, 0, 0].amin(1).tolist())) > 20  # many places, not only those of the grid


@pytest.mark.parametrize("size", [4, 129])
def test_patches_too_small_or_wider_than_the_held_out_strip_are_refused(size):
    with pytest.raises(ValueError, match="8 to 128 pixels"):
        load_data("photos", "image", image_size=size)


# ---- lines -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("width", [64, 256])
def test_lines_have_the_width_asked_for_and_words_end_before_it(width):
    data = load_data("lines", "image", line_width=width)
    index = torch.randint(len(data.train), (300,), generator=torch.Generator().manual_seed(0))
    images = data.train.take(index)["image"]
    assert images.shape == (300, 1, 32, width)
    ink = images > 0
    assert bool(ink.flatten(1).any(1).all())
    assert not bool(ink[..., 0, :].any() | ink[..., -1, :].any())
    assert float(ink[..., -1].flatten(1).any(1).float().mean()) < 0.01


def test_a_line_is_on_the_side_of_its_file():
    data = load_data("lines", "image", held_out=0.2)
    held_out = " ".join(" ".join(text.split()) for name, text in docstrings() if share(name) < 0.2)
    assert all(line in held_out for line in data.test.texts[::50])
    assert not set(data.train.texts) & set(data.test.texts)
    assert 0.02 < len(data.test) / len(data.train) < 0.6


def test_augmentation_draws_a_line_in_other_fonts():
    data = load_data("lines", "image")
    images = data.train.take(torch.zeros(20, dtype=torch.long), torch.Generator().manual_seed(0))["image"]
    assert len({tuple(x.flatten().tolist()) for x in images}) > 10


def test_as_many_whole_words_as_fit():
    font = built_in_fonts(("DejaVu Sans Mono",))[0].sized(CAP_HEIGHT)
    letter = font.getlength("a")
    assert words_that_fit("one two three", font, 9 * letter) == "one two"
    assert words_that_fit("one two three", font, 13 * letter) == "one two three"
    assert words_that_fit("one two", font, 1) == "one"


@pytest.mark.parametrize("width", [10, 5000])
def test_a_width_out_of_range_is_refused(width):
    with pytest.raises(ValueError, match="64 to 1024 pixels"):
        load_data("lines", "image", line_width=width)
