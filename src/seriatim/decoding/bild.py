"""Big little decoding (Kim et al. 2023, arXiv 2302.07863): a small model writes as long as it is sure, a large one
reads what it wrote and goes back to the first token that it finds too unlikely.

Relaxed on purpose: tokens stand that the large model would not have written. With a threshold of 0 on their loss none
does, and the law is the large model's.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Bool
from torch import Tensor

from seriatim.canvas import Canvas
from seriatim.decoding.draft import Drafting, beside
from seriatim.decoding.guess import Guess
from seriatim.decoding.loop import Step
from seriatim.decoding.target import Target
from seriatim.decoding.verify import Round, Walk
from seriatim.heads.dist import Categorical
from seriatim.model import Rows
from seriatim.random import Random


class Confident(Drafting):
    """A small model writes its likeliest tokens one after another, and hands over where it gives the likeliest less
    than `confidence`, at the latest after `length` tokens.

    draft: the small model, without temperature or filters: they would make it look sure.
    """

    def __init__(self, draft: Target, length: int = 10, confidence: float = 0.6):
        super().__init__(draft)
        if length < 0:
            raise ValueError(f"a draft has 0 or more tokens, got {length}")
        if confidence < 0:
            raise ValueError(f"a confidence is 0 (always sure) or more, above 1 is never reached; got {confidence}")
        if draft.warp is not None:
            raise ValueError("how sure a model is shows without temperature and filters: give a draft that has none")
        self.length, self.confidence = length, confidence

    def propose(self, canvas: Canvas, target: Target, random: Random) -> Guess | None:
        left = self._begin(canvas, target)[:, 0]
        value = torch.full((canvas.batch, 0), -1)
        writes = torch.ones(canvas.batch, dtype=torch.bool)
        for n in range(min(self.length, int(left.max()) - 1)):
            said = self._behind(canvas, Guess(beside(canvas, value)) if n else None, (n - 1,))
            sure, token = (x[:, 0].cpu() for x in said.max(-1))
            writes = writes & (left > n + 1) & (sure.exp() >= self.confidence)
            if not bool(writes.any()):
                break
            value = torch.cat([value, torch.where(writes, token, -1)[:, None]], 1)
        return Guess(beside(canvas, value)) if value.shape[1] else None


class ReleasedConfident(Confident):
    """The same as the code that was released with the paper has it: the large model writes the first token alone, and
    one more by itself after each time that it went back."""

    def __init__(self, draft: Target, length: int = 10, confidence: float = 0.6):
        super().__init__(draft, length, confidence)
        self._waits: dict[int, bool] = {}  # by the name of a row; one that was never met waits

    def propose(self, canvas: Canvas, target: Target, random: Random) -> Guess | None:
        if canvas is not self._canvas:
            self._waits = {}
        self._begin(canvas, target)
        waits = torch.tensor([self._waits.get(row, True) for row in canvas.row.tolist()])
        guess = None if bool(waits.all()) else super().propose(canvas, target, random)
        return None if guess is None else Guess(guess.value.masked_fill(waits[:, None].to(guess.value.device), -1))

    def observe(self, canvas: Canvas, rows: Rows, step: Step) -> None:
        names = self._row.tolist()
        drafted, accepted = (torch.as_tensor(x).expand(len(names)).tolist() for x in (step.drafted, step.accepted))
        self._waits = {row: a < d for row, a, d in zip(names, accepted, drafted, strict=True)}
        super().observe(canvas, rows, step)


class Rollback(Walk):
    """Draw the target's token at a node once, and go on where a child carries it, or else where one carries a token
    whose loss is no larger than `most` (nats): the target goes back at the first token that is neither.

    The loss is under the law that is sampled, penalties and constraints included (of greedy decoding: at temperature
    1), so what these exclude never stands. At `most` = 0 it is `Walk`: exact.
    """

    def __init__(self, most: float = 5.0, stop: Iterable[int] = ()):
        super().__init__(stop)
        if not most >= 0:
            raise ValueError(f"a loss that is tolerated is 0 (exact) or more, got {most}")
        self.most = most

    def verify(self, turn: Round, random: Random) -> None:
        stands: list[list[bool]] = [] if turn.guess is None else self.stands(turn, turn.guess).tolist()
        alive = turn.alive
        while alive:
            tokens = turn.at(alive).sample(random, turn.key(alive))[:, 0].tolist()
            going = []
            for r, token in zip(alive, tokens, strict=True):
                node = turn.child(r, token)
                if node < 0:
                    node = next((c for c in turn.drafted(r, turn.node[r]) if stands[r][c]), -1)
                if turn.emit(r, token if node < 0 else turn.value[r][node], node):
                    going.append(r)
            alive = going

    def stands(self, turn: Round, guess: Guess) -> Bool[Tensor, "b n"]:
        """Which nodes are likely enough, wherever verification comes to them."""
        above = [parent + 1 for parent in guess.parents()]
        loss = -Categorical(turn.dist.logits[:, above]).log_prob(guess.value.clamp(min=0).to(turn.dist.logits.device))
        return (loss <= self.most) & (loss < torch.inf)


class ReleasedRollback(Rollback):
    """The same with the slips of the code that was released with the paper: where the first token of a draft that is
    too unlikely is the target's likeliest nevertheless, the whole draft stands, whatever follows; and a draft that ends
    the text stands up to its end, unread. So `most` = 0 is not exact."""

    def stands(self, turn: Round, guess: Guess) -> Bool[Tensor, "b n"]:
        likely = super().stands(turn, guess)
        first = (~likely).long().argmax(1, keepdim=True)  # of a chain; where all are likely it does not matter
        best = turn.dist.mode()[:, [parent + 1 for parent in guess.parents()]]
        value = guess.value.to(best.device)
        spared = (best == value).gather(1, first)
        ends = torch.isin(value, torch.tensor(sorted(turn.stop), dtype=value.dtype, device=value.device))
        return likely | spared | ends.any(1, keepdim=True)
