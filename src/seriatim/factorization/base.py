"""An order of generation: one value from which mask, feed, decoding steps and likelihood are derived.

`packed` is teacher forcing: all steps of a finished sample in one forward. `step` is one forward from here. Static
orders write only `packed`; dynamic ones only `step`.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from seriatim.canvas import DELETED, GIVEN, Canvas
from seriatim.decoding.guess import Guess
from seriatim.factorization.turns import Turns
from seriatim.layout import Layout
from seriatim.plan import OrderError, Plan
from seriatim.random import Random
from seriatim.view import INF


class Factorization:
    """An order. Subclasses give `packed` (static) or `step` (dynamic), and say what likelihood follows."""

    likelihood: Literal["exact", "bound", "none"] = "exact"
    draftable = False  # can a guess along a line be verified in one step?
    verifies = False  # or one of another kind, by a decider that knows this order?
    free = False  # does the decoder choose which of the elements that were read a step decides?

    def order(self, layout: Layout, random: Random | None = None) -> Int[Tensor, "b E"]:
        """The step that decides each element (given ones: any value)."""
        return torch.arange(layout.size)[None]

    def packed(self, canvas: Canvas) -> Plan | None:
        """All steps of a finished sample in one forward; None where no single pass exists."""
        return None

    def due(self, canvas: Canvas) -> Bool[Tensor, "b E"]:
        """What `packed` has to read: all that is not given; an order that shows a part and reads the rest says so."""
        return canvas.status.ne(GIVEN) & canvas.status.ne(DELETED)

    def step(self, canvas: Canvas, guess: Guess | None, cached: int | Tensor) -> Plan | None:
        """The next forward, given how many slots are cached; None when everything is decided."""
        if guess is not None:
            raise OrderError(f"{type(self).__name__} cannot verify a guess; decode it without a proposer")
        if canvas.done:
            return None
        open_ranks = torch.where(canvas.known | (canvas.status == DELETED), INF, canvas.rank)
        return self._turns(canvas).at(int(open_ranks.min()), cached)

    def fill(self, canvas: Canvas, cached: int | Tensor, most: int, leave: int = 0) -> Plan | None:
        """A forward that only remembers: of the slots whose content is known, all but the last and `leave` more are
        brought into the cache, `most` at a time. None where none is left, or the order has no such forwards."""
        return None

    def _turns(self, canvas: Canvas) -> Turns:
        """The decoding steps of a static order, checked and compiled once for each layout, order and set of given
        elements. (A single step shows no leak: what it sees through the cache is not among its slots.)"""
        memo: OrderedDict[tuple[Layout, bytes], Turns] = self.__dict__.setdefault("_memo", OrderedDict())
        rank = canvas.rank
        shared = rank.shape[0] > 1 and bool((rank == rank[:1]).all())
        key = (canvas.layout, (rank[:1] if shared else rank).numpy().tobytes())
        if key not in memo:
            one = canvas.select(torch.tensor([0])) if shared else canvas
            plan = self.packed(one)
            if plan is None:
                raise OrderError(f"{type(self).__name__} has neither a packed form nor steps of its own")
            memo[key] = Turns(plan.check(due=self.due(one)))
            while len(memo) > 8:
                memo.popitem(last=False)
        memo.move_to_end(key)
        return memo[key]
