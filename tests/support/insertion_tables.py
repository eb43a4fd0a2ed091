"""Models of insertions whose choices are tables of free numbers.

The gradient of a loss by log-probabilities is the weight of each target, so the sum over all draws gives the optimum of
the very code that trains.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import nn

from seriatim.factorization.insertion import Insertion
from seriatim.heads.dist import Categorical
from seriatim.layout import line
from seriatim.objectives.inserted import Dropped
from seriatim.plan import VALUE

V = 2  # ids


class Texts(nn.Module):
    """Embedding and head in one: what stands in slots are ids, -1 at the start and in padding."""

    exact, continuous, value_shape, vocab = False, False, (), V

    def embed(self, canvas, plan, guess=None, prefix=None):
        element = plan.slots.element[..., 0].expand(canvas.batch, -1)
        value = canvas.value["token"].gather(1, element.clamp(min=0))
        there = (plan.slots.source == VALUE) & (element >= 0)
        return torch.where(there, value, -1)[..., None].double()


class Choices(Texts):
    """A free log-probability of every choice at every text."""

    def __init__(self, longest):
        super().__init__()
        texts = [t for n in range(longest + 1) for t in itertools.product(range(V), repeat=n)]
        self.choices = nn.ParameterDict({
            name(t): nn.Parameter(torch.zeros((len(t) + 1) * V + 1, dtype=torch.float64)) for t in texts
        })  # fmt: skip

    def dist(self, h, reads, canvas):
        texts = [tuple(x for x in row if x >= 0) for row in h[..., 0].long().tolist()]
        size = max(len(t) for t in texts)
        rows = []
        for text in texts:
            choice = self.choices[name(text)]
            closed = choice.new_full(((size - len(text)) * V,), -torch.inf)
            rows.append(torch.cat([choice[:-1], closed, choice[-1:]]))
        return Categorical(torch.stack(rows)[:, None])


def name(text):
    return "t" + "".join(map(str, text))


class Part(nn.Module):
    """A function as a module."""

    def __init__(self, forward):
        super().__init__()
        self.forward = forward


def parts(texts, longest):
    """Layout, order, embedding, backbone and head of a model of a table."""
    backbone = Part(lambda x, *more: x)
    backbone.mixers, backbone.new_cache = {"all": "any"}, lambda *more: None
    return line(longest), Insertion(), Part(texts.embed), backbone, texts


def optimum(law, longest, length_weight):
    """The table that minimises the expected loss of texts of a law, every draw taken once."""
    model = Dropped(*parts(Choices(longest), longest), length_weight=length_weight)
    table, total = model.heads["token"].choices, 0.0
    for text, p in law.items():
        n = len(text)
        canvas = model.canvas({"token": torch.tensor([text], dtype=torch.long)}, layout=line(n))
        for dropped in itertools.product((False, True), repeat=n):
            loss = model.dropped_losses(canvas, torch.tensor([dropped], dtype=torch.bool).reshape(1, n))
            chance = p / (n + 1) / math.comb(n, sum(dropped))
            total = total + loss.sum() * chance * (n + 1 if length_weight else 1)
    total.backward()
    with torch.no_grad():
        for choice in table.values():
            weight = -choice.grad if choice.grad is not None else torch.zeros_like(choice)
            assert bool((weight >= 0).all())
            choice.copy_(
                (weight / weight.sum() if float(weight.sum()) else torch.ones_like(weight) / len(weight)).log()
            )
    return model
