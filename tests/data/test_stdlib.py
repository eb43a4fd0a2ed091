"""The standard library as text: two sides that share no file."""

import pytest

from seriatim.data.base import load_data
from seriatim.data.stdlib import docstrings, source_files


def test_documents_are_source_docstrings_and_the_language_reference():
    data = load_data("stdlib", "text")
    documents = [*data.train.documents, *data.test.documents]
    assert any(d.startswith('"""Random variable generators.') and "def shuffle(" in d for d in documents)
    assert any(d.startswith("Random variable generators.") and "def shuffle(" not in d for d in documents)
    assert any(d.startswith('The "assert" statement') for d in data.train.documents)
    assert 0.01 < sum(map(len, data.test.documents)) / sum(map(len, data.train.documents)) < 0.15


def test_docstrings_are_on_the_side_of_their_file():
    data = load_data("stdlib", "text", held_out=0.3)
    sides = [set(data.train.documents), set(data.test.documents)]
    source, documentation = dict(source_files()), dict(docstrings())
    for name in ("random.py", "ast.py", "json/decoder.py", "heapq.py", "abc.py", "bisect.py"):
        assert [source[name] in side for side in sides] == [documentation[name] in side for side in sides]
    assert max(map(len, sides[0] & sides[1]), default=0) < 100  # files that hold one line are alike


def test_tests_tables_and_what_was_installed_are_left_out():
    names = {name for name, _ in source_files()}
    assert not [n for n in names if n.startswith(("test/", "idlelib/", "encodings/", "site-packages/", "pydoc_data/"))]
    assert {"random.py", "json/decoder.py"} <= names


def test_docstrings_come_in_the_order_of_the_file():
    text = dict(docstrings())["bisect.py"]
    assert 0 <= text.index("Bisection algorithms.") < text.index("Insert item x") < text.index("Return the index")


def test_a_python_without_its_source_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    for function in (source_files, docstrings):
        monkeypatch.setattr(f"seriatim.data.stdlib.{function.__name__}", function.__wrapped__)
    monkeypatch.setattr("seriatim.data.stdlib.topics", list)
    with pytest.raises(FileNotFoundError, match="without its standard library's source"):
        load_data("stdlib", "text")
