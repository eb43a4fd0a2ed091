"""A transformer with two ends: the last layers and the last norm come twice, and a plan says which end it takes.

HMAR (Kumbong et al. 2025, arXiv 2506.04421) refines a scale by copies of its last layers, so that the layers before
them serve both, and next-scale prediction stays what it was.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from seriatim.backbones.layer import Layer, TransformerConfig
from seriatim.backbones.transformer import Transformer
from seriatim.plan import Plan


class Forked(Transformer):
    """`fork` layers and an adaptive norm beside the last ones; plans with `fork` go through these. Their keys and
    values stand in one cache, so an order must not let one end see what the other remembered."""

    def __init__(self, config: TransformerConfig, fork: int):
        if not 1 <= fork <= config.depth:
            raise ValueError(f"of {config.depth} layers 1 to {config.depth} may come twice, got {fork}")
        if config.vector is None or len(config.kinds) > 1:
            raise ValueError("a stack with two ends has one kind of layer, and norms that a conditioning vector drives")
        super().__init__(config)
        self.fork = nn.ModuleList(Layer(config) for _ in range(fork))
        self.fork_ada = nn.Parameter(torch.zeros(2 * config.width, config.vector))
        self.fork_ada_bias = nn.Parameter(torch.zeros(2 * config.width))

    def forward(self, x: Float[Tensor, "b s d"], plan: Plan, *rest: Any, **more: Any) -> Float[Tensor, "b s d"]:
        if plan.fork:
            return Transformer.forward(self._other(), x, plan, *rest, **more)
        return super().forward(x, plan, *rest, **more)

    def _other(self) -> Transformer:
        """The same stack by its other end. Made anew each time, so that it is never stale: it holds no weights of its
        own."""
        other = copy.copy(self)
        shared = len(self.layers) - len(self.fork)
        layers = nn.ModuleList([*self.layers[:shared], *self.fork])
        ends = {"ada": self.fork_ada, "ada_bias": self.fork_ada_bias, "relative": self.relative}
        other.__dict__.update(
            _modules={"layers": layers}, layers=layers, _parameters=ends, kept_as="modulation of the fork",
            _compiled=None, _compiled_layer=None,
        )  # fmt: skip
        return other

    @torch.no_grad()
    def fork_from_end(self) -> None:
        """The second end begins as a copy of the first."""
        for mine, theirs in zip(self.fork, self.layers[-len(self.fork) :], strict=True):
            mine.load_state_dict(theirs.state_dict())
        assert self.ada is not None and self.ada_bias is not None
        self.fork_ada.copy_(self.ada)
        self.fork_ada_bias.copy_(self.ada_bias)
