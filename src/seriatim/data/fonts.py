"""Fonts to draw with: the text fonts that matplotlib brings along, and those of a folder.

A font is one cut (regular, bold, italic) of a family. Everything is drawn by Pillow's basic layout, ink 255 on 0.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

CHARACTERS = string.ascii_uppercase + string.ascii_lowercase + string.digits

# matplotlib's fonts that draw all 62 characters, by family. The others hold symbols; cmsy10, cmex10 and LastResort
# claim the letters and draw something else. Computer Modern's cuts are files without a common family name.
FAMILIES = {
    "DejaVu Sans": ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique"),
    "DejaVu Sans Mono": (
        "DejaVuSansMono",
        "DejaVuSansMono-Bold",
        "DejaVuSansMono-Oblique",
        "DejaVuSansMono-BoldOblique",
    ),
    "DejaVu Serif": ("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic"),
    "STIX": ("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"),
    "Computer Modern": ("cmr10", "cmb10", "cmti10", "cmmi10"),
    "Computer Modern Sans": ("cmss10",),
    "Computer Modern Typewriter": ("cmtt10",),
}
FONT_FILES = {".ttf", ".otf", ".ttc"}
LEAST_DISTINCT = 56  # of 62 pictures: I, l and 1 or O, o and 0 may look alike, but a font of capitals will not do


@dataclass(frozen=True)
class Font:
    """One cut of a family."""

    path: Path
    family: str

    @property
    def name(self) -> str:
        return self.path.stem

    def sized(self, cap_height: float) -> ImageFont.FreeTypeFont:
        """The font at the size at which an H is `cap_height` pixels high: families differ in what they call a size."""
        return _sized(self.path, cap_height)


@lru_cache(maxsize=128)
def _sized(path: Path, cap_height: float) -> ImageFont.FreeTypeFont:
    probe = _open(path, 200)
    _, top, _, bottom = probe.getbbox("H", anchor="ls")
    return _open(path, 200 * cap_height / (bottom - top))


def _open(path: Path, size: float) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


WEIGHTS, SLANTS = ("bold", "bol"), ("italic", "oblique", "ita")
KINDS = {
    "DejaVu Sans": "sans", "DejaVu Sans Mono": "mono", "DejaVu Serif": "serif", "STIX": "times",
    "Computer Modern": "roman", "Computer Modern Sans": "narrow", "Computer Modern Typewriter": "typewriter",
}  # fmt: skip
CUTS = {"cmb10": "bold", "cmti10": "italic", "cmmi10": "slanted"}  # whose names do not say it


def described(name: str) -> str:
    """A font by the name of its file in words that people use: "bold italic serif". Of one that did not come with
    matplotlib, the first word of its name stands for the family."""
    family = next((family for family, stems in FAMILIES.items() if name in stems), None)
    cut = name.partition("-")[2].lower() or (name.removeprefix("STIXGeneral").lower() if family == "STIX" else "")
    words = [*(["bold"] if cut.startswith(WEIGHTS) else []), *(["italic"] if cut.endswith(SLANTS) else [])]
    words += [CUTS[name]] if name in CUTS else []
    first = re.match("[A-Za-z]+?(?=[A-Z -_]|$)", name)
    return " ".join([*words, KINDS[family] if family else (first[0] if first else "plain").lower()])


def built_in_fonts(families: Sequence[str] = tuple(FAMILIES)) -> tuple[Font, ...]:
    """The fonts of these families that matplotlib has here. Raises FileNotFoundError where one is missing."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    fonts = tuple(Font(folder / f"{stem}.ttf", family) for family in families for stem in FAMILIES[family])
    missing = [font.path.name for font in fonts if not font.path.is_file()]
    if missing:
        raise FileNotFoundError(f"matplotlib came without {', '.join(missing)} in {folder}: install it from PyPI")
    return fonts


def folder_fonts(folder: str | Path) -> tuple[tuple[Font, ...], tuple[str, ...]]:
    """Fonts of a folder (TrueType, OpenType; at any depth) that draw all 62 characters, and notes about the others.

    Raises FileNotFoundError where there is no such folder, ValueError where no font in it will do.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"no folder of fonts at {root}")
    files = sorted(p for p in root.rglob("*") if p.suffix.lower() in FONT_FILES and p.is_file())
    if not files:
        raise ValueError(f"no fonts (.ttf, .otf, .ttc) in {root}")
    usable, refused = [], []
    for path in files:
        reason = _unfit(path)
        if reason:
            refused.append(f"{path.relative_to(root)} {reason}")
        else:
            usable.append(Font(path, str(_open(path, 20).getname()[0] or path.stem)))
    if not usable:
        raise ValueError(f"no font in {root} draws the letters and digits: {'; '.join(refused[:3])}")
    return tuple(usable), tuple(f"font left out: {text}" for text in refused)


def _unfit(path: Path) -> str:
    """Why this font cannot be used; empty if it can."""
    from matplotlib.ft2font import FT2Font

    try:
        have = FT2Font(str(path)).get_charmap()
        missing = [c for c in CHARACTERS if ord(c) not in have]
        if missing:
            return f"lacks {len(missing)} of the 62 letters and digits"
        font = _open(path, 40)
        masks = [font.getmask(c, anchor="ls") for c in CHARACTERS]
    except (OSError, RuntimeError, ValueError) as error:
        return f"cannot be read ({error})"
    drawn = {(mask.size, bytes(mask)) for mask in masks}
    if masks[CHARACTERS.index("H")].size[1] == 0:
        return "draws nothing for an H"
    if len(drawn) < LEAST_DISTINCT:
        return f"draws only {len(drawn)} different pictures for the 62 letters and digits"
    return ""


def draw_text(
    text: str, font: ImageFont.FreeTypeFont, size: tuple[int, int], start: tuple[float, float], anchor: str
) -> Image.Image:
    """Text in white on a black picture of (width, height), its anchor (Pillow's two letters) at (x, y)."""
    picture = Image.new("L", size)
    ImageDraw.Draw(picture).text(start, text, fill=255, font=font, anchor=anchor)
    return picture
