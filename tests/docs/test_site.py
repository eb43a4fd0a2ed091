"""What the hooks make of systems, results and names; and that the navigation has every page."""

from __future__ import annotations

import ast
import inspect
import json
import re

import pytest

import seriatim
from seriatim.systems import meta
from seriatim.systems.decoders import FAMILIES, example_of
from seriatim.systems.meta import catalogue, everything, studies
from seriatim.verbs.generate import generate

RESULT = {
    "key": "var", "claim": "c", "paper": "p", "metric": "loss", "ours": 1.25, "baseline": 1.5, "verdict": "holds",
    "rule": "r", "arms": {"var": [{"seed": 0, "loss": 1.25, "train_seconds": 60.0}], "other": [{"seed": 1}]},
    "command": "seriatim claim var", "machine": "m | n", "commit": "abc",
}  # fmt: skip


@pytest.fixture(scope="module")
def systems(hook):
    return hook("systems_pages")


@pytest.mark.parametrize("key", list(everything()))
def test_a_page_says_what_the_system_is(systems, key):
    text, card = systems.page(key), everything()[key][0]
    assert text.startswith(f"# {card.title}\n")
    assert card.summary in text
    assert ("## Its order" in text) == (card.family not in ("tokenizer", "study", "series", *FAMILIES))
    if card.family in FAMILIES:
        assert f"--decoder {example_of(key)}" in text and ("| option | type | default |" in text or key == "ancestral")
    elif card.family == "study":
        assert f"seriatim claim {key}" in text and "## Claim" in text
    else:
        assert f"seriatim train {key}" in text and "| setting | type | default |" in text


def test_a_page_shows_the_last_result(systems, tmp_path, monkeypatch):
    monkeypatch.setattr(meta, "RESULTS", (tmp_path,))
    assert "## Last result" not in systems.page("var")
    (tmp_path / "var.json").write_text(json.dumps(RESULT), encoding="utf-8")
    text = systems.page("var")
    assert "**holds**: loss 1.25 against 1.5." in text
    assert "| var | 0 | 1.25 | 60 |" in text and "| other | 1 |  |  |" in text
    assert "`m | n`" in text and "`abc`" in text


def test_a_page_shows_pictures_by_their_names(systems, tmp_path, monkeypatch):
    monkeypatch.setattr(systems, "IMAGES", tmp_path)
    for name in ("var-film.gif", "var-samples.png", "mar-film.gif", "var-notes.txt"):
        (tmp_path / name).touch()
    shown = re.findall(r"\]\(\.\./images/([^)]+)\)", systems.page("var"))
    assert shown == ["var-film.gif", "var-samples.png"]


def test_masks_are_pictures(systems):
    assert systems.mask("raster-ar").startswith(b"\x89PNG")


def test_the_table_names_every_system(systems, root):
    text = systems.overview()
    assert all(f"(systems/{key}.md)" in text for key in catalogue())
    assert all(f"(systems/{key}.md)" in systems.questions() for key in studies())
    pages = "".join(page.read_text(encoding="utf-8") for page in (root / "docs").glob("*.md"))
    for mark, made in systems.TABLES.items():
        assert pages.count(mark) == 1 and made().count("\n|") > 1


def test_columns_follow_from_orders(systems):
    """Of some systems here; all of them are watched when the site is built."""
    keys = ["nar", "var", "raster-ar"]
    columns = systems.image_orders(keys)
    assert "anti-diagonals" in columns and "| 3, 7, 15 | n |" in columns
    assert all(f"(systems/{key}.md)" in columns for key in keys)


def test_what_is_watched_stands_on_one_page(systems, documents):
    for mark in systems.WATCHED:
        assert sum(text.count(mark) for text in documents.values()) == 1


def test_tables_keep_their_cells_apart(systems):
    assert systems.table(("a", "b"), [("x | y", "`p | q`")]).splitlines()[2] == r"| x \| y | `p | q` |"


def test_papers_are_linked(systems):
    assert (
        systems._linked("T (2024), arXiv 2404.02905")
        == "T (2024), [arXiv 2404.02905](https://arxiv.org/abs/2404.02905)"
    )
    assert systems._linked("T (2019)") == "T (2019)"


def test_the_reference_has_every_public_name(hook):
    reference = hook("reference_pages")
    text = "".join(reference.page(topic, names) for topic, names in reference.topics().items())
    named = {line.rsplit(".", 1)[1] for line in text.splitlines() if line.startswith("::: ")}
    assert named == set(seriatim.__all__) - {"__version__"}


def test_every_page_is_in_the_navigation(root):
    listed = set(re.findall(r"[\w-]+\.md", (root / "mkdocs.yml").read_text(encoding="utf-8")))
    there = {p.name for p in (root / "docs").glob("*.md")}
    assert there == listed, "pages of docs/ stand in the list `nav` of mkdocs.yml, and the other way round"


def test_functions_in_the_tour_take_what_they_are_given(documents):
    code = "".join(re.findall(r"```python\n(.*?)```", documents["docs/tour.md"], re.S))
    functions = {f"seriatim.{name}": getattr(seriatim, name) for name in seriatim.__all__} | {"generate": generate}
    called = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call) and (name := ast.unparse(node.func)) in functions:
            signature = inspect.signature(functions[name])
            signature.bind(*node.args, **{k.arg: k.value for k in node.keywords if k.arg})
            called.add(name)
    assert called == {"seriatim.train", "seriatim.load", "seriatim.compare", "seriatim.evaluate", "generate"}
