"""A transformer whose end branches: one state of a slot for each direction in which it predicts.

The first state is that of the trunk; each other one has gone through one more layer of its own (the dimension-oriented
heads of NAR, He et al. 2025, arXiv 2503.10696). The last norm is shared: what a norm of its own scales, the matrix
behind it can.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from seriatim.backbones.layer import TransformerConfig
from seriatim.backbones.quantize import linear
from seriatim.backbones.transformer import Context, Sight, Transformer
from seriatim.heads.categorical import CategoricalHead
from seriatim.plan import OrderError, Plan, Reads


class Branched(Transformer):
    """`config.depth` layers, of which the last `branches` each follow the trunk by itself. States are
    (b, s, (branches + 1) width): each branch's, then the trunk's, which is that of the last direction (right)."""

    def __init__(self, config: TransformerConfig, branches: int):
        if not 0 <= branches < config.depth:
            raise ValueError(f"of {config.depth} layers 0 to {config.depth - 1} may be branches, got {branches}")
        super().__init__(config)
        self.branches, self.skippable = branches, frozenset()

    def forward(self, x: Tensor, plan: Plan, *rest: Any, **more: Any) -> Float[Tensor, "b s states"]:
        if plan.layers is not None or plan.spawns or plan.route is not None:
            raise OrderError("slots go through all layers of a backbone that branches")
        return super().forward(x, plan, *rest, **more)

    def compile_decoding(self) -> None:
        """Nothing: its steps stay as they are."""

    def _all(self, x: Tensor, sights: dict[str, Sight], context: Context) -> Tensor:
        context, states = context._replace(product=linear), []
        trunk = len(self.layers) - self.branches
        for i, layer in enumerate(self.layers):
            y = self._layer(i, layer.weights(), x, sights[self.each_kind[i]], context)  # type: ignore[operator]
            if i < trunk:
                x = y
            if i >= trunk - 1:
                states.append(self._last(y, context))
        return torch.cat(states[::-1], -1)


class DirectedHead(CategoricalHead):
    """A matrix for each direction (role) over that direction's own state."""

    def logits(self, h: Float[Tensor, "b m states"], reads: Reads | None = None) -> Float[Tensor, "b m v"]:
        if reads is None or reads.role is None:
            raise ValueError("states of several directions are read by roles; this plan names none")
        role = reads.role.clamp(min=0).to(h.device).expand(h.shape[0], -1)[..., None, None]
        h = h.unflatten(-1, (self.roles, self.width)).gather(2, role.expand(-1, -1, 1, self.width))[:, :, 0]
        return super().logits(h, reads)
