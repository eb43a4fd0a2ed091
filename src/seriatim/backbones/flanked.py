"""A transformer between residual networks of single slots: in front of it they mix what stands in a slot, behind it
they take a state apart (Token-Shuffle, Ma et al. 2025, arXiv 2504.17789)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from seriatim.backbones.layer import TransformerConfig
from seriatim.backbones.transformer import Context, Transformer
from seriatim.plan import LEARNED, Plan


class Residual(nn.Module):
    """x + MLP(norm x), twice as wide inside."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Flanked(Transformer):
    """`blocks` residual networks in front of the first layer, which learned slots (a class, words) pass untouched, and
    as many behind the last norm."""

    def __init__(self, config: TransformerConfig, blocks: int):
        super().__init__(config)
        self.front = nn.Sequential(*(Residual(config.width) for _ in range(blocks)))
        self.back = nn.Sequential(*(Residual(config.width) for _ in range(blocks)))

    def forward(self, x: Float[Tensor, "b s d"], plan: Plan, *rest: Any, **more: Any) -> Float[Tensor, "b s d"]:
        learned = (plan.slots.source == LEARNED).to(x.device)[..., None]
        return super().forward(torch.where(learned, x, self.front(x)) if len(self.front) else x, plan, *rest, **more)

    def _last(self, x: Tensor, context: Context) -> Tensor:
        return self.back(super()._last(x, context))
