"""A tiny system of text that fills gaps of unknown length by insertion."""

from seriatim.laws.case import randomise
from seriatim.systems.text.ilm import ILM, Config
from seriatim.tokenizers.text import ByteTokenizer


def inserting() -> ILM:
    """With weights drawn at random, and ends by chance."""
    one = ILM(Config(length=64, width=16, depth=1, heads=2, stop=None), ByteTokenizer())
    randomise(one.model, 0, 0.3)
    return one.eval()
