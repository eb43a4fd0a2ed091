"""Blocks whose lengths are chosen one by one: when a block is decided, a rule says how long the next one is (CtrlDiff,
2025, arXiv 2505.14455).

A rule sees what the model had in mind while it wrote the last blocks: the mean hidden state of each one's elements, at
the steps that decided them, and the mean and the largest entropy of what they were drawn from. To look costs no
forward. The model must decide blocks of any lengths (`VaryingBlocks`), since a forward of a block needs its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from seriatim.canvas import DECIDED, Canvas, Reorder, Set, Truncate
from seriatim.decoding.guess import Guess, moved
from seriatim.decoding.loop import Step
from seriatim.decoding.sample import Select
from seriatim.decoding.unmask import at_work, ends
from seriatim.factorization.varying import in_blocks
from seriatim.model import Rows, pick_slots
from seriatim.random import ORDER, Key, Random, numbered
from seriatim.view import INF

LAST = 4095  # of the draws of a turn: those before it choose elements


class Written(NamedTuple):
    """The last blocks of each row, the newest first: mean hidden state (normalised), mean and largest entropy in nats;
    `there`: how many blocks there are."""

    blocks: Float[Tensor, "b m f"]
    there: Int[Tensor, "b"]

    def take(self, rows: Tensor) -> Written:
        return Written(self.blocks[rows], self.there[rows])


class Lengths(Protocol):
    """How long the next block is."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """That a block may have."""
        ...

    @property
    def memory(self) -> int:
        """Blocks that it looks back on."""
        ...

    def logits(self, written: Written) -> Float[Tensor, "b k"]:
        """How likely each of the sizes is, unnormalised."""
        ...


@dataclass(frozen=True)
class Blind:
    """Sizes by fixed probabilities, whatever was written; one size alone makes blocks of one length."""

    sizes: tuple[int, ...]
    shares: tuple[float, ...] = (1.0,)
    memory: int = 1

    def __post_init__(self) -> None:
        if len(self.sizes) != len(self.shares) or min(self.sizes) < 1 or min(self.shares) < 0 or not sum(self.shares):
            raise ValueError(f"sizes are at least 1, each with a share; got {self.sizes} and {self.shares}")

    def logits(self, written: Written) -> Float[Tensor, "b k"]:
        return torch.tensor(self.shares).log().expand(len(written.there), -1)


class LengthPolicy(nn.Module):
    """Sizes by a network of two layers over the last blocks, pooled by learned weights. At first all are alike."""

    def __init__(self, width: int, sizes: Sequence[int], memory: int = 4, hidden: int = 64):
        super().__init__()
        if min(sizes, default=0) < 1 or memory < 1:
            raise ValueError(f"blocks hold at least 1 element, and at least 1 is looked back on; got {sizes}, {memory}")
        self.sizes, self.memory = tuple(sizes), memory
        self.pool = nn.Parameter(torch.zeros(memory))
        self.inner = nn.Linear(width + 2, hidden)
        self.outer = nn.Linear(hidden, len(self.sizes))
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def logits(self, written: Written) -> Float[Tensor, "b k"]:
        x = written.blocks.to(self.pool)
        gone = torch.arange(self.memory, device=x.device) >= written.there.to(x.device).clamp(min=1)[:, None]
        weight = self.pool.masked_fill(gone, -torch.inf).softmax(1)
        return self.outer(F.silu(self.inner(torch.einsum("bm,bmf->bf", weight, x))))


def begun(sizes: Sequence[int], size: int, start: int = 0) -> Int[Tensor, "1 E"]:
    """Ranks of a canvas to begin with, behind `start` given elements. These stand in blocks of the largest size, of
    which the first block completes the last; else it has the smallest size, since nothing is known of the text yet.
    Behind it stand blocks of the largest."""
    lengths = torch.full((1, 1 + -(-(size - start) // max(sizes))), max(sizes))
    lengths[0, 0] = -start % max(sizes) or min(sizes)
    return in_blocks(lengths, size, start)


class Chosen(NamedTuple):
    """One choice of lengths: in which rows, for which block (its rank), which of the sizes, and what was known."""

    row: Int[Tensor, "r"]
    block: Int[Tensor, "r"]
    option: Int[Tensor, "r"]
    written: Written


@dataclass
class InLengths:
    """Some elements of the block at work at each step, by `select`, whose steps are those of a block; when a block is
    decided, `lengths` sets the end of the next, and those behind it are as long as can be until they are set, too. The
    first block is as the canvas has it.

    A row ends at the first of the `stop` ids with nothing unknown before it. Remembers what it has read, of one canvas
    at a time, and every choice in `log` where that is a list.
    """

    select: Select
    lengths: Lengths
    stop: tuple[int, ...] = ()
    log: list[Chosen] | None = None
    _canvas: Canvas | None = field(default=None, init=False, repr=False, compare=False)
    _row: Tensor = field(init=False, repr=False, compare=False)
    _state: Float[Tensor, "b E d"] = field(init=False, repr=False, compare=False)
    _entropy: Float[Tensor, "b E"] = field(init=False, repr=False, compare=False)
    _written: Written = field(init=False, repr=False, compare=False)

    def decide(self, canvas: Canvas, guess: Guess | None, rows: Rows, random: Random) -> Step:
        length = ends(canvas, self.stop)
        if length is not None:
            return Step((Truncate(length),))
        element = at_work(canvas, rows)
        step = self.select.decide(canvas, guess, rows._replace(element=element), random)
        self._follow(canvas, rows)
        decided = self._look(canvas, element, step, rows)
        now = torch.where(canvas.open, canvas.rank, INF).amin(1, keepdim=True)
        left = canvas.open & ~decided
        complete = decided.any(1) & ~(left & (canvas.rank == now)).any(1)
        if not bool(complete.any()):
            return step
        self._finish(complete, ((canvas.status == DECIDED) | decided) & (canvas.rank == now))
        rank = self._cut(canvas, complete[:, None] & left & (canvas.rank > now), random)
        return step if rank is None else replace(step, edits=(*step.edits, Reorder(rank)))

    def _cut(self, canvas: Canvas, later: Bool[Tensor, "b E"], random: Random) -> Int[Tensor, "b E"] | None:
        """Ranks of what stands behind the blocks that are decided (`later`); None where nothing does."""
        choosing, e = later.any(1), torch.arange(canvas.layout.size)
        if not bool(choosing.any()):
            return None
        start = later.long().argmax(1, keepdim=True)
        turn = (canvas.status == DECIDED).sum(1, keepdim=True)
        key = Key(canvas.row, torch.where(choosing[:, None], start, -1), numbered(ORDER, turn, LAST))
        logits = self.lengths.logits(self._written).detach().cpu()
        option = random.categorical(torch.where(choosing[:, None], logits, 0.0)[:, None], key)[:, 0]
        block = canvas.rank.gather(1, start)
        if self.log is not None:
            row = choosing.nonzero()[:, 0]
            self.log.append(Chosen(row, block[row, 0], option[row], self._written.take(row)))
        sizes = torch.tensor(self.lengths.sizes)
        behind = e - start - sizes[option][:, None]
        return torch.where(later, block + (behind // int(sizes.max()) + 1).clamp(min=0), -1)

    def _look(self, canvas: Canvas, element: Int[Tensor, "b m"], step: Step, rows: Rows) -> Bool[Tensor, "b E"]:
        """Remember the states and entropies of the elements that a step decides; which they are."""
        size = canvas.layout.size
        decided = torch.zeros(canvas.batch, size + 1, dtype=torch.bool)
        for edit in step.edits:
            if isinstance(edit, Set) and edit.element is not None:
                decided = decided.scatter(1, torch.where(edit.element < 0, size, edit.element), True)
        decided[:, size] = False
        taken = decided.gather(1, torch.where(element < 0, size, element))
        b, m = taken.nonzero(as_tuple=True)
        h = pick_slots(rows.hidden, torch.as_tensor(rows.slot)).expand(canvas.batch, -1, -1)
        self._state[b, element[b, m]] = h[b, m].float().cpu()
        self._entropy[b, element[b, m]] = rows.said.entropy()[b, m].float().cpu()
        return decided[:, :size]

    def _finish(self, complete: Bool[Tensor, "b"], block: Bool[Tensor, "b E"]) -> None:
        """Put the block that each of these rows has decided in front of those before."""
        share = block / block.sum(1, keepdim=True).clamp(min=1)
        state = torch.einsum("be,bed->bd", share, self._state)
        state = F.layer_norm(state, state.shape[1:])
        most = self._entropy.masked_fill(~block, 0).amax(1)
        new = torch.cat([state, (share * self._entropy).sum(1)[:, None], most[:, None]], 1)
        old, there = self._written
        both = torch.cat([new[:, None], old[:, :-1]], 1)
        self._written = Written(torch.where(complete[:, None, None], both, old), there + complete)

    def _follow(self, canvas: Canvas, rows: Rows) -> None:
        """Another canvas starts anew; rows may have come and gone."""
        width = rows.hidden.shape[-1]
        if canvas is not self._canvas:
            self._canvas, self._row = canvas, canvas.row
            self._state = torch.zeros(canvas.batch, canvas.layout.size, width)
            self._entropy = torch.zeros(canvas.batch, canvas.layout.size)
            empty = torch.zeros(canvas.batch, self.lengths.memory, width + 2)
            self._written = Written(empty, torch.zeros(canvas.batch, dtype=torch.long))
        stay = moved(self._row, canvas.row)
        if stay is not None:
            new = stay < 0
            self._row, self._state, self._entropy = canvas.row, self._state[stay], self._entropy[stay]
            blocks, there = self._written.take(stay)
            self._written = Written(blocks, there.masked_fill(new, 0))
