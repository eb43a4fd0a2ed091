"""Python's own standard library as text: source and documentation, split by a hash of the path; nothing is downloaded.

`test`, `idlelib` and `encodings` are left out (repetitive, or tables). The side of a file is a hash of its relative
path: the same file is on the same side on every machine.
"""

from __future__ import annotations

import ast
import gc
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from seriatim.data.base import Data, Texts, check_held_out, share

LEFT_OUT = {"test", "tests", "idlelib", "encodings", "site-packages", "__pycache__", "lib2to3", "turtledemo"}
NOT_WRITTEN = ("pydoc_data/", "_sysconfigdata", "config-")  # by people, as source: written by tools


def stdlib(held_out: float = 0.05) -> Data:
    """Source files and, as documents of their own, the documentation in them: the docstrings of a file, and the topics
    of the language reference that `help()` shows.

    Raises FileNotFoundError where Python came without its source.
    """
    check_held_out(held_out)
    sides: dict[bool, list[str]] = {True: topics(), False: []}
    for name, document in [*source_files(), *docstrings()]:
        sides[share(name) >= held_out].append(document)
    if not sides[True] or not sides[False]:
        raise FileNotFoundError("no source files: this Python came without its standard library's source")
    return Data("stdlib", "text", Texts(tuple(sides[True])), Texts(tuple(sides[False])))


@lru_cache(maxsize=1)
def source_files() -> tuple[tuple[str, str], ...]:
    """(relative path, text) of each file that holds any, sorted; without `pydoc_data`, which is documentation in
    Python's syntax, and what the build of this Python wrote."""
    both = [(name, content.decode("utf-8", errors="replace")) for name, content in _files()]
    return tuple((name, text) for name, text in both if text.strip() and not name.startswith(NOT_WRITTEN))


@lru_cache(maxsize=1)
def docstrings() -> tuple[tuple[str, str], ...]:
    """(relative path, all docstrings with an empty line between them) of each file that has any."""
    found = []
    with _uncollected():
        for name, source in source_files():
            try:
                tree = ast.parse(source)
            except (SyntaxError, ValueError):
                continue
            if texts := [text for node in _documented(tree) if (text := ast.get_docstring(node))]:
                found.append((name, "\n\n".join(texts) + "\n"))
    return tuple(found)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without the cyclic garbage collector: syntax trees have no cycles, and looking for them takes half the time."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _documented(node: ast.AST) -> Iterator[Documented]:
    """Modules, classes and functions in the order of the file; expressions are not searched (slow)."""
    if isinstance(node, Documented):
        yield node
    body = getattr(node, "body", ())
    for child in body if isinstance(body, list) else ():
        yield from _documented(child)


def topics() -> list[str]:
    """Topics of the language reference, each text once. Some repeat others, so that all of them are for training."""
    try:
        from pydoc_data.topics import topics as reference
    except ImportError:
        return []
    return list(dict.fromkeys(text for _, text in sorted(reference.items())))


def _files() -> Iterator[tuple[str, bytes]]:
    """Relative paths and contents, sorted."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if LEFT_OUT & set(relative.parts):
            continue
        try:
            yield relative.as_posix(), path.read_bytes()
        except OSError:
            continue
