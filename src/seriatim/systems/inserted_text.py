"""Systems of text that grows by insertions anywhere: texts of any length, continued, or filled in between others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from seriatim.canvas import DECIDED, GIVEN, Canvas
from seriatim.data.base import Pairs
from seriatim.decoding.loop import Decider
from seriatim.decoding.target import Target
from seriatim.factorization.insertion import opened
from seriatim.layout import line
from seriatim.random import Generator
from seriatim.systems.decoders import Decoding, Onlooker
from seriatim.systems.infill import Gap, Parts, joined
from seriatim.systems.system import Sampling
from seriatim.systems.text_system import Answered, TextSystem


class InsertedText(TextSystem):
    """Decoded in a gap. The config has `short`: share of the windows that are cut to a random length in training, as a
    model that has seen texts of one length writes texts of that length only."""

    normed = False

    def answered(self, side: Pairs) -> Answered:
        return replace(super().answered(side), end=())  # a text ends when nothing more is to be inserted

    def forward(self, batch: Mapping[str, Tensor], random: Generator, step: int, steps: int) -> tuple[Tensor, Tensor]:
        if "counts" not in batch:
            rows, length = batch["token"].shape
            some = torch.rand(rows, generator=random.generator) < self.config.short
            cut = torch.randint(1, length + 1, (rows,), generator=random.generator)
            counts = torch.arange(length) < torch.where(some, cut, length)[:, None]
            batch = {**batch, "counts": counts.to(batch["token"].device)}
        return super().forward(batch, random, step, steps)

    # ---- generation -------------------------------------------------------------------------------------------------

    fills = "unknown"

    def begun(self, ids: Sequence[int], length: int | None) -> Canvas:
        """A prompt that is given, and a gap behind it. Raises ValueError where there is no room for `length` tokens."""
        known, room = len(ids), self.model.layout.size
        if (length is not None and length < 1) or known + (length or 1) > room:
            raise ValueError(
                f"the prompt takes {known} tokens and {1 if length is None else length} are asked for; this model "
                f"takes {room} in all: shorten the prompt or --length"
            )
        return self._open(ids, [known])

    def gapped(self, parts: Parts) -> Canvas:
        """A canvas of one row in which the texts are given, with a gap of any length wherever one is asked for. Raises
        ValueError where there is no room."""
        ids: list[int] = []
        gaps = []
        for part in joined(parts):
            if isinstance(part, Gap):
                gaps.append(len(ids))
            else:
                ids += self.tokenizer.encode(part)
        if len(ids) + 1 > self.model.layout.size:
            raise ValueError(
                f"what is given takes {len(ids)} tokens, and this model takes {self.model.layout.size} in all: shorten "
                "the text"
            )
        return self._open(ids, gaps)

    def _open(self, ids: Sequence[int], gaps: Sequence[int]) -> Canvas:
        """Tokens that are given, and gaps in front of these of them."""
        value = torch.tensor([list(ids)], dtype=torch.long)
        canvas = self.model.canvas({"token": value}, torch.ones_like(value, dtype=torch.bool), layout=line(len(ids)))
        for gap in gaps:
            canvas = opened(canvas, torch.tensor([gap - 1]))
        return canvas

    def stream(
        self,
        prompt: str | Sequence[int],
        length: int | None = None,
        sampling: Sampling | None = None,
        seed: int = 0,
        decoding: Decoding | None = None,
        trace: list[Any] | None = None,
        watch: Onlooker | None = None,
    ) -> Iterator[str]:
        """The text behind a prompt, in one piece: no part of it is settled before all of it is. `length`: the most
        tokens (None: what there is room for); a text that it cuts short is unfinished everywhere, not at its end.
        `decoding` can only be the system's own."""
        s, canvas = sampling or self.sampling, self.prompted(prompt, length)
        given = int((canvas.status == GIVEN).sum())
        most = self.model.layout.size if length is None else given + length
        for _ in self._decoded(canvas, Decoding(self.inserter(s, most)), s, seed, trace, watch):
            pass
        text = self.tokenizer.decode(self._settled(canvas))
        if text:
            yield text

    def target(self, condition: Mapping[str, Tensor] | None, sampling: Sampling, **more: Any) -> Target:
        """As of all systems. Raises ValueError for what is asked of single tokens: a step chooses token and place."""
        if sampling.shapers or not sampling.suppress.neutral:
            raise ValueError(
                f"{self.meta.key} chooses a token together with its place: leave out penalties and suppressed tokens"
            )
        return super().target(condition, sampling, **more)

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
