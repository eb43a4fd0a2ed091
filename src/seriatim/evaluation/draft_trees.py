"""Pictures of draft trees: what was drafted behind a text, and what of it stood."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seriatim.canvas import Canvas
from seriatim.decoding.guess import Guess, children, depths
from seriatim.decoding.loop import Proposer, Step
from seriatim.decoding.target import Target
from seriatim.evaluation.pictures import INK, PALE, write_beside
from seriatim.model import Rows
from seriatim.random import Random

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LETTERS = 30  # of the text in front of a tree
Text = Callable[[int], str]


@dataclass(frozen=True)
class Drafted:
    """A draft in one row: the known ids, tokens and parents of its nodes, and those that stood; notes: what is told
    beside the token of each node."""

    before: tuple[int, ...]
    token: tuple[int, ...]
    parent: tuple[int, ...]
    stood: frozenset[int]
    notes: tuple[str, ...] | None = None

    @property
    def depth(self) -> int:
        return max(depths(self.parent))


class Watched:
    """Hands on what a proposer drafts for a single row, and notes what came of it."""

    def __init__(self, proposer: Proposer):
        self.proposer, self.drafts = proposer, list[Drafted]()
        self.reads_prompt = getattr(proposer, "reads_prompt", False)
        self._open: tuple[tuple[int, ...], Guess] | None = None

    def propose(self, canvas: Canvas, target: Target, random: Random) -> Guess | None:
        guess = self.proposer.propose(canvas, target, random)
        known = canvas.value[canvas.layout.kinds[0]][0, : int(canvas.lengths()[0])]
        # a guess of no nodes only reads along, as before its first states
        self._open = None if guess is None or not guess.size else (tuple(known.tolist()), guess)
        return guess

    def observe(self, canvas: Canvas, rows: Rows, step: Step) -> None:
        self.proposer.observe(canvas, rows, step)
        if self._open is None:
            return
        before, guess = self._open
        now = canvas.value[canvas.layout.kinds[0]][0, len(before) :].tolist()
        token, parent = tuple(guess.value[0].tolist()), guess.parents()
        stood: list[int] = []
        for i in range(int(step.accepted)):
            below = children(parent)[stood[-1] if stood else -1]
            stood.append(next(c for c in below if token[c] == now[i]))
        self.drafts.append(Drafted(before, token, parent, frozenset(stood)))


def some_trees(drafts: Sequence[Drafted], count: int = 4) -> list[Drafted]:
    """From the shallowest to the deepest, evenly spread, the first of each; as many as there are shapes at most."""
    shapes = {draft.parent: draft for draft in reversed(drafts)}
    ordered = sorted(shapes.values(), key=lambda draft: (draft.depth, -len(draft.parent)))
    if len(ordered) <= count:
        return ordered
    return [ordered[round(i * (len(ordered) - 1) / (count - 1))] for i in range(count)]


def save_trees(drafts: Sequence[Drafted], text: Text, path: str | os.PathLike[str], title: str = "") -> Path:
    """Save draft trees as one PNG, side by side: they grow to the right, what stood is dark. text: of a token. Raises
    ValueError where there are none."""
    from matplotlib.figure import Figure

    if not drafts:
        raise ValueError("there are no drafts to draw")
    most = max(sum(not below for node, below in children(d.parent).items() if node >= 0) for d in drafts)
    size = (1.0 + sum(0.85 * draft.depth + 0.8 for draft in drafts), 1.2 + 0.32 * most)
    figure = Figure(figsize=size, layout="constrained")
    widths = [draft.depth + 0.8 for draft in drafts]
    axes = figure.subplots(1, len(drafts), squeeze=False, width_ratios=widths)[0]
    for ax, draft in zip(axes, drafts, strict=True):
        _draw(ax, draft, text)
    if title:
        figure.suptitle(title, fontsize=10, color=INK)
    return write_beside(path, lambda file: figure.savefig(file, format="png", dpi=150))


def _draw(ax: Axes, draft: Drafted, text: Text) -> None:
    height = _heights(draft.parent)
    place = [(depth, height[i]) for i, depth in enumerate(depths(draft.parent))]
    for i, above in enumerate(draft.parent):
        (x, y), (x0, y0) = place[i], place[above] if above >= 0 else (0, height[-1])
        dark = i in draft.stood
        ax.plot([x0, x], [y0, y], color=INK if dark else "#b9c2cf", linewidth=1.8 if dark else 0.8, zorder=1)
    style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 7, "family": "monospace", "parse_math": False}
    for i, (x, y) in enumerate(place):
        dark = i in draft.stood
        box = {"boxstyle": "round,pad=0.25", "facecolor": INK if dark else PALE, "edgecolor": "#b9c2cf"}
        told = _shown(text(draft.token[i])) + (draft.notes[i] if draft.notes else "")
        ax.text(x, y, told, color="white" if dark else "black", bbox=box, zorder=2, **style)
    ax.plot([0], [height[-1]], "o", color=INK, markersize=4, zorder=2)
    before = "".join(map(text, draft.before[-LETTERS:]))[-LETTERS:]
    ax.set_title(f"…{_shown(before, LETTERS)}", fontsize=7, family="monospace", loc="left", parse_math=False)
    ax.set_xlim(-0.3, draft.depth + 0.5)
    ax.set_ylim(max(height) + 0.7, -0.7)
    ax.set_axis_off()


def _heights(parent: tuple[int, ...]) -> list[float]:
    """How far down each node stands, leaves one below the other; the root last."""
    below, height, leaves = children(parent), [0.0] * (len(parent) + 1), 0
    for node in _leaves_first(below):
        if below[node]:
            height[node] = sum(height[c] for c in below[node]) / len(below[node])
        else:
            height[node], leaves = float(leaves), leaves + 1
    return height


def _leaves_first(below: dict[int, tuple[int, ...]]) -> list[int]:
    """All nodes, children in order and before their parents."""
    order: list[int] = []
    waiting = [-1]
    while waiting:
        node = waiting.pop()
        order.append(node)
        waiting += below[node]
    return order[::-1]


MARKS = {"\n": "⏎", "\t": "→", " ": "·"}
LAST = "\u052f"  # of the letters that every installation can draw: Latin, Greek, Cyrillic


def _shown(text: str, most: int = 10) -> str:
    """Spaces and ends of lines as marks, what cannot be drawn as boxes, long texts cut."""
    drawn = "".join(MARKS.get(c, c if c.isprintable() and c <= LAST else "□") for c in text)
    return drawn if len(drawn) <= most else drawn[: most - 1] + "…"
