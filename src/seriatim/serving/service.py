"""The models that are served: opened one after another while the server already answers, closed with it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from seriatim.serving.limits import Limits, Refused, closing
from seriatim.serving.metrics import Metrics
from seriatim.serving.pictures import Easel, ImageModel
from seriatim.serving.texts import Make, TextModel
from seriatim.systems.image_system import ImageSystem
from seriatim.systems.language_model import LanguageModel
from seriatim.systems.masked_text import MaskedText
from seriatim.systems.system import System

THREADS = 4  # for chat templates, long prompts and grammars
DECODERS = ("ancestral", "prompt-lookup", "token-recycling")

LOG = logging.getLogger("seriatim.serving")


class Service:
    """All models by their names; nothing else can be asked for.

    sources: what gives each system (as `load` does), called once; make: the engine of a text system; decoders: those
    that texts may be written by, the first where nothing is said.
    """

    def __init__(
        self, sources: Mapping[str, Callable[[], System]], make: Make, *, decoders: Sequence[str] = DECODERS,
        limits: Limits | None = None,
    ):  # fmt: skip
        self.sources, self.make, self.decoders = dict(sources), make, tuple(decoders)
        self.limits = limits or Limits()
        self.metrics = Metrics()
        self.metrics.watch(lambda: {name: model.figures() for name, model in list(self.models.items())})
        self.models: dict[str, TextModel | ImageModel] = {}
        self.easel = Easel(self.limits.picture_queue)
        self.pool = ThreadPoolExecutor(THREADS, thread_name_prefix="serving")
        self.created = int(time.time())
        self.ready = False
        self._closing: asyncio.Task[None] | None = None

    @property
    def closing(self) -> bool:
        return self._closing is not None

    @property
    def state(self) -> str:
        return "closing" if self.closing else "ready" if self.ready else "loading"

    async def open(self) -> None:
        """Load all models, and begin. Raises ValueError, OSError for what cannot be served."""
        loop = asyncio.get_running_loop()
        for name, source in self.sources.items():
            model = await loop.run_in_executor(self.pool, self._opened, name, source)
            if self.closing:
                return
            if isinstance(model, TextModel):
                model.start()
            self.models[name] = model
        self.ready = not self.closing

    def _opened(self, name: str, source: Callable[[], System]) -> TextModel | ImageModel:
        system = source()
        if isinstance(system, LanguageModel | MaskedText):
            decoders = self.decoders if isinstance(system, LanguageModel) else ("own",)
            return TextModel(name, system, self.make, decoders, self.metrics, self.limits, LOG.error)
        if isinstance(system, ImageSystem):
            return ImageModel(name, system, self.easel, self.metrics, self.limits, LOG.error)
        raise ValueError(
            f"{name} is {system.meta.key}, which cannot be served yet: give next-token or masked models of text, or "
            "systems of pictures"
        )

    async def close(self, seconds: float | None = None) -> None:
        """Take nothing more, and let what runs end for so many seconds (None: what the limits say)."""
        if self._closing is None:
            self._closing = asyncio.create_task(self._close(self.limits.closing if seconds is None else seconds))
        await asyncio.shield(self._closing)

    async def _close(self, seconds: float) -> None:
        texts = [model for model in self.models.values() if isinstance(model, TextModel)]
        ending = (asyncio.to_thread(model.close, seconds) for model in texts)
        await asyncio.gather(self.easel.close(seconds), *ending)
        self.pool.shutdown(wait=False)

    def awake(self) -> None:
        """Raises Refused while models are loaded, and when no more is taken."""
        if self.closing:
            raise closing()
        if not self.ready:
            raise Refused(503, "the models are being loaded", code="loading", retry=1)

    def model(self, name: str) -> TextModel | ImageModel:
        """A model by its name. Raises Refused for one that there is not."""
        self.awake()
        if name not in self.models:
            there = ", ".join(self.models)
            raise Refused(
                404, f"there is no model {name[:100]!r} here; there is {there}", param="model", code="model_not_found"
            )
        return self.models[name]

    def text(self, name: str) -> TextModel:
        """A model that writes. Raises Refused for others."""
        model = self.model(name)
        if not isinstance(model, TextModel):
            raise Refused(400, f"{name} draws pictures: ask at /v1/images/generations", param="model")
        return model

    def image(self, name: str) -> ImageModel:
        """A system that draws. Raises Refused for others."""
        model = self.model(name)
        if not isinstance(model, ImageModel):
            raise Refused(400, f"{name} writes text: ask at /v1/completions", param="model")
        return model
