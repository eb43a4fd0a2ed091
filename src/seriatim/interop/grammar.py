"""Constrained decoding by `llguidance` (an extra): JSON schemas, regular expressions and grammars over tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool
from torch import Tensor

KINDS = ("json_schema", "regex", "lark")


@dataclass(frozen=True)
class Grammar:
    """What a text must be: kind "json_schema" (a schema as JSON), "regex" or "lark" (llguidance's dialect of Lark)."""

    kind: str
    source: str

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"a grammar is {', '.join(KINDS)}, got {self.kind!r}")
        if self.kind == "json_schema":
            try:
                json.loads(self.source)
            except ValueError as error:
                raise ValueError(f"the JSON schema is no JSON: {error}") from None

    def matchers(self, tokenizer: Any, stop: tuple[int, ...], rows: int) -> list[Matcher]:
        """One for each row. Raises ImportError without the extra, ValueError for a grammar that is wrong, or a
        tokenizer whose tokens are not known."""
        try:
            from llguidance import LLMatcher, LLTokenizer
        except ImportError:
            raise ImportError("constrained decoding needs llguidance: pip install 'seriatim[grammar]'") from None
        inner = getattr(tokenizer, "inner", None)
        if inner is None or not stop:
            raise ValueError("constrained decoding needs a tokenizer of pieces of text, and an id that ends a text")
        known = TOKENS.setdefault(tokenizer, {})  # to make one takes as long as to write some tokens
        if (tokens := known.get(stop)) is None:
            tokens = known[stop] = LLTokenizer(inner.to_str(), n_vocab=tokenizer.vocab, eos_token=list(stop))
        made = getattr(LLMatcher, f"grammar_from_{self.kind}")(self.source)
        matchers = [Matcher(LLMatcher(tokens, made), tokenizer.vocab, stop) for _ in range(rows)]
        if matchers and matchers[0].inner.is_error():
            raise ValueError(f"the {self.kind} is not understood: {matchers[0].inner.get_error()}")
        return matchers


TOKENS: WeakKeyDictionary[Any, dict[tuple[int, ...], Any]] = WeakKeyDictionary()  # as llguidance has them


class Matcher:
    """What may come next in one row, as `Constraint` asks."""

    def __init__(self, inner: Any, vocab: int, stop: tuple[int, ...]):
        self.inner, self.vocab, self.stop = inner, vocab, stop

    def allowed(self) -> Bool[Tensor, "v"]:
        if self.inner.is_stopped():  # the text is complete
            return torch.isin(torch.arange(self.vocab), torch.tensor(self.stop))
        words = torch.frombuffer(bytearray(self.inner.compute_bitmask()), dtype=torch.uint8)
        return (words[:, None] >> torch.arange(8) & 1).flatten()[: self.vocab].bool()

    def take(self, ids: list[int]) -> None:
        """Read on. Raises ValueError for what is not allowed: ids that something else than this constraint decided."""
        for i in ids:
            if self.inner.is_stopped():
                return
            if not self.inner.consume_token(i):
                raise ValueError(f"id {i} is not what the grammar allows here: {self.inner.get_error()}")

    def back(self, count: int) -> None:
        if count and not self.inner.rollback(count):
            raise ValueError(f"the grammar cannot take {count} ids back: {self.inner.get_error()}")
