"""Systems that draw: requests wait in a queue, and one thread draws for all of them."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import re
import secrets
import threading
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from seriatim.serving.limits import Limits, Refused, closing, full, too_late
from seriatim.serving.metrics import Metrics
from seriatim.serving.openai import ImageRequest
from seriatim.systems.image_system import ImageSystem, Pictures
from seriatim.systems.system import Sampling
from seriatim.verbs.generate import sampling_of

FRAMES = 16  # of a stream that are told however long they take; others as long as they take half of the time


class Gone(Exception):
    """Nobody waits for a picture any more."""


class Watching:
    """A `Watcher` of a picture that is drawn in another thread: tells what is there, and ends it when nobody waits."""

    def __init__(self, tell: Callable[[Float[Tensor, "n c h w"], str], None] | None):
        self.tell, self.gone = tell, threading.Event()
        self.frames, self.next = 0, 0.0

    def __call__(self, made: Callable[[], Tensor], caption: str) -> None:
        """Raises Gone."""
        if self.gone.is_set():
            raise Gone
        start = time.perf_counter()
        if self.tell is None or (self.frames >= FRAMES and start < self.next):
            return
        self.tell(made(), caption)
        self.frames, end = self.frames + 1, time.perf_counter()
        self.next = end + (end - start)


class Easel:
    """The one thread that draws, and how many wait for it."""

    def __init__(self, queue: int):
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="pictures")
        self.queue, self.closed = queue, False
        self.held: set[asyncio.Future[Pictures]] = set()

    @property
    def waiting(self) -> int:
        """Requests that are drawn for, or will be."""
        return len(self.held)

    async def draw(self, function: Callable[[Watching], Pictures], watching: Watching) -> Pictures:
        """What a function draws, when its turn comes; where nobody waits any more, it does not come, or ends at its
        next step. Raises Refused where too many wait."""
        if self.closed:
            raise closing()
        if self.waiting > self.queue:
            raise full(f"{self.waiting} requests wait for pictures")
        drawing = asyncio.get_running_loop().run_in_executor(self.pool, function, watching)
        self.held.add(drawing)
        try:
            return await drawing
        except asyncio.CancelledError:
            asked = asyncio.current_task()
            if self.closed and asked is not None and not asked.cancelling():
                raise closing() from None
            raise
        finally:
            watching.gone.set()
            self.held.discard(drawing)

    async def close(self, seconds: float) -> None:
        """Nothing more is begun; whoever still waits behind so many seconds is told so."""
        self.closed = True
        self.pool.shutdown(wait=False, cancel_futures=True)
        if self.held:
            await asyncio.wait(set(self.held), timeout=seconds)
        for drawing in set(self.held):
            drawing.cancel()


class ImageModel:
    """A system that draws pictures of classes."""

    kind = "image"

    def __init__(
        self, name: str, system: ImageSystem, easel: Easel, metrics: Metrics, limits: Limits,
        log: Callable[[str], None],
    ):  # fmt: skip
        self.name, self.system, self.easel, self.metrics, self.limits = name, system, easel, metrics, limits
        self.log = log
        self.drawn = self.forwards = 0

    @property
    def labelled(self) -> bool:
        return "class" in self.system.model.conditions

    @property
    def about(self) -> dict[str, Any]:
        """What a page wants to know."""
        classes = self.system.config.classes if self.labelled else 0
        named = [str(name) for name in self.system.classes[:classes]]
        return {"kind": self.kind, "classes": named or [str(i) for i in range(min(classes, 1000))]}

    def figures(self) -> dict[str, float]:
        return {"steps": self.forwards, "finished": self.drawn}

    async def draw(self, asked: ImageRequest, tell: Callable[[Tensor, str], None] | None = None) -> Pictures:
        """The pictures. tell: is told in the drawing thread what is there after steps. Raises Refused."""
        (system, label), sampling = self._meant(asked.prompt), self._sampling(asked)
        n = asked.n or 1
        if n > (1 if asked.stream else self.limits.pictures):
            most = "one is streamed" if asked.stream else f"{self.limits.pictures} are drawn at once"
            raise Refused(400, f"n = {n}: at most {most}", param="n")
        labels = None if label is None else torch.full((n,), label)
        seed = secrets.randbelow(2**31) if asked.seed is None else asked.seed % 2**62
        start = time.monotonic()
        try:
            async with asyncio.timeout(self.limits.seconds):
                made = await self.easel.draw(
                    lambda watching: system.draw(labels, n, sampling, seed, watching), Watching(tell)
                )
        except (ValueError, TypeError) as error:
            raise Refused(400, str(error)) from None
        except TimeoutError:
            raise too_late(self.limits.seconds) from None
        except (RuntimeError, ArithmeticError, LookupError) as error:
            self.log(f"pictures failed: {type(error).__name__}: {error}")
            raise Refused(500, "the model failed on this request", code="model_failed") from None
        self.drawn, self.forwards = self.drawn + n, self.forwards + made.forwards
        self.metrics.whole.labels(self.name).observe(time.monotonic() - start)
        return made

    def _meant(self, prompt: str) -> tuple[ImageSystem, int | None]:
        """The system and the label that a prompt means. Raises Refused for one that says nothing known."""
        if "text" not in self.system.model.conditions:
            return self.system, self._label(prompt)
        try:
            return self.system.prompted([prompt]), 0
        except ValueError as error:
            raise Refused(400, str(error), param="prompt") from None

    def _label(self, prompt: str) -> int | None:
        """The class that is meant. Raises Refused for none that there is."""
        if not self.labelled:
            return None
        classes, text = self.system.classes, prompt.strip()
        if text in classes:
            return classes.index(text)
        if re.fullmatch("[0-9]{1,9}", text) and int(text) < self.system.config.classes:
            return int(text)
        names = ", ".join(map(str, classes[:20])) + (", ..." if len(classes) > 20 else "")
        there = names or f"numbers 0 to {self.system.config.classes - 1}"
        raise Refused(
            400, f"the prompt is the class of the picture, by name or number; there are {there}", param="prompt"
        )

    def _sampling(self, asked: ImageRequest) -> Sampling:
        if asked.steps is not None and asked.steps > self.limits.steps:
            raise Refused(400, f"{asked.steps:,} steps; at most {self.limits.steps} are taken", param="steps")
        if asked.response_format == "url":
            raise Refused(400, "pictures are not kept here: ask for b64_json", param="response_format")
        size = None
        if asked.size not in (None, "auto"):
            found = re.fullmatch("([0-9]{1,5})x([0-9]{1,5})", str(asked.size))
            size = (int(found[1]), int(found[2])) if found else (0, 0)
            if not all(1 <= side <= self.limits.side for side in size):
                why = f"the size is two numbers up to {self.limits.side}, as in 48x32, or auto"
                raise Refused(400, why, param="size")
        with contextlib.suppress(ValueError):
            return sampling_of(
                self.system, temperature=asked.temperature, guidance=asked.guidance, steps=asked.steps, size=size
            )
        raise Refused(400, "these settings do not go together")

    # ---- how it is told ----------------------------------------------------------------------------------------------

    def whole(self, made: Pictures) -> dict[str, Any]:
        """The answer, all at once."""
        return {
            "created": int(time.time()), "output_format": "png", "size": size_of(made.images),
            "data": [{"b64_json": self.encoded(image)} for image in made.images],
        }  # fmt: skip

    async def events(self, asked: ImageRequest) -> AsyncGenerator[dict[str, Any]]:
        """What is there of a picture while it is drawn, then the picture. Raises Refused."""
        loop, told = asyncio.get_running_loop(), asyncio.Queue[tuple[str, str, str] | None]()

        def tell(frame: Tensor, caption: str) -> None:
            said = caption, self.encoded(frame[0]), size_of(frame)
            with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody waits
                loop.call_soon_threadsafe(told.put_nowait, said)

        drawing = asyncio.ensure_future(self.draw(asked, tell))
        drawing.add_done_callback(lambda _: told.put_nowait(None))
        try:
            count = 0
            while (said := await told.get()) is not None:
                caption, picture, size = said
                what = {"partial_image_index": count, "caption": caption}
                yield _event("partial_image", picture, size) | what
                count += 1
            made = await drawing
            yield _event("completed", self.encoded(made.images[0]), size_of(made.images))
        finally:
            drawing.cancel()
            with contextlib.suppress(asyncio.CancelledError, Refused):
                await drawing

    def encoded(self, image: Float[Tensor, "c h w"]) -> str:
        return base64.b64encode(png(image, self.system.ink)).decode()


def _event(kind: str, picture: str, size: str) -> dict[str, Any]:
    return {
        "type": f"image_generation.{kind}", "b64_json": picture, "created_at": int(time.time()), "size": size,
        "output_format": "png", "background": "opaque", "quality": "auto",
    }  # fmt: skip


def png(image: Float[Tensor, "c h w"], ink: bool) -> bytes:
    """A picture in [-1, 1], of one channel or three, as a file. ink: 1 is black."""
    pixels = (image.detach().cpu().float().nan_to_num().clamp(-1, 1) + 1) * 127.5
    pixels = (255 - pixels if ink else pixels).round().to(torch.uint8)
    array = pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)
    out = io.BytesIO()
    Image.fromarray(array.contiguous().numpy()).save(out, format="PNG")
    return out.getvalue()


def size_of(images: Float[Tensor, "n c h w"]) -> str:
    return f"{images.shape[3]}x{images.shape[2]}"
