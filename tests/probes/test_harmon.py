"""Probe `harmon` (Wu et al. 2025): one plan with a view for each kind of layer, and layers that skip slots.

A masked autoregressive image model's encoder (visible places and registers), a causal language model in the middle
(prompt, visible places, then the registers), the image model's decoder (where the masks join). Painting decides the
image in any order under a given prompt; describing reads a given image and answers word by word.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from seriatim.backbones.transformer import Transformer, TransformerConfig
from seriatim.canvas import UNKNOWN, Set
from seriatim.decoding.loop import Step, decode, generate
from seriatim.decoding.sample import SampleAll, Select
from seriatim.decoding.target import Target
from seriatim.embed import TokenEmbed
from seriatim.embed_kinds import ByKind
from seriatim.factorization.base import Factorization
from seriatim.heads.categorical import CategoricalHead
from seriatim.layout import Layout, Segment, grid, line
from seriatim.model import Model
from seriatim.plan import LEARNED, MASK, VALUE, OrderError, Plan, Reads, Slots
from seriatim.random import Forced, Key, Keyed
from seriatim.slots import ragged
from seriatim.view import timed

KINDS = ("encoder", "encoder", "language", "language", "decoder", "decoder")
WORDS, PIXELS, WIDTH, PROMPT, SIDE, REGISTERS = 3, 2, 16, 3, 2, 2

# ---- the composition -------------------------------------------------------------------------------------------------

LAYERS = {"encoder": (1, 2), "language": (0, 1, 2, 4), "decoder": (1, 2, 3)}  # the parts that each kind computes


class Harmon(Factorization):
    """Parts: prompt, registers, visible places, masks, answer. Array order is no clock: in the language model visible
    places stand right behind the prompt, then the registers, then the answer."""

    def starts(self, t, v):
        """When each part starts in the language model, after a prompt of t words, with v visible places."""
        return torch.cat([0 * v, t + v, t + 0 * v, 0 * v, t + v + REGISTERS], 1)

    def packed(self, canvas):
        hidden = canvas.rank[:1, canvas.layout.elements("image")] >= 0
        return None if bool(hidden.any()) else self.plan(canvas, hidden, 0)

    def step(self, canvas, guess, cached):
        unknown = canvas.status[:, canvas.layout.elements("image")] == UNKNOWN
        return self.plan(canvas, unknown, cached) if bool(unknown.any()) else super().step(canvas, guess, cached)

    def plan(self, canvas, unknown, cached, hidden=MASK):
        layout, b, paint = canvas.layout, unknown.shape[0], bool(unknown.any())
        t, end = int(layout.elements("image")[0]), int(layout.elements("image")[-1]) + 1
        answer = torch.arange(end, end if paint else layout.size)[None]
        seen, masks = (torch.where(x < 0, -1, x + t) for x in (ragged(~unknown), ragged(unknown)))
        parts = [torch.arange(0 if cached else t)[None], torch.full((1, REGISTERS), -1), seen, masks, answer[:, :-1]]
        element = torch.cat([p.expand(b, -1) for p in parts], 1)
        part = torch.cat([torch.full(p.shape[1:], i) for i, p in enumerate(parts)])
        index = torch.cat([torch.arange(p.shape[1]) for p in parts])
        at = self.starts(t, (seen >= 0).sum(1, keepdim=True))[:, part] + index
        live = (element >= 0) | (part == 1)
        source = torch.tensor([VALUE, LEARNED, VALUE, hidden, VALUE])[part].expand(b, -1)
        rank = torch.where(canvas.status == UNKNOWN, 0, -1) if paint else canvas.rank[:1]
        needs = torch.where(live & (source == VALUE), rank.gather(1, element.clamp(min=0)), -1)
        place = torch.where(part[:, None] == 1, index[:, None], layout.coord[element.clamp(min=0)])
        takes = {kind: torch.isin(part, torch.tensor(LAYERS[kind])) for kind in LAYERS}
        views = {k: timed(at if k == "language" else 0 * at, lane=torch.where(live & takes[k], 0, -1)) for k in LAYERS}
        layers = torch.stack([takes[kind] & (paint or kind != "decoder") for kind in KINDS])
        columns = torch.where(element >= 0, torch.arange(len(part)), -1)
        reads = Reads(columns[:, part == 3], masks)
        if not paint:
            last = (part == 1).nonzero()[-1:, 0]
            reads = Reads(torch.cat([last, columns[0, part == 4]])[None], answer)
        slots = Slots(element[..., None], source, torch.cat([place, at[..., None]], -1), needs)
        kept = torch.arange(0 if cached else t)[None] if paint else None
        return Plan(slots, views, reads, rank, layers, layout, kept=kept)


def harmon(layout):
    text = TokenEmbed(WORDS, WIDTH, "text", positions=(8,))
    image = TokenEmbed(PIXELS, WIDTH, "image", positions=(SIDE, SIDE), mask=True)
    embed = ByKind({"text": text, "image": image}, WIDTH, learned=REGISTERS)
    heads = {"text": CategoricalHead(WIDTH, WORDS), "image": CategoricalHead(WIDTH, PIXELS)}
    return Model(layout, Harmon(), embed, Transformer(TransformerConfig(WIDTH, len(KINDS), 2, kinds=KINDS)), heads)


PAINT = line(PROMPT, "text", given=True).then(grid(SIDE, SIDE, kind="image"))
DESCRIBE = line(PROMPT, "text", given=True).then(
    Layout((Segment("image", grid(SIDE, SIDE).coord, given=True),)).then(line(3, "text", start=PROMPT))
)
