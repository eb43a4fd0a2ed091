"""Pictures over OpenAI's interface."""

from __future__ import annotations

import asyncio
import base64
import io
import threading
import time

import openai
import pytest
import torch
from PIL import Image

from seriatim.serving.limits import Limits
from seriatim.serving.openai import ImageRequest
from seriatim.serving.pictures import FRAMES, Gone, Watching, png
from seriatim.systems.image_system import Pictures
from support.served import loaded, served

pytestmark = pytest.mark.anyio
IMAGES = "/v1/images/generations"


@pytest.fixture
def anyio_backend():
    return "asyncio"


def systems():
    return {"var": loaded("zoo:var"), "text-draft": loaded("zoo:text-draft")}


def pixels(encoded):
    return Image.open(io.BytesIO(base64.b64decode(encoded)))


async def test_pictures_are_those_that_are_drawn_offline():
    system = loaded("zoo:var")
    async with served(systems()) as s:
        named = await s.client.images.generate(model="var", prompt="M", n=2, extra_body={"seed": 4})
        numbered = await s.client.images.generate(model="var", prompt="12", n=2, extra_body={"seed": 4}, size="auto")
        listed = await s.client.models.retrieve("var")
    alone = system.draw(torch.tensor([12, 12]), None, system.sampling, 4)
    assert [d.b64_json for d in named.data] == [base64.b64encode(png(i, True)).decode() for i in alone.images]
    assert [d.b64_json for d in numbered.data] == [d.b64_json for d in named.data]
    assert pixels(named.data[0].b64_json).size == (32, 32) and named.size == "32x32"
    assert listed.seriatim["kind"] == "image" and listed.seriatim["classes"][2] == "C"


async def test_a_digit_that_is_a_name_is_no_number():
    async with served(systems()) as s:
        named = s.service.image("var")._label("0")
    assert loaded("zoo:var").classes[named] == "0" and named != 0


async def test_a_stream_shows_how_a_picture_was_drawn():
    async with served(systems()) as s:
        ask = {"model": "var", "prompt": "A", "extra_body": {"seed": 1}}
        events = [e async for e in await s.client.images.generate(**ask, stream=True)]
        whole = await s.client.images.generate(**ask)
        raw = await s.http.post(IMAGES, json={"model": "var", "prompt": "A", "stream": True})
    assert [e.type.rpartition(".")[2] for e in events] == ["partial_image"] * 6 + ["completed"]
    assert [e.partial_image_index for e in events[:-1]] == list(range(6))
    assert events[-1].b64_json == events[-2].b64_json == whole.data[0].b64_json
    assert len({e.b64_json for e in events}) == 6 and raw.text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"prompt": "cat"}, "prompt", "there are A, B"), ({"prompt": ""}, "prompt", "class"),
        ({"prompt": "62"}, "prompt", "class"), ({"prompt": "9" * 50}, "prompt", "class"), ({"n": 9}, "n", "at most 8"),
        ({"n": 2, "stream": True}, "n", "one is streamed"),
        ({"steps": 257}, "steps", "256"), ({"steps": 0}, "steps", "1"),
        ({"size": "9999x9999"}, "size", "up to 512"), ({"size": "huge"}, "size", "48x32"),
        ({"size": "64x64"}, None, "size"),
        ({"response_format": "url"}, "response_format", "b64_json"), ({"temperature": 9}, "temperature", "2"),
        ({"guidance": 1e9}, "guidance", "100"), ({"seed": 2**70}, "seed", "less than"),
        ({"model": "text-draft"}, "model", "writes text"), ({"prompt": 3}, "prompt", "string"),
    ],
)  # fmt: skip
async def test_what_cannot_be_drawn_is_said(change, param, message):
    async with served(systems()) as s:
        answer = await s.http.post(IMAGES, json={"model": "var", "prompt": "A", **change})
    said = answer.json()["error"]
    assert answer.status_code == 400 and said["param"] == param and message in said["message"], said


async def test_requests_for_pictures_wait_and_are_refused_where_too_many_do(monkeypatch):
    held, drawn = threading.Event(), []
    system = loaded("zoo:var")
    monkeypatch.setattr(system, "draw", lambda *given: (drawn.append(1), held.wait(10), 1 / 0)[2], raising=False)
    async with served(systems(), limits=Limits(picture_queue=1, seconds=5, closing=0.1)) as s:
        ask = {"model": "var", "prompt": "A"}
        first, second = (asyncio.create_task(s.http.post(IMAGES, json=ask)) for _ in range(2))
        await asyncio.sleep(0.1)
        with pytest.raises(openai.RateLimitError):
            await s.client.images.generate(**ask)
        second.cancel()  # whoever waits goes away, and is not drawn for
        await asyncio.sleep(0.1)
        held.set()
        answer = await first
        assert answer.status_code == 500 and "division" not in answer.text and len(drawn) == 1
        assert s.service.easel.waiting == 0


async def test_who_waits_for_pictures_is_told_when_the_server_closes(monkeypatch):
    held = threading.Event()
    monkeypatch.setattr(loaded("zoo:var"), "draw", lambda *given: held.wait(10), raising=False)
    async with served(systems(), limits=Limits(closing=0.1)) as s:
        waiting = [asyncio.create_task(s.http.post(IMAGES, json={"model": "var", "prompt": "A"})) for _ in range(3)]
        await asyncio.sleep(0.1)
        await s.service.close()
        for answer in await asyncio.gather(*waiting):
            assert answer.status_code == 503 and answer.json()["error"]["code"] == "shutting_down"
        assert not s.service.easel.held
        held.set()


class Slow:
    """A drawing that shows `steps` frames, each when it is told to go on."""

    def __init__(self, steps):
        self.steps, self.told, self.go = steps, 0, threading.Semaphore(0)
        self.ended = threading.Event()

    def __call__(self, labels, n, sampling, seed, watch):
        try:
            for step in range(self.steps):
                assert self.go.acquire(timeout=10)
                watch(lambda s=step: torch.full((n, 1, 32, 32), s / self.steps), f"forward {step + 1}")
                self.told += 1
            return Pictures(torch.zeros(n, 1, 32, 32), labels, forwards=self.steps)
        finally:
            self.ended.set()


@pytest.fixture
def slow(monkeypatch):
    drawing = Slow(4)
    monkeypatch.setattr(loaded("zoo:var"), "draw", drawing, raising=False)
    return drawing


async def test_a_stream_shows_a_picture_while_it_is_drawn(slow):
    async with served(systems()) as s:
        model, slow.told = s.service.image("var"), 0
        events = model.events(ImageRequest(model="var", prompt="A", stream=True))
        for step in range(4):
            slow.go.release()
            said = await asyncio.wait_for(anext(events), 5)
            assert said["partial_image_index"] == step and said["caption"] == f"forward {step + 1}"
            assert slow.told <= step + 1 and not (step < 3 and slow.ended.is_set())  # the rest is not drawn yet
        assert (await anext(events))["type"].endswith("completed")


async def test_a_picture_that_nobody_waits_for_is_not_finished(slow):
    async with served(systems()) as s:
        events = s.service.image("var").events(ImageRequest(model="var", prompt="A", stream=True))
        slow.go.release()
        await anext(events)
        closing = asyncio.create_task(events.aclose())
        await asyncio.sleep(0.05)
        slow.go.release()
        assert await asyncio.to_thread(slow.ended.wait, 5) and slow.told == 1
        await closing
        assert s.service.easel.waiting == 0
        whole = asyncio.create_task(s.http.post(IMAGES, json={"model": "var", "prompt": "A"}))
        await asyncio.sleep(0.05)
        slow.ended.clear()
        await s.service.close()
        slow.go.release()
        assert await asyncio.to_thread(slow.ended.wait, 5) and slow.told == 1
        assert (await whole).status_code == 503


def test_frames_behind_the_first_ones_take_half_of_the_time_at_most():
    told, watching = [], Watching(lambda frame, caption: told.append(caption))

    def frame():
        time.sleep(0.05)
        return torch.zeros(())

    for step in range(FRAMES):
        watching(frame, str(step))
    assert len(told) == FRAMES and watching.next - time.perf_counter() > 0.03  # as long as the last one took
    watching(frame, "too soon")
    assert len(told) == FRAMES
    time.sleep(0.1)
    watching(frame, "now")
    assert told[-1] == "now"
    watching.gone.set()
    with pytest.raises(Gone):
        watching(frame, "nobody")


async def test_text_goes_on_while_pictures_are_drawn():
    async with served(systems()) as s:
        picture = asyncio.create_task(s.http.post(IMAGES, json={"model": "var", "prompt": "A", "n": 8}))
        made = await s.client.completions.create(model="text-draft", prompt="x", max_tokens=3)
        assert made.usage.completion_tokens == 3 and (await picture).status_code == 200
