"""Tokens as users name them: by id, or by what they are in the tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def token_ids(tokenizer: Any, tokens: Sequence[int | str]) -> tuple[int, ...]:
    """The id of each: a number is one; a text is the name of a token ("<eos>", "<|eot_id|>"), or what one token says
    (" the"). Raises ValueError for a text that is no token, or that is several."""
    if isinstance(tokens, str):
        raise ValueError(f"tokens are a list of ids and names, got the text {tokens!r}")
    return tuple(token if isinstance(token, int) else _named(tokenizer, token) for token in tokens)


def _named(tokenizer: Any, text: str) -> int:
    if tokenizer is None:
        raise ValueError(f"this model came without a tokenizer, which would know the token {text!r}: give its id")
    special = {f"<{name}>": i for name, i in tokenizer.special.items()}
    if text in special:
        return special[text]
    known = tokenizer.inner.token_to_id(text) if hasattr(tokenizer, "inner") else None
    if known is not None:
        return known
    ids = getattr(tokenizer, "encode_templated", tokenizer.encode)(text)
    if len(ids) != 1:
        said = f"is {len(ids)} tokens ({', '.join(map(str, ids[:8]))}{', ...' if len(ids) > 8 else ''})"
        raise ValueError(f"{text!r} {said if ids else 'is no token'} in this tokenizer: name one token, or give its id")
    return ids[0]
