"""What generation of text gives, and the watch on a row while it grows: pieces of text, and strings that end it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from seriatim.tokenizers.text import Detokenizer, TextTokenizer


@dataclass(frozen=True)
class Generation:
    """What was generated for one prompt.

    ids: the new tokens, an end of text or of a stop string among them; text: of these ids, up to a stop string (None
    without a tokenizer); forwards: of the model, one after another, those that only read a long prompt apart; drafted,
    accepted: tokens that were suggested, and those of them that stood; seconds: of the batch it was generated in;
    logprobs: of each new token before temperature, filters, penalties and constraints, in nats, if asked for; first:
    seconds until the first token was there; rows: of each forward, what was verified and one more (of the prompt the
    last token only); drafting: seconds that went into drafts, behind the first forward.
    """

    ids: list[int]
    text: str | None
    forwards: int
    drafted: int
    accepted: int
    seconds: float
    logprobs: list[float] | None = None
    first: float = 0.0
    rows: tuple[int, ...] = ()
    drafting: float = 0.0


class Watch:
    """One row of a batch as text. What may be the beginning of a stop string is held back until it is known."""

    def __init__(self, tokenizer: TextTokenizer, stops: Sequence[str]):
        if not all(stops):
            raise ValueError("an empty string ends nothing: stop strings have at least one letter")
        self.pieces, self.stops = Detokenizer(tokenizer), tuple(stops)
        self.text = ""
        self.told = 0  # letters that were given out
        self.ended = False

    @property
    def count(self) -> int:
        """Ids that were looked at; where the row has ended, those that belong to it."""
        return len(self.pieces.ids)

    def push(self, ids: Sequence[int]) -> str:
        """What can be given out, now that these ids are there."""
        for i in ids:
            if self.ended:
                break
            self._grow(self.pieces.push([i]))
        return self._out(len(self.text) if self.ended else len(self.text) - self._waiting())

    def rest(self) -> str:
        """What is left at the end."""
        if not self.ended:
            self._grow(self.pieces.rest())
        return self._out(len(self.text))

    def _grow(self, piece: str) -> None:
        start = max(len(self.text) - max(map(len, self.stops), default=0), 0)
        self.text += piece
        found = [at for stop in self.stops if (at := self.text.find(stop, start)) >= 0]
        if found:
            self.text, self.ended = self.text[: min(found)], True

    def _waiting(self) -> int:
        """Letters at the end that may begin a stop string."""
        longest = max((len(stop) - 1 for stop in self.stops), default=0)
        for n in range(min(longest, len(self.text)), 0, -1):
            if any(stop.startswith(self.text[-n:]) for stop in self.stops):
                return n
        return 0

    def _out(self, end: int) -> str:
        piece, self.told = self.text[self.told : end], max(end, self.told)
        return piece
