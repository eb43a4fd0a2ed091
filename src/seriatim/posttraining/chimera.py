"""Chimera's draft layer: all known tokens through their states, the newest through trigrams (Zeng et al. 2024, arXiv
2402.15758).

A small network without context turns three tokens into a vector; one decoder layer over the states of a frozen base and
these vectors makes of the newest one an estimate of the state that the base would have there; heads read out of it,
beside the last true state, one token further each. An estimate and the trigram of the token that was read out of it are
what the layer sees next.

Here state and trigram stand side by side: the pair (h_t, g_(t+1)) takes places t and t + 1, and the estimate of h_(t+1)
stands in the second. As in the released code every trigram is seen by what comes later, that of known tokens too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from seriatim.decoding.feature_draft import Pass, chain
from seriatim.decoding.growth import Choices, likeliest
from seriatim.posttraining.drafting import Base, DraftConfig, Output, losses_ahead
from seriatim.posttraining.heads import AheadHeads
from seriatim.posttraining.layers import llama_layer, to_states
from seriatim.random import Generator


@dataclass(frozen=True)
class ChimeraConfig(DraftConfig):
    """heads: how many tokens ahead are read, by a head each; shared: by one head for all; gram: tokens of which the
    short-range encoder knows (1: no more than the token); fused: heads read the last true state beside the estimate;
    hidden: of the layer, where it is not the base's; distill: what the base says is learned in place of the text;
    feature: what the distance of estimates to true states counts in the loss; decay: how much less each further head
    counts."""

    heads: int = 4
    shared: bool = False
    gram: int = 3
    fused: bool = True
    hidden: int | None = None
    distill: bool = False
    feature: float = 0.1
    decay: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads < 1 or not 1 <= self.gram <= 3:
            raise ValueError(f"there is at least 1 head, and 1 to 3 tokens of a gram, got {self.heads} and {self.gram}")
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay lies above 0 and up to 1, got {self.decay}")


class FusedOutput(Output):
    """Reads tokens out of several states side by side: by the base's matrix, after a map of each head's own that mixes
    them into one, or by a matrix of its own for each. At first all heads give what the base reads out of their sum."""

    states = 1

    def __init__(self, config: DraftConfig, base: Base, heads: int, states: int):
        super().__init__(config, base, heads * states)
        self.heads, self.states = heads, states
        if not self.own:
            self.mix = nn.Parameter(torch.eye(base.width, device=base.device).repeat(heads, 1, states))
        self.begin()

    @torch.no_grad()
    def begin(self) -> None:
        super().begin()
        if self.own:
            self.bias.view(-1, self.states, self.size)[:, 1:] = 0

    def forward(self, x: Float[Tensor, "*rest k w"], first: int = 0) -> Float[Tensor, "*rest k n"]:
        """As `Output` says; a single head reads whatever the others would."""
        if self.heads == 1:
            return self._read(x[..., None, :], 0)[..., 0, :]
        return self._read(x, first)

    def _read(self, x: Float[Tensor, "*rest k w"], first: int) -> Float[Tensor, "*rest k n"]:
        k, states = x.shape[-2], self.states
        if not self.own:
            each = zip(x.unbind(-2), self.mix[first : first + k].to(x.dtype), strict=True)
            return super().forward(torch.stack([F.linear(y, mix) for y, mix in each], -2))
        apart = x.unflatten(-1, (states, -1)).flatten(-3, -2)
        return super().forward(apart, first * states).unflatten(-2, (k, states)).sum(-2)


class Chimera(AheadHeads):
    """Trigram encoder, one decoder layer without a norm behind it, and heads.

    The encoder is a residual block x + SiLU(W x + b) over the vectors of three tokens, which begins as the identity,
    and a map to one; the layer begins by handing that on.
    """

    key, Config = "chimera", ChimeraConfig
    places: tuple[int, ...] = (0, 1)

    def __init__(self, config: ChimeraConfig, base: Base):
        super().__init__(config, base)
        g, d, device = config.gram, base.width, base.device
        self.output = FusedOutput(config, base, 1 if config.shared else config.heads, 1 + config.fused)
        self.block = nn.Parameter(torch.zeros(g * d, g * d, device=device))
        self.block_bias = nn.Parameter(torch.zeros(g * d, device=device))
        self.narrow = nn.Parameter(to_states(base, g))
        self.layer = llama_layer(base, hidden=config.hidden)

    def looks_at(self, place: Int[Tensor, "*n"]) -> Int[Tensor, "*n g"]:
        """The token and the two before it; at the start of a text the first ones, the token itself until there are
        three."""
        first = (place - self.config.gram + 1).clamp(min=0)
        return torch.minimum(first[..., None] + torch.arange(self.config.gram), place[..., None])

    def grams(self, e: Float[Tensor, "*m g d"]) -> Float[Tensor, "*m d"]:
        """What the encoder makes of the vectors of tokens; it knows no others."""
        x = e.flatten(-2)
        return F.linear(x + F.silu(F.linear(x, self.block, self.block_bias)), self.narrow)

    def enter(self, h: Float[Tensor, "b m d"], e: Float[Tensor, "b m g d"]) -> Float[Tensor, "b s d"]:
        """State and trigram, one behind the other."""
        return torch.stack([h, self.grams(e.to(h.dtype))], 2).flatten(1, 2)

    def choices(
        self, estimate: Float[Tensor, "b m d"], last: Float[Tensor, "b 1 d"], depth: int, width: int
    ) -> Choices:
        """What the head of this depth reads, or behind all of them the last."""
        x = self._beside(last, estimate)[..., None, :]
        found = likeliest(self.output(x, min(depth, self.ahead) - 1)[..., 0, :], width)
        return found._replace(token=self.output.tokens(found.token))

    def _beside(self, last: Float[Tensor, "b n d"], estimate: Float[Tensor, "b m d"]) -> Float[Tensor, "b m w"]:
        """What a head reads."""
        return torch.cat([last.expand_as(estimate), estimate], -1) if self.config.fused else estimate

    def estimates(
        self, h: Float[Tensor, "b n d"], e: Float[Tensor, "b n g d"], depth: int
    ) -> list[Float[Tensor, "b n d"]]:
        """Estimates of the states 1, ..., `depth` places behind each state h_t, when the text goes on as it does: e
        are the vectors of the grams behind the states. Estimates that would need more text mean nothing.

        At each depth the layer runs anew over all known pairs, and the estimates of smaller depths, of which a place
        sees those that start where it does.
        """
        n, x = h.shape[1], self.enter(h, e)
        found = [self.layer(x, chain(0, n, self.places))[:, 1::2]]
        x = torch.cat([x[:, ::2], x[:, 1::2]], 1)  # states, then grams
        for d in range(2, depth + 1):
            x = torch.cat([x, found[-1]], 1)
            out = self.layer(x, _block(n, d, x.device))[:, n : 2 * n]
            found.append(F.pad(out[:, d - 1 :], (0, 0, 0, min(d - 1, n))))
        return found

    def reads(self, base: Base, h: Float[Tensor, "b n d"], ids: Int[Tensor, "b n"]) -> Float[Tensor, "b n k w"]:
        return self._reads(h, self._estimates(base, h, ids))

    def _estimates(self, base: Base, h: Float[Tensor, "b n d"], ids: Int[Tensor, "b n"]) -> list[Tensor]:
        """As `estimates`, for a text."""
        with torch.no_grad():
            e = base.embed(ids[:, self.looks_at(torch.arange(1, ids.shape[1]))])
        return self.estimates(h[:, :-1], e, self.config.heads)

    def _reads(self, h: Float[Tensor, "b n d"], found: list[Tensor]) -> Float[Tensor, "b n k w"]:
        return torch.stack([F.pad(self._beside(h[:, :-1], f), (0, 0, 0, 1)) for f in found], 2)

    def loss(
        self, base: Base, h: Float[Tensor, "b n d"], ids: Int[Tensor, "b n"], random: Generator
    ) -> tuple[Tensor, Tensor, dict[str, float]]:
        """The cross-entropy of all heads, and the squared distance of estimates to true states (`feature_1`, ...)."""
        c, n = self.config, h.shape[1]
        found = self._estimates(base, h, ids)
        total, count, figures = losses_ahead(self.output, self._reads(h, found), ids, c.decay, h if c.distill else None)
        far = [F.mse_loss(f[:, : n - 1 - i].float(), h[:, 1 + i :].float()) for i, f in enumerate(found)]
        for i, distance in enumerate(far):
            figures[f"feature_{i + 1}"] = float(distance.detach())
        if c.feature:
            total = total + c.feature * count * torch.stack(far).mean()
        return total, count, figures


def _block(n: int, depth: int, device: torch.device) -> Pass:
    """Places and sights of [n states | n grams | n estimates of each smaller depth], `depth` tokens ahead: only the
    grams' rows matter. Gram j, of token j + 1, is reached from state t = j + 1 - depth."""
    t = torch.arange(n)
    start = t[:, None] + 1 - depth  # from which state each gram is reached
    sees = torch.cat([t <= start, t <= t[:, None], *[t == start] * (depth - 1)], 1)
    mask = torch.eye((depth + 1) * n, dtype=torch.bool)
    mask[n : 2 * n] |= sees
    place = torch.cat([t, t + 1, *(t + i for i in range(1, depth))])
    return Pass(len(place), mask[None, None].to(device), (0, place))
