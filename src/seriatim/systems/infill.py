"""Gaps in a text, and the text as they are filled: `<mask:12>` stands for so many tokens, `<fill>` for any number."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Int
from torch import Tensor

from seriatim.canvas import DELETED, GIVEN, Canvas
from seriatim.tokenizers.text import Detokenizer, TextTokenizer

MARK = re.compile(r"(?P<slashes>\\*)(?P<mark><mask:(?P<count>[^<>\n]*)>|<fill>)")
Fills = Literal["known", "unknown"]  # gaps of a given number of tokens; gaps whose number of tokens is found


@dataclass(frozen=True)
class Gap:
    """A place to be filled with so many tokens, or (None) with however many it takes."""

    tokens: int | None = None

    def __post_init__(self) -> None:
        if self.tokens is not None and self.tokens < 1:
            raise ValueError(f"a gap takes at least 1 token, as in <mask:12>; got {self.tokens}")


Parts = Sequence[str | Gap]


def parted(text: str) -> tuple[str | Gap, ...]:
    r"""The parts of a text in which gaps are marked, in order; gaps beside each other are one.

    A backslash before a mark makes it text, two are a backslash and a gap; all other backslashes, and other words in
    angle brackets, are text. Raises ValueError where there is no gap, one of no tokens, or gaps of both kinds.
    """
    parts: list[str | Gap] = []
    said, end = "", 0
    for found in MARK.finditer(text):
        slashes = len(found["slashes"])
        said, end = said + text[end : found.start()] + "\\" * (slashes // 2), found.end()
        if slashes % 2:
            said += found["mark"]
            continue
        parts += [said, _gap(found)] if said else [_gap(found)]
        said = ""
    gaps = {part.tokens is None for part in parts if isinstance(part, Gap)}
    if not gaps:
        raise ValueError("nothing is to be filled: mark a gap by <mask:12> (so many tokens) or <fill> (any number)")
    if len(gaps) == 2:
        raise ValueError("gaps are of one kind, all <mask:N> or all <fill>: no system fills both in one text")
    return joined([*parts, said + text[end:]])


def _gap(found: re.Match[str]) -> Gap:
    count = found["count"]
    if count is not None and not re.fullmatch("0*[1-9][0-9]{0,8}", count):
        raise ValueError(
            f"a gap takes a whole number of tokens from 1 on, as <mask:12> does; got {found['mark']} (where these very "
            f"letters are meant, write \\{found['mark']})"
        )
    return Gap(None if count is None else int(count))


def joined(parts: Parts) -> tuple[str | Gap, ...]:
    """Texts, and gaps of one kind, that stand beside each other as one; no empty texts."""
    out: list[str | Gap] = []
    for part in parts:
        last = out[-1] if out else None
        if isinstance(part, Gap) and isinstance(last, Gap):
            out[-1] = Gap(None if None in (part.tokens, last.tokens) else (part.tokens or 0) + (last.tokens or 0))
        elif isinstance(part, str) and isinstance(last, str):
            out[-1] = last + part
        elif part:
            out.append(part)
    return tuple(out)


def refuse(parts: Parts, fills: Fills | None, key: str) -> None:
    """Raise ValueError where a system that fills these gaps (None: none) is asked for others."""
    gaps = [part for part in parts if isinstance(part, Gap)]
    if not gaps:
        raise ValueError("nothing is to be filled: there is no gap among the parts of the text")
    if fills is None:
        raise ValueError(
            f"{key} writes each token from those before it, and would not see the text behind a gap: it fills none; "
            "systems that decide tokens in any order do, such as zoo:text-mdlm"
        )
    if fills == "known" and any(gap.tokens is None for gap in gaps):
        raise ValueError(f"{key} fills gaps of a given number of tokens: write <mask:12>, say, in place of <fill>")
    if fills == "unknown" and any(gap.tokens is not None for gap in gaps):
        raise ValueError(f"{key} finds out how many tokens a gap takes: write <fill> in place of <mask:N>")


def settled(canvas: Canvas) -> Int[Tensor, " n"]:
    """Elements of the first row in reading order, up to the first that is still to be decided."""
    place, gone = canvas.place[0], canvas.status[0] == DELETED
    order = place.masked_fill(gone, canvas.layout.size).argsort(stable=True)[: int((~gone).sum())]
    return order[canvas.known[0][order].long().cumprod(0).bool()]


class Filled:
    """The text of a canvas whose gaps are filled, given out from the front: what was given as it was written, a letter
    of a gap as soon as it is whole and all before it is decided."""

    def __init__(self, tokenizer: TextTokenizer, parts: Parts):
        self.tokenizer = tokenizer
        texts = [(part, len(tokenizer.encode(part))) for part in parts if isinstance(part, str)]
        self.texts = [(text, size) for text, size in texts if size]  # what takes no id is not seen by the model either
        self.gap = Detokenizer(tokenizer)
        self.told = self.left = 0  # elements that were given out; given ones of the present text that were not

    def push(self, canvas: Canvas) -> str:
        """What can be given out now. Tokens that were, must stay."""
        elements = settled(canvas)[self.told :]
        self.told += len(elements)
        out = []
        given = (canvas.status[0][elements] == GIVEN).tolist()
        for i, old in zip(canvas.value["token"][0][elements].tolist(), given, strict=True):
            if old and not self.left:
                text, self.left = self.texts.pop(0)
                out += [self.gap.rest(), text]
                self.gap = Detokenizer(self.tokenizer)
            if old:
                self.left -= 1
            else:
                out.append(self.gap.push([i]))
        return "".join(out)

    def rest(self) -> str:
        """What is left at the end."""
        return self.gap.rest()


def known_gaps(tokenizer: TextTokenizer, parts: Parts) -> tuple[list[int], list[bool]]:
    """Ids of a text whose gaps are of known lengths, 0 in the gaps; and which are given."""
    ids: list[int] = []
    given: list[bool] = []
    for part in parts:
        row = tokenizer.encode(part) if isinstance(part, str) else [0] * (part.tokens or 0)
        ids += row
        given += [isinstance(part, str)] * len(row)
    return ids, given
