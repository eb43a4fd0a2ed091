"""What tests of released generators in LlamaGen's form have in common: how far logits are from golden numbers, ids that
are drawn greedily, and what would break either. Models are as wide as in `released_llamagen`."""

from dataclasses import replace

import torch

from seriatim.backbones.rope import RotaryTable
from seriatim.systems.system import Sampling
from support.released_llamagen import HEADS, WIDTH

LABEL = torch.tensor([1, 4])
HALF = WIDTH // HEADS // 2


@torch.no_grad()
def logits(model, elements):
    """Of a training forward."""
    canvas = model.canvas({"token": elements})
    plan = model.factorization.packed(canvas)
    h = model.hidden(plan, canvas, None, model.encode({"class": LABEL}))
    return model.dist(h, plan, canvas)[0].logits


def gap(said, numbers, largest):
    """Of the first four numbers, the last four and the largest, in shares of the largest."""
    found = torch.cat([said[0, 0, :4], said[1, -1, -4:], said.abs().max()[None]])
    return float((found - torch.tensor([*numbers, largest])).abs().max()) / largest


def greedy(system, monkeypatch, guidance):
    """Ids of two pictures, and how many forwards drew them."""
    seen, tokenizer = [], system.tokenizer
    blank = torch.zeros(2, tokenizer.channels, tokenizer.side, tokenizer.side)
    monkeypatch.setattr(tokenizer, "decode", lambda ids: seen.append(ids) or blank)
    drawn = system.draw(LABEL, sampling=Sampling(temperature=0.0, guidance=guidance))
    return seen[-1], drawn.forwards


def other_pairs(model):
    for layer in model.backbone.layers:  # halves as neighbours
        turned = layer.qkv.data[: 2 * WIDTH].unflatten(0, (-1, 2, HALF)).transpose(1, 2).flatten(0, 2)
        layer.qkv.data = torch.cat([turned, layer.qkv.data[2 * WIDTH :]])


def places(model, **changes):
    """Other rotary positions."""
    turns = model.backbone.rotary["all"].rope
    model.backbone.rotary = {"all": RotaryTable(replace(turns, **changes), model.backbone.config.dim)}


def class_is_turned(model):
    table = model.backbone.rotary["all"]
    said = table.at
    table.at = lambda coord, dtype, near=False: said(coord.clamp(min=1), dtype, near)  # as its neighbour


def gate_and_value_swapped(model):
    for layer in model.backbone.layers:
        layer.up.data = torch.cat(list(layer.up.data.chunk(2))[::-1])


def other_null(model):
    model.conditions["class"].table.data = model.conditions["class"].table.data.roll(1, 0)


def larger_eps(model):
    model.backbone.config = replace(model.backbone.config, eps=1e-2)
