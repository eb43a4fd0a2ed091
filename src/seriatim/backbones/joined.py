"""Two stacks of one width, one after the other: what xAR calls its encoder and its decoder.

Between them stand a norm, a linear map and learned positions; a norm stands in front of both, and one behind. Norms
inside the stacks are driven by the same vectors. One cache holds the keys and values of both.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from seriatim.backbones.cache import KVCache
from seriatim.backbones.layer import TransformerConfig
from seriatim.backbones.norm import rms_norm
from seriatim.backbones.transformer import Transformer
from seriatim.initial import drawn
from seriatim.plan import Plan


class Joined(nn.Module):
    """Two stacks of this config each. elements: how many have a position between the stacks."""

    def __init__(self, config: TransformerConfig, elements: int):
        super().__init__()
        config = replace(config, last_norm=False)
        self.config, self.width = config, config.width
        self.first, self.second = Transformer(config), Transformer(config)
        self.second.below, self.second.kept_as = config.depth, "modulation of the second stack"
        self.norms = nn.ParameterList(nn.Parameter(torch.ones(config.width)) for _ in range(3))
        self.join = nn.Linear(config.width, config.width)
        self.position = nn.Parameter(drawn(elements, config.width))
        self.mixers = self.first.mixers

    def new_cache(self, batch: int, capacity: int = 256) -> KVCache:
        """A cache for `batch` rows of both stacks."""
        c, one = self.config, self.first.new_cache(1, 1)
        return KVCache(2 * c.depth, batch, c.groups, c.dim, one.dtype, one.device, capacity, tuple(self.mixers))

    def forward(
        self, x: Float[Tensor, "b s d"], plan: Plan, cache: KVCache | None = None, *more: Any
    ) -> Float[Tensor, "b s d"]:
        """Contextualise slots, each of which carries one element."""
        eps = self.config.eps
        x = self.first(rms_norm(x, self.norms[0], eps), plan, cache, *more)
        x = self.join(rms_norm(x, self.norms[1], eps))
        x = x + self.position[plan.slots.element[..., 0].clamp(min=0).to(x.device)]
        return rms_norm(self.second(x, plan, cache, *more), self.norms[2], eps)
