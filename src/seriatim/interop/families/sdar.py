"""SDAR, the dense ones (arXiv 2510.06303): Qwen3 trained on to decide blocks of masks, read where they stand."""

from seriatim.interop.blueprint import MaskedBlueprint, masked
from seriatim.interop.families.qwen import read as qwen
from seriatim.interop.fields import Fields

END_OF_TEXT, END_OF_TURN = 151_643, 151_645


def read(f: Fields) -> MaskedBlueprint:
    f.raw["model_type"] = "qwen3"
    f.take("fuse_cross_entropy", "debug")  # of its training
    plan = qwen(f)
    return masked(
        plan, f.where, f.number("mask_token_id", default=151_669, least=0),
        block=f.number("block_size", "block_length", default=4), threshold=0.9,
        ends=tuple(i for i in (END_OF_TEXT, END_OF_TURN) if i < plan.vocab), sampling={"temperature": 1.0},
    )  # fmt: skip
