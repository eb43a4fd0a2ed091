"""The server as a program: a socket, uvicorn, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType

import uvicorn

from seriatim.serving.app import create_app
from seriatim.serving.guard import Hosts, bracketed
from seriatim.serving.service import Service

SLACK = 2  # seconds behind the limit of closing, for last events on their way


@dataclass
class Place:
    """A socket, and how it is reached."""

    socket: socket.socket
    url: str


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[Place]:
    """A socket at this address. Raises OSError where it is taken, or none of this machine."""
    plain = host.strip("[]")
    family = socket.AF_INET6 if ":" in plain else socket.AF_INET
    try:
        made = socket.create_server((plain, port), family=family)
    except OSError as error:
        raise type(error)(f"cannot listen at {bracketed(plain)}:{port}: {error.strerror or error}") from None
    with made:
        shown = "localhost" if plain in ("", "0.0.0.0", "::") else bracketed(plain)
        yield Place(made, f"http://{shown}:{made.getsockname()[1]}")


class Server(uvicorn.Server):
    """Told to stop, it takes nothing more, lets what runs end, and tells the rest that it ends here."""

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self.service = service
        self.loop: asyncio.AbstractEventLoop | None = None
        self._last: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        if self.loop is not None:
            self.loop.call_soon_threadsafe(self._close)

    def _close(self) -> None:
        if self._last is None:
            self._last = asyncio.ensure_future(self.service.close())


def serve(service: Service, hosts: Hosts, key: str | None, place: Place, ready: Callable[[], None]) -> None:
    """Answer until a signal comes. ready: called when all models are loaded. Raises what went wrong where one cannot
    be."""

    def failed() -> None:
        server.should_exit = True

    app = create_app(service, hosts, key, failed, ready)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, date_header=False, ws="none", lifespan="on",
        timeout_graceful_shutdown=round(service.limits.closing) + SLACK, h11_max_incomplete_event_size=65_536,
    )  # fmt: skip
    server = Server(config, service)
    server.run(sockets=[place.socket])
    if app.state.error is not None:
        raise app.state.error
