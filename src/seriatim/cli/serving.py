"""`seriatim serve`."""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from seriatim.systems.system import System

KEY = "SERIATIM_API_KEY"


def run_serve(options: argparse.Namespace) -> int:
    """Serve until the program is stopped."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ImportError(f"a server needs more packages ({error}): pip install 'seriatim[serve]'") from None
    from seriatim.serving.engine import Engine
    from seriatim.serving.guard import Hosts
    from seriatim.serving.limits import Limits
    from seriatim.serving.server import listening, serve
    from seriatim.serving.service import DECODERS, Service
    from seriatim.systems.decoders import named

    key = options.api_key if options.api_key is not None else os.environ.get(KEY) or None
    if key is not None and not key.strip():
        raise ValueError(f"an empty API key keeps nobody out: give --api-key KEY, or leave it out ({KEY})")
    for decoder in options.decoder or ():
        named(decoder)
    limits = Limits(max_tokens=options.max_tokens, seconds=options.max_seconds)
    service = Service(
        sources_of(options.sources, lambda source: loader(source, options)),
        functools.partial(Engine, rows=options.rows, queue=options.queue),
        decoders=options.decoder or DECODERS, limits=limits,
    )  # fmt: skip
    hosts = Hosts(options.host, options.allow_host or ())
    with listening(options.host, options.port) as place:
        print(f"{', '.join(service.sources)} at {place.url} (stop: Ctrl-C)", file=sys.stderr, flush=True)
        if hosts.any or not hosts.allow("localhost"):
            print(f"seriatim: note: {_reach(key)}", file=sys.stderr, flush=True)
        serve(service, hosts, key, place, lambda: print("ready", file=sys.stderr, flush=True))
    return 0


def _reach(key: str | None) -> str:
    if key is None:
        return f"whoever reaches this address may use it: set {KEY}, or keep to 127.0.0.1"
    return "requests and the key go over the network as they are: put a proxy with TLS in front"


def loader(source: str, options: argparse.Namespace) -> Callable[[], System]:
    """What loads a model, in the format that was asked for where it is one of text."""

    def load() -> System:
        from seriatim.systems.language_model import LanguageModel
        from seriatim.verbs.load import load

        system = load(source, options.dtype, None, options.weights)
        if options.compile and isinstance(system, LanguageModel):
            system.model.compile_decoding()
        return system

    return load


def sources_of(sources: Sequence[str], load: Callable[[str], Callable[[], System]]) -> dict[str, Callable[[], System]]:
    """Each model by the end of its path, or all of it where two end alike. Raises ValueError where one is named twice,
    OSError for a path where there is nothing."""
    from seriatim.interop.hub import HUB
    from seriatim.verbs.load import where

    ends = [end_of(source) for source in sources]
    names = [end if ends.count(end) == 1 else source for end, source in zip(ends, sources, strict=True)]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice} is named twice: each model is served once")
    for source in sources:
        if not HUB.fullmatch(source) or Path(source).parent.exists():
            where(source)
    return {name: load(source) for name, source in zip(names, sources, strict=True)}


def end_of(source: str) -> str:
    """What a model is called: `text-base` of zoo:text-base, the folder's name of a path."""
    if source.startswith(("zoo:", "home:")):
        return source.partition(":")[2]
    return Path(source).name or Path(source).resolve().name
