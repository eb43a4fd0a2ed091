"""Data: built-in sets that need no download, and one's own files."""

from seriatim.data.base import Data, Examples, Texts, load_data
from seriatim.data.digits import Digits, DigitSplit, levels_to_images, load_digits, shift_sideways

__all__ = [
    "Data", "DigitSplit", "Digits", "Examples", "Texts",
    "levels_to_images", "load_data", "load_digits", "shift_sideways",
]  # fmt: skip
