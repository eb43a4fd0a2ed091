"""Deciders of insertions."""

from __future__ import annotations

import torch

from seriatim.canvas import Canvas, Delete, Edit, Insert
from seriatim.decoding.guess import Guess
from seriatim.decoding.loop import Step
from seriatim.heads.dist import Categorical
from seriatim.model import Rows
from seriatim.random import Key, Random


class Inserting:
    """One insertion a row and step, or the end of it: what is drawn of (slot, token) pairs and stopping.

    Sampled as the filters of the target say; with temperature 0 the likeliest. limit: the most known elements of a row,
    which is then finished; stop: finish a row as soon as stopping is more probable than this (at temperature 0, as the
    model says), and never by chance (None: by chance).
    """

    def __init__(self, limit: int, stop: float | None = None):
        if limit < 0:
            raise ValueError(f"a sample has 0 or more elements, got a limit of {limit}")
        if stop is not None and not 0 <= stop < 1:
            raise ValueError(f"stop is a probability in [0, 1), got {stop}")
        self.limit, self.stop = limit, stop

    def decide(self, canvas: Canvas, guess: Guess | None, rows: Rows, random: Random) -> Step:
        element, dist = rows.element, rows.dist
        if isinstance(element, int) or dist.logits.shape[1] != 1 or guess is not None:
            raise ValueError("Inserting decides (slot, token) pairs: use it with the order and the head of insertions")
        element = element.expand(canvas.batch, -1)
        choices = dist.logits.shape[-1] - 1
        vocab = choices // element.shape[1]
        going = canvas.open[:, 0]
        known = canvas.known.sum(1)
        ends = going & (known >= self.limit)
        if self.stop is not None:
            ends = ends | (going & (Categorical(dist.logits).probs()[:, 0, -1].cpu() > self.stop))
            stops = (torch.arange(choices + 1) == choices) & going[:, None, None]
            dist = type(dist)(dist.logits.masked_fill(stops.to(dist.logits.device), -torch.inf))
            ends = ends | (going & (dist.logits[:, 0] == -torch.inf).all(1).cpu())  # filters left nothing to insert
        draws = going & ~ends
        pick = dist.sample(random, Key(canvas.row, torch.where(draws, known, -1)[:, None]))[:, 0].cpu()
        ends = ends | (draws & (pick == choices))
        inserts = draws & ~ends
        edits: list[Edit] = []
        if bool(inserts.any()):
            slot = (pick // vocab).clamp(max=element.shape[1] - 1)
            after = torch.where(inserts, element.gather(1, slot[:, None])[:, 0], -2)
            edits.append(Insert(after, pick % vocab))
        if bool(ends.any()):
            edits.append(Delete(torch.where(ends, 0, -1)[:, None]))
        return Step(tuple(edits))
