"""Fast-dLLM v2 (Wu et al. 2025, arXiv 2509.26328): Qwen2.5 trained on to decide blocks of masks. Its outputs are still
those of a next-token model: a token is read one slot before its own, the first of a block at the end of the one
before."""

from math import gcd

from seriatim.interop.blueprint import MaskedBlueprint, masked
from seriatim.interop.families.qwen import read as qwen
from seriatim.interop.fields import Fields

END_OF_TEXT, END_OF_TURN = 151_643, 151_645


def read(f: Fields) -> MaskedBlueprint:
    f.raw["model_type"] = "qwen2"
    block = f.number("bd_size", default=32)
    plan = qwen(f)
    return masked(
        plan, f.where, f.number("mask_token_id", default=151_665, least=0), shift=True, block=block,
        within=gcd(8, block), threshold=0.9, ends=tuple(i for i in (END_OF_TEXT, END_OF_TURN) if i < plan.vocab),
        sampling={"temperature": 0.0},
    )  # fmt: skip
