"""Draws the pictures of README and documentation: `python docs/pictures.py [FOLDER OF seriatim demo]`."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch

import seriatim as s
from seriatim.data import load_data
from seriatim.evaluation.pictures import draw_mask, save_grid

IMAGES = Path(__file__).parent / "images"


def masks() -> None:
    """Two orders as masks: the first is a language model's, the second VAR's."""
    text = s.inclusive(range(21))
    draw_mask(text.mask()[0], IMAGES / "mask-next-token.png", title="next token: at = born = position")
    scale = s.pyramid([1, 2, 4]).coord[:, 0]
    sides = [1, 4, 16]
    names = ["1x1", "2x2", "4x4"]
    draw_mask(
        s.inclusive(scale).mask()[0],
        IMAGES / "mask-next-scale.png",
        title="next scale: at = born = scale",
        row_groups=sides,
        column_groups=sides,
        row_labels=names,
        column_labels=names,
    )
    block = torch.arange(8) // 2
    both = torch.cat([block, block])
    draw_mask(
        s.two_stream(both, torch.arange(16) < 8).mask()[0],
        IMAGES / "mask-block-diffusion.png",
        title="block diffusion: queries, then values",
        row_groups=[2] * 8,
        column_groups=[2] * 8,
    )


def data_sets() -> None:
    """A look at the glyphs and lines as training sees them: augmented, in all fonts."""
    random = torch.Generator().manual_seed(0)
    glyphs, lines = load_data("glyphs", "image"), load_data("lines", "image", line_width=256)
    shown = torch.randperm(len(glyphs.train), generator=random)[:120]
    save_grid(glyphs.train.take(shown, random)["image"], IMAGES / "glyphs.png", columns=20, upscale=1, invert=True)
    shown = torch.randperm(len(lines.train), generator=random)[:15]
    save_grid(lines.train.take(shown, random)["image"], IMAGES / "lines.png", columns=3, upscale=1, invert=True)


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    masks()
    data_sets()
    if len(sys.argv) > 1:
        for name in ("samples.png", "film.gif"):
            shutil.copy(Path(sys.argv[1]) / name, IMAGES / f"digits-{name}")


if __name__ == "__main__":
    main()
