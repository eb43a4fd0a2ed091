"""Completions as OpenAI's client asks for them: what comes is what the same model writes offline."""

from __future__ import annotations

import asyncio
import json

import openai
import pytest

from seriatim.serving.engine import Engine
from support.plain_engine import PlainEngine
from support.served import loaded, served

pytestmark = pytest.mark.anyio
PROMPT = "def read(path):\n    with open("
MODEL = "text-draft"


@pytest.fixture
def anyio_backend():
    return "asyncio"


def offline(prompt=PROMPT, **settings):
    said = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 20, "seed": 5, **settings}
    return loaded("zoo:text-draft").generate(prompt, **said)


ASK = {"model": MODEL, "prompt": PROMPT, "max_tokens": 20, "seed": 5, "temperature": 1.0, "top_p": 1.0}


async def streamed(s, **settings):
    """All chunks of a stream."""
    return [chunk async for chunk in await s.client.completions.create(**{**ASK, **settings}, stream=True)]


@pytest.mark.parametrize("make", [PlainEngine, Engine])
async def test_a_text_is_what_is_written_offline(make):
    async with served(make=make) as s:
        made = await s.client.completions.create(**ASK)
        chunks = await streamed(s)
    alone = offline()
    choice = made.choices[0]
    assert choice.text == alone.text == "".join(c.choices[0].text for c in chunks)
    assert choice.finish_reason == chunks[-1].choices[0].finish_reason == "length"
    prompt = len(loaded("zoo:text-draft").tokenizer.encode(PROMPT))
    assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (prompt, 20)
    assert made.usage.total_tokens == prompt + 20 and made.model == MODEL and made.object == "text_completion"
    assert len({c.id for c in chunks}) == 1 and len(chunks) > 3 and all(c.usage is None for c in chunks)


@pytest.mark.parametrize("make", [PlainEngine, Engine])
async def test_copies_of_several_prompts_are_in_order(make):
    other = "class Reader:"
    async with served(make=make) as s:
        made = await s.client.completions.create(**{**ASK, "prompt": [PROMPT, other]}, n=2)
        chunks = await streamed(s, prompt=[PROMPT, other], n=2)
    alone = [g.text for prompt in (PROMPT, other) for g in offline(prompt, n=2)]
    assert [c.text for c in made.choices] == alone and [c.index for c in made.choices] == [0, 1, 2, 3]
    texts = [""] * 4
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == alone and made.usage.completion_tokens == 80


async def test_ids_are_prompts_too():
    encode = loaded("zoo:text-draft").tokenizer.encode
    async with served() as s:
        one = await s.client.completions.create(**{**ASK, "prompt": encode(PROMPT)})
        two = await s.client.completions.create(**{**ASK, "prompt": [encode(PROMPT), encode("class")]})
    assert one.choices[0].text == two.choices[0].text == offline().text
    assert two.choices[1].text == offline("class").text


@pytest.mark.parametrize("make", [PlainEngine, Engine])
async def test_settings_reach_the_model(make):
    said = {"temperature": 0.6, "top_p": 0.8, "presence_penalty": 0.7, "frequency_penalty": -0.3}
    async with served(make=make) as s:
        made = await s.client.completions.create(**{**ASK, **said})
        drafted = await s.client.completions.create(**ASK, extra_body={"decoder": "prompt-lookup", "unknown": [1]})
    assert made.choices[0].text == offline(**said).text
    assert drafted.choices[0].text == offline().text, "a lossless decoder"


async def test_what_is_left_out_is_as_the_model_has_it():
    async with served() as s:
        made = await s.client.completions.create(model=MODEL, prompt=PROMPT, seed=5)
        other = await s.client.completions.create(model=MODEL, prompt=PROMPT)
        (request, _) = s.engine().requests
    system = loaded("zoo:text-draft")
    assert made.choices[0].text == offline(temperature=0.7, top_p=0.95, max_new_tokens=16).text
    assert request.sampling == system.sampling and request.max_new_tokens == 16
    assert other.choices[0].text != made.choices[0].text, "a seed of its own"


@pytest.mark.parametrize("make", [PlainEngine, Engine])
async def test_a_stop_string_ends_a_text_and_frees_its_place(make):
    whole = offline(max_new_tokens=100).text
    stop = whole[20:24]
    at = whole.index(stop)
    async with served(make=make) as s:
        made = await s.client.completions.create(**{**ASK, "max_tokens": 100}, stop=stop)
        chunks = await streamed(s, max_tokens=100, stop=["\0", stop])
        for _ in range(200):
            if not (figures := s.engine().figures())["running"] and not figures["waiting"]:
                break
            await asyncio.sleep(0.01)
        assert not s.engine().figures()["running"] and not s.service.models[MODEL].waiting
    assert made.choices[0].text == whole[:at] == "".join(c.choices[0].text for c in chunks)
    assert made.choices[0].finish_reason == chunks[-1].choices[0].finish_reason == "stop"
    assert made.usage.completion_tokens < 60


@pytest.mark.parametrize("make", [PlainEngine, Engine])
async def test_log_probabilities_stand_beside_each_token(make):
    async with served(make=make) as s:
        made = await s.client.completions.create(**ASK, logprobs=2)
        chunks = await streamed(s, logprobs=2)
        bare = await s.client.completions.create(**ASK, logprobs=0)
    alone, told = offline(logprobs=True), made.choices[0].logprobs
    decode = loaded("zoo:text-draft").tokenizer.decode
    assert told.tokens == [decode([i]) for i in alone.ids] and "".join(told.tokens) == alone.text
    assert told.token_logprobs == pytest.approx(alone.logprobs, abs=1e-4)
    assert all(len(top) == 2 for top in told.top_logprobs) and bare.choices[0].logprobs.top_logprobs is None
    assert [alone.text[at : at + len(t)] for at, t in zip(told.text_offset, told.tokens, strict=True)] == told.tokens
    pieces = [c.choices[0].logprobs for c in chunks if c.choices[0].logprobs]
    assert [t for p in pieces for t in p.tokens] == told.tokens
    assert [t for p in pieces for t in p.text_offset] == told.text_offset


async def test_usage_is_told_at_the_end_of_a_stream_where_it_is_asked_for():
    async with served() as s:
        chunks = await streamed(s, stream_options={"include_usage": True})
    assert all(c.usage is None and c.choices for c in chunks[:-1])
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 20


async def test_remembered_tokens_of_a_prompt_are_told():
    long = PROMPT * 8
    async with served(make=Engine) as s:
        first = await s.client.completions.create(**{**ASK, "prompt": long})
        second = await s.client.completions.create(**{**ASK, "prompt": long})
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert second.usage.prompt_tokens_details.cached_tokens == second.usage.prompt_tokens - 1
    assert first.choices[0].text == second.choices[0].text


async def test_a_stream_ends_in_done_and_tells_what_was_drafted():
    async with served() as s:
        answer = await s.http.post("/v1/completions", json={**ASK, "stream": True, "drafted": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = answer.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""] and all(line.startswith("data: {") for line in lines[:-2])
    first, last = (json.loads(lines[i].removeprefix("data: "))["drafted"] for i in (0, -3))
    assert [drafted for _, drafted in first["parts"]] == [True, False] and (first["tokens"], first["accepted"]) == (
        3,
        2,
    )
    assert last["tokens"] == 20 and last["accepted"] == 2 * 6 + 1, "pieces of 3, all but the last drafted"


async def test_two_models_are_served_by_their_names():
    systems = {name: loaded(f"zoo:{name}") for name in ("text-draft", "text-base")}
    async with served(systems) as s:
        listed = [m.id async for m in s.client.models.list()]
        made = {name: await s.client.completions.create(**{**ASK, "model": name}) for name in systems}
        one = await s.client.models.retrieve("text-base")
        with pytest.raises(openai.NotFoundError) as none:
            await s.client.completions.create(**{**ASK, "model": "/etc/passwd"})
    assert listed == ["text-draft", "text-base"] and one.id == "text-base"
    alone = {name: system.generate(PROMPT, max_new_tokens=20, seed=5).text for name, system in systems.items()}
    assert {name: m.choices[0].text for name, m in made.items()} == alone and len(set(alone.values())) == 2
    assert none.value.code == "model_not_found" and none.value.param == "model"


async def test_a_model_that_writes_in_blocks_streams_what_it_answers():
    ask = {**ASK, "model": "text-block"}
    async with served({"text-block": loaded("zoo:text-block")}, make=Engine) as s:
        made = await s.client.completions.create(**ask)
        chunks = [chunk async for chunk in await s.client.completions.create(**ask, stream=True)]
        with pytest.raises(openai.BadRequestError, match="next-token models"):
            await s.client.completions.create(**ask, logprobs=1)
    assert made.choices[0].text == "".join(c.choices[0].text for c in chunks) and made.usage.completion_tokens == 20
