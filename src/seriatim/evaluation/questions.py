"""What decoders are compared on: prompts of a file, or built in, half of them written for this library.

A language model has read the standard library, and what it has read it copies, which flatters every decoder that drafts
by copying. So half of the built-in prompts, those of `questions.jsonl`, stand nowhere else.
"""

from __future__ import annotations

import ast
import json
import sysconfig
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

LINES = (".jsonl", ".ndjson", ".json")  # names of files that hold one JSON object a line; all others are plain text
EXCERPT = 700  # characters of the standard library's texts, at most

# module and class: source that is to be continued from its middle
CODE = (
    ("textwrap", "TextWrapper"), ("csv", "Sniffer"), ("shlex", "shlex"), ("fractions", "Fraction"),
    ("configparser", "RawConfigParser"), ("statistics", "NormalDist"),
)  # fmt: skip
# module and name, or the module itself: docstring whose first part is to be continued
ENGLISH = (
    ("difflib", "SequenceMatcher"), ("argparse", ""), ("statistics", ""), ("textwrap", "TextWrapper"),
    ("optparse", ""), ("difflib", "Differ"),
)  # fmt: skip
# what is asked of a model that converses, and about which functions
EXPLAIN = "What does this Python function do, and what does it return?\n\n```python\n{}```"
REWRITE = "Add type hints and a comment on every branch, and change nothing else:\n\n```python\n{}```"
ASKED = (
    (EXPLAIN, "textwrap", "dedent"), (REWRITE, "posixpath", "commonpath"), (EXPLAIN, "heapq", "merge"),
    (REWRITE, "statistics", "median"), (EXPLAIN, "fnmatch", "filter"), (REWRITE, "calendar", "monthrange"),
)  # fmt: skip


@dataclass(frozen=True)
class Question:
    """A text to continue, or what a user says, one turn after another (`chat`); group: what kind of task it is."""

    turns: tuple[str, ...]
    group: str
    chat: bool


def builtin_questions(chat: bool) -> list[Question]:
    """Code and English to continue and, for a model that converses, questions; as many from the standard library as
    from `questions.jsonl`. Raises FileNotFoundError where Python came without its source."""
    ours = resources.files("seriatim.evaluation").joinpath("questions.jsonl").read_text(encoding="utf-8")
    found = [_question(json.loads(line)) for line in ours.splitlines()]
    found += [Question((_middle(_source(*place)),), "library code", False) for place in CODE]
    found += [Question((_beginning(_docstring(*place)),), "library English", False) for place in ENGLISH]
    found += [Question((ask.format(_source(*place)),), "library chat", True) for ask, *place in ASKED]
    return [q for q in found if chat or not q.chat]


def read_questions(path: str | Path) -> list[Question]:
    """The prompts of a file. Named .jsonl, .ndjson or .json, each line is an object: {"turns": [...]}, what a user says
    (Spec-Bench's format), or {"prompt": "..."}, a text to continue; "category" groups them. Any other file is plain
    text, a prompt a paragraph, with empty lines between.

    Raises FileNotFoundError, and ValueError that says what is wrong in which line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of prompts {path}; give a file, or builtin")
    try:
        text = path.read_bytes().decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x} ({error.reason}); save it "
            "as UTF-8"
        ) from None
    found = _json_lines(path, text) if path.suffix.lower() in LINES else _paragraphs(text)
    if not found:
        raise ValueError(f"{path} holds no prompt: it is empty")
    return found


def _paragraphs(text: str) -> list[Question]:
    """Lines that follow one another without an empty one between, without space at their end."""
    parts: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.strip():
            parts[-1].append(line)
        elif parts[-1]:
            parts.append([])
    return [Question(("\n".join(part).rstrip(),), "text", False) for part in parts if part]


def _json_lines(path: Path, text: str) -> list[Question]:
    found = []
    for number, line in enumerate(text.split("\n"), 1):  # JSON itself may hold what else ends lines
        if not line.strip():
            continue
        try:
            said = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number} of {path} is no JSON ({error}); each line is one object") from None
        try:
            found.append(_question(said))
        except ValueError as error:
            raise ValueError(f"line {number} of {path}: {error}") from None
    return found


def _question(said: Any) -> Question:
    """A line of a file. Raises ValueError for what is none."""
    if not isinstance(said, dict) or not ({"turns", "prompt"} & said.keys()):
        raise ValueError('each line is {"turns": ["...", ...]} (what a user says) or {"prompt": "..."} (to continue)')
    chat = "turns" in said
    turns = said["turns"] if chat else [said["prompt"]]
    if not isinstance(turns, list) or not turns or not all(isinstance(t, str) and t.strip() for t in turns):
        raise ValueError("turns are a list of texts, a prompt is a text, and none is empty")
    group = said.get("category", "chat" if chat else "text")
    if not isinstance(group, str):
        raise ValueError(f"a category is a text, got {group!r}")
    return Question(tuple(turns), group, chat)


# ---- the standard library --------------------------------------------------------------------------------------------


def _source(module: str, name: str) -> str:
    """The text of a class or function."""
    return f"{ast.get_source_segment(_text(module), _node(module, name))}\n"


def _docstring(module: str, name: str) -> str:
    node = _node(module, name) if name else ast.parse(_text(module))
    return ast.get_docstring(node) or ""


def _node(module: str, name: str) -> ast.ClassDef | ast.FunctionDef:
    kinds = (ast.ClassDef, ast.FunctionDef)
    return next(n for n in ast.parse(_text(module)).body if isinstance(n, kinds) and n.name == name)


@lru_cache(maxsize=32)
def _text(module: str) -> str:
    """The source of a module, which need not be what is imported: some have a faster twin in C."""
    path = Path(sysconfig.get_paths()["stdlib"]) / f"{module}.py"
    if not path.is_file():
        raise FileNotFoundError(
            f"the built-in prompts need the standard library's source, and this Python came without {path.name}; give "
            "a file of prompts"
        )
    return path.read_text(encoding="utf-8")


def _middle(text: str) -> str:
    """The lines before the middle."""
    before = text[: text.rfind("\n", 0, len(text) // 2) + 1]
    return before[before.find("\n", max(len(before) - EXCERPT, 0)) + 1 :]


def _beginning(text: str) -> str:
    """The first half, or the first hundreds of letters, to the end of a word."""
    text = text[: min(len(text) // 2, EXCERPT)]
    return text[: max(text.rfind(" "), text.rfind("\n"))].rstrip()
