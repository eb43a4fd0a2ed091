"""A folder of one's own pictures as a data set: a subfolder is a class; without subfolders there are no labels.

Pictures are read when they are asked for and the last few are kept, so a folder may be larger than memory. Files that
are no whole pictures are left out and named in the notes.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int, UInt8
from PIL import Image, ImageOps
from torch import Tensor

from seriatim.data.base import Data, check_held_out, has_sides, naming, split_paths, suffix, visible_files

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")  # by content: Pillow knows more, and some of them run programs
ENDS = {"PNG": b"IEND\xaeB`\x82", "JPEG": b"\xff\xd9"}  # the last bytes of a whole file; the others are decoded
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow raises on bad files
LEAST = 10  # pictures
SMALLEST, LARGEST = 4, 4096  # pixels a side
ROOM = 1.125  # a picture is kept this much larger than needed, so that crops differ
LONGEST = 2.0  # the longer side in shorter ones; the rest of a panorama is never shown
CACHE_BYTES = 128 * 2**20  # a side of the split
IN_A_ROW = 20  # pictures that cannot be read, before the folder is taken to be gone
THREADS = 4  # decoding leaves Python's lock


class Pictures:
    """One side of a folder: paths relative to `root`, and their labels (empty: none)."""

    def __init__(
        self, root: Path, paths: Sequence[str], labels: Sequence[int], image_size: int, channels: int, mirror: bool
    ):
        self.root, self.paths, self.labels = root, tuple(paths), tuple(labels)
        self.image_size, self.channels, self.mirror = image_size, channels, mirror
        room = int((image_size * ROOM) ** 2 * LONGEST * channels)
        self._read = lru_cache(maxsize=max(1, CACHE_BYTES // room))(self._decode)

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, index: Int[Tensor, " n"], generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """ "image" (n, channels, size, size), "label" (n,) if there are classes.

        The middle of each picture; with a generator any part of it, and mirrored every other time if that was asked
        for. A picture that cannot be read any more is replaced by the next one that can, with a warning. Raises
        OSError where many in a row cannot.
        """
        size = self.image_size
        with ThreadPoolExecutor(THREADS) as pool:
            found = list(pool.map(self._readable, index.tolist()))
        draws = (
            torch.full((len(found), 3), 0.5) if generator is None else torch.rand(len(found), 3, generator=generator)
        )
        images = np.empty((len(found), size, size, self.channels), dtype=np.uint8)
        for row, ((_, pixels), (down, right, mirror)) in enumerate(zip(found, draws.tolist(), strict=True)):
            top, left = int(down * (pixels.shape[0] - size + 1)), int(right * (pixels.shape[1] - size + 1))
            crop = pixels[top : top + size, left : left + size]
            images[row] = crop[:, ::-1] if self.mirror and mirror < 0.5 else crop
        batch = {"image": torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1}
        if self.labels:
            batch["label"] = torch.tensor([self.labels[i] for i, _ in found], dtype=torch.long)
        return batch

    def _readable(self, index: int) -> tuple[int, UInt8[np.ndarray, "h w c"]]:
        """The first picture from here on that can be read, and its number."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"there are {len(self)} pictures, none has the number {index}")
        error: Exception | None = None
        for i in ((index + k) % len(self) for k in range(min(IN_A_ROW, len(self)))):
            try:
                return i, self._read(i)
            except UNREADABLE as problem:
                warnings.warn(f"{self.root / self.paths[i]} cannot be read: {problem}", RuntimeWarning, stacklevel=2)
                error = problem
        raise OSError(f"{IN_A_ROW} pictures in a row in {self.root} cannot be read: is it still there?") from error

    def _decode(self, index: int) -> UInt8[np.ndarray, "h w c"]:
        return read_picture(self.root / self.paths[index], self.image_size, self.channels)


def read_picture(path: Path, size: int, channels: int) -> UInt8[np.ndarray, "h w c"]:
    """A picture upright, its shorter side `size` pixels or up to an eighth more where it has them.

    Smaller ones are enlarged, transparent ones laid on white, moving ones stand still. Raises what Pillow raises.
    """
    with Image.open(path, formats=FORMATS) as opened:
        target = round(size * ROOM)
        opened.draft(None, (2 * target, 2 * target))  # large JPEGs are decoded at a fraction of their size
        picture = ImageOps.exif_transpose(opened)
        picture = on_white(picture).convert("L" if channels == 1 else "RGB")
    width, height = picture.size
    shorter = min(width, height)
    longer = min(max(width, height), round(shorter * LONGEST))
    if width >= height:
        middle = ((width - longer) / 2, 0.0, (width + longer) / 2, float(height))
    else:
        middle = (0.0, (height - longer) / 2, float(width), (height + longer) / 2)
    side = min(target, max(size, shorter))
    other = max(side, round(longer * side / shorter))
    new = (other, side) if width >= height else (side, other)
    if (picture.size, middle) != (new, (0, 0, *new)):
        picture = picture.resize(new, Image.Resampling.BICUBIC, box=middle)
    return np.asarray(picture).reshape(new[1], new[0], channels)


def on_white(picture: Image.Image) -> Image.Image:
    """Without transparency and in 8 bits."""
    if picture.mode.startswith("I"):  # 16 bits, of which Pillow would keep the lower ones
        return Image.fromarray((np.asarray(picture).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture.convert("RGBA"))
    return picture


def image_folder(
    path: Path, image_size: int = 64, channels: int = 3, held_out: float = 0.1, mirror: bool = False
) -> Data:
    """The pictures (PNG, JPEG, WebP, BMP, GIF) below a folder.

    Where all lie in subfolders, the first folder of a path is the class. The side of a picture is a hash of its path,
    unless the folders are train/ and test/ (or val/, valid/, validation/). image_size: pixels a side, cut from the
    middle; channels: 1 (grey) or 3 (RGB); mirror: whether training may see pictures mirrored.

    Raises NotADirectoryError, PermissionError, and ValueError for too few pictures or an option out of range.
    """
    root = Path(path).expanduser()
    check_held_out(held_out)
    if not SMALLEST <= image_size <= LARGEST or channels not in (1, 3):
        raise ValueError(
            f"image_size is {SMALLEST} to {LARGEST} pixels and channels 1 or 3, got {image_size} and {channels}"
        )
    if not root.is_dir():
        raise NotADirectoryError(f"{root} is no folder: pictures are given as a folder of them")
    files = visible_files(root)
    named = [name for name in files if suffix(name) in SUFFIXES]
    if not named:
        raise ValueError(f"no pictures in {root} ({', '.join(SUFFIXES)}); it holds {len(files)} other files")
    with ThreadPoolExecutor(THREADS) as pool:
        whole = list(pool.map(is_whole, (root / name for name in named)))
    good = [name for name, fine in zip(named, whole, strict=True) if fine]
    bad = [name for name, fine in zip(named, whole, strict=True) if not fine]
    unread = f"{len(bad):,} of {len(named):,} pictures could not be read: {naming(bad)}" if bad else ""
    if len(good) < LEAST:
        raise ValueError(f"{root} holds {len(good)} pictures, at least {LEAST} are needed. {unread}".rstrip(". "))
    label_of, classes, note = _classes(good)
    train, test = (
        Pictures(root, side, [label_of[p] for p in side] if classes else [], image_size, channels, mirror)
        for side in split_paths(good, held_out)
    )
    return Data(root.name, "image", train, test, classes, tuple(filter(None, (unread, note))))


def is_whole(path: Path) -> bool:
    """Whether a file is a picture, down to its end: its head and its last bytes are read, the rest only in doubt."""
    try:
        with Image.open(path, formats=FORMATS) as picture:
            end = ENDS.get(picture.format or "")
            if end is not None:
                with open(path, "rb") as file:
                    file.seek(max(0, path.stat().st_size - 64))
                    if end in file.read():
                        return True
            picture.load()
        return True
    except UNREADABLE:
        return False


def _classes(paths: Sequence[str]) -> tuple[dict[str, int], tuple[str, ...], str]:
    """Label of each path, names of the classes (none where a picture lies outside of all folders), and a note on it."""
    parts = [p.split("/") for p in paths]
    level = 1 if has_sides({p[0].lower() for p in parts if len(p) > 1}) and all(len(p) > 1 for p in parts) else 0
    outside = sum(len(p) < level + 2 for p in parts)
    if outside:
        note = f"{outside:,} of {len(paths):,} pictures lie in no subfolder, so there are no classes"
        return {}, (), note if outside < len(paths) else ""
    classes = sorted({p[level] for p in parts})
    number = {name: i for i, name in enumerate(classes)}
    return {path: number[p[level]] for path, p in zip(paths, parts, strict=True)}, tuple(classes), ""
