"""A part of a picture is drawn anew, the rest stays as it is, pixel for pixel."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from PIL import Image

from seriatim.cli.main import main
from seriatim.data.base import load_data
from seriatim.verbs.evaluate import features_of
from seriatim.verbs.load import load
from seriatim.verbs.repaint import repainted
from seriatim.verbs.train import train

torch.set_num_threads(1)
TINY = {"width": 16, "depth": 1, "heads": 2, "steps": 2, "batch": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of each kind of order, a picture of 8 x 8 grey levels and a mask of its right half."""
    place = tmp_path_factory.mktemp("repaint")
    for key in ("raster-ar", "mar", "vf-prompt"):
        train(key, "digits", out=place / key, settings=TINY)
    digit = load_data("digits", "image").test.take(torch.tensor([3]))["image"][0, 0]
    Image.fromarray(((1 - digit) * 127.5).round().byte().numpy()).save(place / "digit.png")
    mask = np.zeros((8, 8), np.uint8)
    mask[:, 4:] = 255
    Image.fromarray(mask).save(place / "mask.png")
    Image.fromarray(mask).resize((16, 8)).save(place / "wide.png")
    Image.fromarray(mask * 0).save(place / "black.png")
    (place / "broken.png").write_bytes((place / "digit.png").read_bytes()[:60])
    return place


@pytest.mark.parametrize("key", ["raster-ar", "mar"])
def test_pixels_outside_the_mask_are_bit_identical(folder, key):
    system = load(folder / key)
    made = [
        repainted(system, folder / "digit.png", folder / "mask.png", [3, 5], 2, seed=seed).images for seed in (0, 1)
    ]
    given = 1 - torch.from_numpy(np.array(Image.open(folder / "digit.png"))).float() / 127.5
    for images in made:
        assert images.shape == (4, 1, 8, 8) and torch.equal(images[..., :4], given[:, :4].expand(4, 1, 8, 4))
    assert not torch.equal(made[0], made[1])


def test_the_command_writes_pictures(folder, capsys):
    ask = ["--image", str(folder / "digit.png"), "--inpaint", str(folder / "mask.png"), "--label", "3", "--count", "2"]
    assert main(["generate", str(folder / "raster-ar"), *ask, "--out", str(folder / "out")]) == 0
    assert "2 pictures" in capsys.readouterr().out and (folder / "out" / "samples.png").is_file()


@pytest.mark.parametrize(
    ("run", "asked", "said"),
    [
        ("raster-ar", {"--image": "none.png"}, "no picture"),
        ("raster-ar", {"--image": "broken.png"}, "cannot|can be read"),
        ("raster-ar", {"--image": "wide.png"}, "cut it to that form"),
        ("raster-ar", {"--inpaint": "wide.png"}, "mask .* 16 x 8"),
        ("raster-ar", {"--inpaint": "black.png"}, "black everywhere"),
        ("raster-ar", {"--inpaint": None}, "give both"),
        ("raster-ar", {"--image": None}, "give both"),
        ("raster-ar", {"--label": None}, "--label"),
        ("raster-ar", {"--label": "11"}, "0..9"),
        ("raster-ar", {"--decoder": "sjd"}, "leave --decoder out"),
        ("vf-prompt", {}, "no place"),
    ],
)
def test_mistakes_are_said(folder, capsys, run, asked, said):
    ask = {"--image": "digit.png", "--inpaint": "mask.png", "--label": "3", **asked}
    words = [str(folder / run)]
    for name, value in ask.items():
        if value is not None:
            words += [name, str(folder / value) if value.endswith(".png") else value]
    assert main(["generate", *words]) != 0
    error = capsys.readouterr().err
    assert re.search(said, " ".join(error.split())) and "Traceback" not in error


@pytest.mark.slow
@pytest.mark.parametrize("zoo", ["var", "raster-ar"])
def test_completed_characters_are_read_as_what_they_are(zoo):
    """The upper half is kept: of 62 held-out characters far more than by chance (1 of 62; error rate below 1e-6)."""
    data = load_data("glyphs", "image")
    some = data.test.take(torch.arange(0, len(data.test), len(data.test) // 62)[:62])
    keep = torch.zeros(32, 32, dtype=torch.bool)
    keep[:16] = True
    made = load(f"zoo:{zoo}").repaint(some["image"], keep, some["label"], seed=0)
    assert torch.equal(made.images[:, :, :16], some["image"][:, :, :16])
    assert features_of(data).accuracy(made.images, some["label"]) > 12 / 62
