"""Requests that come at times of their own, and the ways to put them together: at once, in batches, one by one."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from seriatim.serving.engine import Engine
from seriatim.serving.request import Piece, Request


@dataclass(frozen=True)
class Arrival:
    """A request and when it comes, in seconds from the beginning."""

    at: float
    request: Request


@dataclass
class Story:
    """What became of a request, in seconds from the beginning: when it came and was begun, when each of its tokens was
    there, and when it ended; prompt: tokens of its prompt."""

    arrived: float
    prompt: int
    begun: float = 0.0
    tokens: list[float] = field(default_factory=list)
    ended: float = 0.0
    ids: list[int] = field(default_factory=list)

    @property
    def first(self) -> float:
        """Seconds until the first token."""
        return self.tokens[0] - self.arrived

    @property
    def latency(self) -> float:
        """Seconds until the end."""
        return self.ended - self.arrived

    @property
    def gaps(self) -> list[float]:
        """Seconds between tokens."""
        return [b - a for a, b in pairwise(self.tokens)]


@dataclass(frozen=True)
class Gathering:
    """How requests are put together. window: None lets each join what runs (in-flight batching); else a batch is begun
    when nothing runs and `most` requests wait, or the first of them has waited for so many seconds, and nobody joins it
    (dynamic batching; infinity: until there are so many, or no others come: static batches)."""

    most: int = 32
    window: float | None = None

    def may_begin(self, waiting: Sequence[Arrival], now: float, busy: bool, last: bool) -> int:
        """How many of those that wait begin now; last: no others will come."""
        if self.window is None:
            return len(waiting)
        if busy or not waiting:
            return 0
        full = len(waiting) >= self.most or now - waiting[0].at >= self.window or last
        return min(len(waiting), self.most) if full else 0


def poisson(requests: Sequence[Request], rate: float, seed: int = 0) -> list[Arrival]:
    """Requests that come independently of each other, `rate` of them a second on the mean; infinity: all at once.
    Raises ValueError for rates that are not positive."""
    if not rate > 0:
        raise ValueError(f"a rate is a positive number of requests a second, got {rate}")
    rng, at, out = random.Random(seed), 0.0, []
    for request in requests:
        out.append(Arrival(at, request))
        at += rng.expovariate(rate) if rate < float("inf") else 0.0
    return out


def serve(
    made: Callable[[Callable[[Sequence[Piece]], None]], Engine], arrivals: Sequence[Arrival], gathering: Gathering,
    clock: Callable[[], float] = time.perf_counter, sleep: Callable[[float], None] = time.sleep,
) -> list[Story]:  # fmt: skip
    """What becomes of requests that come one after another. made: an engine, given where its pieces go; clock, sleep:
    of the time that is told, a simulated one in tests. Raises RuntimeError where a request failed."""
    stories: dict[int, Story] = {}
    start = clock()

    def sink(pieces: Sequence[Piece]) -> None:
        now = clock() - start
        for piece in pieces:
            _tell(stories[piece.number], piece, now)

    engine, coming, waiting = made(sink), list(arrivals), list[Arrival]()
    while coming or waiting or engine.busy:
        now = clock() - start
        while coming and coming[0].at <= now:
            waiting.append(coming.pop(0))
        for _ in range(gathering.may_begin(waiting, now, engine.busy, not coming)):
            one = waiting.pop(0)
            number = engine.submit(one.request)
            stories[number] = Story(one.at, len(one.request.prompt), begun=now)
        if engine.busy:
            engine.turn()
        elif coming or waiting:
            sleep(_next(coming, waiting, gathering, now))
    return [stories[n] for n in sorted(stories)]


def _next(coming: Sequence[Arrival], waiting: Sequence[Arrival], gathering: Gathering, now: float) -> float:
    """Seconds until something can happen."""
    times = [coming[0].at] if coming else []
    if waiting and gathering.window is not None and gathering.window < float("inf"):
        times.append(waiting[0].at + gathering.window)
    return max(min(times) - now, 1e-4)


def closed(
    made: Callable[[Callable[[Sequence[Piece]], None]], Engine], requests: Sequence[Request], clients: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Story]:  # fmt: skip
    """A closed loop: so many clients, each of which asks for the next text when it has had its last one. Raises
    RuntimeError where a request failed."""
    stories: dict[int, Story] = {}
    start, left = clock(), list(requests)[::-1]

    def sink(pieces: Sequence[Piece]) -> None:
        now = clock() - start
        for piece in pieces:
            _tell(stories[piece.number], piece, now)

    engine, seen = made(sink), 0
    while left or engine.busy:
        ended = sum(story.ended > 0 for story in stories.values())
        for _ in range(min(clients if not stories else ended - seen, len(left))):
            request = left.pop()
            now = clock() - start
            stories[engine.submit(request)] = Story(now, len(request.prompt), begun=now)
        seen = ended
        engine.turn()
    return [stories[n] for n in sorted(stories)]


def steady(stories: Sequence[Story], clients: int) -> float:
    """Tokens a second of a closed loop, from when so many texts have ended until the last one is asked for; of all the
    time where that is less than a fifth of it."""
    begin = sorted(story.ended for story in stories)[min(clients, len(stories)) - 1]
    end, whole = max(story.arrived for story in stories), max(story.ended for story in stories)
    if end - begin < whole / 5:
        begin, end = -1e-9, whole
    return sum(begin < t <= end for story in stories for t in story.tokens) / (end - begin)


def _tell(story: Story, piece: Piece, now: float) -> None:
    """Note a piece of a text."""
    story.tokens += [now] * len(piece.ids)
    story.ids += piece.ids
    if piece.finish == "failed":
        raise RuntimeError(f"request {piece.number} failed: {piece.error}")
    if piece.finish is not None:
        story.ended = now
