"""Drafts for the laws: guesses that depend on the known elements only, guesses drawn at random, untrained parts; and a
way of verifying that is wrong."""

from __future__ import annotations

import copy
import random as stdlib
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import torch

from seriatim.canvas import Canvas
from seriatim.decoding.guess import Guess
from seriatim.decoding.loop import Step
from seriatim.decoding.target import Target
from seriatim.decoding.verify import Round, Walk
from seriatim.heads.dist import Categorical
from seriatim.laws.case import randomise
from seriatim.model import Rows
from seriatim.posttraining.drafting import Base, P, ready
from seriatim.random import Key, Random


class Guessing:
    """Chains and trees of arbitrary tokens, a function of how many elements are known: drafts without randomness."""

    shapes = ((-1, 0), (-1, -1, 0, 0, 1), (-1,), (-1, -1), (-1, 0, 1))

    def __init__(self, vocab: int, seed: int):
        self.vocab, self.seed = vocab, seed

    def propose(self, canvas: Canvas, target: Target, random: Random) -> Guess | None:
        known = canvas.length
        assert known is not None
        room = canvas.layout.size - known
        rng = stdlib.Random(1000 * self.seed + known)
        if room < 2 or rng.random() < 0.2:
            return None
        shape = rng.choice(self.shapes)
        guess = Guess(torch.zeros(canvas.batch, len(shape), dtype=torch.long), shape)
        while max(guess.depths()) >= room:
            shape = shape[:1]
            guess = Guess(guess.value[:, :1], shape)
        value = torch.tensor([[rng.randrange(self.vocab) for _ in shape]])
        return Guess(value.expand(canvas.batch, -1), shape)

    def observe(self, canvas: Canvas, rows: Rows, step: Step) -> None:
        """Learns nothing."""


class RandomDraft:
    """A chain of up to two tokens drawn from a fixed law q, through the source of randomness under test."""

    def __init__(self, vocab: int, random: Random, length: int = 2):
        self.random, self.length = random, length
        self.logits = torch.linspace(0, 1, vocab, dtype=torch.float64)

    def propose(self, canvas: Canvas, target: Target, random: Random) -> Guess | None:
        known = canvas.length
        assert known is not None
        n = min(self.length, canvas.layout.size - known - 1)
        if n < 1:
            return None
        logits = self.logits.expand(canvas.batch, n, -1)
        value = self.random.categorical(logits, Key(canvas.row, known, draw=9))
        return Guess(value, None, Categorical(logits))

    def observe(self, canvas: Canvas, rows: Rows, step: Step) -> None:
        """Learns nothing."""


def another(vocab: int = 3) -> Any:
    """A small language model of so many ids, with weights of its own: its drafts are seldom right."""
    from seriatim.systems.text.next_token import Config, NextToken

    small = NextToken(Config(length=64, vocab=vocab, width=8, depth=1, heads=1), SimpleNamespace(special={}))
    randomise(small.model, seed=9)
    return small.eval().requires_grad_(False)


def near(system: Any, share: float = 0.5) -> Any:
    """A language model like this one, whose drafts are often right: its parameters in floating point are moved at
    random by a share of how far they are spread."""
    other = copy.copy(system)
    other._modules = {**system._modules, "model": copy.deepcopy(system.model)}
    g = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for p in other.model.parameters():
            spread = p.float().std(correction=0)
            p.add_((share * spread * torch.randn(p.shape, generator=g)).to(p.dtype))
    return other


def untrained(kind: type[P], config: Any, system: Any, seed: int = 7) -> tuple[P, Base]:
    """A draft part of arbitrary weights for a model, and the model as the part sees it."""
    base = Base(system)
    part = kind(config, base)
    randomise(part, seed)  # type: ignore[arg-type]
    return ready(part, base), base


class WrongBonus(Walk):
    """Wrong on purpose, for mutants: the token behind the last node of a path is drawn from another law of the forward
    than the target's."""

    def __init__(self, stop: Iterable[int], law: Callable[[Rows], Categorical]):
        super().__init__(stop)
        self.law = law

    def decide(self, canvas: Canvas, guess: Guess | None, rows: Rows, random: Random) -> Step:
        self._other = self.law(rows)
        return super().decide(canvas, guess, rows, random)

    def verify(self, turn: Round, random: Random) -> None:
        for r in turn.alive:
            going = True
            while going:
                node, law = turn.node[r], turn.at([r])
                if node >= 0 and not turn.drafted(r, node):
                    law = type(self._other)(self._other.logits[r, node + 1][None, None])
                token = int(law.sample(random, turn.key([r])))
                going = turn.emit(r, token, turn.child(r, token))
