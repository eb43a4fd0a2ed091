"""A tiny system of text that fills gaps of unknown length by insertion."""

from seriatim.laws.case import randomise
from seriatim.systems.text.ilm import ILM, Config
from seriatim.tokenizers.text import ByteTokenizer


def inserting() -> ILM:
    """With weights drawn at random, filling all the room there is."""
    one = ILM(Config(length=16, width=16, depth=1, heads=2, stop=0.999), ByteTokenizer())
    randomise(one.model, 0, 0.3)
    return one.eval()
