"""Dream 7B (Ye et al. 2025, arXiv 2508.15487): Qwen2.5 trained on to decide masks anywhere. Its outputs are still those
of a next-token model: a token is read one slot before its own."""

from seriatim.interop.blueprint import MaskedBlueprint, masked
from seriatim.interop.families.qwen import read as qwen
from seriatim.interop.fields import Fields

END_OF_TEXT, END_OF_TURN = 151_643, 151_645


def read(f: Fields) -> MaskedBlueprint:
    f.raw["model_type"] = "qwen2"
    plan = qwen(f)
    return masked(
        plan, f.where, f.number("mask_token_id", default=151_666, least=0), shift=True, rule="entropy",
        ends=tuple(i for i in (END_OF_TEXT, END_OF_TURN) if i < plan.vocab),
        sampling={"temperature": 0.2, "top_p": 0.95},
    )  # fmt: skip
