"""Systems of text: documents become one stream of ids, training draws windows of it, generation streams text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from seriatim.canvas import GIVEN, Canvas, Delete
from seriatim.data.base import Pairs
from seriatim.decoding.loop import Decider, decode
from seriatim.decoding.sample import SampleAll
from seriatim.decoding.shaping import Shaper, Without
from seriatim.layout import line
from seriatim.random import Keyed
from seriatim.systems.decoders import Block, Decoding, Onlooker
from seriatim.systems.infill import Filled, Fills, Parts, known_gaps, parted, refuse, settled
from seriatim.systems.system import Sampling, System, evenly
from seriatim.tokenizers.text import ByteTokenizer, Detokenizer, TextTokenizer, id_stream


@dataclass(frozen=True)
class Windows:
    """Windows of a stream of ids, starting anywhere."""

    ids: Int[Tensor, " n"]
    length: int

    def __post_init__(self) -> None:
        if len(self.ids) < self.length:
            raise ValueError(
                f"the text has {len(self.ids)} tokens, and a window takes {self.length}: use more text, or a shorter "
                "--length"
            )

    def __len__(self) -> int:
        return len(self.ids) - self.length + 1

    def take(self, index: Int[Tensor, " n"], generator: torch.Generator | None = None) -> dict[str, Tensor]:
        return {"token": self.ids[index[:, None] + torch.arange(self.length)].long()}


@dataclass(frozen=True)
class Answered:
    """Prompts with their answers as ids; what ends a text, if there is anything, belongs to the answer, as often as
    makes answers `fill` tokens long."""

    side: Pairs
    tokenizer: TextTokenizer
    end: tuple[int, ...]
    length: int
    fill: int = 0

    def __post_init__(self) -> None:
        many = [x for x in self.side.words if len(self.tokenizer.encode(x)) != 1]
        if many:
            raise ValueError(
                f"{many[0]!r} is {len(self.tokenizer.encode(many[0]))} tokens in this tokenizer, and {len(many) - 1} "
                "more of the data's words are several, each of which is to be one: leave out --tokenizer, and it is"
            )

    def __len__(self) -> int:
        return len(self.side)

    def ids(self, index: int) -> tuple[list[int], list[int]]:
        """A prompt, and its answer with the end. Raises ValueError for what is longer than a window, and for an empty
        answer."""
        prompt, answer = (self.tokenizer.encode(text) for text in self.side.pairs[index])
        if not answer:
            raise ValueError(f"the prompt {self.side.pairs[index][0][:40]!r} has an empty answer: nothing to learn")
        answer = [*answer, *(self.end * max(self.fill - len(answer), 1))]
        if len(prompt) + len(answer) > self.length:
            raise ValueError(
                f"a prompt and its answer take {len(prompt) + len(answer)} tokens, and a window {self.length}: give a "
                "longer --length"
            )
        return prompt, answer

    def take(self, index: Int[Tensor, " n"], generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """ "token": Int[n longest], 0 behind an answer; "counts": Bool[n longest], true for answers."""
        return beside([self.ids(i) for i in index.tolist()])


def beside(pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> dict[str, Tensor]:
    """Ids of prompts and answers as a batch: "token", 0 behind an answer, and which of them are answers, "counts"."""
    token = torch.zeros(len(pairs), max(len(prompt) + len(answer) for prompt, answer in pairs), dtype=torch.long)
    counts = torch.zeros(token.shape, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(pairs):
        end = len(prompt) + len(answer)
        token[row, :end] = torch.tensor([*prompt, *answer])
        counts[row, len(prompt) : end] = True
    return {"token": token, "counts": counts}


class TextSystem(System):
    """Elements are the tokens of a text, kind "token". The config has `length` and `vocab`."""

    source = "stdlib"
    tokenizers: ClassVar[tuple[str, ...]] = ("bytes", "bpe", "words")  # the first is the default
    sampling = Sampling(temperature=0.7, top_p=0.95)
    validation_size = 64
    validation_batch = 8
    score_size = 256

    tokenizer: TextTokenizer

    def __init__(self, config: Any, tokenizer: TextTokenizer | None = None):
        super().__init__(config, tokenizer or ByteTokenizer())

    def examples(self, documents: Sequence[str]) -> Windows:
        """One side of a data set, as training draws it."""
        return Windows(id_stream(self.tokenizer, documents, self.stop[:1]), self.window)

    def answered(self, side: Pairs) -> Answered:
        """One side of a set of prompts and answers, as training draws it. Raises ValueError where a word that is to be
        one token is not."""
        return Answered(side, self.tokenizer, self.stop[:1], self.window)

    @property
    def window(self) -> int:
        """Tokens that are trained and scored together."""
        return self.config.length

    def canvas(self, batch: Mapping[str, Tensor]) -> tuple[Canvas, None]:
        """Texts of any length. Where some of the tokens count, what stands before the last of them is given, and there
        is nothing behind it."""
        token, counts = batch["token"], batch.get("counts")
        known: int | Tensor = 0
        if counts is not None:
            behind = counts.flip(1).cumsum(1).flip(1) == 0
            known = ~(counts | behind)
        canvas = self.model.canvas({"token": token}, known, layout=line(token.shape[1]))
        if counts is not None and bool(behind.any()):
            canvas.apply([Delete(torch.where(behind, torch.arange(token.shape[1]), -1))])
        return canvas, None

    def validate(self, examples: Any) -> dict[str, float]:
        """The loss, and bits per byte of the same windows: an upper bound where the likelihood is one."""
        nats, elements = self.score(examples, self.validation_size)
        size = self.bytes_in(examples, self.validation_size)
        return {"loss": nats / elements, "bits_per_byte": nats / size / math.log(2)}

    def bytes_in(self, examples: Windows, most: int | None = None) -> int:
        """UTF-8 bytes of the windows that `score` scores."""
        batch = examples.take(evenly(len(examples), most or self.score_size))
        sizes = self.tokenizer.bytes_of[batch["token"]]
        return int(sizes[batch["counts"]].sum() if "counts" in batch else sizes[:, self._given :].sum())

    _given = 0  # first tokens that must be given, and are not scored

    # ---- generation -------------------------------------------------------------------------------------------------

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
        """Pieces of text as they are decided for good, after the prompt; at most `length` tokens (None: 200, or what
        there is room for). `trace` collects the steps; `watch` looks on (`evaluation.text_film.Recorder`)."""
        s = sampling or self.sampling
        way = decoding or Decoding(self.decider(s), self.proposer(s))
        canvas = self.prompted(prompt, length)
        if way.block is not None:
            canvas = self.blocked(canvas, way.block)
        told, pieces = int((canvas.status[0] == GIVEN).sum()), Detokenizer(self.tokenizer)
        for firm in self._decoded(canvas, way, s, seed, trace, watch):
            ids = self._settled(canvas, told) if firm else []
            told += len(ids)
            piece = pieces.push(ids)
            if piece:
                yield piece
        rest = pieces.push(self._settled(canvas, told)) + pieces.rest()
        if rest:
            yield rest

    def _decoded(
        self, canvas: Canvas, way: Decoding, sampling: Sampling, seed: int, trace: list[Any] | None,
        watch: Onlooker | None, shapers: Sequence[Shaper] = (),
    ) -> Iterator[bool]:  # fmt: skip
        """Decode, and say after each step whether what is decided stays."""
        way = way if watch is None else watch(way)
        target = self.target(None, sampling, **way.target)
        target.shapers += tuple(shapers)
        firm = not getattr(way.decider, "redraws", False)
        for step in decode(target, canvas, way.decider, way.proposer, Keyed(seed)):
            if trace is not None:
                trace.append(step)
            yield firm

    def _settled(self, canvas: Canvas, start: int = 0) -> list[int]:
        """Ids known from the front, from a place on."""
        if canvas.length is not None:
            return canvas.value["token"][0, start : canvas.length].tolist()
        return canvas.value["token"][0, settled(canvas)[start:]].tolist()

    # ---- gaps -------------------------------------------------------------------------------------------------------

    fills: ClassVar[Fills | None] = None  # what gaps it fills, given the text on both sides: of known or unknown length

    def infill(
        self, parts: str | Parts, sampling: Sampling | None = None, seed: int = 0, decoding: Decoding | None = None,
        trace: list[Any] | None = None, watch: Onlooker | None = None,
    ) -> Iterator[str]:  # fmt: skip
        """Pieces of a text whose gaps are filled, as they are decided for good: the whole text, from its front. Parts:
        texts and gaps, or a text in which gaps are marked (`parted`); decoding: None for `filling`. Raises ValueError
        for gaps that this system cannot fill."""
        parts = parted(parts) if isinstance(parts, str) else parts
        refuse(parts, self.fills, self.meta.key)
        s = sampling or self.sampling
        canvas, pieces = self.gapped(parts), Filled(self.tokenizer, parts)
        way = decoding or self.filling(parts, s)
        goes_on = (Without(self.stop),) if self.fills == "known" and self.stop else ()  # no end of text in a gap
        for firm in self._decoded(canvas, way, s, seed, trace, watch, goes_on):
            piece = pieces.push(canvas) if firm else ""
            if piece:
                yield piece
        rest = pieces.push(canvas) + pieces.rest()
        if rest:
            yield rest

    def gapped(self, parts: Parts) -> Canvas:
        """A canvas of one row in which the texts are given and the gaps are to be decided. Raises ValueError where they
        do not fit, or would be filled without regard to what is behind them."""
        ids, given = known_gaps(self.tokenizer, parts)
        room = self.model.layout.size
        if len(ids) > room:
            raise ValueError(
                f"the text takes {len(ids)} tokens, {given.count(False)} of them in gaps; this model takes {room} in "
                "all: shorten the text or its gaps"
            )
        return self.model.canvas({"token": torch.tensor([ids])}, torch.tensor([given]), layout=line(len(ids)))

    def filling(self, parts: Parts, sampling: Sampling) -> Decoding:
        """How the gaps of such a canvas are filled."""
        return Decoding(self.decider(sampling), self.proposer(sampling))

    # ---- prompts ----------------------------------------------------------------------------------------------------

    def prompt_ids(self, text: str) -> list[int]:
        """A prompt as ids."""
        return self.tokenizer.encode(text)

    def asked(self, prompt: str | Sequence[int]) -> TextSystem:
        """The system for which a decoder of this prompt is made: itself, where it reads prompts on the canvas."""
        return self

    def prompted(self, prompt: str | Sequence[int], length: int | None) -> Canvas:
        """A canvas with a prompt (text, or ids) given and room for `length` tokens. Raises ValueError where they do not
        fit."""
        return self.begun(self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt, length)

    def begun(self, ids: Sequence[int], length: int | None) -> Canvas:
        """The same for a prompt of ids."""
        ids, room = list(ids), self.model.layout.size
        length = max(min(200, room - len(ids)), 1) if length is None else length
        if length < 1:
            raise ValueError(f"at least 1 token can be asked for, got {length}")
        if len(ids) + length > room:
            raise ValueError(
                f"the prompt takes {len(ids)} tokens and {length} are asked for; this model takes {room} in all: "
                "shorten the prompt or --length"
            )
        value = torch.nn.functional.pad(torch.tensor([ids], dtype=torch.long), (0, length))
        return self.model.canvas({"token": value}, len(ids), layout=line(len(ids) + length))

    def blocked(self, canvas: Canvas, block: Block) -> Canvas:
        """The same canvas, decided in blocks (`Decoding.block`) behind what stands at its beginning. Raises ValueError
        where that is not the decoder's choice, or blocks do not fit."""
        raise ValueError(f"{self.meta.key} has no blocks that a decoder may choose")

    @property
    def begins(self) -> bool:
        """Whether it writes without anything given."""
        return True

    @property
    def stop(self) -> tuple[int, ...]:
        """Ids that end a text."""
        eos = None if self.tokenizer is None else self.tokenizer.special.get("eos")
        return () if eos is None else (eos,)

    def decider(self, sampling: Sampling) -> Decider:
        return SampleAll(self.stop)

    def write(self, prompt: str, length: int, sampling: Sampling | None = None, seed: int = 0) -> str:
        """A whole continuation at once."""
        with torch.inference_mode():
            return "".join(self.stream(prompt, length, sampling, seed))
