"""`export`: a language model in a format that other programs read."""

from __future__ import annotations

from pathlib import Path

import torch

from seriatim.interop.export import in_format, llama_of, published_tensors, write_published
from seriatim.systems.published import Published
from seriatim.systems.system import System
from seriatim.systems.text.next_token import NextToken
from seriatim.verbs.load import load

FORMATS = ("hf",)


def export(source: str | Path | System, out: str | Path, form: str = "hf", dtype: torch.dtype | None = None) -> Path:
    """Write a next-token run or a published model as a folder that `transformers` loads, and whatever reads its format.

    dtype: the number format (None: as the model has it). A run's learned start becomes the embedding of its <bos> id.
    Raises ValueError for models of another kind, and for a folder that is not empty.
    """
    if form not in FORMATS:
        raise ValueError(f"there is no format {form!r}; there is {', '.join(FORMATS)}")
    system, out = source if isinstance(source, System) else load(source), Path(out)
    if isinstance(system, Published):
        config, settings = system.raw, system.settings
        tensors = published_tensors(system.model, system.config.parts, system.config.backbone)
    elif isinstance(system, NextToken):
        special = system.tokenizer.special
        config, tensors = llama_of(system.model, system.config.length, special["bos"])
        settings = {"bos_token_id": special["bos"], "eos_token_id": special.get("eos")}
        config |= settings
    else:
        raise ValueError(f"{system.meta.key} has no counterpart in that format: next-token models do")
    chat = system.chat if isinstance(system, Published) else None
    write_published(out, config, in_format(tensors, dtype), system.tokenizer, settings, chat)
    return out
