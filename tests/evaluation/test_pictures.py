"""Files for people: what is drawn where, that writes are atomic, and that nonsense is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from seriatim.evaluation import draw_mask, save_curve, save_film, save_grid


def read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_a_grid_shows_each_picture_at_its_place(tmp_path: Path) -> None:
    images = torch.linspace(-1, 1, 5).view(5, 1, 1, 1).expand(5, 1, 2, 2)
    pixels = read(save_grid(images, tmp_path / "new" / "grid.png", columns=3, upscale=6))
    assert pixels.shape == (6 + 2 * (12 + 6), 6 + 3 * (12 + 6), 3)
    centres = [pixels[6 + 6 + 18 * (i // 3), 6 + 6 + 18 * (i % 3), 0] for i in range(5)]
    assert centres == [0, 64, 128, 191, 255]
    inverted = read(save_grid(images, tmp_path / "grid.png", columns=3, upscale=6, invert=True))
    assert inverted[12, 12, 0] == 255 and inverted[12 + 18, 12 + 18, 0] == 0


def test_colours_and_labels(tmp_path: Path) -> None:
    red = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1).expand(2, 3, 4, 4)
    plain = read(save_grid(red, tmp_path / "plain.png", columns=1))
    assert plain[10, 10].tolist() == [255, 0, 0]
    labelled = read(save_grid(red, tmp_path / "labelled.png", columns=1, row_labels=["one", "two"]))
    margin = labelled.shape[1] - plain.shape[1]
    assert margin > 10 and labelled[:, margin + 10].tolist() == plain[:, 10].tolist()
    assert labelled[:, :margin].min() < 100, "no label was drawn"


@pytest.mark.parametrize("resample", ["nearest", "bicubic"])
def test_a_film_keeps_its_steps_and_pauses(tmp_path: Path, resample: str) -> None:
    generator = torch.Generator().manual_seed(0)
    steps = [torch.rand(4, 1, 8, 8, generator=generator) * scale * 2 - 1 for scale in (0.2, 0.5, 1.0)]
    captions = ["1x1", "2x2", "4x4"]
    path = save_film(steps, tmp_path / "film.gif", captions=captions, columns=2, resample=resample, pause=0.5)  # type: ignore[arg-type]
    film = Image.open(path)
    pauses, brightness = [], []
    for frame in range(film.n_frames):  # type: ignore[attr-defined]
        film.seek(frame)
        pauses.append(film.info["duration"])
        brightness.append(np.asarray(film.convert("L"))[:130].mean())
    assert pauses == [500, 500, 2500] and film.info["loop"] == 0
    assert brightness == sorted(brightness)


def test_a_mask_is_dark_where_a_query_sees_a_key(tmp_path: Path) -> None:
    everything = read(draw_mask(torch.ones(4, 4, dtype=torch.bool), tmp_path / "all.png"))
    causal = read(draw_mask(torch.ones(4, 4, dtype=torch.bool).tril(), tmp_path / "causal.png"))
    assert everything.shape == causal.shape
    dark = [(np.abs(pixels - [0x1F, 0x3A, 0x5F]).sum(axis=2) < 8).sum() for pixels in (everything, causal)]
    assert dark[1] / dark[0] == pytest.approx(10 / 16, abs=0.01)
    sizes, labels = [1, 4, 16], ["1x1", "2x2", "4x4"]
    rank = torch.repeat_interleave(torch.arange(3), torch.tensor(sizes))
    mask = rank[:, None] >= rank
    grouped = draw_mask(
        mask, tmp_path / "m.png", row_groups=sizes, column_groups=sizes, row_labels=labels, column_labels=labels
    )
    assert (np.abs(read(grouped) - [0xC8, 0x55, 0x3D]).sum(axis=2) < 40).sum() > 500, "no line between groups"


def test_a_curve_is_drawn(tmp_path: Path) -> None:
    history = {"train": [3.0, 2.0, 1.5, 1.2], "held out": [3.1, 2.2]}
    plain, smooth = (save_curve(history, tmp_path / f"{s}.png", smooth=s, title="Loss") for s in (1, 3))
    for path in (plain, smooth):
        assert (np.abs(read(path) - [0x1F, 0x3A, 0x5F]).sum(axis=2) < 8).sum() > 100


BAD_PICTURES = {
    "pictures are": torch.zeros(1, 8, 8),
    "1 or 3": torch.zeros(1, 2, 8, 8),
    "floating point": torch.zeros(1, 1, 8, 8, dtype=torch.long),
    "hold NaN": torch.full((1, 1, 8, 8), float("nan")),
    "rescale or clamp": torch.full((1, 1, 8, 8), 255.0),
}


@pytest.mark.parametrize("message", list(BAD_PICTURES))
def test_pictures_that_are_none_are_refused_and_leave_no_file(tmp_path: Path, message: str) -> None:
    for save in (save_grid, lambda images, path: save_film([images], path)):
        with pytest.raises(ValueError, match=message):
            save(BAD_PICTURES[message], tmp_path / "bad.png")
    assert list(tmp_path.iterdir()) == []


def test_other_nonsense_is_refused(tmp_path: Path) -> None:
    images, path = torch.zeros(4, 1, 2, 2), tmp_path / "x"
    with pytest.raises(ValueError, match="2 labels for 1 rows"):
        save_grid(images, path, row_labels=["a", "b"])
    with pytest.raises(ValueError, match="start at 1"):
        save_grid(images, path, columns=0)
    with pytest.raises(ValueError, match="at least one step"):
        save_film([], path)
    with pytest.raises(ValueError, match="one shape"):
        save_film([images, images[:2]], path)
    with pytest.raises(ValueError, match="one caption a step"):
        save_film([images], path, captions=["a", "b"])
    with pytest.raises(ValueError, match="not finite at step 20"):
        save_curve({"loss": [1.0, float("nan")]}, path, every=10)
    with pytest.raises(ValueError, match="bool tensor"):
        draw_mask(torch.ones(3, 3), path)
    with pytest.raises(ValueError, match="sum to 3"):
        draw_mask(torch.ones(3, 3, dtype=torch.bool), path, row_groups=[1, 1])
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, path = torch.zeros(1, 1, 2, 2), tmp_path / "grid.png"
    save_grid(images, path)
    before = path.read_bytes()

    def broken(self: Image.Image, file: object, **options: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", broken)
    with pytest.raises(OSError, match="disk full"):
        save_grid(images + 1, path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["grid.png"]
