"""Figures of a server in Prometheus' format."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from support.served import loaded, served

pytestmark = pytest.mark.anyio
ASK = {"model": "text-draft", "prompt": "def x(", "max_tokens": 12, "seed": 1, "temperature": 1.0}


@pytest.fixture
def anyio_backend():
    return "asyncio"


async def figures(s):
    """name, model -> value; of paths: name, path, status."""
    answer = await s.http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    out = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            if "le" not in sample.labels:
                out[(sample.name.removeprefix("seriatim_"), *sample.labels.values())] = sample.value
    return out


async def test_requests_tokens_and_clocks_are_counted():
    async with served({"text-draft": loaded("zoo:text-draft"), "var": loaded("zoo:var")}) as s:
        await s.client.completions.create(**ASK, n=2)
        await s.http.post("/v1/completions", json={**ASK, "n": 0})
        await s.http.get("/somewhere/else")
        await s.client.images.generate(model="var", prompt="A")
        got = await figures(s)
        again = await figures(s)
    assert got["requests_total", "/v1/completions", "200"] == got["requests_total", "/v1/completions", "400"] == 1
    assert got["requests_total", "other", "404"] == 1 and got["requests_open",] == 1, "the one that asks"
    assert got["tokens_total", "text-draft"] == 24 and got["finished_total", "text-draft"] == 2
    assert got["first_token_seconds_count", "text-draft"] == got["request_seconds_count", "text-draft"] == 2
    assert got["between_tokens_seconds_count", "text-draft"] == 2 * 3, "pieces behind the first"
    assert got["accepted_length_sum", "text-draft"] == 24 and got["accepted_length_count", "text-draft"] == 8
    assert got["running", "text-draft"] == got["waiting", "text-draft"] == 0
    assert 0 < got["tokens_per_second", "text-draft"] <= 2.4
    assert got["finished_total", "var"] == 1 and got["request_seconds_count", "var"] == 1
    assert again["requests_total", "/metrics", "200"] == 1


async def test_two_servers_count_apart():
    async with served() as one, served() as other:
        await one.client.completions.create(**ASK)
        assert (await figures(one))["tokens_total", "text-draft"] == 12
        assert (await figures(other))["tokens_total", "text-draft"] == 0
