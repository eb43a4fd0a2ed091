"""The reverse process of absorbing diffusion in so many steps: how many elements are decided at each is drawn."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from seriatim.canvas import DECIDED, Canvas
from seriatim.decoding.guess import Guess, moved
from seriatim.decoding.loop import Step
from seriatim.decoding.sample import Select, elements, first_of
from seriatim.model import Rows
from seriatim.noise import NOISES
from seriatim.random import ORDER, Key, Random, numbered


@dataclass
class Drawn(Select):
    """`Select` whose counts are drawn, where it takes their means: from time t to time s < t each unknown element is
    decided with probability 1 - hidden(s) / hidden(t) of the noise `schedule`. With the rule "random" that is the
    ancestral sampler of masked diffusion (MDLM, Sahoo et al. 2024, arXiv 2406.07524), whose expected error in T steps
    is what the bound of T steps misses.

    A step in which nothing is decided costs no forward: the model is not told the time (`remask.ReMDM` spends it, and
    takes back, too). Remembers at which step each
    row of a block is, of one canvas at a time.
    """

    _canvas: Canvas | None = field(default=None, init=False, repr=False, compare=False)
    _row: Tensor = field(init=False, repr=False, compare=False)
    _turn: Int[Tensor, "b"] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.schedule not in NOISES:
            raise ValueError(f"counts are drawn under a noise schedule ({', '.join(NOISES)}), not {self.schedule!r}")
        if self.commit is not None:
            raise ValueError("how many are decided is drawn, or a threshold's choice, not both: leave one of them out")

    def decide(self, canvas: Canvas, guess: Guess | None, rows: Rows, random: Random) -> Step:
        element = elements(canvas, guess, rows)
        self._follow(canvas)
        left = (element >= 0).sum(1)
        count = self._counts(canvas, element, left, random)
        self._turn = torch.where(count == left, 0, self._turn)  # the next block begins anew
        decided = (canvas.status == DECIDED).sum(1, keepdim=True)
        edit, _, _ = self._some(canvas, element, count, decided, rows, random)
        return Step((edit,))

    def _counts(
        self, canvas: Canvas, element: Int[Tensor, "b m"], left: Int[Tensor, "b"], random: Random
    ) -> Int[Tensor, "b"]:
        """How many elements the next step decides that decides any."""
        count, first = torch.zeros_like(left), first_of(element)
        while bool((waits := (count == 0) & (left > 0)).any()):
            said = torch.where(waits[:, None, None], _binomial(left, self._chance(self._turn)), 0.0)
            draw = numbered(ORDER, self._turn[:, None], 4095)  # the last number: `_some` takes the first ones
            key = Key(canvas.row, torch.where(waits[:, None], first, -1), draw)
            count = torch.where(waits, random.categorical(said, key)[:, 0], count)
            self._turn = self._turn + waits
        return count

    def _chance(self, turn: Int[Tensor, "b"]) -> Float[Tensor, "b"]:
        """That an unknown element is decided at this step: 1 at the last one."""
        noise, before, after = NOISES[self.schedule], self.steps - turn, (self.steps - turn - 1).clamp(min=0)
        return 1 - noise.hidden(after.double() / self.steps) / noise.hidden(before.double() / self.steps)

    def _follow(self, canvas: Canvas) -> None:
        """Another canvas starts anew; rows may have come and gone."""
        if canvas is not self._canvas:
            self._canvas, self._row = canvas, canvas.row
            self._turn = torch.zeros(canvas.batch, dtype=torch.long)
        rows = moved(self._row, canvas.row)
        if rows is not None:
            self._row, self._turn = canvas.row, torch.where(rows < 0, 0, self._turn[rows])


def _binomial(n: Int[Tensor, "b"], p: Float[Tensor, "b"]) -> Float[Tensor, "b 1 k"]:
    """Log-probabilities of 0, 1, ... successes in n trials each."""
    n, p = n[:, None].double(), p[:, None].double()
    k = torch.arange(int(n.max()) + 1, dtype=torch.float64)[None]
    rest: Bool[Tensor, "b k"] = k <= n
    failures = (n - k).clamp(min=0)
    ways = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(failures + 1)
    said = ways + torch.xlogy(k, p) + torch.xlogy(failures, 1 - p)
    return said.masked_fill(~rest, -torch.inf)[:, None]
