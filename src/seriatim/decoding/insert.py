"""Deciders of insertions."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from seriatim.canvas import Canvas, Delete, Edit, Insert
from seriatim.decoding.guess import Guess
from seriatim.decoding.loop import Step
from seriatim.heads.dist import Categorical
from seriatim.model import Rows
from seriatim.random import Key, Random
from seriatim.slots import ragged


class Inserting:
    """One insertion a row and step, or the end of it: what is drawn of (slot, token) pairs and stopping.

    Sampled as the filters of the target say; with temperature 0 the likeliest. limit: the most known elements of a row,
    which is then finished; stop: finish a row as soon as the model, before temperature and filters, finds stopping more
    probable than this, and never by chance (None: by chance); slots: only so many of the likeliest slots (None: all).
    """

    redraws = True  # what stands between two tokens may still come

    def __init__(self, limit: int, stop: float | None = None, slots: int | None = None):
        if limit < 0:
            raise ValueError(f"a sample has 0 or more elements, got a limit of {limit}")
        if stop is not None and not 0 <= stop < 1:
            raise ValueError(f"stop is a probability in [0, 1), got {stop}")
        if slots is not None and slots < 1:
            raise ValueError(f"at least 1 slot is needed to insert behind, got {slots}")
        self.limit, self.stop, self.slots = limit, stop, slots

    def decide(self, canvas: Canvas, guess: Guess | None, rows: Rows, random: Random) -> Step:
        element, dist = rows.element, rows.dist
        if isinstance(element, int) or dist.logits.shape[1] != 1 or guess is not None:
            raise ValueError("Inserting decides (slot, token) pairs: use it with the order and the head of insertions")
        element = element.expand(canvas.batch, -1)
        choices = dist.logits.shape[-1] - 1
        vocab = choices // element.shape[1]
        going = canvas.open.any(1)
        known = canvas.known.sum(1)
        ends = going & (known >= self.limit)
        if self.stop is not None:
            ends = ends | (going & (Categorical(rows.said.logits).probs()[:, 0, -1].cpu() > self.stop))
            stops = (torch.arange(choices + 1) == choices) & going[:, None, None]
            dist = type(dist)(dist.logits.masked_fill(stops.to(dist.logits.device), -torch.inf))
            ends = ends | (going & (dist.logits[:, 0] == -torch.inf).all(1).cpu())  # filters left nothing to insert
        if self.slots is not None:
            dist = type(dist)(self._likeliest(dist.logits, vocab))
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
            edits.append(Delete(ragged(canvas.open & ends[:, None])))
        return Step(tuple(edits))

    def _likeliest(self, logits: Float[Tensor, "b 1 n"], vocab: int) -> Float[Tensor, "b 1 n"]:
        """The same with insertions behind the likeliest slots only; stopping stays as probable as it is."""
        pairs = logits[:, 0, :-1].unflatten(1, (-1, vocab))
        total = pairs.logsumexp(2)
        best = total.topk(min(self.slots or 1, total.shape[1]), 1)
        chosen = torch.zeros_like(total, dtype=torch.bool).scatter(1, best.indices, True)
        kept = pairs.masked_fill(~chosen[..., None], -torch.inf)
        gain = total.logsumexp(1) - best.values.logsumexp(1)
        gain = torch.where(gain.isfinite(), gain, 0.0)  # nothing but stopping is left
        return torch.cat([(kept + gain[:, None, None]).flatten(1), logits[:, 0, -1:]], 1)[:, None]
