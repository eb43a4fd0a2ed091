"""Prediction alignment: a small model is trained on what a large one writes, so that it drafts better for it (BiLD, Kim
et al. 2023; sequence-level distillation, Kim and Rush 2016). Labels only: the large model's likeliest tokens behind
prompts, not its laws."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from seriatim.systems.language_model import LanguageModel
from seriatim.systems.system import evenly
from seriatim.systems.text_system import Windows, beside
from seriatim.systems.tuned import Tuning
from seriatim.tokenizers.pieces import agree
from seriatim.training.checkpoint import save_json
from seriatim.verbs.load import load

FILE = "written.json"  # beside a run: what its teacher wrote, so that a resumed training learns the same
PROMPTS = 800  # that a teacher continues, where nothing else is said
LENGTH = 128  # tokens of a text and what is written behind it, where nothing else is said
HELD_OUT = 64  # prompts of the other side
TOGETHER = 8  # prompts that are continued at once

Pair = tuple[list[int], list[int]]


@dataclass(frozen=True)
class Written:
    """Prompts, and what a teacher wrote behind each, as ids; training draws them, and what was written counts."""

    pairs: Sequence[Pair]

    def __len__(self) -> int:
        return len(self.pairs)

    def take(self, index: Int[Tensor, " n"], generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """ "token": Int[n longest], 0 behind an answer; "counts": Bool[n longest], true for answers."""
        return beside([self.pairs[i] for i in index.tolist()])


def taught(
    system: LanguageModel, train: Any, test: Any, tuning: Tuning, folder: Path, bar: Callable[[str], Any] | None = None
) -> tuple[Written, Written, tuple[str, ...]]:
    """What the teacher of a tuning writes behind prompts of both sides, and what a user should hear of it; kept in the
    run's folder. Raises ValueError, OSError for a teacher that cannot be one, and where it writes nothing."""
    if (folder / FILE).is_file():
        kept = json.loads((folder / FILE).read_text(encoding="utf-8"))
        sides = [kept["train"], kept["test"]]
    else:
        teacher = teacher_of(system, str(tuning.teacher))
        length = tuning.length or min(LENGTH, system.model.layout.size, teacher.model.layout.size)
        asked = [prompts_of(side, n, length) for side, n in ((train, tuning.prompts or PROMPTS), (test, HELD_OUT))]
        display, before, sides = None if bar is None else bar("teacher"), 0, []
        for prompts in asked:

            def tell(done: int, before: int = before) -> None:
                if display is not None:
                    display.update(before + done, sum(map(len, asked)), {})

            sides.append(continued(teacher, prompts, length - length // 2, tell))
            before += len(prompts)
        if display is not None:
            display.close()
        if os.environ.get("RANK", "0") == "0":
            folder.mkdir(parents=True, exist_ok=True)
            save_json({"train": sides[0], "test": sides[1]}, folder / FILE)
    if not all(sides):
        raise ValueError(f"{tuning.teacher} wrote nothing behind these prompts: give a text that it continues")
    first, second = (Written([(prompt, answer) for prompt, answer in side]) for side in sides)
    tokens = sum(len(answer) for _, answer in first.pairs)
    return first, second, (f"{tuning.teacher} wrote {tokens:,} tokens behind {len(first):,} prompts",)


def teacher_of(system: LanguageModel, source: str) -> LanguageModel:
    """The model that a source names, if it can teach this one. Raises ValueError, OSError where it cannot."""
    teacher = load(source)
    if not isinstance(teacher, LanguageModel) or teacher.model.conditions:
        raise ValueError(f"{source} is {teacher.meta.key}: a teacher is a model that continues texts")
    if teacher.tokenizer is None or not agree(teacher.tokenizer, system.tokenizer):
        raise ValueError(
            f"the tokenizers of {source} ({teacher.meta.key}) and of the model that learns ({system.meta.key}) differ, "
            "so what one writes means nothing to the other: take two of the same tokenizer"
        )
    return teacher


def prompts_of(side: Any, count: int, length: int) -> list[list[int]]:
    """At most so many prompts of one side, spread evenly: the first half of a window of a text, or all of a
    conversation up to its first answer, if that leaves room for an answer in `length` tokens."""
    if isinstance(side, Windows):
        stretches = Windows(side.ids, max(length // 2, 1))
        return stretches.take(evenly(len(stretches), count))["token"].tolist()
    prompts = []
    for i in evenly(len(side), count):
        sample = side.take(i[None])
        first = int(sample["counts"][0].int().argmax())
        if 0 < first <= length // 2:
            prompts.append(sample["token"][0, :first].tolist())
    return prompts


def continued(
    teacher: LanguageModel, prompts: Sequence[Sequence[int]], new_tokens: int, tell: Callable[[int], None] | None = None
) -> list[Pair]:
    """What a model writes greedily behind prompts, those left out to which it says nothing. tell: how many are done."""
    pairs: list[Pair] = []
    for start in range(0, len(prompts), TOGETHER):
        some = [list(prompt) for prompt in prompts[start : start + TOGETHER]]
        made: Any = teacher.generate(some, max_new_tokens=new_tokens, temperature=0.0)
        pairs += [(prompt, g.ids) for prompt, g in zip(some, made, strict=True) if g.ids]
        if tell is not None:
            tell(start + len(some))
    return pairs
