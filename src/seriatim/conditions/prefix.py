"""Features that stand in front of a sequence, in the learned slots."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from seriatim.conditions.condition import Condition, _dropped, _features


class PrefixCondition(nn.Module):
    """Feature vectors (b, n, e), projected into the n prefix slots of an order; the null is one learned vector."""

    has_null = True

    def __init__(self, features: int, width: int):
        super().__init__()
        self.project = nn.Linear(features, width)
        self.null = nn.Parameter(torch.zeros(width))

    def forward(self, raw: Float[Tensor, "b n e"], drop: Bool[Tensor, "b"] | None = None) -> Condition:
        p = self.project
        x = p(_features(raw, p.weight, p.in_features, "a prefix is (batch, slots, {})"))
        if (dropped := _dropped(drop, self, x)) is not None:
            x = torch.where(dropped[:, None, None], self.null, x)
        return Condition(prefix=x)
