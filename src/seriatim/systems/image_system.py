"""Systems of pictures: a tokenizer makes elements of them, generation makes pictures and the film of their order."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from seriatim.canvas import Canvas
from seriatim.data.base import Data
from seriatim.decoding.kept import Kept
from seriatim.decoding.loop import Decider, decode
from seriatim.layout import Layout, grid
from seriatim.random import Generator
from seriatim.systems.decoders import Decoding, decoder_of
from seriatim.systems.system import Sampling, System

FRAMES = 16  # of a film, at most
BATCH = 100  # pictures that are generated together

# Is told after each step how to make what is there as pictures (n, c, h, w), and what that is.
Watcher = Callable[[Callable[[], Tensor], str], None]


@dataclass
class Pictures:
    """Generated pictures in [-1, 1] with their film: what was there after some of the steps, and what it cost.

    images, frames: in float32 at least, whatever the weights are in. decided: with a film of elements on the grid of
    the tokenizer, the forward that decided each of them, from 1.
    """

    images: Float[Tensor, "n c h w"]
    labels: Int[Tensor, " n"] | None
    frames: list[Float[Tensor, "n c h w"]] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    forwards: int = 0  # one after another, for each picture
    seconds: float = 0.0  # in all
    decided: Int[Tensor, "n rows columns"] | None = None

    def __post_init__(self) -> None:
        self.images, self.frames = _full(self.images), [_full(frame) for frame in self.frames]


def _full(images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
    return images if images.dtype == torch.float64 else images.float()


def joined(parts: Sequence[Pictures], labels: Tensor | None, seconds: float) -> Pictures:
    """Pictures that were drawn a batch at a time."""
    maps = [p.decided for p in parts if p.decided is not None]
    return Pictures(
        torch.cat([p.images for p in parts]),
        labels,
        [torch.cat(frames) for frames in zip(*(p.frames for p in parts), strict=False)],
        parts[0].captions,
        parts[0].forwards,
        seconds,
        torch.cat(maps) if maps else None,
    )


def whole_cells(keep: Bool[Tensor, "h w"], shape: tuple[int, int]) -> Bool[Tensor, "rows columns"]:
    """Which cells of a picture are kept as a whole. Raises ValueError where it has no such cells."""
    (height, width), (rows, columns) = keep.shape, shape
    if height % rows or width % columns:
        raise ValueError(f"{height} x {width} pixels do not fall into {rows} x {columns} places")
    return keep.view(rows, height // rows, columns, width // columns).all(3).all(1)


class ImageSystem(System):
    """Elements are the codes of a picture, kind "token"; the class, where there is one, is the condition "class"."""

    source = "digits"
    tokenizers: ClassVar[tuple[str, ...]]  # how pictures become elements; the first is the default
    tokenizer_settings: ClassVar[Mapping[str, Any]] = MappingProxyType({})  # of one that needs no training
    sampling = Sampling(top_p=0.96)
    placed = True  # do coordinates of elements tell places in the picture?
    seen_ahead = False  # may what is known of a picture be seen before its turn comes?
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

    def drawn_from(self, examples: Any) -> Any:
        """One side of the data as batches are drawn from it: here sample by sample."""
        return examples

    @classmethod
    def tokenizer_settings_for(cls, shape: Sequence[int]) -> Mapping[str, Any]:
        """Those of a tokenizer that needs no training, for pictures (channels, height, width)."""
        return cls.tokenizer_settings

    def canvas(self, batch: Mapping[str, Tensor]) -> tuple[Canvas, dict[str, Tensor] | None]:
        codes = self.elements(batch["image"], self.model.layout)
        return self.model.canvas({"token": codes}), self.condition(batch.get("label"), len(codes))

    def elements(self, images: Float[Tensor, "n c h w"], layout: Layout) -> Tensor:
        """What the elements of a layout are in pictures: ids (n, E), or vectors (n, E, d)."""
        with torch.no_grad():
            return self.tokenizer.encode(images)

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
        film: bool | Watcher = False,
        decoder: str = "own",
    ) -> Pictures:
        """Generate pictures of these classes, or `count` of them, by a decoder (`decoder_of`; for orders other than
        next-token the system's own). film: keep what was there after some of the steps; a `Watcher` is told while they
        are made, and whatever it raises ends it. Raises ValueError for labels and decoders that do not exist or do not
        suit."""
        n = len(labels) if labels is not None else count or 1
        out: list[Pictures] = []
        start = time.perf_counter()
        with torch.inference_mode():
            for k in range(0, n, BATCH):
                part = None if labels is None else labels[k : k + BATCH]
                size, s = min(BATCH, n - k), sampling or self.sampling
                out.append(self._draw(part, size, s, seed + k, film, decoder_of(self, decoder, s, ())))
        return joined(out, labels, time.perf_counter() - start)

    def prompted(self, texts: Sequence[str]) -> ImageSystem:
        """This system, same weights, asked for pictures of these texts: labels are their numbers. Raises ValueError
        where it was not trained by texts."""
        raise ValueError(f"this {self.meta.key} was trained by classes: ask for a label, not by a prompt")

    def repaint(
        self,
        images: Float[Tensor, "n c h w"],
        keep: Bool[Tensor, "h w"],
        labels: Int[Tensor, " n"] | None = None,
        sampling: Sampling | None = None,
        seed: int = 0,
        film: bool = False,
    ) -> Pictures:
        """Pictures of which a part is known and stays as it is, pixel for pixel (in- and out-painting).

        keep: the pixels that are known; elements all of whose pixels are stay, too. Raises ValueError for another
        shape, and where elements have no place in the picture."""
        s, start, out = sampling or self.sampling, time.perf_counter(), []
        layout = self.layout(s)
        known = self.known_elements(keep, layout)
        with torch.inference_mode():
            for k in range(0, len(images), BATCH):
                some, part = images[k : k + BATCH], None if labels is None else labels[k : k + BATCH]
                made = self._repainted(some, known, layout, part, s, seed + k, film)
                made.images = torch.where(keep, some, made.images)
                made.frames = [torch.where(keep, some, frame) for frame in made.frames]
                out.append(made)
        return joined(out, labels, time.perf_counter() - start)

    def known_elements(self, keep: Bool[Tensor, "h w"], layout: Layout) -> Bool[Tensor, "E"]:
        """The elements all of whose pixels are kept."""
        shape = self.tokenizer.grid
        raster = grid(*shape).coord
        if not self.placed or layout.coord.shape != raster.shape or not torch.equal(layout.coord, raster):
            raise ValueError(f"no part of a picture is kept by {self.meta.key}: its elements have no place in one")
        return whole_cells(keep, shape).flatten()

    def _repainted(
        self, images: Tensor, known: Tensor, layout: Layout, labels: Tensor | None, s: Sampling, seed: int, film: bool
    ) -> Pictures:
        """Given where that may be seen from the beginning, else taken as it comes in the order."""
        value, way = {"token": self.elements(images, layout)}, decoder_of(self, "own", s, ())
        if self.seen_ahead or self.model.factorization.free:
            canvas = self.model.canvas(value, known[None], Generator(seed), layout=layout)
        else:
            canvas = self.model.blank(len(images), Generator(seed), layout)
            way = replace(way, decider=self.keeping(way.decider, value, known))
        return self._draw(labels, len(images), s, seed, film, way, canvas)

    def keeping(self, decider: Decider, value: Mapping[str, Tensor], known: Bool[Tensor, "E"]) -> Decider:
        """A decider that takes what is known as it comes."""
        return Kept(decider, value, known)

    def layout(self, sampling: Sampling) -> Layout:
        """What is drawn. Raises ValueError for sizes that this system does not draw."""
        if sampling.size is not None or sampling.scales is not None:
            raise ValueError(f"{self.meta.key} draws pictures of the size it was trained on: leave size and scales out")
        return self.model.layout

    def blank(self, labels: Int[Tensor, " n"] | None, n: int, sampling: Sampling, seed: int) -> Canvas:
        """A canvas on which nothing of n pictures is known, and what stands in front of them, if anything."""
        return self.model.blank(n, Generator(seed), self.layout(sampling))

    def _draw(
        self, labels: Tensor | None, n: int, sampling: Sampling, seed: int, film: bool | Watcher, way: Decoding,
        canvas: Canvas | None = None,
    ) -> Pictures:  # fmt: skip
        """Decode a canvas, a fresh one if none is given."""
        canvas = canvas or self.blank(labels, n, sampling, seed)
        target = self.target(self.condition(labels, n), sampling, **way.target)
        states, forwards = [], 0
        for step in decode(target, canvas, way.decider, way.proposer, Generator(seed)):
            forwards += step.forwards
            if callable(film):
                film(lambda: self.so_far(canvas), f"forward {forwards}")
            elif film:
                states.append((forwards, canvas.copy()))
        out = Pictures(self.finished(canvas), labels, forwards=forwards)
        for i in torch.linspace(0, len(states) - 1, min(FRAMES, len(states))).long().tolist():
            number, state = states[i]
            out.frames.append(self.so_far(state))
            out.captions.append(f"forward {number} of {forwards}")
        rows, columns = self.tokenizer.grid
        if states and rows * columns == canvas.layout.size:
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
