"""Systems of pictures: a tokenizer makes elements of them, generation makes pictures and the film of their order."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from seriatim.canvas import Canvas
from seriatim.data.base import Data
from seriatim.decoding.loop import decode
from seriatim.layout import Layout
from seriatim.random import Generator
from seriatim.systems.decoders import Decoding, decoder_of
from seriatim.systems.system import Sampling, System

FRAMES = 16  # of a film, at most
BATCH = 100  # pictures that are generated together


@dataclass
class Pictures:
    """Generated pictures in [-1, 1] with their film: what was there after some of the steps, and what it cost.

    decided: with a film of elements on the tokenizer's grid, the forward that decided each of them, from 1.
    """

    images: Float[Tensor, "n c h w"]
    labels: Int[Tensor, " n"] | None
    frames: list[Float[Tensor, "n c h w"]] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    forwards: int = 0  # one after another, for each picture
    seconds: float = 0.0  # in all
    decided: Int[Tensor, "n rows columns"] | None = None


class ImageSystem(System):
    """Elements are the codes of a picture, kind "token"; the class, where there is one, is the condition "class"."""

    source = "digits"
    tokenizers: ClassVar[tuple[str, ...]]  # how pictures become elements; the first is the default
    tokenizer_settings: ClassVar[Mapping[str, Any]] = MappingProxyType({})  # of one that needs no training
    sampling = Sampling(top_p=0.96)
    validation_size = 256
    validation_batch = 64

    @classmethod
    def known(cls, tokenizer: Any, data: Data) -> dict[str, Any]:
        """Fields of the config that follow from the tokenizer and the data."""
        return {"vocab": tokenizer.vocab, "classes": max(len(data.classes), 1)}

    @classmethod
    def tokenizer_for(cls, shape: Sequence[int]) -> str:
        """The kind of tokenizer for pictures (channels, height, width), where the user names none."""
        return cls.tokenizers[0]

    @classmethod
    def tokenizer_settings_for(cls, shape: Sequence[int]) -> Mapping[str, Any]:
        """Those of a tokenizer that needs no training, for pictures (channels, height, width)."""
        return cls.tokenizer_settings

    def canvas(self, batch: Mapping[str, Tensor]) -> tuple[Canvas, dict[str, Tensor] | None]:
        with torch.no_grad():
            codes = self.tokenizer.encode(batch["image"])
        return self.model.canvas({"token": codes}), self.condition(batch.get("label"), len(codes))

    def condition(self, labels: Tensor | None, count: int) -> dict[str, Tensor] | None:
        """The raw condition of labels; unlabelled pictures are all of class 0."""
        if "class" not in self.model.conditions:
            return None
        return {"class": torch.zeros(count, dtype=torch.long) if labels is None else labels}

    # ---- generation -------------------------------------------------------------------------------------------------

    def draw(
        self,
        labels: Int[Tensor, " n"] | None = None,
        count: int | None = None,
        sampling: Sampling | None = None,
        seed: int = 0,
        film: bool = False,
        decoder: str = "own",
    ) -> Pictures:
        """Generate pictures of these classes, or `count` of them, by a decoder (`decoder_of`; for orders other than
        next-token the system's own). Raises ValueError for labels and decoders that do not exist or do not suit."""
        n = len(labels) if labels is not None else count or 1
        out: list[Pictures] = []
        start = time.perf_counter()
        with torch.inference_mode():
            for k in range(0, n, BATCH):
                part = None if labels is None else labels[k : k + BATCH]
                size, s = min(BATCH, n - k), sampling or self.sampling
                out.append(self._draw(part, size, s, seed + k, film, decoder_of(self, decoder, s, ())))
        whole = Pictures(torch.cat([p.images for p in out]), labels, forwards=out[0].forwards)
        whole.frames = [torch.cat(parts) for parts in zip(*(p.frames for p in out), strict=False)]
        whole.captions = out[0].captions
        maps = [p.decided for p in out if p.decided is not None]
        whole.decided = torch.cat(maps) if maps else None
        whole.seconds = time.perf_counter() - start
        return whole

    def layout(self, sampling: Sampling) -> Layout:
        """What is drawn. Raises ValueError for sizes that this system does not draw."""
        if sampling.size is not None or sampling.scales is not None:
            raise ValueError(f"{self.meta.key} draws pictures of the size it was trained on: leave size and scales out")
        return self.model.layout

    def _draw(
        self, labels: Tensor | None, n: int, sampling: Sampling, seed: int, film: bool, way: Decoding,
        canvas: Canvas | None = None,
    ) -> Pictures:  # fmt: skip
        """Decode a canvas, empty if none is given."""
        canvas = canvas or self.model.blank(n, Generator(seed), self.layout(sampling))
        target = self.target(self.condition(labels, n), sampling, **way.target)
        states, forwards = [], 0
        for step in decode(target, canvas, way.decider, way.proposer, Generator(seed)):
            forwards += step.forwards
            if film:
                states.append((forwards, canvas.copy()))
        out = Pictures(self.finished(canvas), labels, forwards=forwards)
        for i in torch.linspace(0, len(states) - 1, min(FRAMES, len(states))).long().tolist():
            number, state = states[i]
            out.frames.append(self.so_far(state))
            out.captions.append(f"forward {number} of {forwards}")
        rows, columns = self.tokenizer.grid
        if film and rows * columns == canvas.layout.size:
            at = torch.full(canvas.known.shape, forwards)
            for number, state in reversed(states):
                at = torch.where(state.known, number, at)
            out.decided = at.view(n, rows, columns)
        return out

    def finished(self, canvas: Canvas) -> Float[Tensor, "n c h w"]:
        """The pictures of a finished canvas."""
        return self.picture(canvas.value["token"])

    def so_far(self, canvas: Canvas) -> Float[Tensor, "n c h w"]:
        """What is known so far as pictures."""
        return self.unfinished(canvas.value["token"], canvas.known)

    def picture(self, codes: Tensor) -> Float[Tensor, "n c h w"]:
        """Codes of all elements as pictures."""
        return self.tokenizer.decode(codes)

    def unfinished(self, codes: Tensor, known: Tensor) -> Float[Tensor, "n c h w"]:
        """What is known so far as pictures: the rest is grey."""
        images = self.picture(torch.where(known.view(*known.shape, *[1] * (codes.dim() - 2)), codes, 0))
        return self.shown(images, known)

    def shown(self, images: Float[Tensor, "n c h w"], known: Tensor) -> Float[Tensor, "n c h w"]:
        """The places (n, rows times columns) of pictures that are known, grey around them."""
        rows, columns = self.tokenizer.grid
        patch = images.shape[2] // rows, images.shape[3] // columns
        shown = known.view(-1, 1, rows, columns).repeat_interleave(patch[0], 2).repeat_interleave(patch[1], 3)
        return torch.where(shown, images, torch.zeros(()))
