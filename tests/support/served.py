"""A server in the same process, with the official client in front of it."""

from __future__ import annotations

import contextlib
import functools

import httpx
import openai

from seriatim.serving.app import create_app
from seriatim.serving.guard import Hosts
from seriatim.serving.limits import Limits
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
