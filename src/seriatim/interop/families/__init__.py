"""Published families of language models: what each config says, in this library's terms. One file a family."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from seriatim.backbones.transformer import TransformerConfig
from seriatim.interop.blueprint import Blueprint, MaskedBlueprint, masked
from seriatim.interop.fields import MOST_NUMBERS, Fields

# model_type -> the module that reads it
FAMILIES = {
    "llama": "llama", "mistral": "mistral", "qwen2": "qwen", "qwen3": "qwen", "qwen3_moe": "qwen", "smollm3": "smollm3",
    "phi3": "phi3", "olmo2": "olmo2", "gemma2": "gemma", "gemma3_text": "gemma", "gpt2": "gpt2", "gpt_neox": "gpt_neox",
    "mamba2": "mamba2", "bamba": "bamba", "t5": "t5", "mt5": "mt5",
}  # fmt: skip
# the same, of models that decide masks in any order, or block after block
MASKED = {
    "llada": "llada", "Dream": "dream", "sdar": "sdar", "Fast_dLLM_Qwen": "fast_dllm", "mdlm": "mdlm", "bd3lm": "mdlm",
    "wedlm": "wedlm",
}  # fmt: skip


CONVERTED = "seriatim"  # the entry of a config that says how a next-token model was turned into one that decides masks


def masked_as(plan: Blueprint, how: Mapping[str, Any], where: str = "config.json") -> MaskedBlueprint:
    """The blueprint of a next-token model as one that decides masks. Raises ValueError for what cannot be one."""
    if set(how) != {"mask", "block"} or not isinstance(how["mask"], int):
        raise ValueError(f"{where}: {CONVERTED!r} says which id is the mask and how long a block is, not {dict(how)}")
    if not isinstance(plan.backbone, TransformerConfig):
        raise ValueError(f"{where}: what reads from left to right only decides no masks")
    whole = {"within": 32} if how["block"] is None else {"threshold": 0.9}
    sampling = {"temperature": 0.7, "top_p": 0.95}
    return masked(plan, where, how["mask"], block=how["block"], sampling=sampling, **whole)


def blueprint(raw: Mapping[str, Any], where: str = "config.json") -> Blueprint:
    """The parts of a published model by its config. Raises ValueError for a family, a key or a size that is not
    understood."""
    if CONVERTED in raw:
        return masked_as(blueprint({k: v for k, v in raw.items() if k != CONVERTED}, where), raw[CONVERTED], where)
    kind, known = raw.get("model_type"), FAMILIES | MASKED
    if kind not in known:
        raise ValueError(f"{where}: models of type {kind!r} are not understood; there are {', '.join(known)}")
    family = "diffullama" if kind in ("llama", "gpt2") and raw.get("mask_token_id") is not None else known[kind]
    fields = Fields(raw, where)
    try:
        found: Blueprint = importlib.import_module(f"{__name__}.{family}").read(fields)
    except KeyError as error:
        raise ValueError(f"{where} lacks {error}") from None
    except TypeError as error:
        raise ValueError(f"{where} holds a value of the wrong kind: {error}") from None
    fields.finish()
    if found.numbers > MOST_NUMBERS:
        raise ValueError(f"{where} describes {found.numbers:.1e} parameters: that is no model")
    return found
