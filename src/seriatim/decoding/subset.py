"""Drafts in the order of any subset: several unknown elements at once, verified by the model that drafted them.

Any-subset speculative decoding (Guo & Ermon 2025, algorithm 1): a forward in which the unknown elements see only what
is known draws k of them independently; a second one, in which each also sees the drafts before it, says what the law of
each really is; drafts are accepted by the ratio of the two, and the first rejected one is drawn again from what is
left. The first law is the same in both forwards, so its draft always stands: two elements at least by two forwards, and
never more forwards than elements. `ContextBigrams` drafts without a forward.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from seriatim.canvas import Canvas, Set
from seriatim.decoding.guess import Guess
from seriatim.decoding.loop import Step
from seriatim.decoding.sample import SampleAll
from seriatim.decoding.target import Target
from seriatim.decoding.verify import Ratio
from seriatim.heads.dist import Categorical
from seriatim.model import Rows
from seriatim.random import COIN, DRAFT, Key, Random, numbered


class Ahead:
    """No tokens, but room for `length` of them: so many elements are read at once, each given what is known alone."""

    def __init__(self, length: int):
        if length < 1:
            raise ValueError(f"a draft has at least 1 token, got {length}")
        self.length = length

    def propose(self, canvas: Canvas, target: Target, random: Random) -> Guess | None:
        """None where nothing is left, or one element only: reading it is plain decoding."""
        size = min(self.length, int(canvas.open.sum(1).max()))
        return None if size < 2 else Guess(torch.full((canvas.batch, size), -1))

    def observe(self, canvas: Canvas, rows: Rows, step: Step) -> None:
        """Learns nothing."""


class SelfDraft(Ahead):
    """The model itself drafts up to `length` elements, independently of each other, by a forward of its own.

    What that forward computed of known elements stays in the cache. It is counted with the one that verifies.
    """

    _slots = 0  # of the forward that drafted, in this turn

    def propose(self, canvas: Canvas, target: Target, random: Random) -> Guess | None:
        blank, self._slots = super().propose(canvas, target, random), 0
        plan = None if blank is None else target.plan(canvas, blank)
        if plan is None:
            return None
        rows = target.forward(plan, canvas, blank)
        target.commit(None, plan)
        self._slots = plan.size
        element = torch.as_tensor(rows.element).expand(canvas.batch, -1)
        # the first is what plain decoding would draw
        draw = torch.tensor([0, *(numbered(DRAFT, ahead) for ahead in range(1, element.shape[1]))])
        value = rows.dist.sample(random, Key(canvas.row, element, draw))
        return Guess(value.masked_fill((element < 0).to(value.device), -1), None, rows.dist)

    def observe(self, canvas: Canvas, rows: Rows, step: Step) -> None:
        step.forwards += self._slots > 0
        step.slots += self._slots


class ContextBigrams(Ahead):
    """Drafts by what is known: a token is followed by what followed it elsewhere, as often as it did; where it stands
    nowhere else, or nothing stands before, any known token is as likely as it is frequent (Guo & Ermon 2025). Elements
    that follow each other are numbered so. Has no memory: it counts afresh each time."""

    def propose(self, canvas: Canvas, target: Target, random: Random) -> Guess | None:
        blank = super().propose(canvas, target, random)
        known, ids = canvas.known, canvas.value[canvas.layout.kinds[0]].cpu()
        if blank is None or not bool(known.any()):
            return None
        vocab = int(target.model.heads[canvas.layout.kinds[0]].vocab)  # type: ignore[arg-type]
        single = _counts(ids, known, vocab)
        pair = known[:, :-1] & known[:, 1:]
        element = canvas.rank.masked_fill(~canvas.open, canvas.layout.size).argsort(dim=1, stable=True)[:, : blank.size]
        left = canvas.open.sum(1, keepdim=True)
        # a row that has one element left takes a plain step, whatever its company does
        live = (torch.arange(blank.size) < left) & (left > 1) & known.any(1, keepdim=True)
        value, laws = torch.full_like(element, -1), []
        for ahead in range(blank.size):
            here = element[:, ahead, None]
            before = ids.gather(1, (here - 1).clamp(min=0))
            told = (here > 0) & known.gather(1, (here - 1).clamp(min=0))
            if ahead:  # what stands before may be drafted itself
                before = torch.where(told, before, value[:, ahead - 1, None])
                told = told | (here - 1 == element[:, ahead - 1, None])
            both = _counts(ids[:, 1:], pair & told & (ids[:, :-1] == before), vocab)
            law = torch.where(both.sum(1, keepdim=True) > 0, both, single).log()
            law = law.masked_fill(~live[:, ahead, None], 0.0)[:, None]
            named = torch.where(live[:, ahead, None], here, -1)
            x = random.categorical(law, Key(canvas.row, named, numbered(DRAFT, ahead)))[:, 0]
            value[:, ahead] = torch.where(live[:, ahead], x, -1)
            laws.append(law)
        device = canvas.value[canvas.layout.kinds[0]].device
        return Guess(value.to(device), None, Categorical(torch.cat(laws, 1).to(device)))


def _counts(ids: Int[Tensor, "b n"], chosen: Tensor, vocab: int) -> Float[Tensor, "b v"]:
    """How often each id stands in the chosen places."""
    return torch.zeros(len(ids), vocab, dtype=torch.float64).scatter_add(1, ids, chosen.double())


class InOrder(SampleAll):
    """Verify a chain of drafts along any order: accept with min(1, p / q), draw the first rejected one again from what
    is left of p, and stop there. Behind a draft that is accepted whole nothing was read, so nothing is added to it.

    sure: how many first drafts were drawn from the very law that verifies them; they stand, whatever rounding says of
    the ratio. A row without a draft takes a plain step. `stop` ids end a row (texts from left to right only).
    """

    def __init__(self, stop: Iterable[int] = (), sure: int = 0):
        super().__init__(stop)
        self.sure, self.ratio = sure, Ratio()

    def decide(self, canvas: Canvas, guess: Guess | None, rows: Rows, random: Random) -> Step:
        if guess is None:
            return super().decide(canvas, guess, rows, random)
        if not isinstance(rows.dist, Categorical) or guess.q is None:
            raise TypeError("verified are drafts of ids that say from which law they were drawn")
        element = torch.as_tensor(rows.element).expand(canvas.batch, -1)
        n = element.shape[1]
        drafted = guess.value[:, :n].cpu()
        live = (drafted >= 0) & (element >= 0)
        p, q = rows.dist.probs(), guess.q.probs()[:, :n]
        count = random.heads(self._chances(p, q, drafted, live), Key(canvas.row, element, _coins(n))).cpu()
        number = live.sum(1)

        at = count.clamp(max=n - 1)
        row = torch.arange(canvas.batch)
        last, offered = p[row, at], q[row, at].to(p) * (count < number)[:, None].to(p)
        own = element.gather(1, at[:, None])
        own = torch.where(((count < number) | (number == 0))[:, None], own, -1)
        token = random.categorical(self.ratio.rest(last, offered).log()[:, None], Key(canvas.row, own)).cpu()

        column = torch.arange(n)
        value = torch.where(column < count[:, None], drafted, token)
        decided = (column < count[:, None]) | ((column == at[:, None]) & (own >= 0))
        named = torch.where(decided, element, -1)
        step = self._settled(canvas, value, named)
        step.keep = self._keep(canvas, rows, count, number)
        if canvas.batch == 1:
            step.drafted, step.accepted = int(number), int(count)
        else:
            step.drafted, step.accepted = number, count
        return step

    def _chances(
        self, p: Float[Tensor, "b n v"], q: Float[Tensor, "b n v"], drafted: Int[Tensor, "b n"], live: Tensor
    ) -> Float[Tensor, "b n"]:
        """The probability of accepting each draft, once all before it are."""
        token = drafted.clamp(min=0)[..., None].to(p.device)
        chances = self.ratio.acceptance(p.gather(-1, token)[..., 0], q.gather(-1, token)[..., 0])
        chances[:, : self.sure] = 1.0
        return chances.masked_fill(~live.to(p.device), 0.0)

    def _settled(self, canvas: Canvas, value: Int[Tensor, "b n"], element: Int[Tensor, "b n"]) -> Step:
        """What is decided, by name: columns behind it decide nothing."""
        ended = torch.isin(value, torch.tensor(sorted(self.stop))) & (element >= 0)
        return self._stopped(canvas, value, element) if bool(ended.any()) else Step((Set(value, element),))

    def _keep(self, canvas: Canvas, rows: Rows, count: Int[Tensor, "b"], number: Int[Tensor, "b"]) -> int | Tensor:
        """The slots of what was known, then of the accepted drafts: these stand in front, row by row."""
        first = rows.slot[:, 0].expand(canvas.batch)
        kept = torch.where(first >= 0, first - number + count, 0)
        if bool((kept == kept[0]).all()):
            return int(kept[0])
        column = torch.arange(int(kept.max()))
        return torch.where(column < kept[:, None], column, -1)


class Together(SampleAll):
    """Decide all that was read at once, as if the elements did not depend on each other: fast, and another law."""

    def decide(self, canvas: Canvas, guess: Guess | None, rows: Rows, random: Random) -> Step:
        return super().decide(canvas, None, rows, random)


def _coins(n: int) -> Int[Tensor, "n"]:
    """The draws that decide on each of n drafts."""
    return torch.tensor([numbered(COIN, ahead) for ahead in range(n)])
