"""Drafts by the model's own masks, in the very forward that verifies the last ones (TiDAR, Liu et al. 2025).

Behind the last known token, and behind each drafted one, stands a block of masks; so wherever verification ends, what
follows there has been proposed by then.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from seriatim.canvas import Canvas
from seriatim.decoding.draft import beside
from seriatim.decoding.features import states_behind
from seriatim.decoding.guess import Guess, moved, room
from seriatim.decoding.loop import Step
from seriatim.decoding.target import Target
from seriatim.heads.dist import Greedy
from seriatim.model import Rows
from seriatim.plan import Reads
from seriatim.random import DRAFT, Key, Random, numbered


class OwnMasks:
    """Drafts size - 1 tokens, each drawn from what the mask in its place said; a verifier adds the one before them.

    A block of masks reads its places independently of each other, so what each token was drawn from is known: `Walk`
    and `Chain` verify it. A forward of n drafted tokens has (1 + n)(1 + size) slots. always: masks also where no draft
    is to come, since the law itself is read from them.
    """

    def __init__(self, size: int, always: bool = False):
        if size < 1:
            raise ValueError(f"a block has at least 1 mask, got {size}")
        self.size, self.always = size, always
        self._canvas: Canvas | None = None
        self._row = torch.zeros(0, dtype=torch.long)
        self._state: Float[Tensor, "b k d"] | None = None
        self._known: Bool[Tensor, "b 1"] | bool = True  # rows whose masks were read

    def propose(self, canvas: Canvas, target: Target, random: Random) -> Guess | None:
        if canvas is not self._canvas:
            self._canvas, self._row, self._state, self._known = canvas, canvas.row, None, True
        self._follow(canvas, moved(self._row, canvas.row))
        left = torch.tensor(room(canvas))[:, None]
        most = int(left.max())
        masks = self.size if self.always or (self.size > 1 and most > 2) else 0
        n = min(self.size, most) - 1
        if self._state is None or n < 1:
            nothing = torch.zeros(canvas.batch, 0, dtype=torch.long)
            return Guess(beside(canvas, nothing), masks=masks) if masks else None
        ahead = 1 + torch.arange(n)  # the place of the first mask is read by the text itself
        head = target.model.heads[canvas.layout.kinds[0]]
        element = canvas.lengths()[:, None] + ahead - 1
        law = head.dist(self._state[:, 1 : n + 1], Reads(ahead[None], element), canvas)  # type: ignore[operator]
        law = law if target.warp is None else target.warp(law)
        there = (ahead < left) & self._known
        draw = torch.tensor([numbered(DRAFT, i) for i in range(n)])
        value = law.sample(random, Key(canvas.row, torch.where(there, element, -1), draw))
        value = torch.where(there.to(value.device), value, -1)
        return Guess(beside(canvas, value), q=None if type(law) is Greedy else law, masks=masks)

    def observe(self, canvas: Canvas, rows: Rows, step: Step) -> None:
        self._state = None if rows.spawned is None else states_behind(rows, step, self.size)
        self._known = True
        self._follow(canvas, step.select)

    def _follow(self, canvas: Canvas, rows: Int[Tensor, "b"] | None) -> None:
        """Rows were copied, dropped or admitted; nothing has been read of new ones."""
        if rows is None:
            return
        self._row = canvas.row
        if self._state is not None:
            known = (rows >= 0)[:, None]
            where = rows.clamp(min=0)
            self._known = known if isinstance(self._known, bool) else known & self._known[where]
            self._state = self._state[where]
