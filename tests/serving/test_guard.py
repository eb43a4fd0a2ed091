"""Who may ask, how much and how long; every refusal in the shape of OpenAI's errors, never a traceback."""

from __future__ import annotations

import asyncio
import json

import openai
import pytest

from seriatim.serving.engine import Engine
from seriatim.serving.guard import Hosts
from seriatim.serving.limits import Limits, Refused
from support.plain_engine import PlainEngine
from support.served import URL, loaded, served

pytestmark = pytest.mark.anyio
MODEL = "text-draft"
ASK = {"model": MODEL, "prompt": "x", "max_tokens": 4}
COMPLETIONS, CHAT, IMAGES = "/v1/completions", "/v1/chat/completions", "/v1/images/generations"


@pytest.fixture
def anyio_backend():
    return "asyncio"


def error_of(answer, status=None):
    """The error of an answer, which has OpenAI's shape."""
    assert answer.headers["content-type"] == "application/json"
    said = answer.json()["error"]
    assert said.keys() == {"message", "type", "param", "code"} and said["message"]
    assert "Traceback" not in answer.text and 'File "' not in answer.text
    assert status is None or answer.status_code == status, answer.text
    return said


# ---- what is asked ---------------------------------------------------------------------------------------------------

BODIES = [
    b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe{}", b'{"model": "\xff"}', b"[" * 100_000, b'{"a":' * 50_000,
    b'{"model": "text-draft", "prompt": "\\ud800"}', b'{"model": "text-draft", "prompt": 1e999}',
    b'{"model": "text-draft", "prompt": [' + b"9" * 5000 + b"]}",
    b'{"model": "text-draft", "prompt": "x", "seed": ' + b"9" * 400 + b"}",
    b'{"model": "text-draft", "prompt": "x", "temperature": NaN}',
    b'{"model": "text-draft", "prompt": "x", "temperature": -Infinity}',
    b'{"model": "text-draft", "prompt": "x", "temperature": 1e400}',
]  # fmt: skip


@pytest.mark.parametrize("body", BODIES, ids=range(len(BODIES)))
async def test_bodies_that_are_no_requests(body):
    async with served() as s:
        for path in (COMPLETIONS, CHAT, IMAGES):
            answer = await s.http.post(path, content=body, headers={"content-type": "application/json"})
            assert error_of(answer)["type"] == "invalid_request_error" and answer.status_code in (400, 404)


FIELDS = [
    ({"model": None}, "model"), ({"model": 3}, "model"), ({"prompt": None}, "prompt"), ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"), ({"prompt": ""}, "prompt"), ({"prompt": [1.5]}, "prompt"),
    ({"prompt": [-1]}, "prompt"), ({"prompt": [True]}, "prompt"), ({"prompt": ["x", 3]}, "prompt"),
    ({"prompt": ["x"] * 33}, "prompt"), ({"prompt": [1.5] * 100_000}, "prompt"), ({"n": 0}, "n"), ({"n": 33}, "n"),
    ({"n": 10**30}, "n"), ({"n": 1.5}, "n"), ({"n": True}, "n"), ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"), ({"max_tokens": 5000}, "max_tokens"), ({"max_tokens": "7"}, "max_tokens"),
    ({"max_tokens": 2**31}, "max_tokens"), ({"temperature": 2.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"), ({"temperature": True}, "temperature"), ({"top_p": 0}, "top_p"),
    ({"top_p": 1.01}, "top_p"), ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"), ({"stop": ""}, "stop"), ({"stop": ["a"] * 5}, "stop"),
    ({"stop": [3]}, "stop"), ({"stop": "x" * 300}, "stop"), ({"logprobs": 21}, "logprobs"),
    ({"logprobs": -1}, "logprobs"), ({"seed": 2**63}, "seed"), ({"seed": 0.5}, "seed"),
    ({"decoder": "beam"}, "decoder"), ({"decoder": 3}, "decoder"), ({"decoder": "spec-sampling:/etc"}, "decoder"),
    ({"stream": "yes"}, "stream"), ({"stream_options": 3}, "stream_options"),
    ({"response_format": "json"}, "response_format"), ({"logit_bias": {"3": 1}}, "logit_bias"),
    ({"echo": True}, "echo"), ({"suffix": "x"}, "suffix"), ({"best_of": 2}, "best_of"), ({"prompt": [4096]}, None),
    ({"prompt": [2**31 - 1]}, None),
]  # fmt: skip


async def test_fields_that_cannot_be_are_named():
    async with served() as s:
        for change, param in FIELDS:
            error = error_of(await s.http.post(COMPLETIONS, json={**ASK, **change}), 400)
            assert error["param"] == param, (change, error)
        assert not s.engine().requests and not s.service.models[MODEL].waiting
        assert (await s.http.post(COMPLETIONS, json={**ASK, "seed": -(2**63), "user": 3, "x": {}})).status_code == 200


async def test_paths_and_methods_that_are_not_there():
    async with served() as s:
        error_of(await s.http.get("/v1/nosuch"), 404)
        error_of(await s.http.get(COMPLETIONS), 405)
        error_of(await s.http.get("/page.js/../../../etc/passwd"), 404)
        error_of(await s.http.get("/v1/models/..%2f..%2fetc"), 404)
        error_of(await s.http.post(COMPLETIONS, content=json.dumps(ASK), headers={"content-type": "text/plain"}), 400)
        error_of(await s.http.post(COMPLETIONS, content=json.dumps(ASK)), 400)
        assert error_of(await s.http.post(IMAGES, json=ASK), 400)["param"] == "model"
        counted = (await s.http.get("/metrics")).text
    assert 'path="/v1/completions",status="405"' in counted and "nosuch" not in counted and "etc" not in counted


async def test_a_prompt_that_is_too_long_says_how_long_it_may_be():
    async with served(limits=Limits(max_tokens=2000, closing=0.1)) as s:
        error = error_of(await s.http.post(COMPLETIONS, json={**ASK, "prompt": "def x():\n" * 2000}), 400)
        room = error_of(await s.http.post(COMPLETIONS, json={**ASK, "max_tokens": 1500}), 400)
    assert error["code"] == room["code"] == "context_length_exceeded" and "1,024 in all" in error["message"]


async def test_long_bodies_are_refused_before_they_are_read():
    read = 0

    async def endless():
        nonlocal read
        while True:
            read += 1000
            yield b"x" * 1000

    async with served(limits=Limits(body=10_000, closing=0.1)) as s:
        error_of(await s.http.post(COMPLETIONS, json={**ASK, "prompt": "x" * 10_000}), 413)
        error_of(await s.http.post(COMPLETIONS, content=endless()), 413)
    assert read < 20_000


async def test_a_body_that_does_not_come_is_given_up():
    async def slow():
        yield b"{"
        await asyncio.sleep(5)
        yield b"}"

    async with served(limits=Limits(body_seconds=0.05, closing=0.1)) as s:
        error_of(await s.http.post(COMPLETIONS, content=slow()), 408)


# ---- how much and how long -------------------------------------------------------------------------------------------


async def test_a_full_queue_says_when_to_come_again():
    async with served(queue=1, pace=0.05) as s:
        held = [asyncio.create_task(s.http.post(COMPLETIONS, json={**ASK, "max_tokens": 12})) for _ in range(4)]
        answers = await asyncio.gather(*held)
        with pytest.raises(openai.RateLimitError):
            await s.client.completions.create(**{**ASK, "max_tokens": 12}, n=4)
        assert {a.status_code for a in answers} == {200, 429}
        full = next(a for a in answers if a.status_code == 429)
        assert int(full.headers["retry-after"]) >= 1 and error_of(full)["type"] == "rate_limit_error"
        await asyncio.sleep(0.3)
        assert not s.service.models[MODEL].waiting, "copies that were queued before it was full are taken back"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_takes_too_long_ends(stream):
    async with served(limits=Limits(seconds=0.5, closing=0.1), pace=0.1) as s:
        answer = await s.http.post(COMPLETIONS, json={**ASK, "max_tokens": 30, "stream": stream})
        if stream:
            events = answer.text.split("\n\n")
            assert json.loads(events[-3].removeprefix("data: "))["error"]["code"] == "timeout"
            assert events[-2] == "data: [DONE]" and len(events) > 3
        else:
            assert error_of(answer, 504)["code"] == "timeout"
        assert not s.service.models[MODEL].waiting and s.engine().gone


async def test_so_many_requests_at_once():
    async with served(limits=Limits(open=2, closing=0.1), pace=0.05) as s:
        answers = await asyncio.gather(*(s.http.post(COMPLETIONS, json=ASK) for _ in range(4)))
    assert sorted(a.status_code for a in answers) == [200, 200, 429, 429]


class Visitor:
    """A client that goes away behind so many messages of the answer."""

    def __init__(self, app, body, messages):
        self.app, self.body, self.left, self.gone = app, json.dumps(body).encode(), messages, asyncio.Event()
        self.got = []

    async def visit(self):
        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST",
            "path": COMPLETIONS, "raw_path": COMPLETIONS.encode(), "query_string": b"", "headers": headers,
            "scheme": "http", "server": ("localhost", 8000), "client": ("127.0.0.1", 1),
        }  # fmt: skip
        await self.app(scope, self._receive, self._send)

    async def _receive(self):
        if self.body is not None:
            body, self.body = self.body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message):
        self.got.append(message)
        self.left -= 1
        if self.left == 0:
            self.gone.set()


@pytest.mark.parametrize("make", [PlainEngine, Engine])
async def test_a_client_that_goes_away_frees_its_place_at_once(make):
    more = {"pace": 0.01} if make is PlainEngine else {}
    async with served(make=make, **more) as s:
        before = s.engine().figures()["cancelled"]
        ask = {**ASK, "max_tokens": 400, "seed": 1}
        quitter = Visitor(s.app, {**ask, "max_tokens": 200, "stream": True, "n": 2}, 3)
        await asyncio.wait_for(quitter.visit(), 10)
        assert not s.service.models[MODEL].waiting
        silent = Visitor(s.app, ask, -1)
        asyncio.get_running_loop().call_later(0.1, silent.gone.set)
        await asyncio.wait_for(silent.visit(), 10)
        assert not s.service.models[MODEL].waiting
        for _ in range(300):
            if s.engine().figures()["cancelled"] == before + 3:
                break
            await asyncio.sleep(0.02)
        assert s.engine().figures()["cancelled"] == before + 3 and s.engine().figures()["running"] == 0


async def test_a_model_that_fails_says_no_more_than_that():
    async with served() as s:
        s.engine()._write = lambda *_: (_ for _ in ()).throw(RuntimeError("secret of the house"))
        error = error_of(await s.http.post(COMPLETIONS, json=ASK), 500)
        stream = await s.http.post(COMPLETIONS, json={**ASK, "stream": True})
    assert error["code"] == "model_failed" and "secret" not in error["message"]
    assert stream.status_code == 200 and "model_failed" in stream.text and "secret" not in stream.text


async def test_an_error_of_the_server_is_no_traceback(monkeypatch):
    async with served() as s:
        monkeypatch.setattr(s.service, "text", lambda name: 1 / 0)
        error = error_of(await s.http.post(COMPLETIONS, json=ASK), 500)
    assert error["type"] == "server_error" and "division" not in error["message"]


# ---- who asks --------------------------------------------------------------------------------------------------------


async def test_the_host_must_be_a_name_of_this_server():
    async with served() as s:
        for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "", "10.0.0.1", "[::2]"):
            for path in ("/", "/health", "/v1/models"):
                assert error_of(await s.http.get(path, headers={"host": host}), 403)["code"] == "host_not_allowed"
        for host in ("localhost", "LOCALHOST:8000", "127.0.0.1:9", "[::1]:8000"):
            assert (await s.http.get("/health", headers={"host": host})).status_code == 200


@pytest.mark.parametrize(
    ("host", "more", "yes", "no"),
    [
        ("0.0.0.0", (), ("10.1.2.3:8000", "[fe80::1]", "localhost"), ("evil.example", "10.1.2.3.evil.example")),
        ("192.168.0.7", (), ("192.168.0.7",), ("localhost", "127.0.0.1", "192.168.0.8")),
        ("::1", ("Models.lan",), ("models.lan:80", "[::1]", "localhost"), ("lan", "models.lan.evil.example")),
    ],
)
def test_names_follow_from_what_the_server_is_bound_to(host, more, yes, no):
    hosts = Hosts(host, more)
    assert all(map(hosts.allow, yes)) and not any(map(hosts.allow, no))


async def test_pages_of_other_sites_may_not_ask():
    async with served() as s:
        for origin in ("http://evil.example", "null", "file://", "http://localhost:3000", "http://127.0.0.1:8000"):
            answer = await s.http.post(COMPLETIONS, json=ASK, headers={"origin": origin})
            assert error_of(answer, 403)["code"] == "origin_not_allowed"
            assert not [name for name in answer.headers if name.startswith("access-control")]
        assert (await s.http.post(COMPLETIONS, json=ASK, headers={"origin": URL})).status_code == 200
        asked = {"origin": "http://evil.example", "access-control-request-method": "POST"}
        assert (await s.http.options(COMPLETIONS, headers=asked)).status_code == 403


async def test_every_answer_has_the_headers_of_a_careful_server():
    async with served(key="k") as s:
        answers = [await s.http.get(path) for path in ("/", "/page.js", "/health", "/nosuch", "/v1/models")]
        answers.append(await s.http.post(COMPLETIONS, content=b"{"))
    for answer in answers:
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "unsafe" not in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in answer.headers


async def test_a_key_is_asked_for_where_there_is_one():
    async with served(key="schlüssel") as s:
        for said in ({}, {"authorization": "Bearer wrong"}, {"authorization": "schlüssel".encode()}):
            answer = await s.http.get("/v1/models", headers=said)
            assert error_of(answer, 401)["code"] == "invalid_api_key"
        for path in ("/metrics", "/openapi.json", "/v1/models", COMPLETIONS, "/v1/nosuch"):
            error_of(await s.http.get(path), 401)
        for path in ("/", "/page.js", "/page.css", "/health"):
            assert (await s.http.get(path)).status_code == 200
        right = {"authorization": "Bearer schlüssel".encode()}
        assert (await s.http.get("/v1/models", headers=right)).status_code == 200
    async with served(key="plain") as s:
        assert (await s.client.completions.create(**ASK)).choices
        with pytest.raises(openai.AuthenticationError):
            await s.client.with_options(api_key="else").completions.create(**ASK)


# ---- when ------------------------------------------------------------------------------------------------------------


async def test_a_server_says_when_it_is_ready_and_when_it_closes():
    async with served(opened=False) as s:
        loading = await s.http.get("/health")
        assert loading.status_code == 503 and loading.json() == {"status": "loading"}
        assert error_of(await s.http.post(COMPLETIONS, json=ASK), 503)["code"] == "loading"
        await s.service.open()
        assert (await s.http.get("/health")).json() == {"status": "ready"}
        await s.service.close()
        assert (await s.http.get("/health")).json() == {"status": "closing"}
        answer = await s.http.post(COMPLETIONS, json=ASK)
        assert error_of(answer, 503)["code"] == "shutting_down" and answer.headers["retry-after"]


@pytest.mark.parametrize("make", [PlainEngine, Engine])
async def test_streams_get_an_end_when_the_server_closes(make):
    more = {"pace": 0.02} if make is PlainEngine else {}
    async with served(make=make, **more) as s:
        ask = {**ASK, "max_tokens": 1000, "stream": True}
        running = [asyncio.create_task(s.http.post(COMPLETIONS, json=ask)) for _ in range(3)]
        await asyncio.sleep(0.15)
        await s.service.close(0.05)
        for answer in await asyncio.wait_for(asyncio.gather(*running), 10):
            assert answer.text.endswith("data: [DONE]\n\n")
            assert "shutting_down" in answer.text or answer.status_code == 503


async def test_systems_that_cannot_be_served_are_refused():
    async with served({"pixels": loaded("zoo:image-vq")}, opened=False) as s:
        with pytest.raises(ValueError, match="cannot be served yet"):
            await s.service.open()


def test_errors_have_the_words_that_programs_look_for():
    assert Refused(429, "x").kind == "rate_limit_error" and Refused(404, "x").kind == "invalid_request_error"
    assert Refused(503, "x").kind == "server_error" and Refused(401, "x").body["error"]["param"] is None
