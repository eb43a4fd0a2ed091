"""Heads that look ahead from the states of a frozen base: Medusa's, and Hydra's, which also see what was drafted.

A base's own head reads token t + 1 out of h_t; head i (from 1) reads token t + 1 + i. Blocks are written as one tensor
for all heads where they have one shape, so that a step of decoding is a few products.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from seriatim.backbones.norm import rms_norm
from seriatim.factorization.line import run
from seriatim.plan import Plan
from seriatim.posttraining.drafting import Base, DraftConfig, DraftPart, losses_ahead
from seriatim.posttraining.layers import llama_layer
from seriatim.random import Generator

CANDIDATES = 8  # of a head, whose chances are measured


@dataclass(frozen=True)
class HeadsConfig(DraftConfig):
    """heads: how many tokens are looked ahead; layers: blocks of each; decay: how much less each further head counts in
    the loss."""

    heads: int = 4
    layers: int = 1
    decay: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads < 1 or self.layers < 1:
            raise ValueError(f"there is at least 1 head of at least 1 layer, got {self.heads} of {self.layers}")
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay lies above 0 and up to 1, got {self.decay}")


class AheadHeads(DraftPart):
    """What heads that look ahead share."""

    config: Any

    @property
    def ahead(self) -> int:
        """How many tokens behind the newest one are drafted."""
        return self.config.heads

    def reads(self, base: Base, h: Float[Tensor, "b n d"], ids: Int[Tensor, "b n"]) -> Float[Tensor, "b n k d"]:
        """What each head reads out behind each token, where the tokens between are those of the text."""
        raise NotImplementedError

    def loss(
        self, base: Base, h: Float[Tensor, "b n d"], ids: Int[Tensor, "b n"], random: Generator
    ) -> tuple[Tensor, Tensor, dict[str, float]]:
        """Cross-entropy of the text."""
        return losses_ahead(self.output, self.reads(base, h, ids), ids, self.config.decay)


@torch.no_grad()
def chances(part: AheadHeads, base: Base, examples: Any) -> list[list[float]]:
    """How often candidate i of a head is the token of the text, where all heads before it have it among theirs: one row
    a head, measured on windows ("token" and "state", see `states.py`). A draft tree of the best shape follows."""
    k, n = part.ahead, min(CANDIDATES, part.output.size)
    right, reached = torch.zeros(k, n), torch.zeros(k)
    like = next(part.parameters())
    for index in torch.arange(len(examples)).split(4):
        batch = examples.take(index)
        ids, h = batch["token"].to(like.device), batch["state"].to(like)
        places = ids.shape[1] - 1 - k
        best = part.output.best(part.reads(base, h, ids)[:, :places], n)  # (b, places, k, n)
        text = ids.unfold(1, k, 1)[:, 2:]  # the k tokens behind the newest one
        hit = (best == text[..., None]).float()
        before = F.pad(hit.any(-1).float().cumprod(-1)[..., :-1], (1, 0), value=1.0)
        right += (hit * before[..., None]).sum((0, 1)).cpu()
        reached += before.sum((0, 1)).cpu()
    return (right / reached.clamp(min=1)[:, None]).tolist()


@dataclass(frozen=True)
class MedusaConfig(HeadsConfig):
    """As `HeadsConfig`."""

    decay: float = 0.8


class Medusa(AheadHeads):
    """Heads that see the state alone (Cai et al. 2024, arXiv 2401.10774): each is residual blocks x + SiLU(W x + b),
    which begin as the identity, and reads out what it makes of the state."""

    key, Config = "medusa", MedusaConfig

    def __init__(self, config: MedusaConfig, base: Base):
        super().__init__(config, base, config.heads)
        k, n, d = config.heads, config.layers, base.width
        self.blocks = nn.Parameter(torch.zeros(n, k, d, d, device=base.device))
        self.bias = nn.Parameter(torch.zeros(n, k, d, device=base.device))

    def forward(self, h: Float[Tensor, "*rest d"]) -> Float[Tensor, "*rest k d"]:
        """What each head reads out of a state."""
        k, d = self.bias.shape[1:]
        x = h[..., None, :] + F.silu(F.linear(h, self.blocks[0].view(k * d, d)).unflatten(-1, (k, d)) + self.bias[0])
        for w, b in zip(self.blocks[1:], self.bias[1:], strict=True):
            x = x + F.silu(torch.einsum("...kd,ked->...ke", x, w) + b)
        return x

    def reads(self, base: Base, h: Float[Tensor, "b n d"], ids: Int[Tensor, "b n"]) -> Float[Tensor, "b n k d"]:
        return self(h)


@dataclass(frozen=True)
class HydraConfig(HeadsConfig):
    """prefix: states go through a decoder layer over all earlier ones first; distill: what the base says is learned in
    place of the text; dropout: of what each block reads, in training."""

    prefix: bool = False
    distill: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is a share from 0 to below 1, got {self.dropout}")


class Hydra(AheadHeads):
    """Heads that also see the tokens between (Ankner et al. 2024, arXiv 2402.05109): head i reads the state and the
    base's vectors of the i tokens behind it, through S u + SiLU(W u + b) of all of them, u = [h; e_1; ...; e_i], and
    residual blocks. S begins as the state alone and W as nothing, so that every head begins as the base's.

    With `prefix` a decoder layer shaped as the base's own replaces h by what it makes of all states so far (Hydra++).
    """

    key, Config = "hydra", HydraConfig

    def __init__(self, config: HydraConfig, base: Base):
        super().__init__(config, base, config.heads)
        k, n, d = config.heads, config.layers, base.width
        # the rows of S, then those of W: both read the same
        self.first = nn.ParameterList(torch.zeros(2 * d, (i + 1) * d, device=base.device) for i in range(1, k + 1))
        self.first_bias = nn.Parameter(torch.zeros(k, 2 * d, device=base.device))
        deep = n > 1  # else there is nothing to train
        self.blocks = nn.Parameter(torch.zeros(k, n - 1, d, d, device=base.device)) if deep else None
        self.bias = nn.Parameter(torch.zeros(k, n - 1, d, device=base.device)) if deep else None
        with torch.no_grad():
            for w in self.first:
                w[:d, :d] = torch.eye(d, device=base.device)
        self.prefix = llama_layer(base) if config.prefix else None
        self.prefix_norm = nn.Parameter(torch.ones(d, device=base.device)) if config.prefix else None
        scale = getattr(base.model.backbone, "norm", None)  # of the states that the layer is to hand on
        if self.prefix_norm is not None and isinstance(scale, Tensor):
            nn.init.constant_(self.prefix_norm, float(scale.float().square().mean().sqrt()))

    def forward(self, i: int, path: Float[Tensor, "*rest w"]) -> Float[Tensor, "*rest d"]:
        """What head i (from 1) reads out behind [h; e_1; ...; e_i]."""
        keep, gate = F.linear(self._dropped(path), self.first[i - 1], self.first_bias[i - 1]).chunk(2, -1)
        x = keep + F.silu(gate)
        if self.blocks is not None and self.bias is not None:
            for w, b in zip(self.blocks[i - 1], self.bias[i - 1], strict=True):
                x = x + F.silu(F.linear(self._dropped(x), w, b))
        return x

    def passed(self, h: Float[Tensor, "b n d"], plan: Plan, cache: Any = None) -> Float[Tensor, "b n d"]:
        """What the layer in front makes of states; without one, the states."""
        if self.prefix is None:
            return h
        return rms_norm(self.prefix(h, plan, cache), self.prefix_norm, self.prefix.config.eps).to(h.dtype)

    def _dropped(self, x: Tensor) -> Tensor:
        rate = self.config.dropout
        return F.dropout(x, rate) if self.training and rate else x

    def reads(self, base: Base, h: Float[Tensor, "b n d"], ids: Int[Tensor, "b n"]) -> Float[Tensor, "b n k d"]:
        with torch.no_grad():
            e = base.embed(ids).to(h.dtype)
        seen = [self.passed(h, run(0, h.shape[1]))]
        out = []
        for i in range(1, self.ahead + 1):
            seen.append(F.pad(e[:, i:], (0, 0, 0, i)))  # e_i of the token at hand
            out.append(self(i, torch.cat(seen, -1)))
        return torch.stack(out, 2)

    def loss(
        self, base: Base, h: Float[Tensor, "b n d"], ids: Int[Tensor, "b n"], random: Generator
    ) -> tuple[Tensor, Tensor, dict[str, float]]:
        """Cross-entropy of the text, or (`distill`) of what the base says."""
        taught = h if self.config.distill else None
        return losses_ahead(self.output, self.reads(base, h, ids), ids, self.config.decay, taught)
