"""The two-stream transformer of XLNet (Yang et al. 2019, arXiv 1906.08237), in the shape in which it was published.

Norms stand behind each branch; what a key scores depends on its content and, by a sinusoid, on how far it stands from
the query (Transformer-XL, Dai et al. 2019, arXiv 1901.02860). Queries (slots that carry a mask) have no keys and
values, not even for themselves: one that sees nothing is left as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from seriatim.backbones.cache import KVCache
from seriatim.initial import drawn
from seriatim.plan import MASK, Plan


@dataclass(frozen=True)
class XLNetConfig:
    """Sizes; `hidden` is the width of the feed-forward layers."""

    width: int
    depth: int
    heads: int
    hidden: int
    eps: float = 1e-12

    def __post_init__(self) -> None:
        if self.width % (2 * self.heads):
            raise ValueError(f"a width of {self.width} cannot be shared evenly by {self.heads} heads, in pairs")

    @property
    def dim(self) -> int:
        return self.width // self.heads


class XLNetLayer(nn.Module):
    """Weights of a layer, and what it computes."""

    q: nn.Parameter
    k: nn.Parameter
    v: nn.Parameter
    r: nn.Parameter
    out: nn.Parameter
    content_bias: nn.Parameter
    place_bias: nn.Parameter

    def __init__(self, config: XLNetConfig):
        super().__init__()
        self.config, c = config, config
        for name in ("q", "k", "v", "r", "out"):
            self.register_parameter(name, nn.Parameter(drawn(c.width, c.width)))
        for name in ("content_bias", "place_bias"):
            self.register_parameter(name, nn.Parameter(torch.zeros(c.heads, c.dim)))
        self.norm1, self.norm2 = (nn.LayerNorm(c.width, c.eps) for _ in range(2))
        self.up, self.down = nn.Linear(c.width, c.hidden), nn.Linear(c.hidden, c.width)

    def split(self, x: Float[Tensor, "*b s d"], weight: Tensor) -> Float[Tensor, "*b h s e"]:
        """By heads."""
        return F.linear(x, weight).unflatten(-1, (self.config.heads, self.config.dim)).transpose(-3, -2)

    def forward(
        self,
        x: Float[Tensor, "b s d"],
        k: Float[Tensor, "b h k e"],
        v: Float[Tensor, "b h k e"],
        waves: Float[Tensor, "n d"],
        distance: Int[Tensor, "b q k"],
        mask: Bool[Tensor, "#b 1 q k"],
    ) -> Float[Tensor, "b s d"]:
        """waves: one for each distance; `distance`: which of them each pair of slots has."""
        q = self.split(x, self.q)
        content = (q + self.content_bias[:, None]) @ k.transpose(-1, -2)
        every = (q + self.place_bias[:, None]) @ self.split(waves, self.r).transpose(-1, -2)
        place = every.gather(-1, distance[:, None].expand(*content.shape))
        scores = ((content + place) * self.config.dim**-0.5).masked_fill(~mask, -torch.inf)
        share = torch.softmax(scores, -1).nan_to_num(0.0)  # who sees nothing takes nothing in
        seen = (share @ v).transpose(1, 2).flatten(2)
        x = self.norm1(x + F.linear(seen, self.out))
        return self.norm2(x + self.down(F.gelu(self.up(x))))


class XLNet(nn.Module):
    """Layers over slots, whose first coordinate is their place. Honours any visibility, but that no slot sees a query:
    orders in which one must are not its business (`AnySubset` is)."""

    mixers = {"all": "any"}  # noqa: RUF012 (as of all backbones)

    def __init__(self, config: XLNetConfig):
        super().__init__()
        self.config, self.width = config, config.width
        self.layers = nn.ModuleList(XLNetLayer(config) for _ in range(config.depth))

    def new_cache(self, batch: int, capacity: int = 256) -> KVCache:
        """Keys know their places: the last number of each. So they stay in float32 at least."""
        c, weight = self.config, next(self.parameters())
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        return KVCache(c.depth, batch, c.heads, c.dim + 1, dtype, weight.device, capacity)

    def forward(
        self,
        x: Float[Tensor, "b s d"],
        plan: Plan,
        cache: KVCache | None = None,
        vector: Tensor | None = None,
        memory: Tensor | None = None,
    ) -> Float[Tensor, "b s d"]:
        if vector is not None or memory is not None:
            raise ValueError("this backbone takes no conditions")
        if cache is not None:
            cache.begin(plan)
        mask = plan.attention("all", cache)
        if not isinstance(mask, Tensor):
            raise TypeError("this backbone needs a plan with labels; use an order of two streams, such as AnySubset")
        query = (plan.slots.source == MASK)[:, None, :, None]
        own = torch.eye(plan.size, dtype=torch.bool)
        own = F.pad(own, (mask.shape[-1] - plan.size, 0))
        mask = (mask & ~(query & own)).to(x.device)
        here = plan.slots.coord[..., 0].expand(len(x), -1).to(x.device)
        waves = distance = None
        for n, layer in enumerate(self.layers):
            assert isinstance(layer, XLNetLayer)
            k, v, there = layer.split(x, layer.k), layer.split(x, layer.v), here
            if cache is not None:
                place = here[:, None, :, None].expand(*k.shape[:3], 1).to(k.dtype)
                k, v = cache.append(n, torch.cat([k, place], -1), F.pad(v, (0, 1)))
                there, k, v = k[:, 0, :, -1].long(), k[..., :-1].to(x.dtype), v[..., :-1].to(x.dtype)
            if waves is None or distance is None:
                waves, distance = self._distances(here[:, :, None] - there[:, None], mask[:, 0], x.dtype)
            x = layer(x, k, v, waves, distance, mask)
        return x

    def _distances(
        self, offset: Int[Tensor, "b q k"], mask: Bool[Tensor, "#b q k"], dtype: torch.dtype
    ) -> tuple[Float[Tensor, "n d"], Int[Tensor, "b q k"]]:
        """A wave for each distance, from the farthest ahead to the farthest behind, and which one each pair has. (What
        a cache holds behind shorter rows may be anything: pairs that do not see each other have no distance.)"""
        offset = offset.masked_fill(~mask, 0)
        least, most = int(offset.min()), int(offset.max())
        far = torch.arange(least, most + 1, device=offset.device).float()
        slow = torch.arange(0, self.width, 2, device=offset.device).float() / self.width
        angle = far[:, None] * (1 / torch.pow(10_000, slow))
        return torch.cat([angle.sin(), angle.cos()], 1).to(dtype), offset - least
