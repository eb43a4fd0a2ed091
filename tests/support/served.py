"""A server in the same process, with the official client in front of it."""

from __future__ import annotations

import contextlib
import functools
import signal
import threading
import time

import httpx
import openai
import uvicorn

from seriatim.serving.app import create_app
from seriatim.serving.guard import Hosts
from seriatim.serving.limits import Limits
from seriatim.serving.server import Server, listening
from seriatim.serving.service import Service
from seriatim.verbs.load import load
from support.plain_engine import PlainEngine

loaded = functools.cache(load)
URL = "http://localhost:8000"


class Served:
    """The service, the application, a plain client (`http`) and OpenAI's (`client`)."""

    def __init__(self, service, app, http, client):
        self.service, self.app, self.http, self.client = service, app, http, client

    def engine(self, name="text-draft"):
        return self.service.models[name].engine


def service_of(systems=None, make=PlainEngine, decoders=("ancestral", "prompt-lookup"), limits=None, **more):
    """Models by their names, text-draft of the zoo where none is given. more: settings of the engine."""
    systems = systems or {"text-draft": loaded("zoo:text-draft")}
    sources = {name: functools.partial(lambda s: s, system) for name, system in systems.items()}
    return Service(
        sources, lambda *given: make(*given, **more), decoders=decoders, limits=limits or Limits(closing=0.2)
    )


@contextlib.asynccontextmanager
async def served(systems=None, key=None, hosts=None, opened=True, **more):
    """Open, until the end."""
    service = service_of(systems, **more)
    app = create_app(service, hosts or Hosts("127.0.0.1"), key)
    if opened:
        await service.open()
    transport = httpx.ASGITransport(app, raise_app_exceptions=True)
    async with httpx.AsyncClient(transport=transport, base_url=URL) as http:
        client = openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key=key or "none", http_client=http, max_retries=0)
        try:
            yield Served(service, app, http, client)
        finally:
            await service.close()


@contextlib.contextmanager
def running(**more):
    """A server on a socket, in a thread: where, and the server."""
    service = service_of(**more)
    with listening("127.0.0.1", 0) as place:
        config = uvicorn.Config(create_app(service, Hosts("127.0.0.1")), log_level="warning", lifespan="on", ws="none")
        server = Server(config, service)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [place.socket]})
        thread.start()
        try:
            until(lambda: httpx.get(f"{place.url}/health").status_code == 200)
            yield place.url, server
        finally:
            server.handle_exit(signal.SIGTERM, None)
            server._captured_signals.clear()
            thread.join(10)
            assert not thread.is_alive()


def until(true, seconds=30):
    for _ in range(seconds * 20):
        with contextlib.suppress(httpx.TransportError):
            if true():
                return
        time.sleep(0.05)
    raise AssertionError("it did not come")
