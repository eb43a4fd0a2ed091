"""Texts of two parts: a prompt, and the one answer that is to stand behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload


@dataclass(frozen=True)
class Pairs(Sequence[str]):
    """Documents that are prompts with their answers; of a document only the answer is learned."""

    pairs: tuple[tuple[str, str], ...]

    def __len__(self) -> int:
        return len(self.pairs)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [prompt + answer for prompt, answer in self.pairs[index]]
        prompt, answer = self.pairs[index]
        return prompt + answer
