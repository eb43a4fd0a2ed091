"""An engine that writes many texts at once: in-flight batching (Flover, Yao et al. 2023, arXiv 2305.13484).

All requests in flight are one batch, each at its own place, with its own settings; one joins or leaves between any two
steps. Prompts are read in parts between steps, so that what runs is not held up, and what they have in common with
earlier ones is not read again. What a request gets is what it would get alone, with the same seed.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import torch

from seriatim.layout import line
from seriatim.serving.batch import Batch, Ready
from seriatim.serving.memory import Trimmer
from seriatim.serving.prefixes import Prefixes
from seriatim.serving.request import Finish, Full, Piece, Request
from seriatim.systems.language_model import LanguageModel
from seriatim.systems.text_system import TextSystem

CHUNK = 512  # slots of a prompt that are read at once where nothing waits for it
LEAST_CHUNK = 128  # fewer cost nearly as much: weights are read for each part
PATIENCE = 2.0  # a part of a prompt may take as long as so many steps of those that run
SHARE = 0.25  # of the memory, for prompts that may come again
SMOOTH = 0.1  # of the newest, in averages of time
COUNTS = (
    "steps", "tokens", "prompt_tokens", "reused_tokens", "accepted", "finished", "cancelled", "failed", "refused",
)  # fmt: skip


class Reading:
    """A prompt that is read part by part."""

    def __init__(self, system: TextSystem, ready: Ready, prefixes: Prefixes):
        self.system, self.ready = system, ready
        prompt = list(ready.request.prompt)
        self.canvas = system.model.canvas(
            {"token": torch.tensor([[*prompt, 0]])}, len(prompt), layout=line(len(prompt) + 1)
        )
        prefix = int(getattr(system.model.factorization, "prefix", 0))
        self.last, room = prefix + len(prompt) - 1, prefix + len(prompt) + 1
        self.cache, self.reused = prefixes.find(prompt, room, prefix)
        if self.cache is None:
            self.cache = system.model.new_cache(1, room)
        self.condition = system.model.encode(None)

    @property
    def done(self) -> bool:
        """Was all read that can be before the first step?"""
        return self.system.model.factorization.fill(self.canvas, self.cache.length, 1, 0) is None

    def read(self, slots: int) -> int:
        """Read at most so many slots more, in parts of one length: each costs something, however short. How many were
        read."""
        model, rest = self.system.model, max(self.last - int(self.cache.length), 1)
        parts = math.ceil(rest / slots)
        plan = model.factorization.fill(self.canvas, self.cache.length, min(slots, math.ceil(rest / parts)), 0)
        if plan is None:
            return 0
        model.hidden(plan, self.canvas, self.cache, self.condition)
        self.cache.commit(plan.size, plan)
        return plan.size


class Engine:
    """A `TextEngine` over one model of texts: a next-token model, or one that writes block after block or in any order,
    whose tokens are given out as far as they are known from the front.

    decoders: names as of `decoder_of`, one batch each; sink: takes the pieces of each step; rows: texts in flight;
    queue: requests that may wait; memory: bytes for keys and values (None: half of what is free), a quarter of it for
    prompts that may come again; length: tokens of a request, prompt included (None: what the model takes). Raises
    ValueError for decoders that do not exist or cannot stream.
    """

    def __init__(
        self, system: TextSystem, decoders: Sequence[str], sink: Callable[[Sequence[Piece]], None], *,
        rows: int = 32, queue: int = 256, memory: float | None = None, length: int | None = None,
    ):  # fmt: skip
        if rows < 1 or queue < 0 or not decoders:
            raise ValueError(f"an engine has at least 1 row and 1 decoder, got {rows} and {len(decoders)}")
        self.system, self.sink, self.most, self.queue = system, sink, rows, queue
        self.decoders = tuple(decoders)
        self.batches = {name: Batch(system, name, rows) for name in decoders}
        self.length = min(length or system.model.layout.size, system.model.layout.size)
        self.memory = memory if memory is not None else 0.5 * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGESIZE")
        self.column = _bytes_of_a_column(system)
        self.prefixes = Prefixes(SHARE * self.memory)
        self.counts = dict.fromkeys(COUNTS, 0)
        self.waiting: deque[Ready] = deque()
        self.reading: deque[Reading] = deque()
        self.ready: deque[Ready] = deque()
        self._gone: dict[int, Finish] = {}  # cancelled, and not yet taken out: as what they end
        self._over: dict[str, set[int]] = {name: set() for name in decoders}  # finished, and still in the batch
        self._numbers = 0
        self._step, self._slot = 0.0, 0.0  # seconds of a step, and of a slot of a prompt, on average
        self._lock = threading.Condition()
        self._closing = self._closed = False
        self._thread: threading.Thread | None = None

    # ---- from other threads ------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> int:
        """As of `TextEngine`."""
        self._check(request)
        matcher = None
        if request.grammar is not None:
            (matcher,) = request.grammar.matchers(self.system.tokenizer, self.system.stop, 1)
        with self._lock:
            if self._closing or len(self.waiting) >= self.queue:
                self.counts["refused"] += 1
                raise Full("the engine is shutting down" if self._closing else f"{len(self.waiting)} requests wait")
            self._numbers += 1
            self.waiting.append(Ready(self._numbers, request, None, matcher))
            self._lock.notify_all()
            return self._numbers

    def _check(self, request: Request) -> None:
        """Raises ValueError for what can never be written."""
        prompt, new, s = len(request.prompt), request.max_new_tokens, request.sampling
        vocab = getattr(self.system.model.heads["token"], "vocab", None)
        if prompt < 1:
            raise ValueError("the prompt is empty: give at least one token")
        if vocab is not None and not all(0 <= i < vocab for i in request.prompt):
            raise ValueError(f"the prompt has ids that this model does not know: they are 0 to {vocab - 1:,}")
        if new < 1 or prompt + new > self.length:
            raise ValueError(
                f"the prompt has {prompt} tokens and {new} are asked for; at least 1, and {self.length:,} in all can be"
            )
        if request.decoder is not None and request.decoder not in self.decoders:
            raise ValueError(f"there is no decoder {request.decoder!r} here; there is {', '.join(self.decoders)}")
        if not isinstance(self.system, LanguageModel) and (request.grammar is not None or request.logprobs is not None):
            raise ValueError("grammars and log-probabilities are those of next-token models")
        if s.guidance or s.keep_tokens or not s.suppress.neutral:
            raise ValueError("guidance and tokens that are suppressed or kept are settings of whole batches")
        if self._bytes(1, prompt + new) > self.memory:
            raise ValueError(f"{prompt + new} tokens do not fit into the {self.memory / 2**20:,.0f} MiB there are")
        s.warp, s.shapers  # noqa: B018 (they refuse what cannot be)

    def cancel(self, number: int, enough: bool = False) -> None:
        """As of `TextEngine`."""
        with self._lock:
            if 0 < number <= self._numbers:
                self._gone[number] = "stop" if enough else "cancelled"
                self._lock.notify_all()

    def figures(self) -> dict[str, float]:
        """As of `TextEngine`."""
        running = sum(len(batch.rows) for batch in self.batches.values())
        held = [batch.target.cache for batch in self.batches.values() if batch.target is not None]
        return {
            **self.counts, "drafted": sum(batch.drafted for batch in self.batches.values()), "running": running,
            "waiting": len(self.waiting) + len(self.reading) + len(self.ready),
            "memory_bytes": sum(c.nbytes() for c in held if c is not None) + self.prefixes.nbytes,
        }  # fmt: skip

    def start(self) -> None:
        """As of `TextEngine`."""
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def close(self, seconds: float = 10.0) -> None:
        """As of `TextEngine`."""
        with self._lock:
            self._closing = True
            self._lock.notify_all()
        if self._thread is not None:
            self._thread.join(seconds)
        with self._lock:
            self._closed = True
            self._lock.notify_all()
        if self._thread is not None:
            self._thread.join()

    # ---- the engine's own thread ---------------------------------------------------------------------------------

    def _work(self) -> None:
        trim = Trimmer()
        while True:
            with self._lock:
                while not (self.busy or self._closing):
                    self._lock.wait()
                if self._closed or (self._closing and not self.busy):
                    break
            self.turn()
            trim()
        self._end(self._everybody(), "cancelled", "the engine was shut down")

    @property
    def busy(self) -> bool:
        """Is there anything to do?"""
        return bool(self.waiting or self.reading or self.ready or any(b.rows for b in self.batches.values()))

    def turn(self) -> None:
        """Take out who is gone, read a part of a prompt, let in who is ready, and one step of every batch."""
        with torch.inference_mode():
            self._take_out()
            self._read()
            pieces: list[Piece] = []
            for name, batch in self.batches.items():
                pieces += self._stepped(name, batch)
        if pieces:
            self.sink(pieces)

    def _take_out(self) -> None:
        """Cancelled requests end."""
        with self._lock:  # others add to what waits
            gone, self._gone = self._gone, {}
            if not gone:
                return
            there = gone.keys() & set(self._everybody())
            self.waiting = deque(r for r in self.waiting if r.number not in gone)
        self.ready = deque(r for r in self.ready if r.number not in gone)
        self.reading = deque(r for r in self.reading if r.ready.number not in gone)
        for name, batch in self.batches.items():
            self._over[name] |= gone.keys() & {row.number for row in batch.rows}
        for finish in ("cancelled", "stop"):
            self._end([number for number in there if gone[number] == finish], finish)

    def _everybody(self) -> list[int]:
        """The numbers of all that have not ended."""
        running = [r.number for n, b in self.batches.items() for r in b.rows if r.number not in self._over[n]]
        return [*running, *(r.number for r in (*self.waiting, *self.ready)), *(r.ready.number for r in self.reading)]

    def _end(self, numbers: Sequence[int] | set[int], finish: Finish, error: str | None = None) -> None:
        """Tell that these have ended."""
        if numbers:
            self.counts["finished" if finish == "stop" else finish] += len(numbers)
            self.sink([Piece(n, finish=finish, error=error) for n in sorted(numbers)])

    # ---- prompts -------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        """A part of the oldest prompts, as long as what runs may be held up."""
        self._let_in()
        running = any(batch.rows for batch in self.batches.values())
        left = CHUNK
        if running and self._slot and self._step:
            left = max(LEAST_CHUNK, min(CHUNK, int(PATIENCE * self._step / self._slot)))
        few = left // 2  # no other prompt is begun for less
        while self.reading and left > few:
            one = self.reading[0]
            start = time.perf_counter()
            whole = self._batch(one.ready).reads_prompt
            try:
                read = 0 if whole else one.read(left)
            except (RuntimeError, ValueError, FloatingPointError) as error:
                self.reading.popleft()
                self._end([one.ready.number], "failed", str(error))
                continue
            left -= read
            self.counts["prompt_tokens"] += read
            if read:
                self._slot = _average(self._slot, (time.perf_counter() - start) / read)
            if whole or one.done:
                self.reading.popleft()
                self._prepared(one)

    def _batch(self, ready: Ready) -> Batch:
        return self.batches[ready.request.decoder or self.decoders[0]]

    def _prepared(self, one: Reading) -> None:
        """A prompt was read, and others may begin alike; one whose states are looked at is read in its first step."""
        if not self._batch(one.ready).reads_prompt:
            one.ready.cache = one.cache
            self.prefixes.add(one.ready.request.prompt[:-1], one.cache)
            self.counts["reused_tokens"] += one.reused
            if one.reused:
                self.sink([Piece(one.ready.number, reused=one.reused)])
        self.ready.append(one.ready)

    def _let_in(self) -> None:
        """Begin to read prompts, first come first served, as long as there are rows and memory for their texts."""
        held = [row for batch in self.batches.values() for row in batch.rows]
        held += [*self.ready, *(one.ready for one in self.reading)]
        while self.waiting and len(held) < self.most:
            longest = max(row.size for row in (*held, self.waiting[0]))
            if held and self._bytes(len(held) + 1, longest) > (1 - SHARE) * self.memory:
                return
            with self._lock:
                ready = self.waiting.popleft()
            held.append(ready)
            self.reading.append(Reading(self.system, ready, self.prefixes))

    def _bytes(self, rows: int, columns: int) -> float:
        return rows * columns * self.column

    # ---- steps ---------------------------------------------------------------------------------------------------

    def _stepped(self, name: str, batch: Batch) -> list[Piece]:
        """One step of a batch, after rows came and went."""
        come = [r for r in self.ready if self._batch(r) is batch]
        self.ready = deque(r for r in self.ready if self._batch(r) is not batch)
        start = time.perf_counter()
        try:
            batch.change(self._over[name], come)
            self._over[name] = set()
            if not batch.rows:
                return []
            pieces = batch.step()
        except (RuntimeError, ValueError, FloatingPointError, TypeError, KeyError, IndexError) as error:
            lost = {row.number for row in (*batch.rows, *come)} - self._over[name]
            batch.clear()
            self._over[name] = set()
            self._end(lost, "failed", f"{type(error).__name__}: {error}")
            return []
        self._step = _average(self._step, time.perf_counter() - start)
        self._over[name] = {p.number for p in pieces if p.finish is not None}
        self.counts["steps"] += 1
        self.counts["tokens"] += sum(len(p.ids) for p in pieces)
        self.counts["accepted"] += sum(p.accepted for p in pieces)
        self.counts["finished"] += len(self._over[name])
        if len(self._over[name]) == len(batch.rows):
            batch.clear()
            self._over[name] = set()
        return pieces


def _average(before: float, now: float) -> float:
    return now if not before else before + SMOOTH * (now - before)


def _bytes_of_a_column(system: TextSystem) -> float:
    """What a token takes in a cache; 1 where that does not grow with the length."""
    cache = system.model.new_cache(1, 1)
    buffer = getattr(cache, "buffer", None)
    return 1.0 if buffer is None else float(buffer.nbytes)
