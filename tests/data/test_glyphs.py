"""Glyphs: 62 characters in 22 fonts, parted by (character, family), and fonts of one's own."""

import shutil

import pytest
import torch

from seriatim.data.base import load_data
from seriatim.data.fonts import CHARACTERS, FAMILIES, built_in_fonts
from seriatim.data.glyphs import CAP_HEIGHT, held_out_pairs, jiggle

FAMILY = {font.name: font.family for font in built_in_fonts()}


@pytest.fixture(scope="module")
def data():
    return load_data("glyphs", "image")


def pairs(side) -> set[tuple[str, str]]:
    """(character, family)."""
    rows = zip(side.label.tolist(), side.style.tolist(), strict=True)
    return {(CHARACTERS[label], FAMILY[side.styles[style]]) for label, style in rows}


def test_22_fonts_draw_62_characters_once(data):
    assert len(data.train.styles) == 22 and "".join(data.classes) == CHARACTERS
    rows = [(side.label[i].item(), side.style[i].item()) for side in (data.train, data.test) for i in range(len(side))]
    assert len(set(rows)) == len(rows) == 62 * 22


def test_15_percent_of_pairs_are_held_out_with_all_cuts(data):
    train, test = pairs(data.train), pairs(data.test)
    assert not train & test
    assert len(test) == round(0.15 * 62 * len(FAMILIES)) == 65


def test_every_character_and_every_style_is_on_both_sides(data):
    for side in (data.train, data.test):
        assert set(side.label.tolist()) == set(range(62))
        assert set(side.style.tolist()) == set(range(22))


def test_style_comes_with_the_batch(data):
    index = torch.tensor([5, 500])
    assert torch.equal(data.train.take(index)["style"], data.train.style[index])


def test_no_two_characters_of_a_font_are_one_picture_and_all_ink_is_inside(data):
    for side in (data.train, data.test):
        images = side.take(torch.arange(len(side)))["image"]
        edge = torch.cat([images[..., 0, :], images[..., -1, :], images[..., 0], images[..., -1]], -1)
        assert float(edge.max()) == -1
        assert float(images.amax((1, 2, 3)).min()) > 0  # something is drawn in each
        distance = torch.cdist(images.flatten(1), images.flatten(1)) + 9 * torch.eye(len(images))
        same_style = side.style[:, None] == side.style
        assert float(distance[same_style].min()) > 0.5


def test_capitals_are_equally_high_in_all_fonts_and_small_letters_lower(data):
    both = [(side.take(torch.arange(len(side))), side) for side in (data.train, data.test)]

    def heights(character: str) -> torch.Tensor:
        images = torch.cat([batch["image"][batch["label"] == CHARACTERS.index(character)] for batch, _ in both])
        return (images.amax(3) > -0.5).sum(2).flatten().float()

    assert set(heights("H").tolist()) <= {CAP_HEIGHT + 0.5, CAP_HEIGHT + 1.5}  # whole rows, slanted or not
    assert float(heights("o").max()) < float(heights("O").min())


def test_augmentation_moves_ink_a_little_and_keeps_most_of_it(data):
    index = torch.arange(0, len(data.train), 5)
    plain = data.train.take(index)["image"] + 1
    moved = data.train.take(index, torch.Generator().manual_seed(0))["image"] + 1
    ratio = moved.sum((1, 2, 3)) / plain.sum((1, 2, 3))
    assert float(ratio.min()) > 0.75 and float(ratio.max()) < 1.3  # the size changes by up to 10% each way
    assert float((moved - plain).abs().amax((1, 2, 3)).min()) > 0.1


def test_an_affine_map_keeps_the_middle_of_a_picture_in_reach():
    dot = torch.zeros(200, 1, 64, 64)
    dot[:, :, 31:33, 31:33] = 1
    moved = jiggle(dot, torch.Generator().manual_seed(0)).squeeze(1)
    rows = (moved.sum(2) * torch.arange(64)).sum(1) / moved.sum((1, 2))
    assert float((rows - 31.5).abs().max()) < 4 and float(rows.std()) > 1  # 1.5 pixels of the 32, two to one


def test_pairs_are_held_out_evenly_over_characters():
    hidden = held_out_pairs(sorted(FAMILIES), 0.3)
    count = [sum(c == character for c, _ in hidden) for character in CHARACTERS]
    assert len(hidden) == 130 and set(count) == {2, 3}


# ---- fonts of one's own ----------------------------------------------------------------------------------------------
def symbols():
    return built_in_fonts()[0].path.parent / "STIXSizOneSymReg.ttf"


def test_more_fonts_are_more_styles_and_unusable_ones_are_named(tmp_path):
    fonts = {font.name: font.path for font in built_in_fonts()}
    shutil.copy(fonts["cmr10"], tmp_path / "mine.ttf")
    shutil.copy(symbols(), tmp_path / "symbols.ttf")
    shutil.copy(fonts["cmr10"].parent / "LastResortHE-Regular.ttf", tmp_path / "boxes.ttf")
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    data = load_data("glyphs", "image", fonts=tmp_path)
    assert data.train.styles[22:] == ("mine",)
    assert len(data.train) + len(data.test) == 62 * 23
    notes = "\n".join(data.notes)
    assert "symbols.ttf lacks" in notes and "boxes.ttf draws only" in notes and "broken.ttf cannot be read" in notes


def test_a_folder_without_usable_fonts_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no fonts"):
        load_data("glyphs", "image", fonts=tmp_path)
    shutil.copy(symbols(), tmp_path / "symbols.ttf")
    with pytest.raises(ValueError, match=r"no font in .* draws the letters and digits: symbols.ttf lacks"):
        load_data("glyphs", "image", fonts=tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder of fonts"):
        load_data("glyphs", "image", fonts=tmp_path / "nowhere")
