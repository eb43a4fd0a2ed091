"""What layer plans are to be compared with: others that leave out as much.

A plan is judged by the loss of held-out text behind a prompt (`posttraining.skipping.judged`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from seriatim.backbones.route import Block
from seriatim.canvas import Canvas
from seriatim.decoding.layers import (
    Given,
    PromptRouters,
    Skipping,
    Staircase,
    steps_of,
    summed_up,
)
from seriatim.plan import Plan
from seriatim.posttraining.skipping import judged
from seriatim.posttraining.states import windows
from seriatim.tokenizers.text import id_stream


class TopExit(Staircase):
    """As many layers as a staircase has, but the first ones: tokens leave early, at the top."""

    def stair(self, count: int, depth: int) -> list[bool]:
        return [i < count for i in range(depth)]


@dataclass(frozen=True)
class AtRandom:
    """Each token behind the prompt and `warmup` others computes each network, or layer, by chance: `share` of all, the
    `bottom` first and `top` last ones always.

    Of layers this is for one pass only, where those behind see what the skipped ones would have made of the state that
    was handed on ("state copying"); decoding would lack these entries.
    """

    share: float
    blocks: Block
    bottom: int = 1
    top: int = 1
    warmup: int = 0
    seed: int = 0
    whole_prompt: ClassVar[bool] = False

    def begin(self, depth: int) -> Chance:
        free = depth - self.bottom - self.top
        if not 1 - free / depth <= self.share <= 1:
            raise ValueError(f"with {depth - free} of {depth} always computed, the share is no less; got {self.share}")
        return Chance(self, depth)


class Chance(Skipping):
    """Blocks by chance on one canvas. What a token computes depends on its place behind the prompt and on its row."""

    def __init__(self, plan: AtRandom, depth: int):
        super().__init__(depth)
        self.plan = plan
        free = depth - plan.bottom - plan.top
        self.odds = 1 - (1 - plan.share) * depth / free if free else 1.0
        self.generator = torch.Generator().manual_seed(plan.seed)

    def route(self, plan: Plan, canvas: Canvas) -> Any:
        steps, live = steps_of(plan, canvas)
        drawn = torch.rand(self.depth, *steps.shape, generator=self.generator) < self.odds
        drawn[: self.plan.bottom] = True
        drawn[self.depth - self.plan.top :] = True
        runs: Bool[Tensor, "L b s"] = drawn | (steps < self.plan.warmup)
        return Given(summed_up(runs, live), self.tally, self.plan.blocks)


def always(layers: Sequence[int], model: Any) -> PromptRouters:
    """These layers for every token of every text, the prompt among them."""
    bias = torch.full((model.backbone.config.depth,), -100.0)
    bias[list(layers)] = 100.0
    return PromptRouters(torch.zeros(len(bias), model.backbone.width), bias)


def best_layers(model: Any, ids: Int[Tensor, "w n"], prompt: int, count: int, kept: Sequence[int] = ()) -> list[int]:
    """The `count` layers that are left when again and again the one is taken out whose loss costs least on this text;
    `kept` are never taken. Raises ValueError where fewer are asked for than are kept."""
    left = list(range(model.backbone.config.depth))
    if not max(len(kept), 1) <= count <= len(left):
        raise ValueError(f"{count} layers of {len(left)} are asked for, and {len(kept)} are always kept")
    while len(left) > count:
        tries = [[i for i in left if i != out] for out in left if out not in kept]
        left = min(tries, key=lambda layers: judged(model, ids, prompt, always(layers, model)).loss)
    return left


def network_share(model: Any) -> float:
    """Of a layer's weights, those of its feed-forward network."""
    sizes = {name: p.numel() for name, p in model.backbone.layers[1].named_parameters()}
    return sum(sizes.get(name, 0) for name in ("up", "down")) / sum(sizes.values())


# ---- held-out text ---------------------------------------------------------------------------------------------------


def text_windows(system: Any, documents: Sequence[str], count: int, length: int) -> Int[Tensor, "w n"]:
    """About so many windows of a text in a model's tokens, spread evenly; fewer where there is less of it. Raises
    ValueError where there is not one."""
    ids = id_stream(system.tokenizer, documents, system.stop[:1])
    return windows(ids, length, count * length).long()
