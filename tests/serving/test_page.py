"""The page at `/`, in a headless Chromium."""

from __future__ import annotations

import json
import re

import pytest

from seriatim.serving.engine import Engine
from seriatim.serving.guard import POLICY
from seriatim.serving.request import Piece
from support.browser import browser, found
from support.plain_engine import PlainEngine
from support.served import loaded, running, served

needs_browser = pytest.mark.skipif(found() is None, reason="no Chromium is installed, and CHROMIUM names none")
READY = "document.getElementById('state')?.textContent == 'ready'"
IDLE = "!document.getElementById('go').disabled"
MARKUP = "<b>bold</b><img src=x onerror='window.hit=1'><script>window.hit=1</script>&lt;"


def start(page, url, **fields):
    """Open the page, and fill it in."""
    page.call("Page.navigate", url=url)
    page.until(READY)
    if "model" in fields:
        page.value(f"at('model').value = {json.dumps(fields.pop('model'))}; choose()")
    for name, value in fields.items():
        page.value(f"at({json.dumps(name)}).value = {json.dumps(value)}")
    page.value("at('go').click()")


@needs_browser
@pytest.mark.slow
def test_a_text_appears_with_its_drafts_in_a_shade(tmp_path):
    prompt = "def a(x):\n    return x\n\n\ndef a(x):\n    return x\n\n\ndef a(x):"
    with running(make=Engine) as (url, _), browser(tmp_path) as page:
        start(page, url, prompt=prompt, decoder="prompt-lookup", temperature="0", tokens="40")
        page.until(IDLE)
        spans = page.value("[...at('text').children].map((one) => [one.className, one.textContent])")
        figures = page.value("at('figures').textContent")
        row = page.value("[...at('runs').children[0].children].map((one) => one.textContent)")
        said = page.said
    alone = loaded("zoo:text-draft").generate(prompt, temperature=0, max_new_tokens=40)
    assert spans[0] == ["prompt", prompt] and "".join(text for _, text in spans[1:]) == alone.text
    assert {kind for kind, _ in spans[1:]} == {"drafted", "own"}
    assert re.fullmatch(r"40 tokens, [\d.]+ tokens/s, [1-9]\d?% drafted", figures)
    assert row[:2] == ["prompt-lookup", "40"] and not said


@needs_browser
@pytest.mark.slow
def test_what_a_model_writes_is_never_markup(tmp_path):
    class Writes(PlainEngine):
        def _write(self, number, request):
            ids = self.system.tokenizer.encode(MARKUP)
            self.sink([Piece(number, tuple(ids), len(ids) // 2, finish="length")])

    with running(make=Writes) as (url, _), browser(tmp_path) as page:
        start(page, url, prompt=MARKUP)
        page.until(f"{IDLE} && at('text').children.length > 1")
        assert page.value("at('text').textContent") == MARKUP * 2
        assert page.value("window.hit === undefined && at('text').querySelector('b, img, script') === null")
        assert not page.said


@needs_browser
@pytest.mark.slow
def test_a_picture_is_drawn_step_by_step(tmp_path):
    systems = {"text-draft": loaded("zoo:text-draft"), "var": loaded("zoo:var")}
    with running(systems=systems) as (url, _), browser(tmp_path) as page:
        start(page, url, model="var", label="Q")
        page.until(f"{IDLE} && at('caption').textContent == 'finished'")
        assert page.value("at('film').children.length") == 6
        assert page.value("at('picture').naturalWidth") == 32
        assert page.value("at('text-box').hidden && !at('image-box').hidden")
        page.value("at('label').value = 'no such'; at('go').click()")
        page.until(f"{IDLE} && !at('error').hidden")
        assert "class of the picture" in page.value("at('error').textContent")
        assert [one.get("text", "")[:60] for one in page.said if one.get("source") != "network"] == []


@needs_browser
@pytest.mark.slow
def test_stopping_frees_the_place_and_keeps_the_text(tmp_path):
    with running(make=Engine) as (url, server), browser(tmp_path) as page:
        start(page, url, tokens="900", temperature="1")
        page.until("at('text').textContent.length > 60")
        page.value("at('stop').click()")
        page.until(IDLE)
        engine = server.service.models["text-draft"].engine
        page.until("true")
        for _ in range(100):
            if engine.figures()["cancelled"]:
                break
            page.value("new Promise((done) => setTimeout(done, 30))")
        assert engine.figures()["cancelled"] == 1 and page.value("at('error').hidden")


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.mark.anyio
async def test_the_page_is_what_its_policy_allows():
    """Nothing from elsewhere, no script or style in a line, and text as text."""
    async with served() as s:
        page, script, style = [await s.http.get(path) for path in ("/", "/page.js", "/page.css")]
    assert page.headers["content-type"].startswith("text/html") and "javascript" in script.headers["content-type"]
    assert not re.search(r"<style|style=|\son\w+=|<script(?![^>]*src=)", page.text)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|Function\(", script.text)
    assert not re.search(r"https?://|//\w+\.", page.text + style.text) and "@import" not in style.text
    assert "script-src 'self'" in POLICY and style.headers["content-type"].startswith("text/css")
