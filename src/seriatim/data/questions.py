"""Small questions about numbers, dates and units, each with one right answer in several wordings: what a judge of
drafts is trained and measured on, where a good token need not be the one that a model would have written.

Wordings differ in the words and in the order of the numbers; errors are other digits. Everything follows from a seed.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from seriatim.data.base import Data, Texts, check_held_out, share

MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip
UNITS = (
    ("minutes", "hours", 60), ("hours", "days", 24), ("days", "weeks", 7), ("months", "years", 12),
    ("eggs", "dozens", 12), ("metres", "kilometres", 1000), ("grams", "kilograms", 1000), ("cents", "euros", 100),
)  # fmt: skip
WORDINGS = 3  # of every answer
NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class Question:
    """text: what is asked; answer: the number it comes to; wordings: the answer in full; numbers: those that may stand
    in one."""

    text: str
    answer: int
    wordings: tuple[str, ...]
    numbers: frozenset[int]

    @property
    def prompt(self) -> str:
        """What an answer is written behind."""
        return f"Q: {self.text}\nA:"

    def said(self, wording: int) -> str:
        """An answer as it stands behind the prompt, its space included."""
        return f" {self.wordings[wording]}"

    def right(self, said: str) -> bool:
        """Whether the first line of an answer, in whatever words, comes to the right number and says no wrong one."""
        found = {int(x) for x in NUMBER.findall(said.partition("\n")[0])}
        return self.answer in found and found <= self.numbers

    def spoilt(self, wording: int, rng: random.Random) -> tuple[str, int, int]:
        """An answer with other digits in one of its numbers, and where these stand in it: from the first that is wrong
        to behind the last."""
        said = self.said(wording)
        place = rng.choice(list(NUMBER.finditer(said)))
        old, new = place.group(), place.group()
        while int(new) in self.numbers:
            some = [i for i in range(len(old)) if rng.random() < 0.5] or [rng.randrange(len(old))]
            new = "".join(str(rng.randint(i == 0, 9)) if i in some else digit for i, digit in enumerate(old))
        wrong = [i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]
        start = place.start()
        return said[:start] + new + said[place.end() :], start + wrong[0], start + wrong[-1] + 1


def _sum(rng: random.Random) -> Question:
    a, b = rng.randint(2, 60), rng.randint(2, 60)
    wordings = (f"{a} + {b} = {a + b}.", f"The sum of {a} and {b} is {a + b}.", f"Adding {b} to {a} gives {a + b}.")
    return Question(f"What is {a} plus {b}?", a + b, wordings, frozenset({a, b, a + b}))


def _difference(rng: random.Random) -> Question:
    b, c = rng.randint(2, 60), rng.randint(2, 60)
    a = b + c
    wordings = (f"{a} - {b} = {c}.", f"The difference of {a} and {b} is {c}.", f"Taking {b} from {a} leaves {c}.")
    return Question(f"What is {a} minus {b}?", c, wordings, frozenset({a, b, c}))


def _product(rng: random.Random) -> Question:
    a, b = rng.randint(2, 12), rng.randint(2, 12)
    wordings = (f"{a} x {b} = {a * b}.", f"The product of {a} and {b} is {a * b}.", f"{b} times {a} makes {a * b}.")
    return Question(f"What is {a} times {b}?", a * b, wordings, frozenset({a, b, a * b}))


def _date(rng: random.Random) -> Question:
    day, later, month = rng.randint(1, 18), rng.randint(2, 10), rng.choice(MONTHS)
    end = day + later
    wordings = (
        f"It is {end} {month}.", f"{later} days behind {day} {month} is {end} {month}.",
        f"Counting {later} days from {day} {month} leads to {month} {end}.",
    )  # fmt: skip
    return Question(f"Which day is {later} days after {day} {month}?", end, wordings, frozenset({day, later, end}))


def _unit(rng: random.Random) -> Question:
    (small, large, factor), n = rng.choice(UNITS), rng.randint(2, 12)
    total = n * factor
    wordings = (
        f"{n} {large} are {total} {small}.", f"There are {total} {small} in {n} {large}.",
        f"At {factor} {small} each, {n} {large} make {total} {small}.",
    )  # fmt: skip
    return Question(f"How many {small} are {n} {large}?", total, wordings, frozenset({n, factor, total}))


KINDS: dict[str, Callable[[random.Random], Question]] = {
    "sum": _sum, "difference": _difference, "product": _product, "date": _date, "unit": _unit,
}  # fmt: skip


def asked(seed: int, count: int, held_out: float = 0.05, test: bool = False) -> list[Question]:
    """So many questions of one side, of all kinds; the side of a question follows from its text."""
    rng, found = random.Random(seed), list[Question]()
    while len(found) < count:
        question = rng.choice(list(KINDS.values()))(rng)
        if (share(question.text) < held_out) == test:
            found.append(question)
    return found


def questions(
    count: int = 20_000, wording: int | None = None, wrong: float = 0.0, held_out: float = 0.05, seed: int = 0
) -> Data:
    """Questions with their answers, a document each.

    wording: the one that four of five answers have (None: all alike); wrong: share of answers with an error, in the
    training side. Raises ValueError for what is out of range.
    """
    check_held_out(held_out)
    if wording is not None and not 0 <= wording < WORDINGS:
        raise ValueError(f"answers have wordings 0 to {WORDINGS - 1}, got {wording}")
    if count < 2 or not 0 <= wrong <= 1:
        raise ValueError(
            f"at least 2 questions, of which a share from 0 to 1 is answered wrongly; got {count}, {wrong}"
        )
    rng = random.Random(f"{seed} wordings")

    def document(question: Question, wrong: float) -> str:
        words = rng.randrange(WORDINGS) if wording is None or rng.random() < 0.2 else wording
        said = question.spoilt(words, rng)[0] if rng.random() < wrong else question.said(words)
        return f"{question.prompt}{said}\n"

    test = max(round(count * held_out), 1)
    sides = [
        tuple(document(q, w) for q in asked(seed, n, held_out, side))
        for n, side, w in ((count - test, False, wrong), (test, True, 0.0))
    ]
    return Data("questions", "text", Texts(sides[0]), Texts(sides[1]))
