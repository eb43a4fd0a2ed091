"""Conversations in JSON lines: what is read, what is counted and named, which side each is on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from seriatim.data.base import load_data
from seriatim.data.conversations import Conversations

TALK = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
PAIR = {"prompt": "Hi", "completion": "Hello"}


def talk(n: int) -> dict:
    return {"messages": [{"role": "user", "content": f"ask {n}"}, {"role": "assistant", "content": f"answer {n}"}]}


def written(path: Path, lines) -> Path:
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines), encoding="utf-8")
    return path


def said(side: Conversations) -> list[str]:
    return [conversation[0]["content"] for conversation in side.conversations]


def test_messages_and_pairs_are_the_same_conversation(tmp_path):
    data = load_data(written(tmp_path / "a.jsonl", [TALK, PAIR]), "text")
    assert data.train.conversations == [TALK["messages"]] == data.test.conversations and not data.notes


def test_a_conversation_keeps_its_side_as_others_come(tmp_path):
    few = load_data(written(tmp_path / "a.jsonl", map(talk, range(40))), "text", held_out=0.2)
    many = load_data(written(tmp_path / "b.jsonl", map(talk, range(200))), "text", held_out=0.2)
    assert set(said(few.train)) < set(said(many.train)) and set(said(few.test)) < set(said(many.test))
    assert len(few.train) + len(few.test) == 40 and 20 < len(many.test) < 60
    again = load_data(tmp_path / "b.jsonl", "text", held_out=0.2)
    assert said(again.test) == said(many.test)


def test_a_folder_is_read_whole_and_its_sides_are_kept(tmp_path):
    for side, numbers in (("train", range(5)), ("test", range(5, 7))):
        (tmp_path / side).mkdir()
        written(tmp_path / side / "a.jsonl", map(talk, numbers))
    data = load_data(tmp_path, "text")
    assert len(data.train) == 5 and said(data.test) == ["ask 5", "ask 6"]


def test_lines_that_are_none_are_counted_and_named(tmp_path):
    lines = [
        talk(1), "{half", "[1]", {"messages": "x"}, {"messages": [{"role": "user"}]}, {"prompt": "x"}, {"text": "x"},
        {"prompt": 1, "completion": "x"}, "[" * 5000, talk(2), "", {"messages": [{"role": "user", "content": "Hi"}]},
        {"prompt": "x", "completion": "  "},
    ]  # fmt: skip
    data = load_data(written(tmp_path / "a.jsonl", lines), "text")
    assert len(data.train) + len(data.test) == 2
    assert data.notes == (
        "8 of 12 lines are no conversations: line 2 (no JSON), line 3 (no JSON object), line 4 (a conversation is a "
        'list of messages: [{"role": "user", "content": "Hello"}]), line 5 (message 0 has no content), line 6 (no '
        "completion) and 3 more",
        "2 of 12 conversations hold no answer of an assistant",
    )


def test_bytes_that_are_no_text_are_a_line_that_is_none(tmp_path):
    file = tmp_path / "a.jsonl"
    good = b"".join(json.dumps(talk(n)).encode() + b"\n" for n in range(3))
    file.write_bytes(b"\xef\xbb\xbf" + good + b'{"prompt": "\xff", "completion": "x"}\n')
    data = load_data(file, "text")
    assert len(data.train) + len(data.test) == 3 and "line 4 (no JSON)" in data.notes[0]


def test_too_few_are_an_error_that_says_what_a_line_is(tmp_path):
    file = written(tmp_path / "a.jsonl", [TALK, "{half"])
    with pytest.raises(ValueError, match=r"holds 1 conversations .*line 2 \(no JSON\).*A line is \{\"messages\""):
        load_data(file, "text")


def test_other_json_lines_are_tables_still(tmp_path):
    pytest.importorskip("datasets")
    data = load_data(written(tmp_path / "a.jsonl", [{"text": f"a text {n}"} for n in range(9)]), "text")
    assert not isinstance(data.train, Conversations) and len(data.train) + len(data.test) == 9


def test_only_its_own_options_are_taken(tmp_path):
    with pytest.raises(TypeError, match="takes no column; it takes held_out"):
        load_data(written(tmp_path / "a.jsonl", [TALK, PAIR]), "text", column="text")
