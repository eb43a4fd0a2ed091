"""`generate --image --inpaint`: a picture of which a part is drawn anew, the rest as it is, pixel for pixel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image, ImageOps
from torch import Tensor

from seriatim.data.folders import UNREADABLE, on_white
from seriatim.systems.image_system import ImageSystem, Pictures
from seriatim.verbs.generate import sampling_of


def repainted(
    system: ImageSystem, image: Path, mask: Path, labels: Sequence[int] | None, count: int | None, seed: int = 0,
    **sampling: Any,
) -> Pictures:  # fmt: skip
    """The picture of a file, `count` times for each label, with what is white in the mask drawn anew. Raises OSError
    and ValueError for files that are no pictures of one form, a mask without white, and classes that are not said."""
    s = sampling_of(system, **sampling)
    shape = (s.size[1], s.size[0]) if s.size is not None else (system.tokenizer.side,) * 2
    picture, anew = _read(image, shape, system.tokenizer.channels), _white(mask, image, shape)
    picture = -picture if system.ink else picture
    labelled = "class" in system.model.conditions
    if labelled and labels is None:
        raise ValueError(f"{system.meta.key} draws pictures of a class: say which is to be completed (--label)")
    classes = system.config.classes
    if labels is not None and not all(0 <= i < classes for i in labels):
        raise ValueError(f"labels lie in 0..{classes - 1}, got {', '.join(map(str, labels))}")
    wanted = torch.tensor(list(labels or [0])).repeat_interleave(count or 1)
    images = picture.expand(len(wanted), -1, -1, -1)
    return system.repaint(images, ~anew, wanted if labelled else None, s, seed, film=True)


def _read(path: Path, shape: tuple[int, int], channels: int) -> Float[Tensor, "1 c h w"]:
    """In [-1, 1]. A picture of the form that is asked for is resized; of another, refused."""
    width, height = _size(path)
    if width * shape[0] != height * shape[1]:
        raise ValueError(
            f"{path} is {width} x {height} pixels, and the model draws {shape[1]} x {shape[0]}: cut it to that form"
        )
    with Image.open(path) as opened:
        upright = on_white(ImageOps.exif_transpose(opened)).convert("L" if channels == 1 else "RGB")
    if upright.size != shape[::-1]:
        upright = upright.resize(shape[::-1], Image.Resampling.BICUBIC)
    pixels = np.asarray(upright).reshape(*shape, channels)
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1


def _size(path: Path) -> tuple[int, int]:
    """Width and height of a picture, once all of it could be read."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no picture {path}")
    try:
        with Image.open(path) as opened:
            opened.load()
            return ImageOps.exif_transpose(opened).size
    except UNREADABLE as problem:
        raise ValueError(f"{path} is no picture that can be read: {problem}") from problem


def _white(path: Path, image: Path, shape: tuple[int, int]) -> Bool[Tensor, "h w"]:
    """Where a mask is nearer to white than to black, at the size that is drawn."""
    (width, height), other = _size(path), _size(image)
    if width * other[1] != height * other[0]:
        raise ValueError(f"the mask {path} is {width} x {height} pixels, and {image} is {other[0]} x {other[1]}")
    with Image.open(path) as opened:
        grey = on_white(ImageOps.exif_transpose(opened)).convert("L").resize(shape[::-1], Image.Resampling.NEAREST)
    white = torch.from_numpy(np.asarray(grey).copy()) >= 128
    if not bool(white.any()):
        raise ValueError(f"{path} is black everywhere: white is what is to be drawn anew")
    return white
