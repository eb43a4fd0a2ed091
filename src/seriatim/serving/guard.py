"""What stands in front of every request: who may ask, from where, how much, how long; and headers on every answer.

A page that somebody visits can make the browser send requests to this machine, and by a name that changes its address
even read the answers (DNS rebinding). So the Host header is held to the names that the server is bound to, a foreign
Origin is refused, and no answer allows other origins to read it.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import socket
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any

from seriatim.serving.limits import Limits, Refused, as_json, full, too_late
from seriatim.serving.metrics import Metrics

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LOG = logging.getLogger("seriatim.serving")
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "x-frame-options": "DENY",
    "cache-control": "no-store",
}
OPEN = ("/", "/page.js", "/page.css", "/health")  # what needs no key: the page asks for it
SLACK = 5.0  # seconds behind the limit of a request, in which it may end by itself


class Hosts:
    """The names by which this server may be called.

    host: what it is bound to; more: other names. A server bound to every address is called by any address in numbers,
    which no page can point elsewhere, and by the machine's own name.
    """

    def __init__(self, host: str, more: Collection[str] = ()):
        plain = host.strip("[]").lower()
        self.any = plain in ("0.0.0.0", "::", "")
        self.names = {bracketed(plain), *(bracketed(name.lower()) for name in more)}
        if self.any or plain == "localhost" or _loopback(plain):
            self.names |= set(LOOPBACK)
        if self.any:
            self.names.add(socket.gethostname().lower())

    def allow(self, header: str) -> bool:
        """Is this Host header one of them?"""
        name = without_port(header.lower())
        return name in self.names or (self.any and _address(name.strip("[]")) is not None)


def bracketed(name: str) -> str:
    """As a Host header writes it: addresses with colons stand in brackets."""
    return f"[{name}]" if ":" in name and not name.startswith("[") else name


def without_port(header: str) -> str:
    if header.startswith("["):
        return header[: header.find("]") + 1]
    return header.partition(":")[0].rstrip(".")


def _address(text: str) -> Any:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def _loopback(text: str) -> bool:
    address = _address(text)
    return address is not None and address.is_loopback


class Guard:
    """The outermost layer of the application. paths: those that are counted by their names."""

    def __init__(
        self, app: App, hosts: Hosts, key: str | None, limits: Limits, metrics: Metrics, paths: Collection[str] = ()
    ):
        self.app, self.hosts, self.limits, self.metrics = app, hosts, limits, metrics
        self.key = None if key is None else key.encode()
        self.open = 0
        self.paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await self._answer(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = Answer(send)
        self.open += 1
        self.metrics.open.set(self.open)
        try:
            try:
                self._check(scope)
                body = await self._body(scope, receive)
                async with asyncio.timeout(self.limits.seconds + SLACK):
                    await self.app(scope, replayed(body, receive), answer)
            except Refused as error:
                await answer.refuse(error)
            except TimeoutError:
                await answer.refuse(too_late(self.limits.seconds))
            except asyncio.CancelledError:
                raise
            except Exception:
                LOG.exception("an error in the server")
                await answer.refuse(Refused(500, "an error in the server", code="internal_error"))
        finally:
            self.open -= 1
            self.metrics.open.set(self.open)
            path = scope["path"] if scope["path"] in self.paths else "other"
            self.metrics.requests.labels(path, str(answer.status or 499)).inc()

    def _check(self, scope: Scope) -> None:
        """Raises Refused for whom nothing is done."""
        headers = scope["headers"]
        hosts = [value for name, value in headers if name == b"host"]
        if len(hosts) != 1 or not self.hosts.allow(hosts[0].decode("latin-1")):
            raise Refused(
                403, "this server is not called by that name: use the one it was started with, or give it more by "
                "--allow-host", code="host_not_allowed",
            )  # fmt: skip
        for name, value in headers:
            if name == b"origin" and not same(value, hosts[0]):
                raise Refused(403, "pages of other sites may not ask here", code="origin_not_allowed")
        if self.open > self.limits.open:
            raise full(f"{self.limits.open} requests are open")
        if self.key is not None and scope["path"] not in OPEN:
            said = next((value for name, value in headers if name == b"authorization"), b"")
            kind, _, key = said.partition(b" ")
            if not (hmac.compare_digest(key.strip(), self.key) and kind.lower() == b"bearer"):
                raise Refused(401, "give the API key: Authorization: Bearer KEY", code="invalid_api_key")

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """All of the body. Raises Refused where it is too long, or does not come."""
        most = self.limits.body
        long = Refused(413, f"the request is longer than {most:,} bytes", code="request_too_large")
        said = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if not said.isdigit() or len(said) > 18 or int(said) > most:
            raise long
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Refused(400, "the request was broken off")
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > most:
                        raise long
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            raise Refused(408, "the request did not come in time", code="timeout") from None


def same(origin: bytes, host: bytes) -> bool:
    """Is a page of this origin one of ours? It came from where the request goes."""
    scheme, _, name = origin.lower().partition(b"://")
    return scheme in (b"http", b"https") and name == host.lower()


def replayed(body: bytes, receive: Receive) -> Receive:
    """The body at once, then whatever comes behind it."""
    told = False

    async def again() -> Message:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


class Answer:
    """What is sent, with the headers that every answer has."""

    def __init__(self, send: Send):
        self.send = send
        self.status: int | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            own = {name.lower() for name, _ in message.get("headers", ())}
            more = [(k.encode(), v.encode()) for k, v in HEADERS.items() if k.encode() not in own]
            message = {**message, "headers": [*message.get("headers", ()), *more]}
        await self.send(message)

    async def refuse(self, error: Refused) -> None:
        """Say so, where nothing was said yet; else what was begun is broken off."""
        if self.status is not None:
            return
        body = as_json(error.body)
        headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
        if error.status in (401, 403, 408, 413):
            headers["connection"] = "close"  # what is left of the body is not read
        if error.status == 401:
            headers["www-authenticate"] = "Bearer"
        pairs = [(k.lower().encode(), v.encode()) for k, v in headers.items()]
        await self({"type": "http.response.start", "status": error.status, "headers": pairs})
        await self.send({"type": "http.response.body", "body": body})
