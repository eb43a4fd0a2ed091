"""How far attention reaches in a picture: the distance between the place of a slot and those that it attends to.

ELM (Liu et al. 2024, arXiv 2410.16257) finds attention of models of pictures to be local, in all orders and sizes; only
heads of large ones look far. Slots that carry no place (a class in front) are left out, and what is attended to them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from seriatim.evaluation.pictures import write_beside
from seriatim.layout import grid
from seriatim.model import Model
from seriatim.plan import Plan
from seriatim.random import Generator


@contextmanager
def watched_attention(backbone: Any) -> Iterator[dict[int, Float[Tensor, "b h q k"]]]:
    """The weights of attention of each layer of what runs inside. Raises ValueError for a backbone of other layers."""
    if not hasattr(backbone, "watch"):
        raise ValueError(f"{type(backbone).__name__} has no layers whose attention can be watched")
    seen: dict[int, Tensor] = {}
    c = backbone.config

    def watch(i: int, q: Tensor, k: Tensor, mask: Tensor | str | None) -> None:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        scores = (q.float() @ k.float().transpose(2, 3)) * (c.dim**-0.5 if c.score_scale is None else c.score_scale)
        if c.softcap is not None:
            scores = torch.tanh(scores / c.softcap) * c.softcap
        if isinstance(mask, str):
            n = scores.shape[2]
            scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1), -torch.inf)
        elif mask is not None:  # of queries that share keys, rows are repeated
            scores = scores + mask[:, :, : scores.shape[2]].float()
        seen[i] = scores.softmax(-1)

    backbone.watch = watch
    try:
        yield seen
    finally:
        del backbone.watch


def distances(weights: Float[Tensor, "b h q k"], places: Float[Tensor, "s 2"], placed: Tensor) -> Float[Tensor, "h"]:
    """The mean distance, in places, that each head attends over. places: of each slot; placed: which slots have one."""
    apart = torch.cdist(places.double(), places.double())
    p = weights.double() * placed
    share = p.sum(-1)
    far = (p * apart).sum(-1) / share.clamp(min=1e-12)
    counts = placed & (share > 1e-6)
    return (far * counts).sum((0, 2)) / counts.sum((0, 2)).clamp(min=1)


@torch.no_grad()
def attention_distance(system: Any, batch: Mapping[str, Tensor], seed: int = 0) -> list[Float[Tensor, "h"]]:
    """The mean distance of each head of each layer on pictures (a batch of "image" and "label"): in one pass over all
    of them, or, where a model has none, with half of the elements hidden. Raises ValueError where elements have no
    place on the grid of the tokenizer, and where attention cannot be watched."""
    canvas, condition = system.canvas(batch)
    model: Model = system.model
    rows, columns = system.tokenizer.grid
    each = canvas.layout.size // (rows * columns)
    if canvas.layout.size != each * rows * columns or canvas.layout.coord.shape[1] > 2:
        raise ValueError(f"elements of {system.meta.key} have no place each on a grid of {rows} x {columns}")
    place = grid(rows, columns).coord.repeat_interleave(each, 0)
    plan: Plan | None = model.factorization.packed(canvas)
    if plan is None:
        noise = torch.rand(canvas.layout.size, generator=Generator(seed).generator)
        known = (noise < noise.median()).expand(canvas.batch, -1)
        canvas = model.canvas(canvas.value, known)
        plan = model.factorization.step(canvas, None, 0)
    assert plan is not None
    with watched_attention(model.backbone) as seen:
        model.hidden(plan, canvas, None, model.encode(condition))
    element = plan.slots.element[0]  # of a slot that holds several, the middle
    there = (element >= 0)[..., None]
    middle = (place[element.clamp(min=0)] * there).sum(1) / there.sum(1).clamp(min=1)
    if not seen:
        raise ValueError(f"no layer of {system.meta.key} attends in a way that can be watched")
    return [distances(seen[i], middle, there[:, 0, 0]) for i in sorted(seen)]


def uniform_distance(rows: int, columns: int) -> float:
    """What one would attend over who sees all places alike."""
    place = grid(rows, columns).coord.double()
    return float(torch.cdist(place, place).mean())


def save_attention_distance(
    found: Mapping[str, list[Float[Tensor, "h"]]], path: str | os.PathLike[str], uniform: float = math.nan
) -> Path:
    """Mean distance by layer, a curve for each model, and a dot for each head."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, layers in found.items():
        (curve,) = axes.plot([float(heads.mean()) for heads in layers], marker="o", label=name)
        for i, heads in enumerate(layers):
            axes.scatter([i] * len(heads), heads.tolist(), s=6, alpha=0.4, color=curve.get_color())
    if math.isfinite(uniform):
        axes.axhline(uniform, color="0.6", linewidth=1, linestyle="--", label="all places alike")
    axes.set(xlabel="layer", ylabel="distance attended over, places", ylim=(0, None))
    axes.set_xticks(range(max(len(layers) for layers in found.values())))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    return write_beside(path, lambda file: figure.savefig(file, format="png", dpi=130))
