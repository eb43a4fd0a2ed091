"""What is known of a system without loading it: read from its file's `META = Meta(...)`, importing no torch."""

from __future__ import annotations

import ast
import hashlib
import importlib
import json
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


Cards = dict[str, tuple[Meta, str]]  # key -> card and module name


@cache
def catalogue() -> Cards:
    """Every system, by reading the files under `systems`."""
    return _cards("systems/*/*.py")


@cache
def studies() -> Cards:
    """Every study, by reading the files under `studies`: data, a measure and a claim, but no order of its own."""
    return _cards("studies/*.py")


def everything() -> Cards:
    """Systems and studies."""
    return catalogue() | studies()


def _cards(pattern: str) -> Cards:
    found: Cards = {}
    package = Path(__file__).parents[1]
    for path in sorted(package.glob(pattern)):
        meta = _read(path)
        if meta is None:
            continue
        if meta.key in found:
            raise ValueError(f"two systems are called {meta.key!r}: {found[meta.key][1]} and {path.stem}")
        found[meta.key] = (meta, ".".join(("seriatim", *path.relative_to(package).with_suffix("").parts)))
    return found


def _read(path: Path) -> Meta | None:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "META":
            assert isinstance(node.value, ast.Call)
            values: dict[str, Any] = {k.arg: ast.literal_eval(k.value) for k in node.value.keywords if k.arg}
            return Meta(**values)
    return None


def load(key: str) -> ModuleType:
    """The module of a system or a study; raises KeyError that lists what there is."""
    _known(key)
    return importlib.import_module(everything()[key][1])


def _known(key: str) -> None:
    systems = everything()
    if key not in systems:
        import difflib

        near = difflib.get_close_matches(key, systems, 1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise KeyError(f"no system is called {key!r}{hint} There are: {', '.join(systems)}")


# ---- what is shown to work, from files ------------------------------------------------------------------------------

RESULTS = (Path(__file__).parents[1] / "results", Path(__file__).parents[3] / "results")  # installed; in a clone


def status_of(key: str) -> dict[str, bool]:
    """L, E, C, W of a system, from what was measured: the laws and the run from end to end count only while the
    system's file is the one they were run on."""
    row = recorded().get(key, {})
    fresh = row.get("source") == source_hash(key)
    claim = _result(f"{key}.json")
    return {
        "L": bool(fresh and row.get("laws")),
        "E": bool(fresh and row.get("end_to_end")),
        "C": claim is not None and claim.get("verdict") in ("holds", "fails", "within noise"),
        "W": bool(row.get("weights")),
    }


def recorded() -> dict[str, dict[str, Any]]:
    """What benchmarks/status.py found of each system when it ran last."""
    return _result("status.json") or {}


def source_hash(key: str) -> str:
    """Of a system's own file."""
    return hashlib.sha256(_path(key).read_bytes()).hexdigest()[:16]


def card_of(key: str) -> tuple[Meta, str, dict[str, str], dict[str, Any] | None]:
    """Card, docstring, settings as text, and the last result of a system or a study. Raises KeyError for an unknown
    one."""
    _known(key)
    tree = ast.parse(_path(key).read_text(encoding="utf-8"))
    details: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == "Config":
            fields = [ast.unparse(n) for n in node.body if isinstance(n, ast.AnnAssign)]
            details["settings"] = "; ".join(fields)
        if isinstance(node, ast.ClassDef):
            for n in node.body:
                if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Name) and n.targets[0].id == "sizes":
                    details["sizes"] = ast.unparse(n.value).removeprefix("MappingProxyType(").removesuffix(")")
    uses = [
        n.module for n in tree.body if isinstance(n, ast.ImportFrom) and n.module and n.module.startswith("seriatim")
    ]
    parts = [u.removeprefix("seriatim.") for u in uses if u.split(".")[1] not in ("laws", "systems", "training")]
    details["parts"] = ", ".join(parts)
    return everything()[key][0], ast.get_docstring(tree) or "", details, _result(f"{key}.json")


def _path(key: str) -> Path:
    return Path(__file__).parents[1].joinpath(*everything()[key][1].split(".")[1:]).with_suffix(".py")


def _result(name: str) -> dict[str, Any] | None:
    for root in RESULTS:
        if (root / name).is_file():
            return json.loads((root / name).read_text(encoding="utf-8"))
    return None
