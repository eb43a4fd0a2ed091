"""Guided unmasking: a small model that reads from left to right says how much of a masked model's draft to trust
(FlashDLM, 2025, arXiv 2505.21467).

In one forward the masked model fills in everything that is unknown. The guide reads that in one pass of its own, and
the longest beginning on which it agrees is decided, at least one element. It says how many, never what: every value is
the masked model's own.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from seriatim.canvas import DECIDED, Canvas, Set, Truncate
from seriatim.decoding.guess import Guess
from seriatim.decoding.loop import Step, stop_ids
from seriatim.decoding.target import Target
from seriatim.heads.dist import Categorical
from seriatim.model import Rows
from seriatim.random import COIN, VALUE, Key, Random, numbered
from seriatim.slots import ragged


class Agreement(Protocol):
    """Whether a guide agrees with what is drafted."""

    def __call__(self, said: Categorical, x: Int[Tensor, "b n"]) -> Float[Tensor, "b n"]:
        """With which probability, for each element: 0 or 1 where no chance is involved. said: the guide's laws, given
        everything before."""
        ...


@dataclass(frozen=True)
class Equal:
    """It would write the very same."""

    def __call__(self, said: Categorical, x: Int[Tensor, "b n"]) -> Float[Tensor, "b n"]:
        return (said.mode() == x).double()


@dataclass(frozen=True)
class Likely:
    """It gives this more than a probability."""

    least: float = 0.1

    def __call__(self, said: Categorical, x: Int[Tensor, "b n"]) -> Float[Tensor, "b n"]:
        return (said.log_prob(x).exp() > self.least).double()


@dataclass(frozen=True)
class Among:
    """This is one of its `k` likeliest, and has at least a share of the probability of the likeliest."""

    k: int = 5
    share: float = 0.0

    def __post_init__(self) -> None:
        if self.k < 1 or not 0 <= self.share <= 1:
            raise ValueError(f"at least the likeliest value, and a share of 0 to 1; got {self.k} and {self.share}")

    def __call__(self, said: Categorical, x: Int[Tensor, "b n"]) -> Float[Tensor, "b n"]:
        log_p, own = said.log_probs(), said.log_prob(x)
        better = (log_p > own[..., None]).sum(-1)
        near = own.exp() >= self.share * log_p.amax(-1).exp()
        return ((better < self.k) & near).double()


@dataclass(frozen=True)
class Chance:
    """As often as it would write this: what speculative sampling accepts of a draft without randomness."""

    def __call__(self, said: Categorical, x: Int[Tensor, "b n"]) -> Float[Tensor, "b n"]:
        return said.log_prob(x).exp().double()


class Guided:
    """Decides the longest beginning of the draft on which the guide agrees, at least one element. A row ends at the
    first of the `stop` ids.

    guide: a model of a line, whose own cache holds what was decided and nothing else; ahead: how much of the draft it
    reads at once, and twice as much each time that it agrees with all of it. Behind the longest text that it takes,
    elements are decided one by one.
    """

    def __init__(self, guide: Target, agree: Agreement | None = None, stop: Iterable[int] = (), ahead: int = 32):
        if not guide.model.factorization.draftable:
            name = type(guide.model.factorization).__name__
            raise ValueError(f"a guide reads from left to right, and {name} is another order: give a next-token model")
        if ahead < 1:
            raise ValueError(f"a guide reads at least 1 element at once, got {ahead}")
        self.guide, self.agree, self.stop, self.ahead = guide, agree or Equal(), stop_ids(stop), ahead

    def decide(self, canvas: Canvas, guess: Guess | None, rows: Rows, random: Random) -> Step:
        if guess is not None:
            raise ValueError("guided unmasking verifies nothing: leave out the proposer")
        element = torch.as_tensor(rows.element).expand(canvas.batch, -1)
        turn = (canvas.status == DECIDED).sum(1, keepdim=True)
        x = rows.dist.sample(random, Key(canvas.row, element, numbered(VALUE, turn)))
        front, draft, new = _drafted(canvas, element, x)
        start = time.perf_counter()
        count = self.agreed(canvas, front, draft, new, random)
        seconds = time.perf_counter() - start
        taken = torch.arange(draft.shape[1]) < count[:, None]
        ends = taken & new & torch.isin(draft, torch.tensor(sorted(self.stop), dtype=torch.long))
        edits: tuple[Set | Truncate, ...] = ()
        if bool(ends.any()):
            size = canvas.layout.size
            last = torch.where(ends, torch.arange(draft.shape[1]), size).amin(1, keepdim=True)
            taken &= torch.arange(draft.shape[1]) <= last
            edits = (Truncate((front + last + 1)[:, 0].clamp(max=size)),)
        where = torch.where(taken & new, front + torch.arange(draft.shape[1]), -1)
        return Step((Set(draft, where), *edits), drafting=seconds)

    def agreed(
        self, canvas: Canvas, front: Int[Tensor, "b 1"], draft: Int[Tensor, "b n"], new: Bool[Tensor, "b n"],
        random: Random,
    ) -> Int[Tensor, "b"]:  # fmt: skip
        """How many elements of each row's draft are decided: 0 where there is none. The guide remembers them."""
        there, model = (draft >= 0).sum(1), self.guide.model
        room = min(draft.shape[1], model.layout.size - int(front.amax()))
        if room < 1 or int(front.amin()) + getattr(model.factorization, "prefix", 0) < 1:
            return there.clamp(max=1)  # it has nothing to begin with, or cannot follow any more
        turn = (canvas.status == DECIDED).sum(1, keepdim=True)
        count, read, width = torch.zeros_like(there), 0, min(self.ahead, room)
        while True:
            guess = Guess(draft[:, :width])
            plan = self.guide.plan(canvas, guess)
            assert plan is not None
            rows = self.guide.forward(plan, canvas, guess)
            said = type(rows.dist)(rows.dist.logits[:, read:width])  # of what was not read before
            x, going = draft[:, read:width], (count == read)[:, None] & (draft[:, read:width] >= 0)
            chance = self.agree(said, x.clamp(min=0).to(said.logits.device)).cpu()
            chance = torch.where(new[:, read:width], chance, 1.0).masked_fill(~going, 0.0)
            coins = torch.where(going, front + torch.arange(read, width), -1)
            count = count + random.heads(chance, Key(canvas.row, coins, numbered(COIN, turn)))
            if width == room or not bool((count == width).any()):
                break
            read, width = width, min(2 * width, room)
        count = torch.maximum(count, there.clamp(max=1))
        node = torch.arange(plan.size) - (plan.size - width)
        known, some = plan.reads.slot[:, :1], count[:, None]
        kept = (node < 0) & (torch.arange(plan.size) < known + some.clamp(max=1))
        kept = kept | ((node >= 0) & (node < some - 1))  # the newest is fed again, and says what follows it
        self.guide.commit(ragged(kept.expand(canvas.batch, -1)), plan)
        return count


def _drafted(
    canvas: Canvas, element: Int[Tensor, "b m"], x: Int[Tensor, "b m"]
) -> tuple[Int[Tensor, "b 1"], Int[Tensor, "b n"], Bool[Tensor, "b n"]]:
    """Where each row's known beginning ends, what is drafted behind it (-1: no more; known elements as they are), and
    which of that is new."""
    size, value = canvas.layout.size, canvas.value[canvas.layout.kinds[0]].cpu()
    at = torch.where(element >= 0, element, size)
    whole = torch.cat([torch.where(canvas.known, value, -1), value[:, :1]], 1).scatter(1, at, x.cpu())[:, :-1]
    front = canvas.lengths()[:, None]
    place = front + torch.arange(max(size - int(front.amin()), 1))
    inside = place < size
    place = place.clamp(max=size - 1)
    draft = whole.gather(1, place).masked_fill(~inside, -1)
    going = (draft >= 0).long().cumprod(1).bool()
    longest = max(int(going.sum(1).amax()), 1)
    return front, draft.masked_fill(~going, -1)[:, :longest], ~canvas.known.gather(1, place)[:, :longest]
