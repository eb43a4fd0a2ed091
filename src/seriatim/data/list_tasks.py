"""Small tasks whose answers depend on themselves more or less: lists of names, puzzles, sentences. All right answers of
a problem are known, so what a decoder loses by deciding several tokens at once can be computed.

After ParallelBench (2025): a waiting line to copy, reverse, sort, shuffle, or to change at a place or anywhere; Latin
squares and sudokus of 4 x 4; words to sentences, here of a small grammar of its own. All right answers of a problem are
equally likely, a word is a token, and everything follows from a seed. The side of a problem is a hash of its prompt.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations, product
from typing import overload

from seriatim.data.base import Data, Pairs, check_held_out, share

Words = tuple[str, ...]

NAMES: Words = (
    "Ada", "Ben", "Carl", "Dora", "Emil", "Finn", "Grace", "Hans", "Ida", "Jane", "Kai", "Lena", "Maria", "Nils",
    "Omar", "Paul", "Rosa", "Sam", "Tara", "Uma",
)  # fmt: skip
NUMBERS: Words = tuple(str(i) for i in range(16))
SYMBOLS: Words = tuple("ABCDEFGH")
DIGITS, BLANK = NUMBERS[1:5], NUMBERS[0]
NOUNS = {n: n + "s" for n in ("bird", "boy", "cat", "dog", "girl", "horse", "king", "robot")}  # and their plurals
VERBS = {v: v + "s" for v in ("draw", "find", "follow", "greet", "hear", "help", "know", "see")}  # and of one subject
SINGULAR, PLURAL = ("a", "this"), ("two", "these")
NOTHING, ANSWER = "-", "="  # in place of a word or an index; what an answer follows

LISTS = (
    "copy", "reverse", "sort", "shuffle", "insert-index", "insert-random", "remove-index", "remove-random",
    "replace-index", "replace-random",
)  # fmt: skip
PUZZLES = ("latin-square", "sudoku")
SENTENCES = ("sentence-easy", "sentence-medium", "sentence-hard")
GROUPS = {"lists": LISTS, "puzzles": PUZZLES, "sentences": SENTENCES, "all": LISTS + PUZZLES + SENTENCES}
LENGTHS = (3, 4, 5, 6)
ROOMS = (max(LENGTHS), 16)  # that lists take in prompts
HIDDEN = 4  # cells of a sudoku; the other 12 are given, as in ParallelBench


@dataclass(frozen=True)
class Problem:
    """One task. items: the list, symbols, cells, or words that it is about; word: what is put into a list; index:
    where, from 0 ("-": anywhere)."""

    task: str
    items: Words
    word: str = NOTHING
    index: str = NOTHING

    @property
    def prompt(self) -> Words:
        """What an answer follows; short lists are filled up, so that places in a list and its answer are equally far
        apart whatever its length."""
        room = next(room for room in ROOMS if len(self.items) <= room)
        filler = (NOTHING,) * (room - len(self.items) if self.task in LISTS else 0)
        return (self.task, self.word, self.index, *self.items, *filler, ANSWER)

    @property
    def places(self) -> list[int]:
        """Where a list may be changed."""
        if self.index != NOTHING:
            return [int(self.index)]
        return list(range(len(self.items) + (self.task == "insert-random")))

    def answers(self) -> list[Words]:
        """All that are right, each equally likely. Of a shuffled list there are n! - 1."""
        return _ANSWERS[self.task](self)

    def right(self, said: Sequence[str]) -> bool:
        """Whether an answer is right: the very list, a shuffled one other than what was given, any valid outcome of a
        change, any square that keeps the rules and what is given, any sentence of all words."""
        answer = tuple(said)
        if self.task == "shuffle":
            return answer != self.items and sorted(answer) == sorted(self.items)
        if self.task == "latin-square":
            return len(answer) == 16 and _is_latin(answer, self.items)
        return answer in self.answers()

    def answer(self, rng: random.Random) -> Words:
        """One of the right answers."""
        if self.task == "shuffle":  # of which there may be too many to list
            said = self.items
            while said == self.items:
                said = tuple(rng.sample(self.items, len(self.items)))
            return said
        if self.task == "latin-square":
            return tuple(self.items[i] for i in rng.choice(squares()))
        return rng.choice(self.answers())


# ---- what is right ---------------------------------------------------------------------------------------------------


def _inserted(p: Problem) -> list[Words]:
    return [(*p.items[:i], p.word, *p.items[i:]) for i in p.places]


def _removed(p: Problem) -> list[Words]:
    return [(*p.items[:i], *p.items[i + 1 :]) for i in p.places]


def _replaced(p: Problem) -> list[Words]:
    return [(*p.items[:i], p.word, *p.items[i + 1 :]) for i in p.places]


@lru_cache(maxsize=1)
def squares() -> tuple[tuple[int, ...], ...]:
    """All 576 Latin squares of 0 to 3, row by row."""
    rows = list(permutations(range(4)))
    found: list[tuple[tuple[int, ...], ...]] = [()]
    for _ in range(4):
        found = [(*s, r) for s in found for r in rows if all(a != b for t in s for a, b in zip(t, r, strict=True))]
    return tuple(tuple(x for row in s for x in row) for s in found)


@lru_cache(maxsize=1)
def sudokus() -> tuple[Words, ...]:
    """All 288 of them: Latin squares whose four corners of 2 x 2 hold each digit, too."""
    corner = [[4 * (r + i) + c + j for i in (0, 1) for j in (0, 1)] for r in (0, 2) for c in (0, 2)]
    return tuple(tuple(DIGITS[x] for x in s) for s in squares() if all(len({s[i] for i in c}) == 4 for c in corner))


def _is_latin(answer: Words, symbols: Words) -> bool:
    lines = [answer[4 * i : 4 * i + 4] for i in range(4)] + [answer[i::4] for i in range(4)]
    return all(set(line) == set(symbols) for line in lines)


def _filled(p: Problem) -> list[Words]:
    given = [i for i, x in enumerate(p.items) if x != BLANK]
    return [s for s in sudokus() if all(s[i] == p.items[i] for i in given)]


def _sentences(p: Problem) -> list[Words]:
    """Article, noun, verb, article, noun: nouns in either place; in "medium" one or many of each, and a verb that
    agrees with the first; in "hard" articles that agree, too."""
    verb = next(x for x in p.items if x in VERBS)
    nouns = [x for x in p.items if x in NOUNS]
    phrases = {
        "sentence-easy": lambda n: [("the", n, False)],
        "sentence-medium": lambda n: [("the", n, False), ("the", NOUNS[n], True)],
        "sentence-hard": lambda n: [(a, n, False) for a in SINGULAR] + [(a, NOUNS[n], True) for a in PLURAL],
    }[p.task]
    return [
        (a, subject, verb if many else VERBS[verb], b, object_)
        for one, other in permutations(nouns)
        for (a, subject, many), (b, object_, _) in product(phrases(one), phrases(other))
    ]


_ANSWERS: dict[str, Callable[[Problem], list[Words]]] = {
    "copy": lambda p: [p.items],
    "reverse": lambda p: [p.items[::-1]],
    "sort": lambda p: [tuple(sorted(p.items))],
    "shuffle": lambda p: [x for x in permutations(p.items) if x != p.items],
    **{f"insert-{where}": _inserted for where in ("index", "random")},
    **{f"remove-{where}": _removed for where in ("index", "random")},
    **{f"replace-{where}": _replaced for where in ("index", "random")},
    "latin-square": lambda p: [tuple(p.items[i] for i in s) for s in squares()],
    "sudoku": _filled,
    **dict.fromkeys(SENTENCES, _sentences),
}


# ---- problems --------------------------------------------------------------------------------------------------------


def vocabulary() -> Words:
    """Every word of any prompt or answer."""
    words = (
        *GROUPS["all"], NOTHING, ANSWER, *NUMBERS, *NAMES, *SYMBOLS, "the", *SINGULAR, *PLURAL,
        *NOUNS, *NOUNS.values(), *VERBS, *VERBS.values(),
    )  # fmt: skip
    return tuple(dict.fromkeys(words))


def problem(task: str, length: int, rng: random.Random) -> Problem:
    """A problem of a task; `length` is that of its list, where it has one."""
    if task == "latin-square":
        return Problem(task, tuple(rng.sample(SYMBOLS, 4)))
    if task == "sudoku":
        hidden = set(rng.sample(range(16), HIDDEN))
        return Problem(task, tuple(BLANK if i in hidden else x for i, x in enumerate(rng.choice(sudokus()))))
    if task in SENTENCES:
        words = [*rng.sample(list(NOUNS), 2), rng.choice(list(VERBS))]
        return Problem(task, tuple(rng.sample(words, 3)))
    kind, _, where = task.partition("-")
    names = rng.sample(NAMES, length + 1)
    items = tuple(names[:length])
    word = names[-1] if kind in ("insert", "replace") else NOTHING
    index = str(rng.randrange(length + (kind == "insert"))) if where == "index" else NOTHING
    return Problem(task, items, word, index)


def asked(
    seed: int | str, tasks: Sequence[str], lengths: Sequence[int], held_out: float = 0.05, test: bool = False
) -> tuple[Problem, Words]:
    """The problem of one side that follows from a seed, and one of its right answers."""
    rng = random.Random(seed)
    while True:
        found = problem(rng.choice(tasks), rng.choice(lengths), rng)
        if (share(" ".join(found.prompt)) < held_out) == test:
            return found, found.answer(rng)


@dataclass(frozen=True)
class Problems(Sequence[tuple[str, str]]):
    """Prompts and answers as texts, each made when it is asked for."""

    size: int
    tasks: Words
    lengths: tuple[int, ...]
    held_out: float
    seed: int
    test: bool

    def __len__(self) -> int:
        return self.size

    @overload
    def __getitem__(self, index: int) -> tuple[str, str]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[str, str]]: ...
    def __getitem__(self, index: int | slice) -> tuple[str, str] | list[tuple[str, str]]:
        if isinstance(index, slice):
            return [self[i] for i in range(self.size)[index]]
        number = range(self.size)[index]
        found, answer = asked(f"{self.seed} {self.test} {number}", self.tasks, self.lengths, self.held_out, self.test)
        return " ".join(found.prompt), " ".join(answer)


def list_tasks(
    count: int = 200_000,
    tasks: str | Sequence[str] = "lists",
    lengths: Sequence[int] = LENGTHS,
    held_out: float = 0.05,
    seed: int = 0,
) -> Data:
    """Problems with an answer each, of all tasks and lengths alike.

    tasks: keys, or a group of them (lists, puzzles, sentences, all); lengths: of lists, 2 to 15 names. Raises
    ValueError for what there is not.
    """
    check_held_out(held_out)
    chosen = GROUPS.get(tasks, (tasks,)) if isinstance(tasks, str) else tuple(tasks)
    unknown = [t for t in chosen if t not in GROUPS["all"]]
    if unknown or not chosen:
        groups = ", ".join(GROUPS)
        raise ValueError(f"no task {', '.join(unknown)}; there are {', '.join(GROUPS['all'])}, or {groups}")
    if count < 2 or not lengths or not all(2 <= n < len(NUMBERS) for n in lengths):
        raise ValueError(f"at least 2 problems, of lists of 2 to {len(NUMBERS) - 1} names; got {count}, {lengths}")
    test = max(round(count * held_out), 1)
    train_side, test_side = (
        Pairs(Problems(n, chosen, tuple(lengths), held_out, seed, side), vocabulary())
        for n, side in ((count - test, False), (test, True))
    )
    return Data("list-tasks", "text", train_side, test_side)
