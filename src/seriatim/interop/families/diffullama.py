"""DiffuLLaMA and DiffuGPT (Gong et al. 2024, arXiv 2410.17891): Llama 2 and GPT-2 trained on to decide masks anywhere,
read one slot before their own.

Their configs are those of Llama and GPT-2: what tells them apart is a `mask_token_id`, or how DiffuGPT's tensors are
called. The masks are ids of words that a text hardly has.
"""

from collections.abc import Iterable

from seriatim.interop.blueprint import MaskedBlueprint, masked
from seriatim.interop.families.gpt2 import read as gpt2
from seriatim.interop.families.llama import read as llama
from seriatim.interop.fields import Fields

GPT2_WIDTH, GPT2_MASK, GPT2_MEDIUM_MASK = 768, 10_541, 50_257  # the larger one has a new id


def read(f: Fields) -> MaskedBlueprint:
    bare = f.raw["model_type"] == "gpt2"
    mask = f.number("mask_token_id", least=0)
    plan = gpt2(f) if bare else llama(f)
    plan = masked(plan, f.where, mask, shift=True, rule="random", sampling={"temperature": 0.9, "top_p": 0.9})
    if not bare:
        return plan
    names = {"transformer.wte.": "embed_tokens.", "transformer.": "denoise_model."}
    parts = tuple(part._replace(theirs=tuple(_renamed(t, names) for t in part.theirs)) for part in plan.parts)
    return MaskedBlueprint(**{**plan.__dict__, "parts": parts})


def _renamed(name: str, names: dict[str, str]) -> str:
    old = next((old for old in names if name.startswith(old)), None)
    return name if old is None else names[old] + name.removeprefix(old)


def mask_of_gpt2(raw: dict[str, object], tensors: Iterable[str]) -> dict[str, object]:
    """The config with the mask of a DiffuGPT, where tensors are called as its own and it names none."""
    if raw.get("model_type") != "gpt2" or "mask_token_id" in raw:
        return raw
    if not any(name.startswith("denoise_model.") for name in tensors):
        return raw
    return raw | {"mask_token_id": GPT2_MASK if raw.get("n_embd", GPT2_WIDTH) == GPT2_WIDTH else GPT2_MEDIUM_MASK}
