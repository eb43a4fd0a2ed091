"""The documents, and what is written in them."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def root() -> Path:
    """Where README.md, docs/ and mkdocs.yml lie."""
    return ROOT


@pytest.fixture(scope="session")
def documents() -> dict[str, str]:
    """Path -> text of everything that is written for readers."""
    paths = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return {str(p.relative_to(ROOT)): p.read_text(encoding="utf-8") for p in paths}


@pytest.fixture(scope="session")
def hook() -> Callable[[str], ModuleType]:
    """A script of docs/ as a module."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def example(documents: dict[str, str]) -> str:
    """The system that the documentation adds."""
    code = re.findall(r"```python\n(.*?)```", documents["docs/adding-a-system.md"], re.S)
    assert len(code) == 1
    return code[0]
