"""Runs the laws over the catalogue, each law's mutant, and each system's mutant; says what holds, as a table."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from seriatim.laws.decoders import OF_DECODERS, DecoderCase
from seriatim.laws.laws import LAWS, Broken, NotApplicable
from seriatim.laws.mutants import MUTANTS
from seriatim.laws.series import OF_SERIES, SeriesCase
from seriatim.laws.unmasking import OF_UNMASKING, UnmaskingCase
from seriatim.systems.meta import catalogue, load

Status = Literal["holds", "broken", "n/a"]


RULES: Mapping[type, Any] = {DecoderCase: OF_DECODERS, UnmaskingCase: OF_UNMASKING, SeriesCase: OF_SERIES}


@dataclass(frozen=True)
class Finding:
    """What a law said of a subject (a system, or a mutant that must be caught)."""

    subject: str
    law: int
    status: Status
    note: str
    seconds: float


def judge(subject: str, law: int, make: Callable[[], Any]) -> Finding:
    """One law on one case; an error inside a law counts as broken."""
    start = time.perf_counter()
    status: Status = "holds"
    try:
        case = make()
        note = RULES.get(type(case), LAWS)[law][1](case)
    except NotApplicable as reason:
        status, note = "n/a", str(reason)
    except Broken as reason:
        status, note = "broken", str(reason)
    except Exception as error:
        status, note = "broken", f"{type(error).__name__}: {error}"
    return Finding(subject, law, status, note, time.perf_counter() - start)


def system_findings(key: str, numbers: Sequence[int] = tuple(LAWS)) -> Iterator[Finding]:
    """The laws on one system."""
    module = load(key)
    for number in numbers:
        yield judge(key, number, module.case)


def mutant_finding(key: str) -> Finding:
    """Is a system's mutant caught? `holds` means that some law broke on it; its note says which."""
    module = load(key)
    start = time.perf_counter()
    for number in (3, 2, 1, 7, 4, 5, 6, 8, 9):
        found = judge(key, number, module.mutant)
        if found.status == "broken":
            note = f"law {number}: {found.note}"
            return Finding(f"mutant of {key}", number, "holds", note, time.perf_counter() - start)
    return Finding(f"mutant of {key}", 0, "broken", "no law catches it", time.perf_counter() - start)


def law_mutant_finding(number: int) -> Finding:
    """Does a law catch its own mutant, by finding something wrong rather than by falling over?"""
    start = time.perf_counter()
    base = load("next-token").case()
    try:
        LAWS[number][1](MUTANTS[number](base))
    except Broken as reason:
        return Finding("law's mutant", number, "holds", f"caught: {reason}", time.perf_counter() - start)
    except Exception as error:
        note = f"not judged, it fell over: {type(error).__name__}: {error}"
        return Finding("law's mutant", number, "broken", note, time.perf_counter() - start)
    return Finding("law's mutant", number, "broken", "not caught", time.perf_counter() - start)


def all_keys() -> list[str]:
    """Systems that have an order; tokenizers have none, and are held to their round trip by the tests."""
    return [key for key, (meta, _) in catalogue().items() if meta.family != "tokenizer"]
