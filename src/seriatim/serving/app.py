"""The application: paths of OpenAI's interface, health, metrics and a page, over the models of a `Service`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from importlib import resources
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import Request as Call
from starlette.responses import Response, StreamingResponse

import seriatim
from seriatim.serving.forms import Chat, Completion, Form
from seriatim.serving.guard import Guard, Hosts
from seriatim.serving.limits import Refused, as_json
from seriatim.serving.openai import ChatRequest, CompletionRequest, ImageRequest
from seriatim.serving.service import Service
from seriatim.serving.texts import Choice, Job, Scored

LOG = logging.getLogger("seriatim.serving")
PAGE = {
    "/": ("index.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}
DONE = b"data: [DONE]\n\n"


def create_app(
    service: Service, hosts: Hosts, key: str | None = None, failed: Callable[[], None] | None = None,
    ready: Callable[[], None] | None = None,
) -> FastAPI:  # fmt: skip
    """The application. hosts: the names it may be called by; key: what a client must show (None: nothing); ready:
    called when all models are loaded; failed: where one cannot be, after which `app.state.error` says why."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        opening = asyncio.create_task(_opened(app, service, failed, ready))
        yield
        opening.cancel()
        await service.close()

    app = FastAPI(
        title="Seriatim", version=seriatim.__version__, docs_url=None, redoc_url=None, lifespan=lifespan,
        description="Autoregressive generation behind OpenAI's interface.",
    )  # fmt: skip
    app.state.error = None
    _errors(app)
    _texts(app, service)
    _pictures(app, service)
    _rest(app, service)
    paths = frozenset({str(getattr(route, "path", "")) for route in app.routes} - {"/v1/models/{name:path}"})
    settings: dict[str, Any] = {"limits": service.limits, "metrics": service.metrics, "paths": paths}
    app.add_middleware(Guard, hosts=hosts, key=key, **settings)  # type: ignore[arg-type]
    return app


async def _opened(
    app: FastAPI, service: Service, failed: Callable[[], None] | None, ready: Callable[[], None] | None
) -> None:
    try:
        await service.open()
        if ready is not None:
            ready()
    except Exception as error:
        app.state.error = error
        if failed is None:
            LOG.exception("a model cannot be loaded")
        else:
            failed()


# ---- text ------------------------------------------------------------------------------------------------------------


def _texts(app: FastAPI, service: Service) -> None:
    @app.post("/v1/completions", summary="Continue a text")
    async def completions(asked: CompletionRequest, call: Call) -> Response:
        return await _written(call, Completion(asked, service.text(asked.model), service.limits, service.pool))

    @app.post("/v1/chat/completions", summary="Answer a conversation")
    async def chat(asked: ChatRequest, call: Call) -> Response:
        return await _written(call, Chat(asked, service.text(asked.model), service.limits, service.pool))


async def _written(call: Call, form: Form) -> Response:
    job = form.model.job()
    if not form.asked.stream:
        with job:
            return told(await unless_gone(call, _whole(form, job)))
    try:
        await form.begin(job)
    except BaseException:
        job.cancel()
        raise
    return Events(_events(form, job), job.cancel)


async def _whole(form: Form, job: Job) -> dict[str, Any]:
    """All texts, when the last has ended."""
    await form.begin(job)
    texts: dict[int, list[str]] = {choice.index: [] for choice in job.choices}
    scored: dict[int, list[Scored]] = {choice.index: [] for choice in job.choices}
    async for choice, delta in job:
        texts[choice.index].append(delta.text)
        scored[choice.index] += delta.scored
    each: list[tuple[Choice, str, list[Scored]]] = [(c, "".join(texts[c.index]), scored[c.index]) for c in job.choices]
    return form.whole(each, job)


async def _events(form: Form, job: Job) -> AsyncIterator[bytes]:
    """Texts as they come. What goes wrong on the way is the last event but one."""
    try:
        for choice in job.choices:
            if (first := form.first(choice)) is not None:
                yield event(first)
        async for choice, delta in job:
            if delta.text or delta.scored or delta.finish is not None:
                yield event(form.chunk(choice, delta))
        if (last := form.last(job)) is not None:
            yield event(last)
    except Refused as error:
        yield event(error.body)
    yield DONE


# ---- pictures --------------------------------------------------------------------------------------------------------


def _pictures(app: FastAPI, service: Service) -> None:
    @app.post("/v1/images/generations", summary="Draw pictures of a class")
    async def images(asked: ImageRequest, call: Call) -> Response:
        model = service.image(asked.model)
        if not asked.stream:
            return told(model.whole(await unless_gone(call, model.draw(asked))))
        film = model.events(asked)
        try:
            first = await unless_gone(call, anext(film))  # what cannot be drawn has a status of its own
        except BaseException:
            await film.aclose()
            raise
        return Events(_film(first, film))


async def _film(first: dict[str, Any], rest: AsyncGenerator[dict[str, Any]]) -> AsyncIterator[bytes]:
    """A picture as it is drawn. What goes wrong on the way is the last event but one."""
    async with contextlib.aclosing(rest):
        yield event(first, first["type"])
        try:
            async for said in rest:
                yield event(said, said["type"])
        except Refused as error:
            yield event(error.body)
        yield DONE


# ---- the rest --------------------------------------------------------------------------------------------------------


def _rest(app: FastAPI, service: Service) -> None:
    def about(name: str) -> dict[str, Any]:
        said = {"id": name, "object": "model", "created": service.created, "owned_by": "seriatim"}
        return {**said, "seriatim": service.model(name).about}

    @app.get("/v1/models", summary="The models that are served")
    async def models() -> Response:
        service.awake()
        return told({"object": "list", "data": [about(name) for name in service.models]})

    @app.get("/v1/models/{name:path}", summary="One of them")
    async def model(name: str) -> Response:
        service.model(name)
        return told(about(name))

    @app.get("/health", summary="Whether all models are ready")
    async def health() -> Response:
        return told({"status": service.state}, 200 if service.state == "ready" else 503)

    @app.get("/metrics", summary="Figures in Prometheus' format")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    for path, (file, kind) in PAGE.items():
        content = resources.files("seriatim.serving").joinpath("page", file).read_bytes()
        app.add_api_route(path, _file(content, kind), methods=["GET"], include_in_schema=False)


def _file(content: bytes, kind: str) -> Callable[[], Coroutine[Any, Any, Response]]:
    async def answer() -> Response:
        return Response(content, media_type=kind)

    return answer


# ---- answers ---------------------------------------------------------------------------------------------------------


def told(said: dict[str, Any], status: int = 200) -> Response:
    return Response(as_json(said), status, media_type="application/json")


def event(said: dict[str, Any], name: str | None = None) -> bytes:
    """An event that a server sends."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + as_json(said) + b"\n\n"


class Events(StreamingResponse):
    """A stream of events; `done` is called at its end, whoever ended it, and even if it never began."""

    def __init__(self, events: AsyncIterator[bytes], done: Callable[[], None] | None = None):
        super().__init__(events, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})
        self.done = done

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            if self.done is not None:
                self.done()


async def unless_gone(call: Call, work: Coroutine[Any, Any, Any]) -> Any:
    """What work gives, which is cancelled where the client goes away. Raises Refused then, for nobody to read."""

    async def gone() -> None:
        while (await call.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise Refused(499, "the client went away")
    finally:
        leaving.cancel()
        if not working.done():
            working.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await working


# ---- errors ----------------------------------------------------------------------------------------------------------


def _errors(app: FastAPI) -> None:
    """All in one shape."""

    @app.exception_handler(Refused)
    async def refused(call: Call, error: Refused) -> Response:
        return Response(as_json(error.body), error.status, error.headers, "application/json")

    @app.exception_handler(RequestValidationError)
    async def invalid(call: Call, error: RequestValidationError) -> Response:
        return await refused(call, understood(error.errors()))

    @app.exception_handler(HTTPException)
    async def other(call: Call, error: HTTPException) -> Response:
        said = {404: "there is nothing here", 405: "this is not asked in that way", 400: "the body is no JSON"}
        message = said.get(error.status_code, str(error.detail))
        answer = await refused(call, Refused(error.status_code, message))
        answer.headers.update(dict(error.headers or {}))
        return answer


def understood(errors: Sequence[Any]) -> Refused:
    """The first thing that is wrong with a request, in words."""
    first = errors[0] if errors else {}
    where = [str(x) for x in first.get("loc", ())][1:]
    if first.get("type") == "json_invalid":
        return Refused(400, f"the body is no JSON: {first.get('ctx', {}).get('error', '')}")
    if not where:
        return Refused(400, "the body is a JSON object, sent with Content-Type: application/json")
    said = str(first.get("msg", "")).removeprefix("Value error, ")
    return Refused(400, f"{'.'.join(where)[:200]}: {said[:500]}", param=where[0][:100])
