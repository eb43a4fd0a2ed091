"""Conversations as OpenAI's client has them."""

from __future__ import annotations

import json

import openai
import pytest

from seriatim.serving.engine import Engine
from seriatim.serving.limits import Limits
from seriatim.verbs.load import load
from support.plain_engine import PlainEngine
from support.served import loaded, served
from support.tiny_chat import says, write_chat_model

pytestmark = pytest.mark.anyio
MESSAGES = [says("system", "Be brief."), says("user", "Héllo")]
ASK = {"model": "chat", "messages": MESSAGES, "max_tokens": 24, "seed": 3, "temperature": 1.0}


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.fixture(scope="module")
def system(tmp_path_factory):
    return load(write_chat_model(tmp_path_factory.mktemp("chat")))


def offline(system, **more):
    said = {"max_new_tokens": 24, "seed": 3, "temperature": 1.0, **more}
    return system.generate(system.chat_ids(MESSAGES), **said)


@pytest.mark.parametrize("make", [PlainEngine, Engine])
async def test_an_answer_is_what_the_template_asks_for(system, make):
    async with served({"chat": system}, make=make) as s:
        made = await s.client.chat.completions.create(**ASK)
        stream = await s.client.chat.completions.create(**ASK, stream=True, stream_options={"include_usage": True})
        chunks = [chunk async for chunk in stream]
    alone = offline(system)
    assert made.choices[0].message.content == alone.text and made.choices[0].message.role == "assistant"
    assert made.object == "chat.completion" and chunks[0].object == "chat.completion.chunk"
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].choices == []
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == alone.text
    assert made.usage.prompt_tokens == chunks[-1].usage.prompt_tokens == len(system.chat_ids(MESSAGES))
    assert chunks[-2].choices[0].finish_reason == made.choices[0].finish_reason


async def test_copies_parts_of_messages_and_the_newer_limit(system):
    parts = [
        MESSAGES[0],
        {"role": "user", "content": [{"type": "text", "text": "Hé"}, {"type": "text", "text": "llo"}]},
    ]
    said = {k: v for k, v in ASK.items() if k != "max_tokens"}
    async with served({"chat": system}) as s:
        made = await s.client.chat.completions.create(**{**said, "messages": parts}, n=2, max_completion_tokens=9)
        free = await s.client.chat.completions.create(**said)
    assert [c.message.content for c in made.choices] == [g.text for g in offline(system, max_new_tokens=9, n=2)]
    room = system.model.layout.size - len(system.chat_ids(MESSAGES))
    assert free.choices[0].message.content == offline(system, max_new_tokens=room).text


async def test_log_probabilities_of_bytes(system):
    """Most tokens of this tokenizer are bytes, of letters that have several."""
    async with served({"chat": system}) as s:
        made = await s.client.chat.completions.create(**ASK, logprobs=True, top_logprobs=2)
        bare = await s.client.chat.completions.create(**ASK, logprobs=True)
    alone = offline(system, logprobs=True)
    kept = [(i, x) for i, x in zip(alone.ids, alone.logprobs, strict=True) if i not in system.stop]
    told = made.choices[0].logprobs.content
    assert [t.logprob for t in told] == pytest.approx([x for _, x in kept], abs=1e-4)
    assert b"".join(bytes(t.bytes or ()) for t in told).decode(errors="replace") == alone.text
    assert all(len(t.top_logprobs) == 2 for t in told) and not bare.choices[0].logprobs.content[0].top_logprobs


async def test_a_model_without_a_template_says_so():
    async with served() as s:
        with pytest.raises(openai.BadRequestError, match="no chat template") as none:
            await s.client.chat.completions.create(model="text-draft", messages=MESSAGES)
    assert none.value.code == "no_chat_template"


@pytest.mark.parametrize(
    ("changes", "param", "message"),
    [
        ({"messages": []}, "messages", "at least 1"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages",
            "text",
        ),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "not done"),
        ({"top_logprobs": 3}, "top_logprobs", "logprobs: true"),
        ({"max_tokens": 4000}, "max_tokens", "takes"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, None, None),
    ],
)
async def test_what_cannot_be_done_is_said(system, changes, param, message):
    async with served({"chat": system}) as s:
        if param is None:  # an empty schema allows any JSON
            await s.client.chat.completions.create(**{**ASK, **changes})
            return
        with pytest.raises(openai.BadRequestError, match=message) as error:
            await s.client.chat.completions.create(**{**ASK, **changes})
    assert error.value.param == param


async def test_a_template_that_refuses_is_quoted(tmp_path):
    refuses = "{% for m in messages %}{{ raise_exception('only questions, please') }}{% endfor %}"
    async with served({"chat": load(write_chat_model(tmp_path, refuses))}) as s:
        with pytest.raises(openai.BadRequestError, match="only questions, please"):
            await s.client.chat.completions.create(**ASK)


# ---- forms -----------------------------------------------------------------------------------------------------------

SCHEMA = {
    "type": "object", "properties": {"yes": {"type": "boolean"}, "kind": {"enum": ["a", "b"]}},
    "required": ["yes", "kind"], "additionalProperties": False,
}  # fmt: skip


def schema(said):
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": said, "strict": True}}


@pytest.mark.parametrize("make", [PlainEngine, Engine])
async def test_a_json_schema_is_kept_to(make):
    pytest.importorskip("llguidance")
    ask = {"model": "text-draft", "prompt": "x = ", "max_tokens": 60, "seed": 1, "n": 3}
    async with served(make=make) as s:
        made = await s.client.completions.create(**ask, extra_body={"response_format": schema(SCHEMA)})
    for choice in made.choices:
        said = json.loads(choice.text)
        assert isinstance(said["yes"], bool) and said["kind"] in ("a", "b") and choice.finish_reason == "stop"


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (schema({"type": "nosuch"}), "not understood"), (schema({"description": "x" * 40_000}), "at most 32,768"),
        ({"type": "json_schema"}, "needs json_schema"), ({"type": "yaml"}, "json_object"),
        (schema({"$ref": "https://example.org/schema.json"}), "not understood"),
        (schema({"pattern": "(" * 2000, "type": "string"}), "not understood"),
    ],
)  # fmt: skip
async def test_a_schema_that_cannot_be_compiled_is_refused(form, message):
    pytest.importorskip("llguidance")
    async with served() as s:
        with pytest.raises(openai.BadRequestError, match=message) as error:
            ask = {"model": "text-draft", "prompt": "x"}
            await s.client.completions.create(**ask, extra_body={"response_format": form})
    assert error.value.param == "response_format"


async def test_a_schema_that_takes_long_is_given_up(monkeypatch):
    import threading

    from seriatim.interop.grammar import Grammar

    held = threading.Event()
    monkeypatch.setattr(Grammar, "matchers", lambda *_: held.wait(10))
    async with served(limits=Limits(grammar_seconds=0.05, closing=0.1)) as s:
        with pytest.raises(openai.BadRequestError, match=r"did not compile within 0\.05 seconds"):
            body = {"response_format": schema(SCHEMA)}
            await s.client.completions.create(model="text-draft", prompt="x", extra_body=body)
        held.set()


async def test_without_the_extra_a_form_is_refused(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    async with served() as s:
        with pytest.raises(openai.BadRequestError, match=r"seriatim\[grammar\]"):
            body = {"response_format": {"type": "json_object"}}
            await s.client.completions.create(model="text-draft", prompt="x", extra_body=body)
    assert loaded("zoo:text-draft") is not None
