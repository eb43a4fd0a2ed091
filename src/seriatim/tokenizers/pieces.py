"""What each id of a text tokenizer stands for, so that two vocabularies can be compared and ids of one be read as ids
of the other."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from seriatim.tokenizers.text import ByteTokenizer

Piece = bytes | str | None  # a text in UTF-8 (perhaps a part of a letter), the name of a special id, or nothing


@lru_cache(maxsize=8)
def pieces(tokenizer: Any) -> tuple[Piece, ...]:
    """What each id stands for: of bytes, and of whatever holds a tokenizer of the `tokenizers` library as `inner`."""
    if isinstance(tokenizer, ByteTokenizer):
        names = {i: f"<{name}>" for name, i in tokenizer.special.items()}
        return tuple(bytes([i]) if i < 256 else names.get(i) for i in range(tokenizer.vocab))
    inner = tokenizer.inner
    special = {i for i, token in inner.get_added_tokens_decoder().items() if token.special}
    letters = byte_letters() if "ByteLevel" in repr(inner.decoder) else None
    out: list[Piece] = [None] * tokenizer.vocab
    for token, i in inner.get_vocab(with_added_tokens=True).items():
        out[i] = token if i in special else _text(token, letters)
    return tuple(out)


def _text(token: str, letters: dict[str, int] | None) -> bytes:
    """The text of a token: one letter a byte (GPT-2), or U+2581 for spaces and <0x0A> for bytes (SentencePiece)."""
    if letters is not None:
        return bytes(letters[x] for x in token) if all(x in letters for x in token) else token.encode()
    if re.fullmatch("<0x[0-9A-F]{2}>", token):
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ").encode()


@lru_cache(maxsize=1)
def byte_letters() -> dict[str, int]:
    """The letter that stands for each byte in byte-level tokenizers: itself where it can be printed, else one from
    U+0100 on (Radford et al. 2019)."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printed)]
    return {chr(b): b for b in printed} | {chr(0x100 + n): b for n, b in enumerate(others)}


def agree(a: Any, b: Any) -> bool:
    """Do both read every id that they share as the same piece? Either may have more: many vocabularies are padded."""
    shared = zip(pieces(a), pieces(b), strict=False)
    return all(x == y or x is None or y is None for x, y in shared)


def translation(ours: Any, theirs: Any) -> tuple[Int[Tensor, " ours"], Int[Tensor, " ours"]]:
    """For each of our ids the id of theirs that is the same piece (-1: there is none); and the one that reads most like
    it, which is the same where there is one, else the longest piece with which ours ends."""
    known = {piece: i for i, piece in reversed(list(enumerate(pieces(theirs)))) if piece is not None}
    same, like = [], []
    for piece in pieces(ours):
        found = -1 if piece is None else known.get(piece, -1)
        same.append(found)
        if found < 0 and isinstance(piece, bytes):
            found = next((known[piece[n:]] for n in range(1, len(piece)) if piece[n:] in known), -1)
        like.append(max(found, 0))
    return torch.tensor(same), torch.tensor(like)
