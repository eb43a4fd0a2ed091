"""Conversations as a data set: JSON lines, each {"messages": [{"role": "user", "content": "Hello"}, ...]}, or a pair
{"prompt": "Hello", "completion": "Hi!"}, which is a question and its answer.

The side of a conversation is a hash of what is said in it. What an answer is to a model, its template says
(`interop.answers`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from seriatim.data.base import Data, check_held_out, has_sides, naming, share, split_paths, suffix, visible_files
from seriatim.interop.chat import checked

Conversation = Sequence[Mapping[str, str]]

ENDINGS = (".jsonl", ".ndjson")
LOOKED_AT = 20  # lines that tell what a file holds
LEAST = 2  # conversations, one for each side
EXPECTED = '{"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]} or {"prompt": ..., '
EXPECTED += '"completion": ...}'


@dataclass(frozen=True)
class Conversations:
    """One side of a set of conversations, each with at least one answer of an assistant."""

    conversations: Sequence[Conversation]

    def __len__(self) -> int:
        return len(self.conversations)


def holds_conversations(path: Path) -> bool:
    """Whether a file of JSON lines, or a folder of nothing else, holds conversations, by its first lines."""
    names = [path.name] if path.is_file() else visible_files(path)
    if not names or any(suffix(name) not in ENDINGS for name in names):
        return False
    first = path if path.is_file() else path / names[0]
    return any(_looks_like_one(raw) for _, raw in islice(_lines(first), LOOKED_AT))


def _looks_like_one(raw: bytes) -> bool:
    try:
        said = json.loads(raw)
    except (ValueError, RecursionError):
        return False
    return isinstance(said, dict) and ("messages" in said or {"prompt", "completion"} <= set(said))


def conversations(path: Path, held_out: float = 0.05) -> Data:
    """A file of conversations, or all files of a folder. Lines that are none are counted and named, conversations
    without an answer left out. Folders called train and test are the sides.

    Raises ValueError where fewer than two conversations are left, with what is wrong with the others.
    """
    check_held_out(held_out)
    root = Path(path).expanduser()
    names = [root.name] if root.is_file() else visible_files(root)
    sided = has_sides({name.split("/")[0].lower() if "/" in name else "" for name in names})
    tested = set(split_paths(names, held_out)[1]) if sided else set()
    sides: tuple[list[Conversation], list[Conversation]] = ([], [])
    wrong, silent, total = [], 0, 0
    for name in names:
        for number, raw in _lines(root if root.is_file() else root / name):
            total += 1
            try:
                said = conversation(raw)
            except ValueError as error:
                wrong.append(f"{name + ' ' if len(names) > 1 else ''}line {number} ({error})")
                continue
            if not any(answers(message) for message in said):
                silent += 1
                continue
            test = name in tested if sided else share(json.dumps(said)) < held_out
            sides[test].append(said)
    notes = []
    if wrong:
        notes.append(f"{len(wrong):,} of {total:,} lines are no conversations: {naming(wrong)}")
    if silent:
        notes.append(f"{silent:,} of {total:,} conversations hold no answer of an assistant")
    train, test_side = sides
    if len(train) + len(test_side) < LEAST:
        raise ValueError(
            f"{root} holds {len(train) + len(test_side)} conversations with an answer, at least {LEAST} are needed"
            + (f" ({'; '.join(notes)})" if notes else "")
            + f". A line is {EXPECTED}"
        )
    for few, many in ((train, test_side), (test_side, train)):
        if not few:  # the last one changes sides
            few.append(many.pop())
    return Data(root.name, "text", Conversations(train), Conversations(test_side), notes=tuple(notes))


def conversation(raw: bytes | str) -> Conversation:
    """The messages of one line. Raises ValueError that says why it holds none."""
    try:
        said: Any = json.loads(raw)
    except (ValueError, RecursionError):
        raise ValueError("no JSON") from None
    if not isinstance(said, dict):
        raise ValueError("no JSON object")
    if "messages" in said:
        return checked(said["messages"])
    lacking = [key for key in ("prompt", "completion") if key not in said]
    if lacking:
        raise ValueError("neither messages nor prompt and completion" if len(lacking) == 2 else f"no {lacking[0]}")
    if not isinstance(said["prompt"], str) or not isinstance(said["completion"], str):
        raise ValueError("prompt and completion must be text")
    return [{"role": "user", "content": said["prompt"]}, {"role": "assistant", "content": said["completion"]}]


def answers(message: Mapping[str, str]) -> bool:
    """Whether a message is what an assistant says, and says something."""
    return message["role"] == "assistant" and bool(message["content"].strip())


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbers, from 1, and contents of the lines that are not empty."""
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            text = raw.removeprefix(b"\xef\xbb\xbf").strip()
            if text:
                yield number, text
