"""Text <-> ids: bytes, byte-pair encoding, words. Every tokenizer keeps the same reserved ids in front.

A tokenizer is one JSON file (`tokenizer.json`): byte-pair encoding and words in the format of Hugging Face's
`tokenizers`, so that other programs read them too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import Int
from torch import Tensor

SPECIAL = ("bos", "eos", "pad", "mask", "fill", "sep")
RESERVED = 16  # ids kept free in front: the special ones and spare ones
NAMES = tuple(f"<{name}>" for name in SPECIAL) + tuple(f"<spare{i}>" for i in range(RESERVED - len(SPECIAL)))


class TextTokenizer(Protocol):
    """Text <-> ids. `special` names ids that stand for no text (eos, mask, ...), where there are any."""

    kind: str
    vocab: int
    special: dict[str, int]

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    @property
    def bytes_of(self) -> Int[Tensor, " vocab"]:
        """How many UTF-8 bytes each id stands for: turns nats a token into bits a byte."""
        ...

    def to_json(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class ByteTokenizer:
    """Every byte an id, 0 to 255, then the reserved ids. Exact for any text."""

    kind = "bytes"
    vocab = 256 + RESERVED
    special = {name: 256 + i for i, name in enumerate(SPECIAL)}  # noqa: RUF012 (never changed)

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    @property
    def bytes_of(self) -> Int[Tensor, " vocab"]:
        return torch.cat([torch.ones(256, dtype=torch.long), torch.zeros(RESERVED, dtype=torch.long)])

    def to_json(self) -> dict[str, Any]:
        return {"kind": "bytes"}


class PairTokenizer:
    """Byte-level byte-pair encoding (Sennrich et al. 2016; Radford et al. 2019), by the `tokenizers` library."""

    kind = "bpe"

    def __init__(self, inner: Any):
        self.inner = inner
        self.inner.encode_special_tokens = True  # "<eos>" that a user writes is text
        self.vocab = inner.get_vocab_size()
        self.special = {name: i for name in SPECIAL if (i := inner.token_to_id(f"<{name}>")) is not None}

    @classmethod
    def train(cls, documents: Iterable[str], vocab: int = 4096) -> PairTokenizer:
        """Merge the most frequent pairs until there are `vocab` ids, 16 of them reserved in front."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        if vocab < 256 + RESERVED:
            raise ValueError(f"byte-pair encoding starts from {256 + RESERVED} ids, got vocab {vocab}")
        inner = Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab, special_tokens=list(NAMES), initial_alphabet=alphabet, show_progress=False
        )
        inner.train_from_iterator(documents, trainer)
        return cls(inner)

    def encode(self, text: str) -> list[int]:
        return self.inner.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.inner.decode(list(ids), skip_special_tokens=True)

    @cached_property
    def bytes_of(self) -> Int[Tensor, " vocab"]:
        reserved = set(self.special.values()) | {self.inner.token_to_id(n) for n in NAMES}
        lengths = [0 if i in reserved else len(self.inner.id_to_token(i)) for i in range(self.vocab)]
        return torch.tensor(lengths)  # a token of byte-level encoding is written with one letter a byte

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "tokenizer": json.loads(self.inner.to_str())}


class WordTokenizer(PairTokenizer):
    """The most frequent words, and the signs between them; rarer ones become <spare0>. Not exact: spaces are lost."""

    kind = "words"

    @classmethod
    def train(cls, documents: Iterable[str], vocab: int = 4096) -> WordTokenizer:
        """The `vocab` most frequent words, 16 ids reserved in front."""
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers

        inner = Tokenizer(models.WordLevel(unk_token="<spare0>"))
        inner.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordLevelTrainer(vocab_size=vocab, special_tokens=list(NAMES), show_progress=False)
        inner.train_from_iterator(documents, trainer)
        return cls(inner)

    @classmethod
    def of(cls, words: Sequence[str]) -> WordTokenizer:
        """These words and no others, which spaces part, 16 ids reserved in front."""
        from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

        inner = Tokenizer(models.WordLevel({x: i for i, x in enumerate((*NAMES, *words))}, unk_token="<spare0>"))
        inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        inner.add_special_tokens([AddedToken(x, special=True) for x in NAMES])
        return cls(inner)

    @cached_property
    def bytes_of(self) -> Int[Tensor, " vocab"]:
        lengths = [0 if i < RESERVED else 1 + len(self.inner.id_to_token(i).encode()) for i in range(self.vocab)]
        return torch.tensor(lengths)  # with the space behind it


class Detokenizer:
    """Ids that come one after another -> pieces of text, each as soon as it is whole; at the same cost each time."""

    def __init__(self, tokenizer: TextTokenizer):
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.told = self.before = 0  # ids whose text was given out; those before the last piece, for what joins them

    def push(self, ids: Sequence[int]) -> str:
        """What these ids add; nothing while half a letter waits for its other half."""
        self.ids.extend(ids)
        piece = self._piece()
        if not piece or piece.endswith("\ufffd"):
            return ""
        self.before, self.told = self.told, len(self.ids)
        return piece

    def rest(self) -> str:
        """What is left at the end."""
        piece = self._piece()
        self.before = self.told = len(self.ids)
        return piece

    def _piece(self) -> str:
        known = self.tokenizer.decode(self.ids[self.before : self.told])
        return self.tokenizer.decode(self.ids[self.before :])[len(known) :]


KINDS: dict[str, Any] = {"bpe": PairTokenizer, "words": WordTokenizer}


def from_json(about: dict[str, Any]) -> TextTokenizer:
    """The tokenizer that `to_json` described; also a bare file of the `tokenizers` library."""
    if about.get("kind") == "bytes":
        return ByteTokenizer()
    from tokenizers import Tokenizer

    inner = Tokenizer.from_str(json.dumps(about.get("tokenizer", about)))
    return KINDS.get(about.get("kind", "bpe"), PairTokenizer)(inner)


def load_text_tokenizer(path: str | Path) -> TextTokenizer:
    """From a tokenizer.json, or the folder that holds one. Raises FileNotFoundError, ValueError where it is broken."""
    path = Path(path)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"there is no tokenizer at {path}")
    try:
        return from_json(json.loads(path.read_text(encoding="utf-8")))
    except Exception as error:  # the library raises bare exceptions
        raise ValueError(f"{path} is no tokenizer that can be read ({error}); it may have been cut short") from None


def id_stream(
    tokenizer: TextTokenizer, documents: Iterable[str], end: Sequence[int] | None = None
) -> Int[Tensor, " n"]:
    """All documents one after another as int32, each ended by `end` (None: by <eos>, where there is one)."""
    if end is None:
        end = [tokenizer.special["eos"]] if "eos" in tokenizer.special else []
    parts = [torch.tensor([*tokenizer.encode(text), *end], dtype=torch.int32) for text in documents]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int32)
