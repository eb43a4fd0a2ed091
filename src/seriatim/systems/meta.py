"""What is known of a system without loading it: read from its file's `META = Meta(...)`, importing no torch."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class Meta:
    """A system's card. `likelihood` is exact, bound or none; `paper` is "title (year), address"."""

    key: str
    title: str
    family: str
    modality: str
    paper: str
    likelihood: str
    summary: str


@cache
def catalogue() -> dict[str, tuple[Meta, str]]:
    """Key -> (card, module name) of every system, by reading the files under `systems`."""
    found: dict[str, tuple[Meta, str]] = {}
    root = Path(__file__).parent
    for path in sorted(root.glob("*/*.py")):
        meta = _read(path)
        if meta is None:
            continue
        if meta.key in found:
            raise ValueError(f"two systems are called {meta.key!r}: {found[meta.key][1]} and {path.stem}")
        found[meta.key] = (meta, f"seriatim.systems.{path.parent.name}.{path.stem}")
    return found


def _read(path: Path) -> Meta | None:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "META":
            assert isinstance(node.value, ast.Call)
            values: dict[str, Any] = {k.arg: ast.literal_eval(k.value) for k in node.value.keywords if k.arg}
            return Meta(**values)
    return None


def load(key: str) -> ModuleType:
    """The module of a system; raises KeyError that lists what there is."""
    systems = catalogue()
    if key not in systems:
        import difflib

        near = difflib.get_close_matches(key, systems, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise KeyError(f"no system is called {key!r}{hint} There are: {', '.join(systems)}")
    return importlib.import_module(systems[key][1])


Build = Callable[..., Any]
