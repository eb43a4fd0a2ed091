"""What is asked of an engine, and what it gives back; knows nothing of networks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from seriatim.systems.system import Sampling

Finish = Literal["stop", "length", "cancelled", "failed"]


class Full(RuntimeError):
    """So many requests wait that no other is taken; try again later."""


@dataclass(frozen=True)
class Request:
    """One text that is to be written.

    prompt: ids, at least one; max_new_tokens: at least 1; sampling: temperature, filters and penalties (no guidance);
    seed, copy: what is drawn is that of row `copy` of an offline generation with this seed; decoder: one of the
    engine's names (None: its first); grammar: what the text must be (`interop.grammar.Grammar`); logprobs: None, or how
    many of the likeliest tokens are told beside each (0: its own log-probability alone).
    """

    prompt: tuple[int, ...]
    max_new_tokens: int = 128
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    copy: int = 0
    decoder: str | None = None
    grammar: Any = None
    logprobs: int | None = None


@dataclass(frozen=True)
class Piece:
    """What one step added to a text.

    number: that of the request; ids: new tokens, decided for good; accepted: how many of them, from the front, had been
    drafted; logprobs: of each, in nats, before temperature, filters and penalties; top: for each the likeliest tokens
    with theirs; finish: why nothing follows (None: more will come), with `error` where it failed; reused: tokens of the
    prompt that were remembered from other requests, told once.
    """

    number: int
    ids: tuple[int, ...] = ()
    accepted: int = 0
    logprobs: tuple[float, ...] | None = None
    top: tuple[tuple[tuple[int, float], ...], ...] | None = None
    finish: Finish | None = None
    error: str | None = None
    reused: int = 0


class TextEngine(Protocol):
    """What a server needs of an engine. All methods may be called from any thread, and none waits for a model, except
    `start` and `close`. Pieces are given, all of a step at once, to the function that the engine was made with, from
    the engine's own thread; the last piece of each request has a `finish`."""

    decoders: tuple[str, ...]
    length: int  # tokens of a text, its prompt included

    def start(self) -> None:
        """Begin to work in a thread of its own."""
        ...

    def submit(self, request: Request) -> int:
        """Queue a request; its number. Raises ValueError for one that can never be met (empty or too long a prompt, an
        unknown decoder, settings that the decoder cannot follow), `Full` where the queue is."""
        ...

    def cancel(self, number: int, enough: bool = False) -> None:
        """Nobody waits for this any more: it ends at the next step. enough: what it has is all that was wanted, so that
        it counts as finished. Unknown and ended numbers are passed over."""
        ...

    def figures(self) -> dict[str, float]:
        """Counts since the start (steps, tokens, prompt_tokens, reused_tokens, drafted, accepted, finished, cancelled,
        failed, refused) and the present state (running, waiting, memory_bytes)."""
        ...

    def close(self, seconds: float = 10.0) -> None:
        """Take nothing more, let what runs end for so many seconds, cancel the rest."""
        ...
