"""Single tokens as text and as bytes, for those who look at log-probabilities."""

from __future__ import annotations

import re
from functools import cache
from typing import Any


class Wording:
    """How the tokens of a tokenizer are shown."""

    def __init__(self, tokenizer: Any):
        self.tokenizer, self.inner = tokenizer, getattr(tokenizer, "inner", None)

    def text(self, id: int) -> str:
        """A token as text; one that stands for none by its name, half a letter by its bytes."""
        text = self.tokenizer.decode([id])
        if text and "\ufffd" not in text:
            return text
        raw = self.bytes(id)
        if raw is not None and "\ufffd" in text:
            return "bytes:" + "".join(f"\\x{b:02x}" for b in raw)
        return text or self._name(id)

    def bytes(self, id: int) -> list[int] | None:
        """Its bytes in UTF-8; None where it stands for no text."""
        text = self.tokenizer.decode([id])
        if "\ufffd" not in text:
            return list(text.encode()) if text else None
        if self.inner is None:
            return [id] if id < 256 else None
        name = self._name(id)
        if hexadecimal := re.fullmatch("<0x([0-9A-F]{2})>", name):
            return [int(hexadecimal[1], 16)]
        letters = _letters()
        return [letters[c] for c in name] if all(c in letters for c in name) else list(text.encode())

    def _name(self, id: int) -> str:
        return (self.inner.id_to_token(id) if self.inner is not None else None) or f"<{id}>"


@cache
def _letters() -> dict[str, int]:
    """The letter that byte-level encoding writes for each byte: itself where it can be seen, else one above 255."""
    seen = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255]
    hidden = [b for b in range(256) if b not in seen]
    return {chr(b): b for b in seen} | {chr(256 + i): b for i, b in enumerate(hidden)}
