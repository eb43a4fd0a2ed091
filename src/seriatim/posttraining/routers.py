"""Routers that look at a prompt and say which layers its continuation can do without (FiRST, Jain et al. 2024, arXiv
2410.12513): one linear map and a sigmoid in front of each layer of a frozen model.

In training a layer f that is wanted by rho takes part by that much, h + rho * f(h), and the loss is that of the text
behind the prompt plus a price on rho. (As printed in the review copy of the paper, h + rho f(h) + (1 - rho) f(h), rho
cancels and the text teaches the routers nothing.) Late in training gates are hard, with the soft gate's gradient. rho
is the mean over the prompt, as in decoding, so a prompt's tokens, which all of it gates, are not predicted.

What enters a router is brought to a root mean square of 1 first, unlike in the paper: states of deep layers are
hundreds of times larger than those of the first, and one learning rate serves all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from seriatim.backbones.route import Block
from seriatim.canvas import Canvas
from seriatim.decoding.layers import PromptRouters, Skipping, begun, steps_of
from seriatim.plan import Plan
from seriatim.posttraining.drafting import WEIGHTS, Base, Part
from seriatim.posttraining.skipping import skipping_loss
from seriatim.random import Generator
from seriatim.training.recipe import Recipe

CONFIDENT = 2.0  # the bias that routers begin with: all layers take part by 0.88
ROUTING = Recipe(300, batch=8, learning_rate=5e-2, weight_decay=0.01, bf16=True)  # minutes on two cores


@dataclass(frozen=True)
class RouterConfig:
    """penalty: the price of a layer in nats a token: one that is worth less to the text is skipped; always: first and
    last layers that never are; hard: the share of the training behind which gates are hard."""

    penalty: float = 0.1
    always: int = 1
    hard: float = 0.7

    def __post_init__(self) -> None:
        if self.penalty < 0 or self.always < 0 or not 0 <= self.hard <= 1:
            raise ValueError(f"a penalty and protected layers are not below 0, and hard is a share; got {self}")


class Routers(Part):
    """One router a layer, for a frozen base."""

    key = "first"
    Config = RouterConfig

    def __init__(self, config: RouterConfig, base: Base):
        super().__init__(config, base)
        depth = base.model.backbone.config.depth
        if 2 * config.always >= depth:
            raise ValueError(f"{config.always} first and last layers that always run leave nothing to skip of {depth}")
        self.depth = depth
        self.weight = nn.Parameter(torch.zeros(depth, base.width, device=base.device))
        self.bias = nn.Parameter(torch.full((depth,), CONFIDENT, device=base.device))

    def plan(
        self, threshold: float = 0.5, prompt: Literal["skips", "runs"] = "skips", together: bool = False
    ) -> PromptRouters:
        """As decoding uses them."""
        return PromptRouters(self.weight, self.bias, threshold, prompt, together, self.protected)

    def learner(self, base: Base) -> RouterLearner:
        return RouterLearner(self, base)

    @property
    def protected(self) -> frozenset[int]:
        """Layers that are never skipped."""
        n = self.config.always
        return frozenset((*range(n), *range(self.depth - n, self.depth)))

    def loss(
        self, base: Base, batch: Mapping[str, Tensor], random: Generator, hard: bool
    ) -> tuple[Tensor, Tensor, dict[str, float]]:
        """The summed loss of the tokens behind prompts, with the price of layers, over how many tokens; and figures:
        the loss alone, the mean rho, and the share of layers below 0.5."""
        gating = Gating(self, hard)
        nats, count = skipping_loss(base.model, batch, gating, random)
        rho = torch.stack(gating.rho)
        figures = {
            "nats": float(nats.detach() / count),
            "rho": float(rho.detach().mean()),
            "skipped": float((rho < 0.5).sum(0).double().mean() / self.depth),
        }
        return nats + self.config.penalty * count * rho.sum(0).mean(), count, figures


class Gating(Skipping):
    """Layers that take part by how much routers want them. rho: of each layer that may be skipped, (rows,)."""

    blocks: Block = "layer"

    def __init__(self, routers: Routers, hard: bool):
        super().__init__(routers.depth)
        self.routers, self.protected, self.hard = routers.plan(), routers.protected, hard
        self.rho: list[Float[Tensor, "b"]] = []

    def route(self, plan: Plan, canvas: Canvas) -> Gating:
        steps, live = steps_of(plan, canvas)
        self.prompt: Bool[Tensor, "b s"] = (steps < 0) & live
        return self

    def enters(self, i: int, x: Float[Tensor, "b s d"]) -> bool:
        if i not in self.protected:
            self.rho.append(self.routers.rho(i, x, self.prompt))
        return True

    def leaves(self, i: int, x: Float[Tensor, "b s d"], y: Float[Tensor, "b s d"]) -> Float[Tensor, "b s d"]:
        if i in self.protected:
            return y
        gate = self.rho[-1]
        if self.hard:  # the value of the decision, the gradient of what it is made of
            gate = gate + ((gate >= self.routers.threshold).to(gate.dtype) - gate).detach()
        return x + gate.to(x.dtype)[:, None, None] * (y - x)


class RouterLearner(nn.Module):
    """A learner (`training.trainer`): routers in front of the layers of a frozen base, which is no part of this module.
    Batches hold "token" and, of conversations, which of them "counts"."""

    base: Base

    def __init__(self, part: Routers, base: Base):
        super().__init__()
        self.part = part
        self.__dict__["base"] = base
        self.figures: Mapping[str, float] = {}

    def forward(self, batch: Mapping[str, Tensor], random: Generator, step: int, steps: int) -> tuple[Tensor, Tensor]:
        self.base.model.to(batch["token"].device)
        hard = step >= self.part.config.hard * steps
        total, count, self.figures = self.part.loss(self.base, batch, random, hard)
        return total, count

    def validate(self, examples: Any) -> dict[str, float]:
        """The loss of held-out windows as decoding skips, and the share of layers that is skipped; the same windows and
        prompts each time."""
        index = torch.linspace(0, len(examples) - 1, min(len(examples), VALIDATION)).long()
        nats, count, skipped = 0.0, 0, 0.0
        for n, part in enumerate(index.split(8)):
            batch, skipping = examples.take(part), begun(self.part.plan(), self.base.model)
            batch = {k: v.to(self.base.device) for k, v in batch.items()}
            loss, tokens = skipping_loss(self.base.model, batch, skipping, Generator(n))
            nats, count = nats + float(loss), count + int(tokens)
            skipped += float((~skipping.runs).double().mean(0).sum())  # type: ignore[attr-defined]
        return {"loss": nats / count, "skipped": skipped / len(index)}

    def weights_to_keep(self) -> nn.Module:
        return self.part

    def stored(self, weights: Mapping[str, Tensor]) -> tuple[str, Mapping[str, Tensor]]:
        return WEIGHTS, weights

    def finished(self) -> Any:
        """The base, which is what it was."""
        return self.base.system


VALIDATION = 32  # windows that held-out figures are of
