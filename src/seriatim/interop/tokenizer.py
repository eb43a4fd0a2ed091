"""Tokenizers of published models: tokenizer.json, or vocab.json with merges.txt."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor


class PublishedTokenizer:
    """A file of the `tokenizers` library as it was published: what it adds around a text, it adds here."""

    kind = "published"

    def __init__(self, inner: Any):
        self.inner = inner
        self.vocab = inner.get_vocab_size(with_added_tokens=True)
        self.special: dict[str, int] = {}

    def encode(self, text: str) -> list[int]:
        return self.inner.encode(text).ids

    def encode_templated(self, text: str) -> list[int]:
        """Ids of a text in which every special token stands already, as a chat template writes it."""
        return self.inner.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.inner.decode(list(ids), skip_special_tokens=True)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that stand for no text: beginnings and ends of texts and turns."""
        return frozenset(i for i, token in self.inner.get_added_tokens_decoder().items() if token.special)

    @cached_property
    def bytes_of(self) -> Int[Tensor, " vocab"]:
        """UTF-8 bytes each id stands for; 0 of special ones."""
        letters = "ByteLevel" in repr(self.inner.decoder)  # tokens are written with one letter a byte
        lengths = []
        for i in range(self.vocab):
            token = self.inner.id_to_token(i) or ""
            if re.fullmatch("<0x[0-9A-F]{2}>", token):
                lengths.append(1)
            else:
                lengths.append(len(token) if letters else len(token.replace("\u2581", " ").encode()))
        return torch.tensor([0 if i in self.special_ids else n for i, n in enumerate(lengths)])


def published_tokenizer(folder: Path) -> PublishedTokenizer | None:
    """The tokenizer of a folder; None where there is none. Raises ValueError for files that are broken or of another
    format."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    whole, vocab, merges = (folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
    try:
        if whole.is_file():
            return PublishedTokenizer(Tokenizer.from_file(str(whole)))
        if vocab.is_file() and merges.is_file():
            inner = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
            inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            inner.decoder = decoders.ByteLevel()
            return PublishedTokenizer(inner)
    except Exception as error:  # the library raises bare exceptions
        raise ValueError(f"the tokenizer of {folder} cannot be read: {error}") from None
    if (folder / "tokenizer.model").is_file():
        raise ValueError(
            f"{folder} holds its tokenizer as tokenizer.model (SentencePiece) only; write a tokenizer.json beside it, "
            'with transformers installed: python -c "from transformers import AutoTokenizer as T; '
            f"T.from_pretrained('{folder}').save_pretrained('{folder}')\""
        )
    return None
