"""Built-in data that need no download."""

from seriatim.data.digits import Digits, DigitSplit, levels_to_images, load_digits, shift_sideways

__all__ = ["DigitSplit", "Digits", "levels_to_images", "load_digits", "shift_sideways"]
