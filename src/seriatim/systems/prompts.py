"""What pictures are asked for in words: "bold italic serif letter g", as far as their data can say it."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from seriatim.data.base import Data

ARTICLES = ("a", "an", "the")
KINDS = ("letter", "digit")


def styles_of(data: Data) -> tuple[str, ...]:
    """The styles of data in words, by their numbers; none where pictures have no styles that have names."""
    names = getattr(data.train, "styles", ())
    if data.name == "glyphs":
        from seriatim.data.fonts import described

        return tuple(described(name) for name in names)
    return tuple(names)


class Prompts:
    """Texts as ids of words, in `slots` places, -1 behind their ends: the words of a style, then those of the class."""

    def __init__(self, styles: Sequence[str], classes: Sequence[str]):
        self.styles = [tuple(s.lower().split()) for s in styles]
        self.classes = [_said(name) for name in classes]
        known = dict.fromkeys(word for text in [*self.styles, *self.classes] for word in text)
        self.words = tuple(known) or ("picture",)

    @cached_property
    def slots(self) -> int:
        """The longest text that data ask for."""
        return max(1, max(map(len, self.styles), default=0) + max(map(len, self.classes), default=0))

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.words)}

    def of(
        self, label: Int[Tensor, "n"], style: Int[Tensor, "n"] | None = None, keep: Tensor | None = None
    ) -> Int[Tensor, "n slots"]:
        """The ids of what says these classes, in these styles (None: in no words about them). keep: which words of a
        style are said, (n, slots)."""
        texts = []
        for i, c in enumerate(label.tolist()):
            words = self.styles[int(style[i])] if style is not None and self.styles else ()
            some = [w for k, w in enumerate(words) if keep is None or bool(keep[i, k])]
            texts.append([*some, *self.classes[c]])
        return self._filled(texts)

    def read(self, texts: Sequence[str]) -> Int[Tensor, "n slots"]:
        """The ids of texts as people write them: articles are left out, and but for single letters, case is none.
        Raises ValueError for words that nothing was called by, and for texts that are too long."""
        if not texts:
            raise ValueError("say at least one text")
        return self._filled([self._read(text) for text in texts])

    def _read(self, text: str) -> list[str]:
        words = text.split()
        while len(words) > 1 and words[0].lower() in ARTICLES:
            words = words[1:]
        words = [word if word in self._ids else word.lower() for word in words]
        unknown = [word for word in words if word not in self._ids]
        if unknown or not words:
            near = [f"did you mean {n[0]}?" for w in unknown if (n := difflib.get_close_matches(w, self.words, 1))]
            said = f"no picture was called {unknown[0]!r}" if unknown else "an empty text asks for nothing"
            long = [word for word in self.words if len(word) > 1]
            raise ValueError(f"{said}: {' '.join(near) or 'there are ' + ', '.join(long[:30])}")
        if len(words) > self.slots:
            raise ValueError(f"{text!r} has {len(words)} words, and at most {self.slots} are read")
        return words

    def _filled(self, texts: Sequence[Sequence[str]]) -> Int[Tensor, "n slots"]:
        ids = [[self._ids[w] for w in words] for words in texts]
        return torch.tensor([row + [-1] * (self.slots - len(row)) for row in ids], dtype=torch.long)


def _said(name: Any) -> tuple[str, ...]:
    """A class in words: letters as they are, other names in lower case."""
    text = str(name)
    if len(text) == 1 and text.isalnum():
        return (KINDS[text.isdigit()], text)
    return tuple(text.lower().split()) or ("picture",)
