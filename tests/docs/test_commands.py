"""Every command that the documentation shows is one that the program takes."""

from __future__ import annotations

import re
import shlex
from dataclasses import fields

import pytest

from seriatim.cli.main import parser
from seriatim.cli.training import settings_of
from seriatim.systems.meta import catalogue, everything, load
from seriatim.systems.tuned import Tuning
from seriatim.training.recipe import Recipe
from seriatim.verbs.drafting import Reading, is_draft_part
from seriatim.verbs.load import system_class

PLACEHOLDERS = {"KEY"}
OWN = {"tokenizer_steps"}  # settings of the verb itself


def commands(text: str) -> list[str]:
    """`seriatim ...` of code blocks and of code in a line, whatever launches it."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.S | re.M)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()] + inline
    launched = [re.sub(r"^(accelerate launch|torchrun)\b.* -m seriatim ", "seriatim ", line) for line in lines]
    plain = [re.sub(r"^\.venv/bin/", "", line) for line in launched]
    return [line for line in plain if re.match(r"seriatim [-a-z]", line) and "--help" not in line]


def sizes_of(key: str) -> set[str]:
    """Of a system, or of what is trained beside a model."""
    return set(getattr(load(key), "SIZES", ())) if is_draft_part(key) else set(system_class(key).sizes)


def config_of(key: str) -> set[str]:
    """Settings that are no recipe's."""
    configs = (load(key).Config, Reading) if is_draft_part(key) else (system_class(key).Config,)
    return {f.name for config in configs for f in fields(config)}


def mistakes(command: str, known: set[str]) -> str | None:
    """What is wrong with a command; None where nothing is."""
    try:
        options, rest = parser().parse_known_args(shlex.split(command)[1:])
    except SystemExit:
        return "its arguments are not taken"
    if rest and not getattr(options, "free", False):
        return f"there are no {rest}"
    given = getattr(options, "keys", None) or [getattr(options, "key", None)]
    named = [None if key is None else key.partition(":")[0] for key in given]
    for key in named:
        if key is not None and key not in known:
            return f"there is no system {key!r}"
    size = getattr(options, "size", None)
    for key in named:
        if size is not None and key in catalogue() and size not in sizes_of(key):
            return f"{key} has no size {size!r}"
    if rest and options.key in catalogue():
        further = {f.name for f in fields(Tuning)} if options.base else set()
        unknown = set(settings_of(rest)) - config_of(options.key) - {f.name for f in fields(Recipe)} - OWN - further
        return f"{options.key} has no {sorted(unknown)}" if unknown else None
    return None


def test_every_command_is_taken(documents, example):
    added = re.search(r'key="([\w-]+)"', example)
    assert added is not None
    known = {*everything(), *PLACEHOLDERS, added[1]}
    found = [(name, c) for name, text in documents.items() for c in commands(text)]
    wrong = [f"{name}: {c}: {why}" for name, c in found if (why := mistakes(c, known))]
    assert not wrong, "\n".join(wrong)
    assert len(found) > 30, "the documents have commands, and they were found"
    assert {c.split()[1] for _, c in found} >= {"train", "generate", "evaluate", "compare", "list", "show", "laws"}


@pytest.mark.parametrize(
    "command",
    [
        "seriatim trains var",
        "seriatim train nosuch",
        "seriatim train var --widht 3",
        "seriatim train var --size huge",
        "seriatim generate runs/var --beams 3",
    ],
)
def test_a_wrong_command_is_found(command, capsys):
    assert mistakes(command, set(catalogue())) is not None
