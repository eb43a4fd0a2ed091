"""A folder of one's own pictures: classes, sides, shapes, colours; what is broken is left out and named."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from seriatim.data.base import load_data
from seriatim.data.folders import Pictures, read_picture


def picture(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """Noise that compresses badly, so that a cut-off file has lost pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def fill(folder: Path, count: int, suffix: str = ".png", first: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(first, first + count):
        picture(i).save(folder / f"{i}{suffix}")


def everything(data, generator: torch.Generator | None = None) -> list[dict]:
    return [side.take(torch.arange(len(side)), generator) for side in (data.train, data.test)]


# ---- classes and sides -----------------------------------------------------------------------------------------------
def test_subfolders_are_classes_by_name(tmp_path):
    fill(tmp_path / "dogs", 30)
    fill(tmp_path / "cats" / "tame", 30)
    data = load_data(tmp_path, "image", image_size=16)
    assert (data.name, data.modality, data.classes) == (tmp_path.name, "image", ("cats", "dogs"))
    assert not data.notes and len(data.train) + len(data.test) == 60
    assert {Path(p).parts[0] for p in data.test.paths} == {"cats", "dogs"}
    for side, batch in zip((data.train, data.test), everything(data), strict=True):
        assert batch["image"].shape == (len(side), 3, 16, 16)
        assert [data.classes[i] for i in batch["label"]] == [p.split("/")[0] for p in side.paths]


def test_without_subfolders_there_are_no_labels(tmp_path):
    fill(tmp_path, 12)
    data = load_data(tmp_path, "image")
    assert data.classes == () and not data.notes
    assert set(data.train.take(torch.tensor([0]))) == {"image"}


def test_pictures_outside_of_subfolders_are_said_to_cost_the_classes(tmp_path):
    fill(tmp_path / "cats", 12)
    fill(tmp_path, 2)
    data = load_data(tmp_path, "image")
    assert data.classes == ()
    assert data.notes == ("2 of 14 pictures lie in no subfolder, so there are no classes",)


def test_train_and_validation_folders_are_sides_and_not_classes(tmp_path):
    for side, count in (("train", 10), ("val", 3)):
        for name in ("cats", "dogs"):
            fill(tmp_path / side / name, count)
    data = load_data(tmp_path, "image")
    assert data.classes == ("cats", "dogs") and (len(data.train), len(data.test)) == (20, 6)
    flat = tmp_path.with_name(tmp_path.name + "-flat")
    fill(flat / "train", 10)
    fill(flat / "test", 3)
    assert load_data(flat, "image").classes == ()


def test_a_picture_keeps_its_side_as_others_come(tmp_path):
    fill(tmp_path, 40)
    before = load_data(tmp_path, "image")
    fill(tmp_path, 40, first=40)
    after = load_data(tmp_path, "image")
    assert set(before.train.paths) <= set(after.train.paths) and set(before.test.paths) <= set(after.test.paths)


# ---- pixels ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("suffix", [".png", ".bmp", ".webp"])
def test_pixels_of_a_picture_of_the_right_size_are_kept_exactly(tmp_path, suffix):
    options = {"lossless": True} if suffix == ".webp" else {}
    picture(1, (16, 16)).save(tmp_path / f"a{suffix}", **options)
    assert np.array_equal(read_picture(tmp_path / f"a{suffix}", 16, 3), np.asarray(picture(1, (16, 16))))


@pytest.mark.parametrize("suffix", [".jpg", ".JPEG", ".gif"])
def test_lossy_formats_and_capital_endings_are_read(tmp_path, suffix):
    plain = Image.new("RGB", (20, 20), (200, 40, 40))
    for i in range(10):
        plain.save(tmp_path / f"{i}{suffix}")
    images = load_data(tmp_path, "image", image_size=16).train.take(torch.tensor([0]))["image"]
    assert torch.allclose((images.mean((0, 2, 3)) + 1) * 127.5, torch.tensor([200.0, 40.0, 40.0]), atol=4)


def corner(mode: str) -> Image.Image:
    """A black picture in a mode."""
    return Image.new(mode, (8, 8))


def half_transparent() -> Image.Image:
    transparent = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    transparent.paste((0, 0, 0, 255), (0, 0, 4, 8))
    return transparent


COLOURS = {
    "transparent is white": (half_transparent(), [0, 255]),
    "grey with transparency": (half_transparent().convert("LA"), [0, 255]),
    "palette": (Image.new("RGB", (8, 8), (90, 90, 90)).convert("P", palette=Image.Palette.ADAPTIVE), [90, 90]),
    "one bit": (Image.new("1", (8, 8), 1), [255, 255]),
    "16 bits": (Image.fromarray(np.full((8, 8), 0x8034, dtype=np.uint16)), [0x80, 0x80]),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("case", COLOURS)
def test_every_kind_of_colour_comes_out_as_people_see_it(tmp_path, case, channels):
    source, (left, right) = COLOURS[case]
    source.save(tmp_path / "a.png")
    pixels = read_picture(tmp_path / "a.png", 8, channels)
    assert pixels.shape == (8, 8, channels)
    assert set(pixels[:, 0].flatten().tolist()) == {left} and set(pixels[:, -1].flatten().tolist()) == {right}


def test_grey_is_the_luminance_of_colour(tmp_path):
    Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / "red.png")
    assert set(read_picture(tmp_path / "red.png", 8, 1).flatten().tolist()) == {76}  # ITU-R 601: 0.299 of 255


def test_a_picture_that_the_camera_turned_stands_upright(tmp_path):
    lying = Image.new("RGB", (16, 8))
    lying.paste((255, 255, 255), (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    lying.save(tmp_path / "a.png", exif=exif)
    pixels = read_picture(tmp_path / "a.png", 8, 1)
    assert pixels.shape == (16, 8, 1) and pixels[0].min() == 255 and pixels[-1].max() == 0


@pytest.mark.parametrize(
    ("size", "shape"),
    [((100, 100), (36, 36)), ((34, 34), (34, 34)), ((10, 10), (32, 32)), ((100, 50), (36, 72)), ((20, 4000), (64, 32))],
)
def test_the_shorter_side_has_a_little_room_and_panoramas_are_cut(tmp_path, size, shape):
    Image.new("RGB", size).save(tmp_path / "a.png")
    assert read_picture(tmp_path / "a.png", 32, 3).shape == (*shape, 3)


def halves(tmp_path: Path) -> Pictures:
    """Wide pictures, white left and black right."""
    wide = Image.new("L", (64, 32))
    wide.paste(255, (0, 0, 32, 32))
    wide.save(tmp_path / "a.png")
    return Pictures(tmp_path, ["a.png"], [], 32, 1, mirror=False)


def test_the_middle_is_cut_out_and_with_a_generator_any_part(tmp_path):
    side = halves(tmp_path)
    middle = side.take(torch.tensor([0]))["image"][0, 0]
    assert bool((middle[:, :16] == 1).all()) and bool((middle[:, 16:] == -1).all())
    crops = side.take(torch.zeros(60, dtype=torch.long), torch.Generator().manual_seed(0))["image"]
    white = (crops[:, 0, 0] == 1).sum(1)
    assert int(white.min()) <= 2 and int(white.max()) >= 30 and len(set(white.tolist())) > 15


def test_pictures_are_mirrored_only_if_asked_for_and_only_in_training(tmp_path):
    halves(tmp_path)
    many = torch.zeros(60, dtype=torch.long)
    for mirror in (False, True):
        side = Pictures(tmp_path, ["a.png"], [], 32, 1, mirror)
        crops = side.take(many, torch.Generator().manual_seed(0))["image"][:, 0, 0]
        assert bool((crops[:, 0] < crops[:, -1]).any()) == mirror
        assert float(side.take(many[:1])["image"][0, 0, 0, 0]) == 1


def test_batches_follow_from_the_generator(tmp_path):
    fill(tmp_path, 12)
    side = load_data(tmp_path, "image", image_size=16).train
    a, b, c = (side.take(torch.arange(5), torch.Generator().manual_seed(s))["image"] for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


# ---- what is broken --------------------------------------------------------------------------------------------------
def cut(path: Path, share: float = 0.6) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp", ".gif"])
def test_a_file_cut_short_is_left_out_counted_and_named(tmp_path, suffix):
    fill(tmp_path, 12, suffix)
    cut(tmp_path / f"7{suffix}")
    data = load_data(tmp_path, "image")
    assert data.notes == (f"1 of 12 pictures could not be read: 7{suffix}",)
    assert f"7{suffix}" not in data.train.paths + data.test.paths


def test_what_is_no_picture_is_left_out_whatever_it_is_called(tmp_path):
    fill(tmp_path / "a", 12)
    (tmp_path / "a" / "empty.png").touch()
    (tmp_path / "a" / "text.jpg").write_text("not a picture")
    # A format that is not among those promised: Pillow reads it, and others that run programs.
    picture(0).save(tmp_path / "a" / "other.png", format="TIFF")
    (tmp_path / "a" / "labels.csv").write_text("1,2")
    data = load_data(tmp_path, "image")
    assert data.notes == ("3 of 15 pictures could not be read: a/empty.png, a/other.png, a/text.jpg",)


def test_a_bomb_is_left_out(tmp_path, monkeypatch):
    fill(tmp_path, 12)
    picture(0, (400, 400)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50_000)
    assert load_data(tmp_path, "image").notes == ("1 of 13 pictures could not be read: bomb.png",)


def test_a_picture_lost_later_is_replaced_by_the_next_and_its_label_with_a_warning(tmp_path):
    fill(tmp_path / "a", 10)
    fill(tmp_path / "b", 10)
    side = load_data(tmp_path, "image", image_size=16).train
    last = side.labels.count(0) - 1
    expected = side.take(torch.tensor([last + 1]))
    cut(tmp_path / side.paths[last])
    with pytest.warns(RuntimeWarning, match=f"{side.paths[last]} cannot be read"):
        batch = side.take(torch.tensor([last]))
    assert torch.equal(batch["image"], expected["image"]) and batch["label"].tolist() == [1]


@pytest.mark.filterwarnings("ignore:.*cannot be read")
def test_a_folder_lost_later_is_an_error(tmp_path):
    fill(tmp_path / "a", 12)
    data = load_data(tmp_path / "a", "image")
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(OSError, match="is it still there"):
        data.train.take(torch.tensor([0]))


def test_only_what_is_asked_for_is_decoded_and_the_last_ones_are_kept(tmp_path, monkeypatch):
    fill(tmp_path, 20)
    read = []
    monkeypatch.setattr(
        "seriatim.data.folders.read_picture", lambda path, *rest: read.append(path.name) or read_picture(path, *rest)
    )
    side = load_data(tmp_path, "image", image_size=16).train
    assert read == []
    side.take(torch.tensor([2, 3]))
    side.take(torch.tensor([3, 2]))
    assert sorted(read) == sorted(side.paths[2:4])
    large = Pictures(tmp_path, side.paths, [], 1024, 3, mirror=False)
    assert large._read.cache_info().maxsize * 1024 * 1024 * 3 < 128 * 2**20


# ---- mistakes --------------------------------------------------------------------------------------------------------
def test_too_few_pictures_are_refused_and_the_broken_ones_named(tmp_path):
    fill(tmp_path, 10)
    (tmp_path / "3.png").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"holds 9 pictures, at least 10 are needed. 1 of 10 .* could not be read: 3.png"
    ):
        load_data(tmp_path, "image")


def test_a_folder_without_pictures_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing here")
    with pytest.raises(ValueError, match=r"no pictures in .*\.png.* it holds 1 other files"):
        load_data(tmp_path, "image")


def test_a_file_is_no_folder(tmp_path):
    picture(0).save(tmp_path / "a.png")
    with pytest.raises(NotADirectoryError, match="given as a folder"):
        load_data(tmp_path / "a.png", "image")


@pytest.mark.parametrize("options", [{"image_size": 2}, {"image_size": 10_000}, {"channels": 4}])
def test_sizes_and_channels_out_of_range_are_refused(tmp_path, options):
    with pytest.raises(ValueError, match="image_size is 4 to 4096 pixels and channels 1 or 3"):
        load_data(tmp_path, "image", **options)


def test_an_unknown_option_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(TypeError, match="takes no size; it takes image_size, channels, held_out, mirror"):
        load_data(tmp_path, "image", size=32)
