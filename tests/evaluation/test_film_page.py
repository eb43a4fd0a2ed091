"""The page that replays a film: whole, self-contained, nothing generated is markup in it, and never half written."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from seriatim.evaluation.film_page import changes, check_page, write_page
from seriatim.evaluation.text_film import Frame, Place

HOSTILE = "</script><script>alert(1)</script><img src=http://example.org/x onerror=alert(1)>\u2028&amp;<!--\x1b[31m"
A = Place(0, 7, "def", "given")
B = Place(1, None, None, "open")
C = Place(2, None, None, "open")
FRAMES = [
    Frame((A, B, C)),
    Frame((A, B, Place(2, 9, "):\n", "model", 1, 0.25)), 1),
    Frame((A, Place(3, 4, HOSTILE, "draft", 2, 0.98765), Place(2, 9, "):\n", "model", 1, 0.25)), 2, 3, 1, " rejected"),
    Frame((A, Place(3, None, None, "open"), Place(2, 9, "):", "model", 1, 0.25)), 3),
]


class Parsed(HTMLParser):
    """Tags with their attributes, and the text in each kind."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: dict[str, list[str]] = {}
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.setdefault(self.open[-1] if self.open else "", []).append(data)


@pytest.fixture
def page(tmp_path) -> str:
    path = write_page(FRAMES, tmp_path / "film.html", f"title {HOSTILE}", {"seed": 3, "system": HOSTILE})
    return path.read_text(encoding="utf-8")


def data_of(page: str) -> dict:
    (data,) = re.findall(r'<script type="application/json" id="film">(.*?)</script>', page, re.S)
    return json.loads(data)


def test_what_was_generated_is_data_and_never_markup(page):
    parsed = Parsed(page)
    assert parsed.open == [] and [tag for tag, _ in parsed.tags].count("script") == 2
    assert not any(tag in ("img", "link", "iframe", "a") for tag, _ in parsed.tags)
    assert not any(name.startswith("on") or name in ("src", "href") for _, a in parsed.tags for name in a)
    film = data_of(page)
    assert film["title"] == f"title {HOSTILE}" and film["about"] == [["seed", "3"], ["system", HOSTILE]]
    script = parsed.text["script"][-1]
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval|Function\(|fetch|import", script)


def test_the_policy_allows_this_style_and_this_script_alone(page):
    (policy,) = (a["content"] for tag, a in Parsed(page).tags if a.get("http-equiv") == "Content-Security-Policy")
    style, script = (re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.S) for tag in ("style", "script"))
    assert len(style) == len(script) == 1 and " style=" not in page
    for name, text in (("style", style[0]), ("script", script[0])):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy and "http" not in policy


def test_frames_are_stored_as_what_they_change():
    rows = changes(FRAMES)
    assert [row[5] for row in rows] == [[0, 1, 2], None, [0, 3, 2], None]
    assert [len(row[4]) for row in rows] == [3, 1, 1, 2]
    assert rows[2][:4] == [2, 3, 1, " rejected"] and rows[2][4] == [[3, HOSTILE, "draft", 0.9877, 2]]
    state, order = {}, []
    for row, frame in zip(rows, FRAMES, strict=True):
        state |= {change[0]: tuple(change[1:]) for change in row[4]}
        order = order if row[5] is None else row[5]
        shown = [(e, *state[e]) for e in order]
        want = [
            (p.element, p.text, p.by, None if p.chance is None else round(p.chance, 4), p.frame) for p in frame.places
        ]
        assert shown == want


def test_a_page_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "film.html"
    path.write_text("old")
    with pytest.raises(ValueError, match="at least one frame"):
        write_page([], path, "t")

    def fails(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="disk full"):
        write_page(FRAMES, path, "t")
    assert path.read_text() == "old"


@pytest.mark.parametrize(
    ("name", "said"),
    [("", "is a folder"), ("film.txt", "name it as"), ("film", "name it as"), ("file/film.html", "cannot be written")],
)
def test_places_where_no_page_can_be_are_refused(tmp_path, name, said):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises((ValueError, OSError), match=said):
        check_page(tmp_path / name)


def test_a_place_that_suits_is_left_as_it_is(tmp_path):
    assert check_page(tmp_path / "new" / "film.html") == tmp_path / "new" / "film.html"
    assert list((tmp_path / "new").iterdir()) == []


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no browser is installed")
@pytest.mark.parametrize(("at", "text", "said"), [
    ("#0", "def··", "frame 0 of 3 · 0 forwards · 0 tokens decided, 2 open"),
    ("#1", "def·):\n", "frame 1 of 3 · 1 forward · 1 token decided, 1 open · 1.00 tokens per forward"),
    ("#2", f"def{HOSTILE} rejected):\n", "drafted 3, accepted 1 (in all 1 of 3)"),
    ("#end", "def·):", "frame 3 of 3 · 3 forwards · 1 token decided, 1 open"),
    ("#99", "def·):", "frame 3 of 3"),
])  # fmt: skip
def test_a_browser_shows_each_frame(tmp_path, at, text, said):
    path = write_page(FRAMES, tmp_path / "film.html", HOSTILE)
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", path.as_uri() + at]
    dom = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    (shown,) = re.findall(r'<div id="text"[^>]*>(.*?)</div>', dom, re.S)
    assert html.unescape(re.sub(r"<[^>]*>", "", shown)) == text
    assert said in html.unescape(dom) and "<img" not in dom


def test_the_example_of_the_documentation_makes_a_film(tmp_path, monkeypatch, capsys):
    text = (Path(__file__).parents[2] / "docs" / "decoding.md").read_text(encoding="utf-8")
    (code,) = (c for c in re.findall(r"```python\n(.*?)```", text, re.S) if "Recorder" in c)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert "Place(element=5, token=" in capsys.readouterr().out
    assert len(data_of((tmp_path / "film.html").read_text(encoding="utf-8"))["frames"]) == 41
