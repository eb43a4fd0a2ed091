"""An engine that writes one text at a time, by `generate`: slow, simple, and right."""

from __future__ import annotations

import threading
from collections import deque

import torch

from seriatim.serving.request import Full, Piece
from seriatim.systems.decoders import named

STEP = 3  # tokens of a piece, all but the last of which count as drafted


class Stopped(RuntimeError):
    """Nobody waits for the text."""


class PlainEngine:
    """A `TextEngine`. pace: seconds before each piece; queue: requests that may wait."""

    def __init__(self, system, decoders, sink, *, queue=256, pace=0.0):
        self.system, self.decoders, self.sink, self.queue, self.pace = system, tuple(decoders), sink, queue, pace
        self.length = system.model.layout.size
        for name in decoders:
            named(name)
        self.waiting, self.gone, self.running = deque(), set(), None
        self.counts = dict.fromkeys(("steps", "tokens", "finished", "cancelled", "failed", "refused"), 0)
        self.numbers = 0
        self.lock = threading.Condition()
        self.closing, self.until = False, threading.Event()
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.requests = []

    def start(self):
        self.thread.start()

    def submit(self, request):
        if not request.prompt:
            raise ValueError("the prompt is empty: give at least one token")
        if len(request.prompt) + request.max_new_tokens > self.length:
            raise ValueError("the prompt is too long")
        vocab = self.system.tokenizer.vocab
        if max(request.prompt) >= vocab:
            raise ValueError(f"the prompt has ids that this model does not know: they are 0 to {vocab - 1:,}")
        request.sampling.warp, request.sampling.shapers  # noqa: B018 (they refuse what cannot be)
        with self.lock:
            if self.closing or len(self.waiting) >= self.queue:
                self.counts["refused"] += 1
                raise Full(f"{len(self.waiting)} requests wait")
            self.numbers += 1
            self.waiting.append((self.numbers, request))
            self.requests.append(request)
            self.lock.notify_all()
            return self.numbers

    def cancel(self, number, enough=False):
        self.gone.add(number)

    def figures(self):
        return {**self.counts, "running": float(self.running is not None), "waiting": len(self.waiting)}

    def close(self, seconds=10.0):
        with self.lock:
            self.closing = True
            self.lock.notify_all()
        self.thread.join(seconds)
        self.until.set()
        self.thread.join()

    def _work(self):
        while True:
            with self.lock:
                while not (self.waiting or self.closing):
                    self.lock.wait()
                if not self.waiting:
                    return
                number, request = self.waiting.popleft()
                self.running = number
            try:
                self._write(number, request)
            except Stopped:
                self._end(number, "cancelled")
            except (RuntimeError, ValueError, FloatingPointError) as error:
                self._end(number, "failed", str(error))
            self.running = None

    def _end(self, number, finish, error=None):
        self.counts[finish] += 1
        self.sink([Piece(number, finish=finish, error=error)])

    def _check(self, number):
        if number in self.gone or self.until.is_set():
            raise Stopped

    def _write(self, number, r):
        self._check(number)
        s = r.sampling
        copy, seed = (0, r.seed + r.copy) if r.grammar else (r.copy, r.seed)  # a grammar serves one text
        made = self.system.generate(
            list(r.prompt), r.decoder or self.decoders[0], max_new_tokens=r.max_new_tokens, temperature=s.temperature,
            top_k=s.top_k, top_p=s.top_p, min_p=s.min_p, repetition_penalty=s.repetition_penalty,
            presence_penalty=s.presence_penalty, frequency_penalty=s.frequency_penalty, seed=seed, n=copy + 1,
            grammar=r.grammar, logprobs=r.logprobs is not None,
            stream=None if copy else lambda _: self._check(number),
        )  # fmt: skip
        made = made[copy] if copy else made
        top = self._likeliest(r, made.ids)
        finish = "stop" if made.ids[-1] in self.system.stop else "length"
        for at in range(0, len(made.ids), STEP):
            if self.pace:
                self.until.wait(self.pace)
            self._check(number)
            part = slice(at, at + STEP)
            ids, last = tuple(made.ids[part]), at + STEP >= len(made.ids)
            scores = None if made.logprobs is None else tuple(made.logprobs[part])
            self.counts["steps"] += 1
            self.counts["tokens"] += len(ids)
            self.counts["finished"] += last
            piece = Piece(number, ids, len(ids) - 1, scores, top and tuple(top[part]), finish if last else None)
            self.sink([piece])

    def _likeliest(self, r, ids):
        """Of each new token."""
        if not r.logprobs:
            return None
        whole = torch.tensor([[*r.prompt, *ids]])
        said = torch.log_softmax(self.system.logits(whole)[0, -len(ids) - 1 : -1].float(), -1).topk(r.logprobs)
        pairs = zip(said.indices.tolist(), said.values.tolist(), strict=True)
        return [tuple(zip(i, x, strict=True)) for i, x in pairs]
