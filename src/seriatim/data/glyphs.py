"""Letters and digits as pictures of 32x32 grey pixels: the character is the class, the font the style.

Drawn on first use, from matplotlib's fonts and those of a folder if one is given. 15% of the pairs (character, font
family) are held out with all cuts of that family, at least one family for each character: a model that does well on
them has understood that character and style are two things. Whole fonts could not be held out fairly: most are cuts
of one design.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn import functional as F

from seriatim.data.base import Data, check_held_out, share
from seriatim.data.fonts import CHARACTERS, Font, built_in_fonts, draw_text, folder_fonts

SIDE, FINE = 32, 2  # pictures are drawn FINE times larger, moved, then averaged
CAP_HEIGHT, BASELINE = 17.5, 23.5  # pixels: the same for all fonts, so that o and O differ
# Augmentation, drawn evenly from -x to x: degrees of turn, log of size, slant, pixels of shift.
TURN, GROW, SLANT, SHIFT = 8.0, 0.1, 0.12, 1.5


@dataclass(frozen=True)
class Glyphs:
    """One side of the split; row i of the tensors is the same glyph. `styles` names the fonts.

    ink: 0 to 255, twice as fine as the pictures that `take` gives.
    """

    ink: UInt8[Tensor, "n 64 64"]
    label: Int[Tensor, " n"]
    style: Int[Tensor, " n"]
    styles: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.label)

    def take(self, index: Int[Tensor, " n"], generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """ "image" (n, 1, 32, 32) with ink 1 on -1, "label" (n,) into the characters, "style" (n,) into `styles`.

        With a generator, each picture is turned, scaled, slanted and shifted a little.
        """
        ink = self.ink[index].unsqueeze(1).float() / 255
        if generator is not None:
            ink = jiggle(ink, generator)
        return {"image": F.avg_pool2d(ink, FINE) * 2 - 1, "label": self.label[index], "style": self.style[index]}


def jiggle(ink: Float[Tensor, "n 1 h w"], generator: torch.Generator) -> Float[Tensor, "n 1 h w"]:
    """A random affine map of each picture about its centre; what comes in from outside is 0."""
    n, _, height, _ = ink.shape
    turn, grow, slant, right, down = (torch.rand(n, 5, generator=generator) * 2 - 1).unbind(1)
    angle, scale = turn * math.radians(TURN), torch.exp(-grow * GROW)  # the map goes from the new picture to the old
    cos, sin = scale * angle.cos(), scale * angle.sin()
    slope, shift = slant * SLANT, 2 * SHIFT * FINE / height  # the frame is 2 wide
    rows = torch.stack(
        [
            torch.stack([cos, cos * slope - sin, right * shift], 1),
            torch.stack([sin, sin * slope + cos, down * shift], 1),
        ],
        1,
    )
    where = F.affine_grid(rows, list(ink.shape), align_corners=False)
    return F.grid_sample(ink, where, align_corners=False)


def glyphs(fonts: str | Path | None = None, held_out: float = 0.15) -> Data:
    """All 62 characters in matplotlib's 22 text fonts, and in the fonts of the folder `fonts`.

    held_out: the share of the pairs (character, family) kept for testing. Raises FileNotFoundError or ValueError where
    the folder does not exist or has no font with letters; fonts that lack some are named in `notes`.
    """
    check_held_out(held_out)
    more, notes = folder_fonts(fonts) if fonts is not None else ((), ())
    chosen = built_in_fonts() + more
    ink = _drawn(chosen)
    hidden = held_out_pairs(sorted({font.family for font in chosen}), held_out)
    style, label = (x.flatten() for x in torch.meshgrid(torch.arange(len(chosen)), torch.arange(62), indexing="ij"))
    is_test = torch.tensor([(c, font.family) in hidden for font in chosen for c in CHARACTERS])
    styles = tuple(font.name for font in chosen)

    def side(mask: Tensor) -> Glyphs:
        return Glyphs(ink.flatten(0, 1)[mask], label[mask], style[mask], styles)

    return Data("glyphs", "image", side(~is_test), side(is_test), tuple(CHARACTERS), notes)


def held_out_pairs(families: Sequence[str], share_of_pairs: float) -> set[tuple[str, str]]:
    """(character, family): each character's families in the order of a hash; all first ones before any second one."""
    pairs = []
    for character in CHARACTERS:
        ranked = sorted(families, key=lambda family: share(f"{character}/{family}"))
        pairs += [(rank, share(f"{family}/{character}"), character, family) for rank, family in enumerate(ranked)]
    pairs.sort()
    return {(character, family) for *_, character, family in pairs[: round(share_of_pairs * len(pairs))]}


@lru_cache(maxsize=4)
def _drawn(fonts: tuple[Font, ...]) -> UInt8[Tensor, "fonts 62 64 64"]:
    """Every character in every font, on a common baseline, its ink centred from left to right."""
    size = SIDE * FINE
    pictures = np.zeros((len(fonts), len(CHARACTERS), size, size), dtype=np.uint8)
    for i, font in enumerate(fonts):
        sized = font.sized(CAP_HEIGHT * FINE)
        for j, character in enumerate(CHARACTERS):
            left, _, right, _ = sized.getbbox(character, anchor="ls")
            start = (size / 2 - (left + right) / 2, BASELINE * FINE)
            pictures[i, j] = np.asarray(draw_text(character, sized, (size, size), start, "ls"))
    return torch.from_numpy(pictures)
