"""Trials of systems over queries, as claims state them: how sure a generator is, and what settles when."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from seriatim.maps import bicubic_up
from seriatim.systems.flow_trials import quality
from seriatim.systems.system import evenly

EXAMPLES = 200
LOW = 4  # the largest frequency, in periods a picture, that counts as low


def nats_an_id(trained: Any, samples: int = 620) -> Mapping[str, Any]:
    """The loss of an id on held-out pictures in nats, and the quality of pictures."""
    with torch.no_grad():
        nats, ids = trained.system.score(trained.data.test)
    return {"nats_an_id": nats / ids, **quality(trained, samples)}


@torch.no_grad()
def previews_settle(system: Any, seed: int, data: Any = None) -> Mapping[str, Any]:
    """Of a sequential tokenizer, on held-out pictures: the squared error of the preview after each group
    (`error_1`, ...), of how many groups the error does not grow, and which share of its whole change low and high
    frequencies have made by half of the groups."""
    from seriatim.data.base import load_data

    t, held_out = system.model, (data or load_data("glyphs", "image")).test
    images = held_out.take(evenly(len(held_out), EXAMPLES))["image"]
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    shown = t.previews(t.encode(images), noise)
    errors = [float((x - images).square().mean()) for x in shown]
    falls = sum(now <= before for before, now in pairwise(errors))
    changes = [spectrum(b - a) for a, b in pairwise(shown)]
    half = len(changes) // 2
    shares = {
        f"{name}_by_half": float(sum(c[part].sum() for c in changes[:half]) / sum(c[part].sum() for c in changes))
        for name, part in (("low", slice(0, LOW + 1)), ("high", slice(LOW + 1, None)))
    }
    return {f"error_{g + 1}": e for g, e in enumerate(errors)} | {"falls": falls, "of": len(errors) - 1} | shares


@torch.no_grad()
def prefixes_and_repairs(system: Any, seed: int, data: Any = None) -> Mapping[str, Any]:
    """Of a next-detail tokenizer, on held-out pictures: the squared error of each prefix, enlarged (`error_1`, ...),
    and how often it does not grow; that of all ids when a group of them is wrong, with and without the repair behind
    it, mean over groups (`error_wrong`, `error_repaired`)."""
    from seriatim.data.base import load_data

    t, held_out = system.model, (data or load_data("glyphs", "image")).test
    images = held_out.take(evenly(len(held_out), EXAMPLES))["image"]
    ids, side, c = t.encode(images), (t.side, t.side), t.config
    drawn = {n: bicubic_up(t.decode_prefix(ids[:, :n]), side) for n in c.lengths}
    errors = {n: float((x - images).square().mean()) for n, x in drawn.items()}
    g, wrong, repaired = torch.Generator().manual_seed(seed), [], []
    for at in (*range(c.group), *range(c.group, c.queries - c.group, c.group)):
        lines, end = t.corrupted(images, at, g), t.end_of(at)
        left = torch.cat([lines.fed[:, :end], lines.clean[:, end:]], 1)
        wrong.append(float((t.decode(left) - images).square().mean()))
        repaired.append(float((t.decode(lines.fed) - images).square().mean()))
    falls = sum(now <= before for before, now in pairwise(errors.values()))
    said = {f"error_{n}": e for n, e in errors.items()} | {"falls": falls, "of": len(errors) - 1}
    return said | {"error_wrong": sum(wrong) / len(wrong), "error_repaired": sum(repaired) / len(repaired)}


def spectrum(images: Float[Tensor, "b c h w"]) -> Float[Tensor, "f"]:
    """Mean power at each distance from frequency 0, in whole periods a picture."""
    power = torch.fft.fft2(images).abs().square().mean((0, 1))
    rows, columns = (torch.fft.fftfreq(n, 1 / n) for n in images.shape[2:])
    ring = (rows[:, None].square() + columns.square()).sqrt().round().long()
    return torch.zeros(int(ring.max()) + 1).scatter_add(0, ring.flatten(), power.flatten())
