"""What is to be seen of drafts that are searched for: how many tokens they give while a text grows, and one search."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from seriatim.decoding.tree_search import MonteCarlo
from seriatim.decoding.trigrams import Adapted
from seriatim.evaluation.draft_trees import Drafted
from seriatim.evaluation.pictures import ACCENT, INK, write_beside

MOVING = 250  # tokens over which a drawn rate is averaged
COLOURS = (INK, "#8fa3bf", ACCENT, "#e0a030", "#5b8e7d")


def rates(given: Sequence[int], over: int = MOVING) -> tuple[list[int], list[float]]:
    """Of forwards that gave so many tokens each: after how many tokens each stands, and tokens a forward over the last
    `over` of them; from a fifth of them on, as fewer say nothing."""
    place, rate, written = [], [], 0
    window: list[int] = []
    for n in given:
        window.append(n)
        written += n
        while sum(window) - window[0] >= over:
            window.pop(0)
        if written >= over // 5:
            place.append(written)
            rate.append(sum(window) / len(window))
    return place, rate


def save_rates(
    given: Mapping[str, Sequence[int]], path: str | os.PathLike[str], most: int | None = None, title: str = ""
) -> Path:
    """Tokens a forward while texts grow, a line for each name, as one PNG; at most so many tokens of it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    for (name, own), colour in zip(given.items(), COLOURS, strict=False):
        axes.plot(*rates(own), color=colour, label=f"{name}: {sum(own) / len(own):.2f} in all")
    longest = max(map(sum, given.values()))
    axes.set(xlabel="tokens written", ylabel=f"tokens a forward, over the last {MOVING}")
    axes.set_xlim(0, longest if most is None else min(longest, most))
    axes.axhline(1.0, color="#808080", linewidth=0.8, linestyle=":")
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    if title:
        axes.set_title(title, fontsize=10, color=INK)
    return write_beside(path, lambda file: figure.savefig(file, format="png", dpi=150))


def searched(search: MonteCarlo, table: Adapted, text: Sequence[int], nodes: int = 12, depth: int = 4) -> Drafted:
    """A search below the end of a text, to be drawn by `save_trees`: every node that was visited, and those of the
    draft (dark), among them the successors that extend its paths; how often each was visited."""
    a, b = text[-2:]
    tree, draft = search.search(table, a, b, depth), search(table, a, b, nodes, depth)
    paths = {tuple(tree.path(i)): count for i, count in enumerate(tree.visits) if i and count}
    kept: list[tuple[int, ...]] = []
    for above, token in zip(draft.parent, draft.token, strict=True):
        kept.append((*(kept[above] if above >= 0 else ()), token))
    every = sorted({*paths, *kept}, key=len)
    number = {path: i for i, path in enumerate(every)}
    parent = tuple(number.get(path[:-1], -1) for path in every)
    notes = tuple(f" {paths[path]}" if path in paths else "" for path in every)
    return Drafted(tuple(text), tuple(path[-1] for path in every), parent, frozenset(number[p] for p in kept), notes)
