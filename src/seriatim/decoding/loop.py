"""The one loop: propose, plan, forward, decide, apply, commit. Every decoder is a proposer and a decider in it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Protocol

import torch
from jaxtyping import Int
from torch import Tensor

from seriatim.canvas import Canvas, Edit, Revise
from seriatim.decoding.guess import Guess
from seriatim.decoding.target import Target
from seriatim.model import Rows
from seriatim.random import Generator, Random


@dataclass(slots=True)
class Step:
    """What one turn did; progress bars, films and meters read the stream of these.

    select: rows that go on, perhaps several times (beams); edits: changes of the canvas, of the rows that go on; keep:
    pending cache entries worth keeping, of the rows before the selection (None: as the plan says); drafted, accepted:
    nodes of the guess, plain integers at batch 1, else one a row; drafting: seconds that the proposer took.
    """

    edits: tuple[Edit, ...]
    keep: Any = None
    select: Tensor | None = None
    forwards: int = 1
    slots: int = 0
    drafted: int | Tensor = 0
    accepted: int | Tensor = 0
    drafting: float = 0.0


class Proposer(Protocol):
    """Suggests content to be verified in one forward. May run models of its own; owns state for each row.

    One that looks at the hidden states of a prompt says so by `reads_prompt = True`: then the first forward has all of
    it, in place of a prefill in chunks.
    """

    def propose(self, canvas: Canvas, target: Target, random: Random) -> Guess | None:
        """A guess of what follows; None: nothing to suggest this time."""
        ...

    def observe(self, canvas: Canvas, rows: Rows, step: Step) -> None:
        """What came of it: recycle rows and hidden states, follow selected rows (`rows` are those before)."""
        ...


class Decider(Protocol):
    """Turns the rows of a forward into edits.

    One whose `keep` is more than a path says so by `needs` (a frozenset, see `Cache.can`), and is refused with a cache
    that cannot. One that may take back what it decided says so by `redraws = True`: then a text is streamed at its end.
    """

    def decide(self, canvas: Canvas, guess: Guess | None, rows: Rows, random: Random) -> Step: ...


def stop_ids(stop: Iterable[int]) -> frozenset[int]:
    """Ids that end a row, as deciders take them."""
    ids = tuple(stop) if isinstance(stop, Iterable) else (None,)
    if not all(isinstance(i, Integral) for i in ids):
        raise TypeError(f"stop is a collection of ids, such as (3,), got {stop!r}")
    return frozenset(ids)


def decode(
    target: Target,
    canvas: Canvas,
    decider: Decider,
    proposer: Proposer | None = None,
    random: Random | None = None,
) -> Iterator[Step]:
    """Generate in place until the canvas is complete, yielding each step.

    random: `Generator(0)` if left out, so every call draws the same; pass `Generator(seed)` for other samples. Between
    two steps rows may come and go by `select_rows`; what is known must not be edited: the cache would keep what stood
    there. The caller that drains the stream should hold `torch.inference_mode()`; a streaming caller need not.
    """
    random = random or Generator()
    target.demand(getattr(decider, "needs", frozenset()), type(decider).__name__)
    while True:
        if torch.is_inference_mode_enabled():
            step = _turn(target, canvas, decider, proposer, random)
        else:
            with torch.inference_mode():
                step = _turn(target, canvas, decider, proposer, random)
        if step is None:
            return
        yield step


def _turn(target: Target, canvas: Canvas, decider: Decider, proposer: Proposer | None, random: Random) -> Step | None:
    start = time.perf_counter()
    guess = None if proposer is None else proposer.propose(canvas, target, random)
    proposed = time.perf_counter()
    plan = target.plan(canvas, guess)
    if plan is None:
        return None
    rows = target.forward(plan, canvas, guess)
    step = decider.decide(canvas, guess, rows, random)
    step.slots = plan.size
    repeats = False
    for edit in step.edits:
        repeats = repeats or type(edit) is Revise
    target.commit(step.keep, plan, repeats)
    if step.select is not None:
        select_rows(target, canvas, step.select)
    canvas.apply(step.edits)
    if proposer is not None:
        decided = time.perf_counter()
        proposer.observe(canvas, rows, step)
        step.drafting = proposed - start + time.perf_counter() - decided
    return step


def select_rows(
    target: Target,
    canvas: Canvas,
    rows: Int[Tensor, "b2"],
    new: Canvas | None = None,
    condition: Mapping[str, Tensor] | None = None,
    caches: Sequence[Any] = (),
) -> None:
    """Keep, copy, drop or admit rows between two steps, in place: a running `decode` goes on with them.

    rows: which rows, in which order; -1 is the next row of `new`, whose raw conditions are in `condition`, and of
    which `caches` hold what has been computed already (caches of the model, with as many rows in all). Proposers
    and deciders that remember rows know them by `canvas.row`. A stream that has ended is started again by `decode` on
    the same target and canvas.
    """
    picked = canvas.select(rows, new)
    target.select(rows, canvas.batch, condition, caches)
    canvas.become(picked)


def generate(
    target: Target,
    canvas: Canvas,
    decider: Decider,
    proposer: Proposer | None = None,
    random: Random | None = None,
) -> Canvas:
    """Decode to the end and return the canvas. Without `random` every call draws the same, from `Generator(0)`."""
    with torch.inference_mode():
        for _ in decode(target, canvas, decider, proposer, random):
            pass
    return canvas
