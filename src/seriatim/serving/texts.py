"""Texts in the making: pieces come from the engine's thread, and go to whoever waits in the server's loop."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from seriatim.serving.limits import Limits, Refused, closing, full, too_late
from seriatim.serving.metrics import Metrics
from seriatim.serving.request import Full, Piece, Request, TextEngine
from seriatim.systems.generation import Watch
from seriatim.systems.text_system import TextSystem

WINDOW = 10.0  # seconds over which a speed is an average

Make = Callable[[TextSystem, Sequence[str], Callable[[Sequence[Piece]], None]], TextEngine]


@dataclass
class Scored:
    """A token with its log-probability in nats, and the likeliest tokens in its place with theirs."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class Delta:
    """What is new of a text: parts, each with whether it had been drafted; tokens with log-probabilities, where they
    were asked for; and why it ended, if it did."""

    parts: list[tuple[str, bool]] = field(default_factory=list)
    scored: list[Scored] = field(default_factory=list)
    finish: str | None = None

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.parts)


class Choice:
    """One of the texts of a request, as far as it has come."""

    def __init__(self, index: int, prompt: int, watch: Watch, stop: Sequence[int], scored: bool):
        self.index, self.prompt, self.watch, self.stop = index, prompt, watch, frozenset(stop)
        self.scores = scored
        self.reused = self.accepted = 0  # tokens of the prompt that were remembered; those that had been drafted
        self.finish: str | None = None
        self.last: float | None = None  # when its newest tokens came

    @property
    def tokens(self) -> int:
        return self.watch.count

    def take(self, piece: Piece) -> Delta:
        """Read a piece; what it adds to what was given out."""
        self.reused += piece.reused
        before, out = self.watch.count, Delta()
        for ids, drafted in ((piece.ids[: piece.accepted], True), (piece.ids[piece.accepted :], False)):
            if text := self.watch.push(ids):
                out.parts.append((text, drafted))
        self.accepted += min(piece.accepted, self.watch.count - before)
        if self.watch.ended:
            out.finish = "stop"
        elif piece.finish is not None:
            out.finish = piece.finish
            if text := self.watch.rest():
                out.parts.append((text, False))
            out.finish = "stop" if self.watch.ended else piece.finish
        self.finish = out.finish
        if self.scores and piece.logprobs is not None:
            top = piece.top or ((),) * len(piece.ids)
            taken = list(zip(piece.ids, piece.logprobs, top, strict=True))[: self.watch.count - before]
            out.scored = [Scored(*each) for each in taken if each[0] not in self.stop]
        return out


class Job:
    """All texts of one request over the network. A context: whatever has not ended at its end is cancelled."""

    def __init__(self, model: TextModel, seconds: float):
        self.model, self.seconds = model, seconds
        self.start = time.monotonic()
        self.choices: list[Choice] = []
        self.prompts: list[int] = []  # their lengths
        self.numbers: dict[int, Choice] = {}  # those that have not ended
        self.queue: asyncio.Queue[Piece] = asyncio.Queue()

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *error: Any) -> None:
        self.cancel()

    def cancel(self) -> None:
        """Nobody waits for what is left."""
        for number in self.numbers:
            self.model.drop(number)
        self.numbers.clear()

    def submit(self, prompt: int, request: Request, stops: Sequence[str]) -> None:
        """Another text. prompt: the number of its prompt. Raises Refused for what cannot be written, or not now."""
        watch = Watch(self.model.system.tokenizer, stops)
        choice = Choice(len(self.choices), prompt, watch, self.model.system.stop, request.logprobs is not None)
        self.numbers[self.model.submit(request, self.queue)] = choice
        self.choices.append(choice)

    async def __aiter__(self) -> AsyncIterator[tuple[Choice, Delta]]:
        """What is new, until all texts have ended. Raises Refused where the model fails, the server is shut down, or
        it takes too long."""
        metrics, name = self.model.metrics, self.model.name
        while self.numbers:
            piece = await self._next()
            choice = self.numbers.get(piece.number)
            if choice is None:
                continue
            if piece.finish in ("failed", "cancelled"):
                del self.numbers[piece.number]
                raise self._broken(piece)
            self._timed(choice, piece)
            delta = choice.take(piece)
            if delta.finish is not None:
                del self.numbers[piece.number]
                if piece.finish is None:  # by a stop string, of which the engine knows nothing
                    self.model.drop(piece.number, enough=True)
                else:
                    self.model.ended(piece.number)
                metrics.whole.labels(name).observe(time.monotonic() - self.start)
            yield choice, delta

    async def _next(self) -> Piece:
        """The next piece of any of them. Raises Refused where it does not come in time."""
        left = self.start + self.seconds - time.monotonic()
        if left <= 0:
            raise too_late(self.seconds)
        if not self.queue.empty():
            return self.queue.get_nowait()
        try:
            async with asyncio.timeout(left):
                return await self.queue.get()
        except TimeoutError:
            raise too_late(self.seconds) from None

    def _timed(self, choice: Choice, piece: Piece) -> None:
        """Tell the clocks."""
        if not piece.ids:
            return
        now, metrics, name = time.monotonic(), self.model.metrics, self.model.name
        if choice.last is None:
            metrics.first.labels(name).observe(now - self.start)
        else:
            metrics.between.labels(name).observe((now - choice.last) / len(piece.ids))
        metrics.accepted.labels(name).observe(len(piece.ids))
        choice.last = now

    def _broken(self, piece: Piece) -> Refused:
        self.model.ended(piece.number)
        if piece.finish == "cancelled":
            return closing()
        self.model.log(f"request {piece.number} failed: {piece.error}")
        return Refused(500, "the model failed on this request", code="model_failed")


class TextModel:
    """A model that writes, its engine, and who waits for which text. Lives in one asyncio loop."""

    kind = "text"

    def __init__(
        self, name: str, system: TextSystem, make: Make, decoders: Sequence[str], metrics: Metrics,
        limits: Limits, log: Callable[[str], None],
    ):  # fmt: skip
        if system.tokenizer is None:
            raise ValueError(f"{name} came without a tokenizer: texts cannot be served without")
        self.name, self.system, self.metrics, self.limits, self.log = name, system, metrics, limits, log
        self.waiting: dict[int, asyncio.Queue[Piece]] = {}
        self.recent: deque[tuple[float, int]] = deque()  # when, and how many tokens
        self.loop: asyncio.AbstractEventLoop | None = None
        self.engine = make(system, decoders, self._heard)

    @property
    def room(self) -> int:
        """Tokens of a text, its prompt included."""
        return self.engine.length

    @property
    def about(self) -> dict[str, Any]:
        """What a page wants to know."""
        return {
            "kind": self.kind, "decoders": list(self.engine.decoders), "length": self.room,
            "chat": getattr(self.system, "chat", None) is not None,
        }  # fmt: skip

    def start(self) -> None:
        """Begin; within the loop in which it is waited."""
        self.loop = asyncio.get_running_loop()
        self.engine.start()

    def close(self, seconds: float) -> None:
        """Let what runs end, for so long; waits for it."""
        self.engine.close(seconds)

    def job(self) -> Job:
        return Job(self, self.limits.seconds)

    def submit(self, request: Request, queue: asyncio.Queue[Piece]) -> int:
        """Its number; pieces of it go to this queue. Raises Refused."""
        try:
            number = self.engine.submit(request)
        except Full as error:
            raise full(str(error)) from None
        except (ValueError, TypeError, OverflowError) as error:
            raise Refused(400, str(error)) from None
        self.waiting[number] = queue  # nothing is given out before this returns: pieces come by the loop
        return number

    def drop(self, number: int, enough: bool = False) -> None:
        """Nobody waits for it any more; enough: since it is finished."""
        self.ended(number)
        self.engine.cancel(number, enough)

    def ended(self, number: int) -> None:
        self.waiting.pop(number, None)

    def _heard(self, pieces: Sequence[Piece]) -> None:
        """In the engine's thread."""
        if self.loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody waits
                self.loop.call_soon_threadsafe(self._deliver, pieces)

    def _deliver(self, pieces: Sequence[Piece]) -> None:
        now, count = time.monotonic(), 0
        for piece in pieces:
            count += len(piece.ids)
            if (queue := self.waiting.get(piece.number)) is not None:
                queue.put_nowait(piece)
        self.recent.append((now, count))
        self._forget(now)

    def _forget(self, now: float) -> None:
        while self.recent and self.recent[0][0] < now - WINDOW:
            self.recent.popleft()

    def speed(self) -> float:
        """Tokens a second, of late."""
        now = time.monotonic()
        self._forget(now)
        return sum(count for _, count in self.recent) / WINDOW

    def figures(self) -> dict[str, float]:
        """Those of the engine, and `tokens_per_second`."""
        return {**self.engine.figures(), "tokens_per_second": self.speed()}
