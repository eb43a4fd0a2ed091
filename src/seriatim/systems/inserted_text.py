"""Systems of text that grows by insertions anywhere: texts of any length, continued, or filled in between others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from seriatim.canvas import DECIDED, GIVEN, Canvas
from seriatim.data.pairs import Pairs
from seriatim.decoding.loop import Decider, decode
from seriatim.factorization.insertion import opened
from seriatim.layout import line
from seriatim.random import Generator, Keyed
from seriatim.systems.decoders import Decoding
from seriatim.systems.system import Sampling
from seriatim.systems.text_system import TextSystem, answered


class InsertedText(TextSystem):
    """Decoded in a gap. The config has `short`: share of the windows that are cut to a random length in training, as a
    model that has seen texts of one length writes texts of that length only."""

    def examples(self, documents: Sequence[str]) -> Any:
        if isinstance(documents, Pairs):  # a text ends when nothing more is to be inserted
            return answered(documents, self.tokenizer, (), self.window)
        return super().examples(documents)

    def forward(self, batch: Mapping[str, Tensor], random: Generator, step: int, steps: int) -> tuple[Tensor, Tensor]:
        if "counts" not in batch:
            rows, length = batch["token"].shape
            some = torch.rand(rows, generator=random.generator) < self.config.short
            cut = torch.randint(1, length + 1, (rows,), generator=random.generator)
            counts = torch.arange(length) < torch.where(some, cut, length)[:, None]
            batch = {**batch, "counts": counts.to(batch["token"].device)}
        return super().forward(batch, random, step, steps)

    # ---- generation -------------------------------------------------------------------------------------------------

    def begun(self, ids: Sequence[int], length: int | None) -> Canvas:
        """A prompt that is given, and a gap behind it."""
        return self._around(list(ids), [], length)

    def _around(self, before: list[int], after: list[int], length: int | None) -> Canvas:
        """What is given, and the gap between. Raises ValueError where there is no room for `length` tokens in it."""
        known, room = len(before) + len(after), self.model.layout.size
        if (length is not None and length < 1) or known + (length or 1) > room:
            raise ValueError(
                f"what is given takes {known} tokens and {1 if length is None else length} are asked for; this model "
                f"takes {room} in all: shorten what is given or --length"
            )
        value = torch.tensor([[*before, *after]], dtype=torch.long)
        canvas = self.model.canvas({"token": value}, torch.ones_like(value, dtype=torch.bool), layout=line(known))
        return opened(canvas, torch.tensor([len(before) - 1]))

    def infill(
        self,
        before: str,
        after: str,
        length: int | None = None,
        sampling: Sampling | None = None,
        seed: int = 0,
        trace: list[Any] | None = None,
    ) -> str:
        """A text that stands between two others, as long as the model finds right, at most `length` tokens (None: what
        there is room for). Raises ValueError where there is no room."""
        canvas = self._around(self.tokenizer.encode(before), self.tokenizer.encode(after), length)
        self._fill(canvas, length, sampling, seed, trace)
        return self.tokenizer.decode(self._settled(canvas))

    def stream(
        self,
        prompt: str | Sequence[int],
        length: int | None = None,
        sampling: Sampling | None = None,
        seed: int = 0,
        decoding: Decoding | None = None,
        trace: list[Any] | None = None,
    ) -> Iterator[str]:
        """The text behind a prompt, in one piece: no part of it is settled before all of it is. `length`: the most
        tokens (None: what there is room for); a text that it cuts short is unfinished everywhere, not at its end.
        `decoding` can only be the system's own."""
        canvas = self.prompted(prompt, length)
        self._fill(canvas, length, sampling, seed, trace)
        text = self.tokenizer.decode(self._settled(canvas))
        if text:
            yield text

    def _fill(
        self, canvas: Canvas, length: int | None, sampling: Sampling | None, seed: int, trace: list[Any] | None
    ) -> None:
        """Decode to the end."""
        s, given = sampling or self.sampling, int((canvas.status == GIVEN).sum())
        most = self.model.layout.size if length is None else given + length
        for step in decode(self.target(None, s), canvas, self.inserter(s, most), None, Keyed(seed)):
            if trace is not None:
                trace.append(step)

    def inserter(self, sampling: Sampling, limit: int) -> Decider:
        """How insertions are decided, up to so many known tokens."""
        raise NotImplementedError

    def decider(self, sampling: Sampling) -> Decider:
        return self.inserter(sampling, self.model.layout.size)

    def _settled(self, canvas: Canvas, start: int = 0) -> list[int]:
        """What was inserted, in reading order."""
        inserted = canvas.status[0] == DECIDED
        order = canvas.place[0].masked_fill(~inserted, canvas.layout.size).argsort()[: int(inserted.sum())]
        return canvas.value["token"][0, order].tolist()[start:]
