"""Deciders that sample what was read: everything at once, or a chosen part of the unknown elements."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from typing import Any, ClassVar, Literal, Protocol, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from seriatim.canvas import DECIDED, DELETED, GIVEN, Canvas, Set, Truncate, Unset
from seriatim.decoding.guess import Guess, moved
from seriatim.decoding.loop import Step, stop_ids
from seriatim.heads.dist import Categorical
from seriatim.model import Rows
from seriatim.noise import NOISES
from seriatim.random import ORDER, VALUE, Key, Random, numbered
from seriatim.slots import ragged
from seriatim.view import INF


class SampleAll:
    """Ancestral sampling: decide every element that was read. `stop` ids end a row."""

    def __init__(self, stop: Iterable[int] = ()):
        self.stop = stop_ids(stop)

    def decide(self, canvas: Canvas, guess: Guess | None, rows: Rows, random: Random) -> Step:
        if guess is not None:
            raise ValueError("SampleAll verifies nothing: use a verifier as decider, or no proposer")
        element = rows.element
        if isinstance(element, int):
            x = rows.dist.sample(random, Key(canvas.row, element))
            if not self.stop:
                return Step((Set(x),))
            return self._stopped(canvas, x, torch.full((canvas.batch, 1), element))
        element = element.expand(canvas.batch, -1)
        x = rows.dist.sample(random, Key(canvas.row, element))
        if self.stop:
            return self._stopped(canvas, x, element)
        return Step((Set(x, element),))

    def _stopped(self, canvas: Canvas, x: Tensor, element: Tensor) -> Step:
        """End rows that emitted a stop id."""
        if x.dim() > 2 or x.is_floating_point():
            raise TypeError(
                f"stop ids end rows of ids, but a value here is a {x.dtype} tensor of shape {tuple(x.shape[2:])}: "
                "decode without `stop` (`Growing` ends samples by a group of ids)"
            )
        ended = torch.isin(x, torch.tensor(sorted(self.stop))) & (element >= 0)
        if not bool(ended.any()):
            return Step((Set(x) if canvas.length is not None else Set(x, element),))
        first = torch.where(ended, element, canvas.layout.size).amin(1)
        return Step((Set(x, element), Truncate(torch.minimum(first + 1, torch.tensor(canvas.layout.size)))))


Rule = Literal["random", "confidence", "margin", "entropy"]
Schedule = Literal["linear", "cosine", "quadratic", "powers"]


class Commit(Protocol):
    """How many of the surest elements are decided at once, as far as their scores allow. At least one always is."""

    rules: ClassVar[tuple[Rule, ...]]  # whose scores it understands

    def __call__(self, score: Float[Tensor, "b m"]) -> Int[Tensor, "b"]:
        """score: from the highest to the lowest, -inf behind rows that have fewer."""
        ...


@dataclass(frozen=True)
class Above:
    """All whose score exceeds a threshold (Fast-dLLM, Wu et al. 2025, arXiv 2505.22618; for entropy: minus the entropy,
    in nats)."""

    threshold: float
    rules: ClassVar[tuple[Rule, ...]] = ("random", "confidence", "margin", "entropy")

    def __call__(self, score: Float[Tensor, "b m"]) -> Int[Tensor, "b"]:
        return (score > self.threshold).sum(1)


def check_threshold(threshold: float, rule: str) -> None:
    """Refuse a threshold that no score of a rule ever exceeds, or every one does (of entropies any number is one)."""
    if math.isnan(threshold) or (rule != "entropy" and not 0 < threshold <= 1):
        raise ValueError(f"a threshold is above 0, and at most 1; got {threshold}")


@dataclass(frozen=True)
class Factor:
    """The n surest, the most for which (n + 1) (1 - confidence of the n-th) stays below `factor` (Fast-dLLM): for a
    factor of 1 the likeliest values one by one are then the likeliest together."""

    factor: float
    rules: ClassVar[tuple[Rule, ...]] = ("confidence",)

    def __call__(self, score: Float[Tensor, "b m"]) -> Int[Tensor, "b"]:
        n = torch.arange(1, score.shape[1] + 1)
        return ((n + 1) * (1 - score) < self.factor).long().cumprod(1).sum(1)


@dataclass(frozen=True)
class Budget:
    """The surest whose entropies add up to `nats` at most: what they are decided without knowing of each other costs
    less than that (their total correlation; SDAR, and entropy-bounded sampling, Ben-Hamu et al. 2025)."""

    nats: float
    rules: ClassVar[tuple[Rule, ...]] = ("entropy",)

    def __call__(self, score: Float[Tensor, "b m"]) -> Int[Tensor, "b"]:
        return ((-score).cumsum(1) <= self.nats).long().cumprod(1).sum(1)


class Scorer(Protocol):
    """Ranks elements otherwise than by their confidence alone. A value; draws nothing, and changes no value drawn."""

    def __call__(
        self, canvas: Canvas, element: Int[Tensor, "b m"], x: Int[Tensor, "b m"], score: Float[Tensor, "b m"]
    ) -> Float[Tensor, "b m"]:
        """The score of each element (-1: padding, whatever), for which the value x was drawn with confidence `score`;
        the higher, the earlier it is decided, and `commit` sees it so."""
        ...


@dataclass
class Select:
    """Decide only some of the unknown elements that were read: masked generation (MaskGIT, LLaDA and kin).

    rule: which, at random, or those of largest probability of the value that was sampled ("confidence"; Chang et al.
    2022), largest margin between the two likeliest values, or smallest entropy. Scores are those of the model (guided,
    where it is), before temperature and filters, which would make all values look certain: as in LLaDA and Fast-dLLM.
    `steps` spreads the elements of a block evenly ("linear", the first steps one more; Nie et al. 2025), as another
    noise schedule does (`NOISES`; "cosine": few at first, "quadratic": many), or as "powers": 1, 2, 4, ... and the
    rest, of the whole text as far as its blocks allow, whatever `steps` is (EOSER-ASS, 2025); `commit` decides instead
    as many as the scores allow, and at least one; `sizes` says it of each step, and the last one decides what is left.
    `scorer` changes the scores of the rule "confidence"; `penalty` is taken off a score for every place between an
    element and the first that was read: near ones go first.

    Has no memory: how far a row is follows from what it has decided. Elements of equal rank are a block.
    """

    rule: Rule = "confidence"
    steps: int = 8
    schedule: Schedule = "linear"
    commit: Commit | None = None
    penalty: float = 0.0
    scorer: Scorer | None = None
    sizes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.rule not in ("random", "confidence", "margin", "entropy"):
            raise ValueError(f"rule is random, confidence, margin or entropy, not {self.rule!r}")
        if self.schedule not in get_args(Schedule):
            raise ValueError(f"schedule is {', '.join(get_args(Schedule))}, not {self.schedule!r}")
        if self.sizes is not None and (not self.sizes or min(self.sizes) < 1):
            raise ValueError(f"at least one element is decided at each step, got {self.sizes}")
        if self.commit is not None and self.rule not in self.commit.rules:
            raise ValueError(
                f"{type(self.commit).__name__} goes by {self.commit.rules[0]}, and the rule is {self.rule}"
            )
        if self.scorer is not None and self.rule != "confidence":
            raise ValueError(f"a scorer goes by confidence, and the rule is {self.rule}")
        if self.steps < 1:
            raise ValueError(f"at least one step is needed, got {self.steps}")

    def decide(self, canvas: Canvas, guess: Guess | None, rows: Rows, random: Random) -> Step:
        element = elements(canvas, guess, rows)
        left = (element >= 0).sum(1)
        count = left.clamp(max=1)
        if self.commit is None:
            whole = self.schedule == "powers"
            unknown, total = (canvas.open.sum(1), ours(canvas)) if whole else (left, _block(canvas, element))
            below = [self._below(n, t) for n, t in zip(unknown.tolist(), total.tolist(), strict=True)]
            count = torch.minimum(unknown - torch.tensor(below), left)
        decided = (canvas.status == DECIDED).sum(1, keepdim=True)
        edit, _, _ = self._some(canvas, element, count, decided, rows, random)
        return Step((edit,))

    def _below(self, left: int, total: int) -> int:
        """How many unknown elements of a block remain after a step that starts with `left` of them."""
        return next((n for n in self._planned(total) if n < left), 0)

    def _planned(self, total: int) -> tuple[int, ...]:
        """Unknown elements of a block that remain after each step."""
        return schedule(total, self.steps, self.sizes or self.schedule)

    def _some(
        self,
        canvas: Canvas,
        element: Int[Tensor, "b m"],
        count: Int[Tensor, "b"],
        turn: Int[Tensor, "b 1"],
        rows: Rows,
        random: Random,
    ) -> tuple[Set, Bool[Tensor, "b m"], Float[Tensor, "b m"]]:
        """Values for `count` elements of each row, which they are, and the scores of all. `turn` never comes twice."""
        live = element >= 0
        if self.rule == "confidence":  # noise is drawn anew: the choice depends on what was drawn
            x = rows.dist.sample(random, Key(canvas.row, element, numbered(VALUE, turn)))
            score = _categorical(rows.said, self.rule).log_prob(x).exp().cpu()
            if self.scorer is not None:
                score = self.scorer(canvas, element, x.cpu(), score)
            score = self._nearer(score, element)
            chosen = self._best(score, live, count)
            return Set(x, torch.where(chosen, element, -1)), chosen, score
        if self.rule == "random":
            score = torch.zeros(live.shape)
            chosen = _any(canvas, element, count, turn, random)
        else:
            score = self._nearer(self._certainty(_categorical(rows.said, self.rule)).cpu(), element)
            chosen = self._best(score, live, count)
        pick = ragged(chosen)  # only these are drawn: a draw may cost a network
        named = torch.where(pick >= 0, element.gather(1, pick.clamp(min=0)), -1)
        draw = numbered(VALUE, turn) if self.redraws else 0
        return Set(rows.dist.take(pick).sample(random, Key(canvas.row, named, draw)), named), chosen, score

    def _nearer(self, score: Float[Tensor, "b m"], element: Int[Tensor, "b m"]) -> Float[Tensor, "b m"]:
        """Scores less the penalty of distance."""
        if not self.penalty:
            return score
        return score - self.penalty * (element - first_of(element))

    redraws = False  # may an element be decided more than once?

    def _certainty(self, dist: Categorical) -> Float[Tensor, "b m"]:
        """Scores that depend on the distributions only; larger is decided earlier."""
        if self.rule == "entropy":
            return -dist.entropy()
        top = dist.probs().topk(min(2, dist.logits.shape[-1]), -1).values
        return top[..., 0] - top[..., 1:].sum(-1)

    def _best(self, score: Float[Tensor, "b m"], live: Tensor, count: Int[Tensor, "b"]) -> Bool[Tensor, "b m"]:
        """Those of highest score, the first of equals."""
        ranked = score.masked_fill(~live, -torch.inf).sort(dim=1, descending=True, stable=True)
        if self.commit is not None:
            count = torch.maximum(count, self.commit(ranked.values))
        return live & (ranked.indices.argsort(1) < count[:, None])


@dataclass
class Remask(Select):
    """`Select` that makes the `again` least certain decided elements of the block unknown again after each step but the
    last; the others stay as they are. Remembers scores and turns, of one canvas at a time."""

    again: int = 1
    redraws = True
    _canvas: Canvas | None = field(default=None, init=False, repr=False, compare=False)
    _row: Tensor = field(init=False, repr=False, compare=False)
    _turn: Int[Tensor, "b 1"] = field(init=False, repr=False, compare=False)
    _score: Float[Tensor, "b E"] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.again < 0:
            raise ValueError(f"0 or more elements are remasked at a step, got {self.again}")
        if self.commit is not None or self.rule == "random":
            raise ValueError("remasking needs scores and a fixed number of steps: no commit, and no random rule")

    def decide(self, canvas: Canvas, guess: Guess | None, rows: Rows, random: Random) -> Step:
        element = elements(canvas, guess, rows)
        left = (element >= 0).sum(1)
        self._follow(canvas)
        total = _block(canvas, element)
        after = [self._after(t, n) for t, n in zip(self._turn[:, 0].tolist(), total.tolist(), strict=True)]
        count, again = self._counts(left, torch.tensor(after))
        edit, chosen, score = self._some(canvas, element, count, self._turn, rows, random)
        b, m = chosen.nonzero(as_tuple=True)
        self._score[b, element[b, m]] = score[b, m].to(self._score.dtype)
        done = (count == left) & (again == 0)
        self._turn = torch.where(done[:, None], 0, self._turn + 1)
        worst = self._score.topk(min(int(again.max()), self._score.shape[1]), 1, largest=False)
        some = (torch.arange(worst.values.shape[1]) < again[:, None]) & (worst.values < torch.inf)
        element = torch.where(some, worst.indices, -1)
        self._score = self._score.scatter(1, worst.indices, torch.where(some, torch.inf, worst.values))
        self._score = self._score.masked_fill(done[:, None], torch.inf)
        return Step((edit, Unset(element)) if bool(some.any()) else (edit,))

    def _counts(self, left: Int[Tensor, "b"], after: Int[Tensor, "b"]) -> tuple[Int[Tensor, "b"], Int[Tensor, "b"]]:
        """Of `left` unknown elements, of which `after` are to remain by the schedule: how many are decided, and how
        many decided ones hidden again."""
        count = torch.minimum((left - after).clamp(min=1), left)
        return count, torch.where(count == left, 0, self.again)

    def _after(self, turn: int, total: int) -> int:
        """How many unknown elements remain after a turn, before remasking."""
        plan = self._planned(total)
        return plan[turn] if turn < len(plan) else 0

    def _follow(self, canvas: Canvas) -> None:
        """Another canvas starts anew; rows may have come and gone."""
        if canvas is not self._canvas:
            self._canvas, self._row = canvas, canvas.row
            self._turn = torch.zeros(canvas.batch, 1, dtype=torch.long)
            self._score = torch.full((canvas.batch, canvas.layout.size), torch.inf, dtype=torch.float64)
        rows = moved(self._row, canvas.row)
        if rows is not None:
            new = (rows < 0)[:, None]
            self._row = canvas.row
            self._turn, self._score = (
                self._turn[rows].masked_fill(new, 0),
                self._score[rows].masked_fill(new, torch.inf),
            )


def ours(canvas: Canvas) -> Int[Tensor, "b"]:
    """How many elements of each row are decided in all: what was not given, and is not cut off."""
    return ((canvas.status != GIVEN) & (canvas.status != DELETED)).sum(1)


def first_of(element: Int[Tensor, "b m"]) -> Int[Tensor, "b 1"]:
    """The first of these elements of each row (-1 is none); far behind all where there are none."""
    return torch.where(element >= 0, element, INF).amin(1, keepdim=True)


@lru_cache(maxsize=4096)
def schedule(total: int, steps: int, kind: str | tuple[int, ...]) -> tuple[int, ...]:
    """Unknown elements that remain of `total` after each step: at least one fewer each time, none at the end. kind: a
    `Schedule`, or how many are decided at each step, as long as there are so many."""
    if isinstance(kind, tuple):
        after = [total - n for n in accumulate(kind[:-1]) if n < total]
        return (*after, 0)
    left, remaining = total, []
    steps = max(total.bit_length() - 1, 1) if kind == "powers" else steps
    for turn in range(1, steps + 1):
        if kind == "powers":
            now = total - 2**turn + 1
        elif kind == "linear":
            now = total - turn * (total // steps) - min(turn, total % steps)
        else:
            share = float(NOISES[kind].hidden(torch.tensor(1 - turn / steps, dtype=torch.float64)))
            now = math.floor(total * share + 1e-9)
        left = 0 if turn == steps else max(min(left - 1, now), 0)
        remaining.append(left)
        if left == 0:
            break
    return tuple(remaining)


def elements(canvas: Canvas, guess: Guess | None, rows: Rows) -> Int[Tensor, "b m"]:
    """The elements that were read, -1 where a row has fewer."""
    if guess is not None:
        raise ValueError("masked generation verifies nothing: use a verifier as decider, or no proposer")
    element = rows.element
    if isinstance(element, int):  # a line, read at its end
        element = torch.tensor([[element]])
    return element.expand(canvas.batch, -1)


def _block(canvas: Canvas, element: Int[Tensor, "b m"]) -> Int[Tensor, "b"]:
    """How many elements, known ones included, each row decides together: those of the rank that was read; all, where
    the order gives each a rank of its own and leaves the choice to the decider."""
    live = element >= 0
    rank = canvas.rank.gather(1, element.clamp(min=0))
    low = rank.masked_fill(~live, INF).amin(1, keepdim=True)
    high = rank.masked_fill(~live, -1).amax(1, keepdim=True)
    mine = (canvas.status != GIVEN) & (canvas.status != DELETED)
    return (mine & ((low != high) | (canvas.rank == low))).sum(1)


def _any(
    canvas: Canvas, element: Int[Tensor, "b m"], count: Int[Tensor, "b"], turn: Int[Tensor, "b 1"], random: Random
) -> Bool[Tensor, "b m"]:
    """`count` elements of each row, every set equally likely: drawn one by one, so that it can be enumerated."""
    live = element >= 0
    chosen = live & (count == live.sum(1))[:, None]  # where all are taken nothing is drawn
    wanted = torch.where(chosen.any(1), 0, count)[:, None]
    first = first_of(element)
    for i in range(int(wanted.max())):
        active = wanted > i
        free = torch.where(live & ~chosen, 0.0, -torch.inf).masked_fill(~active, 0.0)
        pick = random.categorical(
            free[:, None], Key(canvas.row, torch.where(active, first, -1), numbered(ORDER, turn, i))
        )
        chosen = chosen | (active & torch.zeros_like(chosen).scatter(1, pick, True))
    return chosen


def _categorical(dist: Any, rule: str) -> Categorical:
    if not isinstance(dist, Categorical):
        raise TypeError(
            f"the rule {rule!r} ranks ids by their probabilities; {type(dist).__name__} takes 'random' only"
        )
    return dist
