"""Multi-scale residual quantization by rings of frequencies: each scale codes a band of the latent, from low to high.

Source: NFIG (Huang et al. 2025, arXiv 2503.07076); followed is what its formulas say. Beside its own ring of the
spectrum, a scale codes what the coarser ones could not; a map is raised to the finest grid without a phi. Only the sum
of all scales is compared with the latent, since a partial sum is to be a low-pass version of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from seriatim.tokenizers.multiscale import MultiScaleConfig, MultiScaleTokenizer, MultiScaleVQ
from seriatim.tokenizers.quantizers import Quantized, StraightThrough

Rings = Literal["tokens", "linear", "log"]


def radius(side: int) -> Float[Tensor, "side side"]:
    """The distance of each frequency of a square map from the mean, in the order of `torch.fft.fft2`."""
    k = torch.fft.fftfreq(side, dtype=torch.float64) * side
    return (k[:, None].square() + k.square()).sqrt()


def ring_edges(scales: Sequence[int], rings: Rings = "tokens") -> tuple[float, ...]:
    """The outer edge of each scale's ring; the last one is the corner frequency of the finest map.

    Widths in proportion to the tokens of a scale (as published: with 680 tokens on a 16x16 map the first ring is the
    mean, the next four are empty), all the same, or edges in geometric progression.
    """
    highest, count = float(radius(scales[-1]).max()), len(scales)
    if rings == "tokens":
        shares = list(accumulate(side * side for side in scales))
        return tuple(highest * share / shares[-1] for share in shares)
    if rings == "linear":
        return tuple(highest * (k + 1) / count for k in range(count))
    return tuple(math.exp(math.log(max(highest, 1.0)) * (k + 1) / count) for k in range(count))


@lru_cache(maxsize=64)
def ring_masks(side: int, edges: tuple[float, ...]) -> Bool[Tensor, "K side side"]:
    """Which frequencies each ring holds: together all of them, each once. The last ring is closed, since the corner
    frequency lies on its edge."""
    r, inner = radius(side), (0.0, *edges[:-1])
    outer = (*edges[:-1], math.inf)
    return torch.stack([(low <= r) & (r < high) for low, high in zip(inner, outer, strict=True)])


class RingVQ(MultiScaleVQ):
    """`MultiScaleVQ` whose bands are rings. edges: outer edges of the rings (None: those of `rings`)."""

    rings: Rings = "tokens"
    edges: tuple[float, ...] | None = None

    def bands(self, f: Float[Tensor, "b dim h w"]) -> list[Float[Tensor, "b dim h w"]]:
        """Rings are symmetric, so bands are real, and half of the plane says all. There is no spectrum of half
        formats."""
        edges = self.edges or ring_edges(self.scales, self.rings)
        masks = ring_masks(self.side, edges)[..., : self.side // 2 + 1].to(f.device)
        spectrum = torch.fft.rfft2(f if f.dtype == torch.float64 else f.float())
        return [torch.fft.irfft2(spectrum * mask, s=f.shape[2:]).to(f.dtype) for mask in masks]

    def quantize(self, f: Float[Tensor, "b dim h w"]) -> Quantized:
        """As `MultiScaleVQ.quantize`, with the loss of the last f_hat alone."""
        f = f.to(self.codebook.dtype)
        steps = list(self.analyse(f))
        last, ids = steps[-1].f_hat, [s.ids for s in steps]
        loss = self.beta * F.mse_loss(last.detach(), f) + F.mse_loss(last, f.detach())
        return Quantized(StraightThrough.apply(last, f), torch.cat(ids, dim=1), loss, self._stats(ids))


@dataclass(frozen=True, kw_only=True)
class RingConfig(MultiScaleConfig):
    """As `MultiScaleConfig`, without phi. rings: widths of the rings (`ring_edges`)."""

    phis: int = 1
    phi_ratio: float = 0.0
    rings: Rings = "tokens"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rings not in get_args(Rings):
            raise ValueError(f"rings are {', '.join(get_args(Rings))}, not {self.rings!r}")

    def quantizer(self) -> RingVQ:
        made = RingVQ(self.scales, self.vocab, self.dim, self.phis, self.phi_ratio, self.beta)
        made.rings = self.rings
        return made


class RingTokenizer(MultiScaleTokenizer):
    """Pictures in [-1, 1] <-> ids of all rings."""

    kind: ClassVar[str] = "rings"
