"""The small model that drafts for another: found by name, kept between generations, and compared with its target."""

from __future__ import annotations

import copy
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from seriatim.interop.translate import translated
from seriatim.systems.encoder_decoder import EncoderDecoder
from seriatim.systems.language_model import LanguageModel
from seriatim.tokenizers.pieces import agree, pieces, translation

KEPT = 2  # draft models that stay in memory: a bench asks for the same one at every prompt


def draft_model(source: str, target: LanguageModel, translate: bool = False) -> LanguageModel:
    """The model that a name stands for, as a draft for `target`: in its number format and its ids.

    translate: where the two tokenizers differ, exchange ids whose texts agree; without it that is refused, and both
    models named. Padding of a vocabulary is no difference. Raises ValueError, OSError that says what is wrong.
    """
    like = next(target.model.embed.parameters())  # in floating point, however the matrices are kept
    draft = _opened(source, like.dtype, like.device, _stamp(source))
    if isinstance(draft, EncoderDecoder) != isinstance(target, EncoderDecoder):
        kinds = ("continues a text", "answers one that an encoder reads")
        theirs, ours = (kinds[isinstance(x, EncoderDecoder)] for x in (draft, target))
        raise ValueError(
            f"{source} ({draft.meta.key}) {theirs}, and this model ({target.meta.key}) {ours}: a draft model is of the "
            "kind of its target"
        )
    tokenizer: Any = target.tokenizer
    fitted = _fitted(draft, source, tokenizer, target.meta.key, _vocab(target), translate)
    if isinstance(target, EncoderDecoder) and isinstance(fitted, EncoderDecoder):
        if fitted.start != target.start:
            raise ValueError(
                f"answers of {source} begin at id {fitted.start} and those of this model ({target.meta.key}) at "
                f"{target.start}: take a draft that was trained to answer alike"
            )
        return fitted if target.prompts is None else fitted.answering(target.prompts)
    return fitted


@lru_cache(maxsize=KEPT)
def _opened(source: str, dtype: torch.dtype, device: torch.device, stamp: int) -> LanguageModel:
    from seriatim.verbs.load import load

    system = load(source)
    if not isinstance(system, LanguageModel) or not system.model.factorization.draftable:
        raise ValueError(f"{source} ({system.meta.key}) is no next-token model, so it cannot draft one token at a time")
    system.model.to(device, dtype)
    return system


def _stamp(source: str) -> int:
    """Changes when the files of a folder do."""
    from seriatim.verbs.load import where

    try:
        place = where(source)
    except FileNotFoundError:
        return 0  # a name on the hub, or nothing
    files = [place] if place.is_file() else [p for p in Path(place).iterdir() if p.is_file()]
    return max((p.stat().st_mtime_ns for p in files), default=0)


@lru_cache(maxsize=KEPT)
def _fitted(draft: LanguageModel, source: str, tokenizer: Any, key: str, vocab: int, translate: bool) -> LanguageModel:
    """The draft in the ids of the tokenizer and vocabulary of its target."""
    ours, theirs = draft.tokenizer, tokenizer
    if ours is None or theirs is None or agree(ours, theirs):
        if _vocab(draft) == vocab:
            return draft
        if ours is None or theirs is None or draft.model.conditions:
            raise ValueError(
                f"{source} has {_vocab(draft):,} ids and {key} {vocab:,}: a draft model has those of its target"
            )
    elif not translate:
        raise ValueError(
            f"the tokenizers differ: {source} ({draft.meta.key}, {ours.kind}, {ours.vocab:,} ids) and the model "
            f"({key}, {theirs.kind}, {theirs.vocab:,} ids) give ids other meanings. Take a draft of the same "
            f"tokenizer, or exchange ids whose texts agree ({_shared(theirs, ours):,}) by +translate=true"
        )
    same, like = translation(theirs, ours)
    same, like = (_long(x, vocab, fill) for x, fill in ((same, -1), (like, 0)))
    out = copy.copy(draft)
    out._modules = {**draft._modules, "model": translated(draft.model, same, like)}
    out.__dict__["tokenizer"] = theirs
    return out


def _vocab(system: LanguageModel) -> int:
    return system.model.heads["token"].vocab  # type: ignore[return-value]


def _shared(a: Any, b: Any) -> int:
    return len({p for p in pieces(a) if p is not None} & set(pieces(b)))


def _long(x: torch.Tensor, size: int, fill: int) -> torch.Tensor:
    """Of this length."""
    return torch.cat([x[:size], x.new_full((max(size - len(x), 0),), fill)])
