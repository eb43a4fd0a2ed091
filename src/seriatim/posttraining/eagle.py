"""EAGLE's draft layer: autoregression in the states of a frozen base (Li et al. 2024, arXiv 2401.15077).

From the state f_t, which has seen tokens 0 to t, and the token behind it, one decoder layer estimates f_(t+1); the base
reads the next token out of the estimate, and both are the next input. Knowing the token that was drawn takes the
uncertainty out of the state: that is why it is fused in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from seriatim.decoding.growth import Choices, likeliest
from seriatim.factorization.line import run
from seriatim.posttraining.drafting import Base, DraftConfig, DraftPart, losses_ahead
from seriatim.posttraining.layers import llama_layer, to_states
from seriatim.random import Generator, Key


@dataclass(frozen=True)
class EagleConfig(DraftConfig):
    """hidden, heads, kv_heads, theta, eps: of the layer, where they are not the base's; qkv_bias: it has biases there;
    bias: of the map that fuses state and token; noise: uniform within so much (at windows of 512 tokens, more in
    shorter ones) / 2 around the states that training gives, as estimates will be wrong too; feature, said: what the
    error of the state and that of what is read out of it count in the loss."""

    hidden: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    theta: float | None = None
    eps: float | None = None
    qkv_bias: bool = False
    bias: bool = True
    noise: float = 0.2
    feature: float = 1.0
    said: float = 0.1


class Eagle(DraftPart):
    """W [e(x_(t+1)); f_t] + b, then a decoder layer without a norm in front or behind: it goes on in states as they
    are. W begins as half the state and, as large, a random map of the token; the layer hands on what it is given."""

    key, Config = "eagle-2", EagleConfig
    places: tuple[int, ...] = (0,)

    def __init__(self, config: EagleConfig, base: Base):
        super().__init__(config, base)
        c, d = config, base.width
        self.layer = llama_layer(
            base, c.heads, c.kv_heads, c.hidden, c.theta, c.eps, first_norm=False, qkv_bias=c.qkv_bias
        )
        self.fuse = nn.Parameter(torch.cat([to_states(base), torch.eye(d, device=base.device) / 2], 1))
        self.fuse_bias = nn.Parameter(torch.zeros(d, device=base.device)) if c.bias else None

    def looks_at(self, place: Int[Tensor, "*n"]) -> Int[Tensor, "*n 1"]:
        """The token alone."""
        return place[..., None]

    def enter(self, h: Float[Tensor, "b m d"], e: Float[Tensor, "b m 1 d"]) -> Float[Tensor, "b m d"]:
        """Token and state in one vector."""
        return F.linear(torch.cat([e[..., 0, :].to(h.dtype), h], -1), self.fuse, self.fuse_bias)

    def choices(
        self, estimate: Float[Tensor, "b m d"], last: Float[Tensor, "b 1 d"], depth: int, width: int
    ) -> Choices:
        """What the base reads out of estimates."""
        found = likeliest(self.output(estimate[..., None, :])[..., 0, :], width)
        return found._replace(token=self.output.tokens(found.token))

    def loss(
        self, base: Base, h: Float[Tensor, "b n d"], ids: Int[Tensor, "b n"], random: Generator
    ) -> tuple[Tensor, Tensor, dict[str, float]]:
        """Smooth L1 distance to the true states, and the cross-entropy to what the base says (section 3.2); `feature`
        is the former, averaged over dimensions."""
        b, n, d = h.shape
        c: EagleConfig = self.config
        noise = random.uniform((b, n - 1, d), Key(torch.arange(b), 0), h.device) - 0.5
        seen = h[:, :-1] + (c.noise * 512 / n) * noise.to(h.dtype)
        with torch.no_grad():
            e = base.embed(ids[:, 1:, None])
        f = self.layer(self.enter(seen, e), run(0, n - 1))
        said, count, figures = losses_ahead(self.output, F.pad(f, (0, 0, 0, 1))[:, :, None], ids, h=h)
        far = F.smooth_l1_loss(f[:, :-1].float(), h[:, 1:-1].float(), reduction="sum") / d
        terms = b * (n - 2)
        figures["feature"] = float(far.detach()) / terms
        return c.feature * far + c.said * said, torch.tensor(terms), figures
