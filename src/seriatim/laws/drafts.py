"""Drafts for the laws: guesses that depend on the known elements only, and guesses drawn at random."""

from __future__ import annotations

import random as stdlib

import torch

from seriatim.canvas import Canvas
from seriatim.decoding.guess import Guess
from seriatim.decoding.loop import Step
from seriatim.decoding.target import Target
from seriatim.heads.dist import Categorical
from seriatim.model import Rows
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
