"""Probe `hat` (hierarchical autoregressive transformer, arXiv 2501.10322): bytes inside words, on a layout that grows.

An element is a word, its value the ids of its bytes up to the end symbol. A small bidirectional encoder makes each
word a vector, a causal backbone runs over words, and the head of a word is a small causal model over its bytes.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from seriatim.backbones.rope import RoPE
from seriatim.backbones.transformer import Transformer, TransformerConfig
from seriatim.canvas import Canvas
from seriatim.conditions.prefix import PrefixCondition
from seriatim.decoding.grow import Growing
from seriatim.decoding.loop import decode, generate
from seriatim.decoding.sample import SampleAll
from seriatim.decoding.target import Target
from seriatim.embed import TokenEmbed, gather_values
from seriatim.factorization.line import Line
from seriatim.heads.categorical import CategoricalHead
from seriatim.heads.group import GroupHead
from seriatim.laws.case import randomise
from seriatim.layout import line
from seriatim.model import Model
from seriatim.plan import LEARNED, VALUE, OrderError, Plan, Reads, Slots
from seriatim.random import Enumerator, Forced, Keyed, enumerate_law
from seriatim.view import full

END, STOP, BYTES = 0, 1, 3  # the end of a word [W]; the first byte of the word that ends a text [S]; how many ids
WIDTH, SMALL = 16, 12

# ---- the composition -------------------------------------------------------------------------------------------------


class WordEmbed(nn.Module):
    """A word as the first output of a small bidirectional transformer over a learned [W] and its bytes. All words of a
    forward stand in one row, each in its own lane; what follows the end symbol is in none."""

    def __init__(self, length):
        super().__init__()
        self.bytes = TokenEmbed(BYTES, SMALL, "byte", positions=(length + 1,))
        self.encoder = Transformer(TransformerConfig(SMALL, 2, 2))
        self.project = nn.Linear(SMALL, WIDTH)
        self.start = nn.Parameter(torch.zeros(WIDTH))

    def lanes(self, words):
        """The lane of [W] and of each byte: the word's number, or none behind its end."""
        live = torch.cat([torch.ones_like(words[..., :1]), (words != END).long().cumprod(-1)], -1) > 0
        return torch.where(live, torch.arange(words.shape[1])[:, None], -1).flatten(1)

    def forward(self, canvas, plan, guess=None, prefix=None):
        words = gather_values(canvas, plan.slots.element, "word")[:, :, 0]
        _, s, n = words.shape
        carried = torch.cat([torch.full((s, 1), -1), torch.arange(s * n).view(s, n)], 1).flatten()
        source = torch.where(carried < 0, LEARNED, VALUE)[None]
        place = torch.arange(n + 1).repeat(s)[None, :, None]
        nothing = torch.zeros(1, 0, dtype=torch.long)
        view = full(s * (n + 1)).narrow(lane=self.lanes(words))
        slots = Slots(carried[None, :, None], source, place, torch.full_like(source, -1))
        inner = Plan(slots, {"all": view}, Reads(nothing, nothing), torch.full((1, s * n), -1))
        text = Canvas(line(s * n, "byte"), {"byte": words.flatten(1)})
        x = self.project(self.encoder(self.bytes(text, inner), inner)[:, :: n + 1])
        return torch.where(plan.slots.element < 0, self.start, x)


def hat(words, length):
    """A text of `words` words of up to `length` bytes, the end symbol included."""
    config = TransformerConfig(SMALL, 2, 2)
    embed = TokenEmbed(BYTES, SMALL, "byte", positions=(length,), start=False)
    state = {"state": PrefixCondition(WIDTH, SMALL)}
    inner = Model(line(length, "byte"), Line(1), embed, Transformer(config), CategoricalHead(SMALL, BYTES), state)
    backbone = Transformer(TransformerConfig(WIDTH, 2, 2, rope=RoPE()))
    return Model(line(words, "word"), Line(1), WordEmbed(length), backbone, GroupHead(inner, END))
