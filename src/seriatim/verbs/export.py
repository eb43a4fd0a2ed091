"""`export`: a language model in a format that other programs read."""

from __future__ import annotations

from pathlib import Path

import torch

from seriatim.interop.export import write_published
from seriatim.systems.language_model import LanguageModel
from seriatim.systems.published_masked import PublishedMasked
from seriatim.systems.system import System
from seriatim.verbs.load import load, number_format

FORMATS = ("hf",)


def export(
    source: str | Path | System, out: str | Path, form: str = "hf", dtype: torch.dtype | str | None = None
) -> Path:
    """Write a next-token run or a published model as a folder that `transformers` loads, and whatever reads its format.

    dtype: the number format or its name (None: as the model has it). A run's learned start becomes the embedding of
    its <bos> id. Raises ValueError for models of another kind, and for a folder that is not empty.
    """
    if form not in FORMATS:
        raise ValueError(f"there is no format {form!r}; there is {', '.join(FORMATS)}")
    system, out = source if isinstance(source, System) else load(source), Path(out)
    if not isinstance(system, LanguageModel | PublishedMasked):
        raise ValueError(f"{system.meta.key} has no counterpart in that format: next-token models do")
    what, dtype = system.publication(), number_format(dtype)
    if dtype is not None:
        what = what._replace(tensors={name: x.to(dtype) for name, x in what.tensors.items()})
    write_published(out, what, system.tokenizer, system.chat)
    return out
