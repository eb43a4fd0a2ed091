"""Paths through star graphs (Bachmann & Nagarajan 2024; with arms of different lengths, Patel et al. 2025): whoever
writes the first step of a path must have seen where it ends.

Arms go out from one node; the path to the end of one of them is asked for. Behind its first step a path is copied edge
by edge, which is so easy to learn from left to right that the first step is not learned at all: it stays a guess among
the arms. Everything follows from a seed.
"""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Literal

from seriatim.data.base import Data, Pairs, check_held_out, share

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


def stars(
    arms: Literal["uneven", "equal"] = "uneven",
    degree: int = 3,
    shortest: int = 2,
    longest: int = 4,
    nodes: int = 20,
    count: int = 50_000,
    held_out: float = 0.02,
    seed: int = 0,
) -> Data:
    """Graphs as texts, "a b, c a, ... | c f:" with the path " c a ... f" as answer.

    arms: each of `shortest` to `longest` edges ("uneven"), or all of `longest` ("equal"); degree: number of arms;
    nodes: of how many letters the names are drawn. The paper's sizes: degree 3, arms of 2 to 5 edges, 20 nodes (equal
    arms: of 4 edges); hard: degree 5, 5 to 11 edges, 56 nodes. Raises ValueError for what is out of range.
    """
    check_held_out(held_out)
    if arms not in ("uneven", "equal") or degree < 1 or not 1 <= shortest <= longest or count < 2:
        raise ValueError(
            f"arms are uneven or equal, of at least 1 edge, for a degree of at least 1 and at least 2 graphs; got "
            f"{arms!r}, {shortest} to {longest} edges, degree {degree}, {count} graphs"
        )
    names = [*LETTERS, *(f"{a}{b}" for a in LETTERS for b in LETTERS)]
    if not degree * longest + 1 <= nodes <= len(names):
        raise ValueError(
            f"{degree} arms of {longest} edges take {degree * longest + 1} nodes or more, at most {len(names)} have "
            f"names; got {nodes}"
        )
    rng, lengths = random.Random(seed), range(longest if arms == "equal" else shortest, longest + 1)
    sides: dict[bool, list[tuple[str, str]]] = {False: [], True: []}
    wanted = {True: max(round(count * held_out), 1)}
    wanted[False] = count - wanted[True]
    while any(len(sides[side]) < wanted[side] for side in sides):
        pair = graph(rng, names[:nodes], [rng.choice(lengths) for _ in range(degree)])
        side = share(pair[0]) < held_out
        if len(sides[side]) < wanted[side]:
            sides[side].append(pair)
    train, test = (Pairs(tuple(sides[side]), fill=True) for side in (False, True))
    return Data("stars", "text", train, test)


def graph(rng: random.Random, names: list[str], arms: list[int]) -> tuple[str, str]:
    """One graph with arms of so many edges: the prompt and the path to the end of one arm."""
    start, *others = rng.sample(names, sum(arms) + 1)
    paths = []
    for length in arms:
        paths.append([start, *others[:length]])
        others = others[length:]
    edges = [f"{a} {b}" for path in paths for a, b in pairwise(path)]
    rng.shuffle(edges)
    path = rng.choice(paths)
    return f"{', '.join(edges)} | {start} {path[-1]}:", " " + " ".join(path)
