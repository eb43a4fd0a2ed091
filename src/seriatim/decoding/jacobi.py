"""Jacobi windows: the target drafts for itself, from the rows of the last forward."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from seriatim.canvas import Canvas
from seriatim.decoding.guess import Guess, moved, room
from seriatim.decoding.loop import Step
from seriatim.decoding.target import Target
from seriatim.heads.dist import Categorical, Greedy
from seriatim.model import Rows
from seriatim.random import DRAFT, Key, Random, numbered


class Window:
    """Speculative Jacobi decoding (Teng et al. 2024): a window of drafted tokens slides over a line.

    After each verification every later token of the window is drawn afresh from its new row, computed under the old
    drafts, and that row is recorded as its proposal; so ratio verifiers are exact. Greedy targets make it Jacobi
    decoding (Santilli et al. 2023). Tokens that enter the window are a point mass: "random" ids, or "repeat": the
    element `stride` places before (1: the left neighbour; the row length of an image: the upper one).
    """

    def __init__(self, size: int = 16, entering: Literal["random", "repeat"] = "repeat", stride: int = 1):
        if size < 0 or stride < 1:
            raise ValueError(f"a window has 0 or more tokens and a stride of at least 1, got {size} and {stride}")
        if entering not in ("random", "repeat"):
            raise ValueError(f"tokens enter a window by 'random' or 'repeat', not {entering!r}")
        self.size, self.entering, self.stride = size, entering, stride
        self._canvas: Canvas | None = None
        self._row = torch.zeros(0, dtype=torch.long)
        self._rows: Categorical | None = None  # the laws that the last forward read
        self._first = self._last = torch.zeros(0, dtype=torch.long)  # which of them read what is still unknown

    def propose(self, canvas: Canvas, target: Target, random: Random) -> Guess | None:
        if canvas is not self._canvas:  # one plain step first: it says how many ids there are
            self._canvas, self._row, self._rows = canvas, canvas.row, None
        self._follow(canvas, moved(self._row, canvas.row))
        left = torch.tensor(room(canvas))[:, None]
        n = min(self.size, int(left.max()) - 1)
        if self._rows is None or n < 1:
            return None
        ahead = torch.arange(n)[None]
        read = self._first[:, None] + ahead
        open_ = ahead + 1 < left
        drawn = open_ & (read <= self._last[:, None])
        law = _at(self._rows, read)
        start = canvas.lengths()[:, None]
        key = Key(canvas.row, torch.where(drawn, start + ahead, -1), _draws(n))
        value = torch.where(drawn, law.sample(random, key), 0)
        enters = open_ & ~drawn
        if bool(enters.any()):
            entering = self._entering(canvas, value, enters, law.logits.shape[-1], random)
            value = torch.where(enters, entering.to(value.device), value)
            b, i = enters.nonzero(as_tuple=True)
            law.logits[b, i] = -torch.inf
            law.logits[b, i, value[b, i]] = 0.0
        greedy = type(law) is Greedy  # then all drafts are point masses
        return Guess(torch.where(open_, value, -1), q=None if greedy else law)

    def observe(self, canvas: Canvas, rows: Rows, step: Step) -> None:
        self._rows = rows.dist
        batch = rows.dist.logits.shape[0]
        accepted = torch.as_tensor(step.accepted).expand(batch)
        self._first, self._last = accepted + 1, torch.as_tensor(step.drafted).expand(batch)
        self._follow(canvas, step.select)

    def _follow(self, canvas: Canvas, rows: Int[Tensor, "b"] | None) -> None:
        """Rows were copied, dropped or admitted; of new ones nothing has been read."""
        if rows is not None:
            if self._rows is not None:
                self._rows = type(self._rows)(self._rows.logits[rows])
                self._first, self._last = self._first[rows], self._last[rows]
                self._last = self._last.masked_fill(rows < 0, -1)
            self._row = canvas.row

    def _entering(
        self, canvas: Canvas, value: Int[Tensor, "b n"], enters: Tensor, vocab: int, random: Random
    ) -> Int[Tensor, "b n"]:
        """Tokens for the places that no row has read yet."""
        start, n = canvas.lengths()[:, None], value.shape[1]
        if self.entering == "random":
            element = torch.where(enters, start + torch.arange(n), -1)
            draw = torch.tensor([numbered(DRAFT, i, 1) for i in range(n)])
            logits = torch.zeros(*value.shape, vocab)
            return random.categorical(logits, Key(canvas.row, element, draw))
        known = canvas.value[canvas.layout.kinds[0]]
        value = value.clone()
        for i in range(n):  # a copy may come from the window itself
            source = start[:, 0] + i - self.stride
            old = known.gather(1, source.clamp(min=0, max=known.shape[1] - 1)[:, None])[:, 0]
            new = value[:, i - self.stride] if i >= self.stride else old
            value[:, i] = torch.where(enters[:, i], new, value[:, i])
        return value


def _at(law: Categorical, index: Int[Tensor, "b n"]) -> Categorical:
    """A copy of the laws of some read-outs; any where there are none."""
    index = index.clamp(max=law.logits.shape[1] - 1)
    return type(law)(law.logits[:, index[0]]) if len(index) == 1 else law.take(index)


@lru_cache(maxsize=64)
def _draws(n: int) -> Int[Tensor, "n"]:
    """The draws of tokens so far ahead."""
    return torch.tensor([numbered(DRAFT, i) for i in range(n)])
