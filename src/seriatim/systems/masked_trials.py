"""What decoders of tokens in any order cost and what it does to the text: held-out lines of code that are written as
they stand there, and continuations as another model finds them."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from seriatim.data.base import load_data
from seriatim.evaluation.metrics import distinct
from seriatim.systems.text_system import TextSystem
from seriatim.systems.trials import continued, held_out, quality

AT_ONCE = 16  # rows of a forward
ROOM = 32  # tokens that are written behind a context: a line and a little more


@dataclass(frozen=True)
class Line:
    """A line of held-out code and the tokens in front of it, but for the line break: a token may hold it and what
    follows it."""

    context: tuple[int, ...]
    text: str


def lines_of(system: TextSystem, count: int = 500, context: int = 160) -> list[Line]:
    """So many lines of held-out files of the standard library, drawn evenly, each of at least 6 letters and at most
    `ROOM` - 4 tokens. Raises ValueError where there are not so many."""
    files = [f.splitlines(keepends=True) for f in load_data("stdlib", "text").test.documents]
    places = [(f, i) for f, lines in enumerate(files) for i in range(20, len(lines)) if len(lines[i].strip()) >= 6]
    random.Random(0).shuffle(places)
    found: list[Line] = []
    for f, i in places:
        if len(system.tokenizer.encode(files[f][i])) <= ROOM - 4:
            before = system.tokenizer.encode("".join(files[f][max(i - 60, 0) : i]).removesuffix("\n"))
            found.append(Line(tuple(before[-context:]), files[f][i].rstrip("\n")))
        if len(found) == count:
            return found
    raise ValueError(f"the held-out files have {len(found)} such lines, not {count}")


@dataclass(frozen=True)
class Written:
    """What a decoder wrote behind prompts: ids of each, forwards and slots in all."""

    ids: list[list[int]]
    forwards: int
    slots: int

    @property
    def tokens(self) -> int:
        return sum(map(len, self.ids))


def written(
    system: TextSystem, decoder: str, prompts: Sequence[Sequence[int]], new: int, temperature: float, seed: int = 0,
    steps: int | None = None,
) -> Written:  # fmt: skip
    """By a decoder's name, in so many steps where it goes by them (None: one token at each); all `new` tokens, ends of
    text among them. Prompts of one length go together, and the forwards of a row are those that decide some of it."""
    sampling = replace(system.sampling, temperature=temperature, top_p=None, steps=steps)
    ids: list[list[int]] = [[] for _ in prompts]
    forwards = slots = 0
    for length in sorted({len(prompt) for prompt in prompts}):
        alike = [n for n, prompt in enumerate(prompts) if len(prompt) == length]
        for rows in (alike[i : i + AT_ONCE] for i in range(0, len(alike), AT_ONCE)):
            made = continued(system, [prompts[n] for n in rows], new, decoder, sampling, 1000 * seed + rows[0])
            forwards += sum(made.active)
            slots += sum(n * step.slots for n, step in zip(made.active, made.steps, strict=True))
            for n, text in zip(rows, made.ids, strict=True):
                ids[n] = text
    return Written(ids, forwards, slots)


def next_lines(
    system: TextSystem, decoder: str, lines: Sequence[Line], steps: int | None = None
) -> dict[str, Any]:  # fmt: skip
    """How many lines are written greedily as they stand in the file, which ones, the share of their letters that are
    right from the front, and tokens a forward."""
    made = written(system, decoder, [line.context for line in lines], ROOM, 0.0, steps=steps)
    texts = [system.tokenizer.decode(ids).split("\n")[1:2] for ids in made.ids]  # behind the end of the line before
    right = [text == [line.text] for text, line in zip(texts, lines, strict=True)]
    leading = [_leading("".join(text), line.text) for text, line in zip(texts, lines, strict=True)]
    return {
        "matches": sum(right) / len(right), "leading": sum(leading) / len(leading),
        "tokens_per_forward": made.tokens / made.forwards, "slots_per_token": made.slots / made.tokens,
        "right": [int(r) for r in right],
    }  # fmt: skip


def _leading(text: str, line: str) -> float:
    """The share of a line's letters that are right from the front, indentation among them."""
    wrong = (i for i, (a, b) in enumerate(zip(text, line, strict=False)) if a != b)
    return next(wrong, min(len(text), len(line))) / len(line)


def continuations(
    system: TextSystem, decoder: str, judge: Any, prompts: int = 24, new: int = 128, temperature: float = 1.0,
    seed: int = 0,
) -> dict[str, float]:  # fmt: skip
    """Texts behind held-out prompts: nats a token that `judge`, a next-token model of the same vocabulary, finds in
    them, distinct trigrams and entropy of their tokens (dull texts flatter the first), and tokens a forward."""
    given = held_out(system, prompts, 96)
    made = written(system, decoder, given, new, temperature, seed)
    nats, entropy = quality(given, made.ids, judge)
    return {
        "nats_per_token": nats, "distinct_3": distinct(made.ids, 3), "entropy": entropy,
        "tokens_per_forward": made.tokens / made.forwards, "slots_per_token": made.slots / made.tokens,
    }  # fmt: skip


def lines_trial(decoder: str, count: int = 200, steps: int | None = None) -> Callable[[Any, int], Mapping[str, Any]]:
    """A trial of a claim: a seed takes other lines."""

    def measure(system: Any, seed: int) -> Mapping[str, Any]:
        return next_lines(system, decoder, lines_of(system, count * (seed + 1))[seed :: seed + 1], steps)

    return measure


def paired(ours: Sequence[int], theirs: Sequence[int]) -> tuple[float, float]:
    """Difference of the shares of two lists of 0 and 1 about the same lines, and its standard error."""
    gaps = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean = sum(gaps) / len(gaps)
    return mean, math.sqrt(sum((g - mean) ** 2 for g in gaps) / max(len(gaps) - 1, 1) / len(gaps))
