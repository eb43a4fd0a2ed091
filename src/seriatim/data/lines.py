"""Lines of text as grey pictures, 32 pixels high: words from the standard library's docstrings, each line in a font.

Drawn when asked for. The side of a line is the side of the file it comes from (see `stdlib.py`).
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Int
from PIL import ImageFont
from torch import Tensor

from seriatim.data.base import Data, check_held_out, share
from seriatim.data.fonts import Font, built_in_fonts, draw_text
from seriatim.data.stdlib import docstrings

HEIGHT, CAP_HEIGHT, BASELINE, MARGIN = 32, 13.0, 21.5, 4.0  # pixels
FAMILIES = ("DejaVu Sans", "DejaVu Sans Mono", "DejaVu Serif", "STIX")  # they draw all of ASCII
SHIFT = 2.0  # augmentation: pixels up or down
NARROWEST, WIDEST = 64, 1024
CLOSE, APART = 5.0, 12.0  # pixels from letter to letter: the least in any of these fonts; the mean in the widest


@dataclass(frozen=True)
class Lines:
    """One side of the split: what is written, and the fonts to draw it in."""

    texts: Sequence[str]
    fonts: tuple[Font, ...]
    width: int

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, index: Int[Tensor, " n"], generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """ "image" (n, 1, 32, width), ink 1 on -1: as many whole words of the line as fit, in a font that follows from
        the text. With a generator, in any font, and up to two pixels higher or lower.
        """
        texts = [self.texts[i] for i in index.tolist()]
        which, shift = torch.tensor([share(text) for text in texts]), torch.zeros(len(texts))
        if generator is not None:
            which, shift = torch.rand(2, len(texts), generator=generator)
            shift = (shift * 2 - 1) * SHIFT
        fonts = [self.fonts[int(part * len(self.fonts))] for part in which.tolist()]
        drawn = [self._draw(*line) for line in zip(texts, fonts, shift.tolist(), strict=True)]
        ink = torch.from_numpy(np.stack(drawn)) if drawn else torch.empty(0, HEIGHT, self.width)
        return {"image": ink.unsqueeze(1).float() / 127.5 - 1}

    def _draw(self, text: str, font: Font, shift: float) -> np.ndarray:
        sized = font.sized(CAP_HEIGHT)
        fitting = words_that_fit(text, sized, self.width - 2 * MARGIN)
        return np.asarray(draw_text(fitting, sized, (self.width, HEIGHT), (MARGIN, BASELINE + shift), "ls"))


def words_that_fit(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """The longest beginning of whole words that is no wider than `width` pixels; the first word always."""
    words = text.split(" ")
    count = len(words)
    while count > 1 and font.getlength(" ".join(words[:count])) > width:
        count -= 1
    return " ".join(words[:count])


def lines(line_width: int = 128, held_out: float = 0.05) -> Data:
    """Lines of `line_width` pixels, 64 to 1,024; `held_out` is the share of files whose lines are kept for testing."""
    check_held_out(held_out)
    if not NARROWEST <= line_width <= WIDEST:
        raise ValueError(f"lines are {NARROWEST} to {WIDEST} pixels wide, got {line_width}")
    sides: dict[bool, list[str]] = {True: [], False: []}
    for name, text in _wrapped(line_width):
        sides[share(name) >= held_out].append(text)
    fonts = built_in_fonts(FAMILIES)
    return Data("lines", "image", Lines(sides[True], fonts, line_width), Lines(sides[False], fonts, line_width))


@lru_cache(maxsize=2)
def _wrapped(width: int) -> tuple[tuple[str, str], ...]:
    """(file, line) of all docstrings in printable ASCII: lines that fill `width` pixels in any font, each once.

    Lines that begin with a word too long to fit are left out.
    """
    length, first = int(width / CLOSE), int((width - 2 * MARGIN) / APART)
    found: dict[str, str] = {}
    for name, text in docstrings():
        for paragraph in text.split("\n\n"):
            plain = " ".join(paragraph.split())
            if not plain.isascii() or not plain.isprintable():
                continue
            for line in textwrap.wrap(plain, length, break_long_words=False, break_on_hyphens=False):
                if len(line) >= length / 2 and len(line.split(" ", 1)[0]) <= first:
                    found.setdefault(line, name)
    return tuple((name, line) for line, name in found.items())
