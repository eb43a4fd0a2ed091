"""Requests that are made up from the server's own description find no error of its own."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from seriatim.serving.limits import Limits
from support.served import loaded, running

schemathesis = pytest.importorskip("schemathesis")

PATHS = (
    ("/v1/completions", "POST", "text-draft"), ("/v1/chat/completions", "POST", "chat"),
    ("/v1/images/generations", "POST", "var"), ("/v1/models/{name}", "GET", None), ("/v1/models", "GET", None),
    ("/health", "GET", None), ("/metrics", "GET", None),
)  # fmt: skip
SMALL = Limits(max_tokens=6, texts=4, prompts=4, pictures=2, steps=4, grammar_seconds=2.0, closing=0.2)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    from seriatim.verbs.load import load
    from support.tiny_chat import write_chat_model

    systems = {"text-draft": loaded("zoo:text-draft"), "var": loaded("zoo:var")}
    systems["chat"] = load(write_chat_model(tmp_path_factory.mktemp("chat")))
    with running(systems=systems, limits=SMALL) as (url, server):
        yield url, server


def fuzz(strategy, model, url, examples):
    """The status of answers to made up requests, none of which is an error of the server."""
    seen = set()

    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=True, phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=strategy)
    def ask(case):
        if model and isinstance(case.body, dict) and "model" in case.body:
            case.body["model"] = model
        answer = case.call(base_url=url, timeout=20)
        seen.add(answer.status_code)
        assert answer.status_code < 500, (case.body, answer.text)
        if answer.status_code >= 400:
            assert json.loads(answer.content)["error"]["message"]

    ask()
    return seen


@pytest.mark.slow
@pytest.mark.parametrize(("path", "method", "model"), PATHS)
def test_made_up_requests_find_no_error_of_the_server(server, path, method, model):
    url, program = server
    operation = schemathesis.openapi.from_url(f"{url}/openapi.json")[path][method]
    modes = schemathesis.GenerationMode
    seen = fuzz(operation.as_strategy(generation_mode=modes.POSITIVE), model, url, 60 if model else 15)
    if model:
        seen |= fuzz(operation.as_strategy(generation_mode=modes.NEGATIVE), model, url, 60)
        assert 400 in seen
    assert program.service.state == "ready"
    assert not any(getattr(one, "waiting", None) for one in program.service.models.values())
