"""A transformer whose every slot is steered by what it looks up: adaptive norms, not added vectors.

D-AR (Gao & Shou 2025, arXiv 2505.23660): in front of each layer a slot attends to a memory, and what it finds there,
plus what the layer makes of the time, says shift, scale and gate of both branches of that slot.
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from seriatim.backbones.layer import TransformerConfig
from seriatim.backbones.rope import rotate
from seriatim.backbones.transformer import Context, Transformer
from seriatim.heads.denoiser import time_features
from seriatim.plan import Plan


class Steer(nn.Module):
    """What steers the slots of one layer. Queries and keys are normalised; rotary positions are the slots' alone."""

    def __init__(self, width: int, heads: int, eps: float):
        super().__init__()
        self.heads, self.eps = heads, eps
        self.time = nn.Sequential(nn.Linear(width // 2 * 2, width), nn.SiLU(), nn.Linear(width, width))
        self.memory = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.q, self.kv, self.out = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.q_norm, self.k_norm = (nn.LayerNorm(width // heads, eps) for _ in range(2))
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.trunc_normal_(part.weight, std=0.02)
                nn.init.zeros_(part.bias)

    def forward(
        self, x: Float[Tensor, "b s d"], time: Float[Tensor, "b f"], memory: Float[Tensor, "b m d"],
        rope: tuple[Tensor, Tensor] | None,
    ) -> Float[Tensor, "b s d"]:  # fmt: skip
        memory = self.memory(memory)
        memory = F.layer_norm(memory, memory.shape[-1:], eps=self.eps)
        q = self.q_norm(self.q(F.layer_norm(x, x.shape[-1:], eps=self.eps)).unflatten(-1, (self.heads, -1)))
        k, v = self.kv(memory).unflatten(-1, (2 * self.heads, -1)).chunk(2, 2)
        k = self.k_norm(k).to(v.dtype)  # autocast makes norms float32
        q = q.to(v.dtype) if rope is None else rotate(q, *rope).to(v.dtype)
        found = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.time(time)[:, None] + self.out(found.transpose(1, 2).flatten(2))


class Steered(Transformer):
    """Layers of slots steered by a time and a memory of the same width. Their gates begin at zero, the norm behind the
    last layer is plain."""

    def __init__(self, config: TransformerConfig):
        if config.vector != config.width or config.last_norm or len(config.kinds) > 1:
            raise ValueError("steered layers are of one kind, with vector=width and last_norm=False")
        super().__init__(config)
        self.steers = nn.ModuleList(Steer(config.width, config.heads, config.eps) for _ in range(config.depth))

    def forward(  # type: ignore[override]
        self, x: Float[Tensor, "b s d"], plan: Plan, time: Float[Tensor, " b"], memory: Float[Tensor, "b m d"]
    ) -> Float[Tensor, "b s d"]:
        """time: from 0 to 1."""
        c = self.config
        (sight,) = self._sights(plan, None, x, False).values()
        features = time_features(1000 * time.to(x.dtype), c.width // 2)
        memory = F.layer_norm(memory, memory.shape[-1:], eps=c.eps)
        for i, (layer, steer) in enumerate(zip(self.layers, self.steers, strict=True)):
            vector = F.silu(steer(x, features, memory, sight.rope))
            x = self._layer(i, layer.weights(), x, sight, Context(None, vector, None))  # type: ignore[operator]
        return F.layer_norm(x, x.shape[-1:], eps=c.eps)
