"""Token recycling (Luo et al. 2024): the candidates that a model did not choose are the draft of another time.

Every forward says of each token it read what is likely to follow. Plain decoding takes one candidate and throws the
others away; here a matrix keeps the likeliest few behind every token, whoever saw it last, and a fixed tree of them is
verified at each step: below a token stand its candidates, below these theirs. The matrix depends on the past alone, so
drafts involve no randomness and `Walk` verifies them exactly at every temperature.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from seriatim.canvas import Canvas
from seriatim.decoding.draft import beside
from seriatim.decoding.features import last_tokens
from seriatim.decoding.guess import Guess, room
from seriatim.decoding.loop import Step
from seriatim.decoding.ranking import ranked
from seriatim.decoding.target import Target
from seriatim.decoding.templates import Template
from seriatim.model import Rows
from seriatim.random import Random

CHUNK = 128  # tokens of a prompt that are read out at once


class Adjacency:
    """The likeliest `width` tokens behind each token, as they were said last; -1 where nothing is known.

    `next` is (vocab + 1, width) of int32: the last row is that of no token (-1) and stays empty, so what stands below
    nothing is nothing. 1.6 MB for a vocabulary of 49 thousand. Meant to be kept over many generations.
    """

    def __init__(self, vocab: int, width: int = 8):
        if vocab < 1 or width < 1:
            raise ValueError(f"a matrix holds 1 or more candidates of 1 or more tokens, got {width} of {vocab}")
        self.next = torch.full((vocab + 1, width), -1, dtype=torch.int32)
        self._rows = self.next.numpy()  # the same numbers: a row of them is had in a tenth of the time

    @property
    def width(self) -> int:
        return self.next.shape[1]

    def fill(self, template: Template, root: int) -> list[int]:
        """The tokens of a tree below a token, depth by depth; -1 where there is no candidate."""
        value: list[int] = []
        for parent, children in _families(template):
            row = self._rows[value[parent] if parent >= 0 else root].tolist()
            value += [row[child] for child in children]
        return value

    def write(self, tokens: Sequence[int], best: Int[Tensor, "m k"]) -> None:
        """From now on these are the candidates behind each of these tokens; of one that occurs twice the last."""
        last = {token: i for i, token in enumerate(tokens)}
        if last:
            self._rows[list(last), : best.shape[1]] = best.cpu().numpy()[list(last.values())]


@lru_cache(maxsize=64)
def _families(template: Template) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """Nodes that have children, and which candidates these are, in the order of the children."""
    return tuple(
        (parent, tuple(child for _, child in group))
        for parent, group in groupby(zip(template.parent, template.child, strict=True), key=itemgetter(0))
    )


class Recycler:
    """Drafts a template filled from a matrix, and writes every row of a forward back into it.

    Of what a token was followed by at several places the accepted one counts, the last of them; among those that were
    rejected the one nearest to the text (so it is no matter in which order a machine writes). Rows of a batch share the
    matrix, later ones write last. prompt: the rows of a prompt are recycled too, which costs a read-out of all of it.

    `visits` counts how often each node of the template was accepted: what `Template.pruned` asks for.
    """

    def __init__(self, matrix: Adjacency, template: Template, prompt: bool = False):
        if template.width > matrix.width:
            raise ValueError(
                f"the template asks for {template.width} candidates of a token, and the matrix keeps {matrix.width}"
            )
        self.matrix, self.template, self.reads_prompt = matrix, template, prompt
        self.visits = [0] * template.size
        self._head: Any = None
        self._guess: Guess | None = None

    def propose(self, canvas: Canvas, target: Target, random: Random) -> Guess | None:
        self._head = target.model.heads[canvas.layout.kinds[0]]
        known = [canvas.length] * canvas.batch if canvas.length is not None else canvas.lengths().tolist()
        roots = [root if n else -1 for root, n in zip(last_tokens(canvas).tolist(), known, strict=True)]
        value = [self._fill(root, left) for root, left in zip(roots, room(canvas), strict=True)]
        width = max(len(v) for v in value)
        self._guess = None
        if width:
            padded = torch.tensor([v + [-1] * (width - len(v)) for v in value])
            self._guess = Guess(beside(canvas, padded), self.template.parent[:width])
        return self._guess

    def _fill(self, root: int, left: int) -> list[int]:
        """The draft of a row, without what it has no room for and without the nodes at its end that are not known."""
        value = self.matrix.fill(self.template.cut(left - 1), root)
        while value and value[-1] < 0:
            value.pop()
        return value

    def observe(self, canvas: Canvas, rows: Rows, step: Step) -> None:
        """Learn from any forward, whoever drafted what it verified."""
        guess, ids = rows.guess, canvas.value[canvas.layout.kinds[0]]
        batch, nodes = len(rows.hidden), 0 if guess is None else guess.size
        drafted = [[]] * batch if guess is None else guess.value.tolist()
        start = _decided_next(rows.element, batch)
        before = rows.hidden.shape[1] - nodes  # slots in front of the nodes
        if self.reads_prompt and before > 1:
            self._read_prompt(canvas, rows, start, before)
        tokens: list[int] = []
        where: list[int] = []
        for r, path in enumerate(_accepted(step.keep, before, batch)):
            if start[r] < 1:
                continue  # this row has ended, or began with a learned start alone
            for node in path if guess is self._guess else ():
                self.visits[node] += 1
            own = [int(ids[r, start[r] - 1]), *drafted[r]]
            kept = [0, *(node + 1 for node in path)]
            order = [i for i in range(nodes, 0, -1) if i not in kept] + kept
            order = [i for i in order if own[i] >= 0]
            tokens += [own[i] for i in order]
            where += [r * (nodes + 1) + i for i in order]
        if tokens:
            best = ranked(rows.said.logits.flatten(0, 1), self.matrix.width)
            self.matrix.write(tokens, best[where])

    def _read_prompt(self, canvas: Canvas, rows: Rows, start: Sequence[int], before: int) -> None:
        """Recycle the rows of all known tokens but the last, which is read out anyway."""
        ids = canvas.value[canvas.layout.kinds[0]]
        for r, known in enumerate(start):
            last = int(rows.slot[r, 0]) if isinstance(rows.slot, Tensor) else before - 1
            count = min(last, known - 1)  # a learned start is no token
            for i in range(0, count, CHUNK):
                n = min(CHUNK, count - i)
                slots = rows.hidden[r : r + 1, last - count + i : last - count + i + n]
                best = ranked(self._head.dist(slots, None, canvas).logits[0], self.matrix.width)
                first = known - 1 - count + i
                self.matrix.write(ids[r, first : first + n].tolist(), best)


def _decided_next(element: Tensor | int, batch: int) -> list[int]:
    """The element that each row decides next, which is as many as it knows; -1: none."""
    return [element] * batch if isinstance(element, int) else element[:, 0].expand(batch).tolist()


def _accepted(keep: Any, before: int, batch: int) -> list[list[int]]:
    """The accepted nodes of each row, from the root, by the slots that a step keeps."""
    if isinstance(keep, Tensor):
        return [[i - before for i in row if i >= before] for row in keep.expand(batch, -1).tolist()]
    slots = range(before, keep) if isinstance(keep, int) else [i for i in keep if i >= before]
    return [[i - before for i in slots]] * batch
