"""Drafting that pays: which drafter, and how large a tree, is decided at every step by what it is likely to bring.

A draft costs its making and the rows it adds to a forward; it brings the tokens that stand. What a forward over n rows
costs is known beforehand (a curve of the machine); how often each node of each drafter's trees stands is learned while
decoding, for nothing: whatever is written, one can look afterwards how far a tree would have gone that nobody verified,
since under a `Walk` drafts do not change the text. So nothing is tried out at the user's expense. The nodes that stand
most often make the best tree of each size (Sequoia, Chen et al. 2024, section 3.1, with frequencies for acceptance
rates); of all drafters and sizes the one with the most tokens a second is taken, and plain decoding where none beats
it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Int
from torch import Tensor

from seriatim.canvas import Canvas
from seriatim.decoding.guess import Guess, moved
from seriatim.decoding.loop import Proposer, Step
from seriatim.decoding.target import Target
from seriatim.model import Rows
from seriatim.random import Random

NEWEST = 0.06  # the weight of what was seen last: some 16 looks count, fewer at first
HOPE = 0.3  # how often a node is taken to stand below one that stands, before anything is seen
MARGIN = 1.04  # how much faster than plain a draft must look: a forward's cost is known to a few percent
PATIENCE = 16  # at most so many steps pass between two looks at a drafter that does not pay


@dataclass(eq=False)
class Arm:
    """A drafter, what is known of it, and its drafts whose fate is not known yet.

    stands, seen: how often each node of its trees stood, and how many times that was seen; seconds: that a draft takes;
    wait, idle: looks are skipped while a drafter does not pay.
    """

    proposer: Proposer
    stands: list[float] = field(default_factory=list)
    seen: list[int] = field(default_factory=list)
    seconds: float = 0.0
    wait: int = 0
    idle: int = 0
    open: list[tuple[int, list[int], tuple[int, ...], int]] = field(default_factory=list)  # row, tokens, parent, start

    def hopes(self, parent: tuple[int, ...]) -> list[float]:
        """How often each node of a tree is likely to stand."""
        for i in range(len(self.stands), len(parent)):
            above = 1.0 if parent[i] < 0 else self.stands[parent[i]]
            self.stands.append(above * HOPE)
            self.seen.append(1)
        return self.stands

    def learn(self, tokens: Sequence[int], stood: set[int]) -> None:
        """These nodes of a draft stood, the others did not."""
        for i, token in enumerate(tokens):
            if token >= 0:
                self.seen[i] += 1
                self.stands[i] += (float(i in stood) - self.stands[i]) * max(NEWEST, 1 / self.seen[i])


@dataclass(frozen=True)
class Offer:
    """A tree that might be verified: of an arm's guess these nodes; speed: tokens a second."""

    arm: Arm | None
    guess: Guess | None
    nodes: tuple[int, ...]
    speed: float


class Turns:
    """What steps take beyond their forwards: to judge a draft, keep its path and drop the rest costs something, too.

    Seconds are counted from the end of a proposal to the beginning of the next one, so whoever reads the steps as they
    come is counted in both kinds.
    """

    def __init__(self) -> None:
        self.beyond: dict[bool, float] = {}  # seconds, of steps with a draft and without
        self._since: tuple[bool, float, float] | None = None

    @property
    def dearer(self) -> float:
        """Seconds that a step with a draft takes more than its rows explain."""
        return max(0.0, self.beyond.get(True, 0.0) - self.beyond.get(False, 0.0))

    def begin(self, drafted: bool | None = None, forward: float = 0.0) -> None:
        """A step begins, whose forward takes so many seconds (None: what follows is none)."""
        self._since = None if drafted is None else (drafted, forward, time.perf_counter())

    def end(self) -> None:
        """The step is over, if there was one."""
        if self._since is not None:
            drafted, forward, start = self._since
            taken = min(time.perf_counter() - start - forward, forward)  # a pause tells nothing of drafts
            before = self.beyond.get(drafted, taken)
            self.beyond[drafted] = before + (taken - before) * NEWEST


class Auto:
    """Takes the draft, of those that its proposers make, that promises most tokens a second.

    proposers: drafters without randomness (their drafts are exact under `Walk` alone); cost: seconds of a forward over
    so many rows of one sequence; most: nodes of a draft at most.
    """

    def __init__(self, proposers: Sequence[Proposer], cost: Callable[[float], float], most: int = 16):
        if most < 0:
            raise ValueError(f"a draft has 0 or more nodes, got {most}")
        self.arms = [Arm(p) for p in proposers]
        self.cost, self.most = cost, most
        self.reads_prompt = any(getattr(p, "reads_prompt", False) for p in proposers)
        self.taken: dict[int, int] = {}  # steps by the arm whose draft was verified (-1: plain)
        self._chosen = -1
        self._canvas: Canvas | None = None
        self._row = torch.zeros(0, dtype=torch.long)
        self._turns = Turns()

    def propose(self, canvas: Canvas, target: Target, random: Random) -> Guess | None:
        if first := canvas is not self._canvas:
            self._canvas, self._row = canvas, canvas.row
            self._turns.begin()
            for arm in self.arms:
                arm.open.clear()
        self._turns.end()
        self._follow(canvas, moved(self._row, canvas.row))
        self._look_back(canvas)
        plain = canvas.batch / self.cost(canvas.batch)
        best = Offer(None, None, (), plain * MARGIN)
        for arm in self.arms:
            if arm.idle > 0:
                arm.idle -= 1
                continue
            start = time.perf_counter()
            guess = arm.proposer.propose(canvas, target, random)
            arm.seconds += (time.perf_counter() - start - arm.seconds) * (NEWEST if arm.seconds else 1.0)
            offer = self._offer(arm, guess, canvas)
            pays = offer is not None and offer.speed > plain
            arm.wait = 0 if pays else min(PATIENCE, 2 * arm.wait + 1)
            arm.idle = arm.wait
            if offer is not None and offer.speed > best.speed:
                best = offer
        self._chosen = -1 if best.arm is None else self.arms.index(best.arm)
        drafted = None if first else self._chosen >= 0  # the first forward reads the prompt
        self._turns.begin(drafted, self.cost(canvas.batch * (1 + len(best.nodes))))
        return None if best.guess is None else part(best.guess, best.nodes)

    def observe(self, canvas: Canvas, rows: Rows, step: Step) -> None:
        self.taken[self._chosen] = self.taken.get(self._chosen, 0) + 1
        for arm in self.arms:
            arm.proposer.observe(canvas, rows, step)
        self._follow(canvas, step.select)

    def _follow(self, canvas: Canvas, rows: Int[Tensor, "b"] | None) -> None:
        """Rows were copied, dropped or admitted: drafts of those that are gone will not be judged."""
        if rows is not None:
            where = {old: new for new, old in reversed(list(enumerate(rows.tolist())))}
            for arm in self.arms:
                arm.open = [(where[r], *rest) for r, *rest in arm.open if r in where]  # type: ignore[misc]
            self._row = canvas.row

    def _offer(self, arm: Arm, guess: Guess | None, canvas: Canvas) -> Offer | None:
        """The best tree among the first nodes of a draft, and the draft noted to be judged."""
        if guess is None:
            return None
        parent, value = guess.parents(), guess.value.tolist()
        stands = arm.hopes(parent)
        lengths = [canvas.length] * canvas.batch if canvas.length is not None else canvas.lengths().tolist()
        for r, tokens in enumerate(value):
            if tokens[0] >= 0:
                arm.open.append((r, tokens, parent, lengths[r]))
        counts = [sum(tokens[i] >= 0 for tokens in value) for i in range(guess.size)]
        order = sorted((i for i in range(guess.size) if counts[i]), key=lambda i: (-stands[i], i))
        best, gain = Offer(arm, guess, (), 0.0), float(canvas.batch)
        for n, i in enumerate(order[: self.most], 1):
            gain += stands[i] * counts[i]
            speed = gain / (self.cost(canvas.batch * (n + 1)) + arm.seconds + self._turns.dearer)
            if speed > best.speed:
                best = Offer(arm, guess, tuple(sorted(order[:n])), speed)
        return best

    def _look_back(self, canvas: Canvas) -> None:
        """Judge the drafts behind which enough is known by now."""
        known = canvas.value[canvas.layout.kinds[0]]
        lengths = [canvas.length] * canvas.batch if canvas.length is not None else canvas.lengths().tolist()
        for arm in self.arms:
            waiting = []
            for draft in arm.open:
                row, tokens, parent, start = draft
                stood = standing(tokens, parent, known[row, start : lengths[row]].tolist())
                if stood is None:
                    waiting.append(draft)
                    continue
                arm.learn(tokens, stood)
            arm.open = waiting


def standing(tokens: Sequence[int], parent: Sequence[int], text: Sequence[int]) -> set[int] | None:
    """The nodes of a tree that the text behind it goes through; None while that is not known to the end."""
    node = -1
    stood: set[int] = set()
    for token in text:
        node = next((i for i, p in enumerate(parent) if p == node and tokens[i] == token), -2)
        if node < 0:
            return stood
        stood.add(node)
    return stood if not any(p == node and tokens[i] >= 0 for i, p in enumerate(parent)) else None


def part(guess: Guess, nodes: Sequence[int]) -> Guess:
    """These nodes of a draft, parents among them, and nothing else."""
    if len(nodes) == guess.size:
        return guess
    parents, where = guess.parents(), {node: i for i, node in enumerate(nodes)}
    parent = tuple(where.get(parents[node], -1) for node in nodes)
    chain = parent == tuple(range(-1, len(nodes) - 1))
    return Guess(guess.value[:, list(nodes)], None if chain else parent)
