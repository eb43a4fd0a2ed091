"""Quantizers of single vectors: a latent to an id, and an id back to the very vector that the decoder was trained on.

One protocol and four quantizers of our own; `library.py` wraps further ones. The law for all: in eval mode
`decode_ids(quantize(z).ids)` equals `quantize(z).z_q`. Vectors stand last: (batch, elements, dim).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F


class Quantized(NamedTuple):
    """What a quantizer made of latents; the shapes of `z_q` and `ids` are the quantizer's."""

    z_q: Tensor  # value: what the ids decode to; gradient: straight through to the latents, or as the quantizer says
    ids: Tensor
    loss: Float[Tensor, ""]  # to be added to the error of the picture, weighted by the quantizer already
    stats: dict[str, Tensor]  # used (codes met at all), perplexity, and what else a quantizer has to say


class Quantizer(Protocol):
    """Vectors <-> ids. `codebook` is the table whose rows may be filled and revived from outside, None where there is
    none; `depth` is the number of ids a vector becomes, each below `vocab`."""

    vocab: int
    code_dim: int

    @property
    def depth(self) -> int: ...

    @property
    def codebook(self) -> nn.Parameter | None: ...

    def quantize(self, z: Float[Tensor, "b n d"]) -> Quantized:
        """ids are (b, n), or (b, n, depth) where the depth is over 1."""
        ...

    def decode_ids(self, ids: Int[Tensor, "b n *depth"]) -> Float[Tensor, "b n d"]: ...


class StraightThrough(torch.autograd.Function):
    """Value of the first argument, gradient of the second. z + (z_q - z) would round z_q off."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, carrier: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        return None, grads[0]


def full_precision(x: Tensor) -> torch.autocast:
    """Ids and codes must not depend on whether the caller runs under autocast."""
    return torch.autocast(x.device.type, enabled=False)


def usage(ids: Int[Tensor, "*n"]) -> dict[str, Tensor]:
    """`used`, how many codes occur at all, and `perplexity`, exp of the entropy of their shares; -1 is not counted."""
    _, counts = ids[ids >= 0].unique(return_counts=True)  # by sorting: a vocabulary may be too large for a table
    share = counts / counts.sum()
    return {"used": torch.tensor(len(counts)), "perplexity": torch.special.entr(share).sum().exp()}


def entropy_penalty(logits: Float[Tensor, "b n v"], temperature: float = 0.01) -> Float[Tensor, ""]:
    """Mean entropy of each vector's soft choice minus the entropy of the mean choice: sure choices, all codes used.

    Source: MAGVIT-v2 (Yu et al. 2023, arXiv 2310.05737), equation 4; logits are similarities or negative distances.
    """
    log_p = F.log_softmax(logits / temperature, dim=-1)
    p = log_p.exp()
    mean = p.flatten(0, -2).mean(0).clamp(min=1e-12)  # a share of exactly 0 would have no gradient
    return -(p * log_p).sum(-1).mean() - torch.special.entr(mean).sum()


class _Table(nn.Module):
    """What the quantizers with a learned table share: (vocab, code_dim), moved by gradient."""

    depth = 1

    def __init__(self, vocab: int, dim: int, beta: float = 0.25, entropy: float = 0.0) -> None:
        super().__init__()
        if vocab < 1 or dim < 1:
            raise ValueError(f"a codebook has at least 1 code of at least 1 dimension, got {vocab} of {dim}")
        self.vocab, self.code_dim, self.beta, self.entropy = vocab, dim, beta, entropy
        self.table = nn.Parameter(torch.randn(vocab, dim) / math.sqrt(dim))

    def _check(self, z: Tensor) -> Float[Tensor, "b n d"]:
        if z.dim() != 3 or z.shape[2] != self.code_dim:
            raise ValueError(f"latents are (batch, elements, {self.code_dim}), got {tuple(z.shape)}")
        return z.to(self.table.dtype)

    def _pull(self, codes: Tensor, z: Tensor, weight: Float[Tensor, "b n"] | None = None) -> Float[Tensor, ""]:
        """|codes - sg z|^2 + beta |z - sg codes|^2 (van den Oord et al. 2017, arXiv 1711.00937, equation 3); each
        vector counts by its weight, all alike where there is none."""
        if weight is None:
            return F.mse_loss(codes, z.detach()) + self.beta * F.mse_loss(z, codes.detach())
        each = (codes - z.detach()).square().mean(-1) + self.beta * (z - codes.detach()).square().mean(-1)
        return (each * weight).sum() / weight.sum()

    def _sure(self, logits: Tensor) -> Tensor | float:
        return self.entropy * entropy_penalty(logits) if self.entropy else 0.0


class VQ(_Table):
    """The nearest codeword in Euclidean distance, of a codebook learned by gradient.

    Source: van den Oord et al. 2017, arXiv 1711.00937. `beta` weighs the commitment of the latents, `entropy` the
    penalty on unsure and uneven choices (0 in the paper). weight: by how much each vector counts in the loss.
    """

    @property
    def codebook(self) -> nn.Parameter:
        return self.table

    def quantize(self, z: Float[Tensor, "b n d"], weight: Float[Tensor, "b n"] | None = None) -> Quantized:
        with full_precision(z):
            z = self._check(z)
            logits = _closeness(z, self.table)
            ids = logits.argmax(-1)
            codes = self.decode_ids(ids)
            loss = self._pull(codes, z, weight) + self._sure(logits)
        return Quantized(StraightThrough.apply(codes, z), ids, loss, usage(ids))

    def decode_ids(self, ids: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        return F.embedding(ids, self.table)

    @torch.no_grad()
    def nearest(self, z: Float[Tensor, "b n d"], count: int) -> Int[Tensor, "b n count"]:
        """The ids of the nearest codes to each latent, the one that it becomes first."""
        if not 1 <= count <= self.vocab:
            raise ValueError(f"1 to {self.vocab} codes are nearest, not {count}")
        with full_precision(z):
            codes = self.decode_ids(torch.arange(self.vocab, device=z.device)[None])[0]
            return _closeness(self._check(z), codes).topk(count, -1).indices


class NormalizedVQ(VQ):
    """`VQ` on the unit sphere: latents and codewords are l2-normalised, so that the nearest is the most aligned.

    Source: ViT-VQGAN (Yu et al. 2021, arXiv 2110.04627), as LlamaGen has it (Sun et al. 2024, arXiv 2406.06525): 8
    dimensions, codebook by gradient.
    """

    def quantize(self, z: Float[Tensor, "b n d"], weight: Float[Tensor, "b n"] | None = None) -> Quantized:
        with full_precision(z):
            z = F.normalize(self._check(z), dim=-1)
            logits = _closeness(z, F.normalize(self.table, dim=-1))
            ids = logits.argmax(-1)
            codes = self.decode_ids(ids)
            loss = self._pull(codes, z, weight) + self._sure(logits)
        return Quantized(StraightThrough.apply(codes, z), ids, loss, usage(ids))

    def decode_ids(self, ids: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        return F.normalize(F.embedding(ids, self.table), dim=-1)


class IBQ(_Table):
    """Index backpropagation: the codeword of largest inner product, with a straight-through one-hot over all of them,
    so that every code gets a gradient in every step. Nobody needs to fill or revive its table; without the entropy
    penalty a few long codewords would win everywhere.

    Source: Shi et al. 2024, arXiv 2412.02692; its loss pulls the latent twice (to the soft and to the hard code) and
    the codes once, by `beta`. The paper's weight of the penalty is 0.05; a few hundred steps on small pictures need
    more (32x32 glyphs, 240 steps: 3 of 256 codes in use at 0.05, 166 at 0.5).
    """

    codebook = None

    def __init__(self, vocab: int, dim: int, beta: float = 0.25, entropy: float = 0.5) -> None:
        super().__init__(vocab, dim, beta, entropy)

    def quantize(self, z: Float[Tensor, "b n d"]) -> Quantized:
        with full_precision(z):
            z = self._check(z)
            logits = z @ self.table.T
            p = logits.softmax(-1)
            ids = logits.argmax(-1)
            choice = StraightThrough.apply(F.one_hot(ids, self.vocab).to(p.dtype), p)
            soft = choice @ self.table  # value: the codeword to rounding
            codes = self.decode_ids(ids)
            loss = F.mse_loss(soft, z) + F.mse_loss(z, codes.detach()) + self.beta * F.mse_loss(codes, z.detach())
            loss = loss + self._sure(logits)
        return Quantized(StraightThrough.apply(codes, soft), ids, loss, usage(ids))

    def decode_ids(self, ids: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        return F.embedding(ids, self.table)


class BSQ(nn.Module):
    """Binary spherical quantization: z/|z|, then the nearest of the 2^bits corners of a cube in the unit sphere.

    Source: Zhao et al. 2024, arXiv 2406.07548. The id holds one bit a dimension, the first the most significant; a
    zero counts as negative. The entropy penalty is factorised over bits: with affinities exp(2 `sharpness` c.u) they
    are independent, so the entropy of a vector's choice is a sum of `bits` binary entropies (exact), and that of the
    mean choice is bounded above by such a sum. Nothing of size 2^bits is held, so any number up to 62 will do.
    """

    depth, codebook = 1, None
    place: Tensor

    def __init__(self, bits: int, beta: float = 0.25, entropy: float = 0.1, sharpness: float = 100.0) -> None:
        super().__init__()
        if not 1 <= bits <= 62:
            raise ValueError(f"an id of 64 bits holds 1 to 62 dimensions, got {bits}")
        self.vocab, self.code_dim = 2**bits, bits
        self.beta, self.entropy, self.sharpness = beta, entropy, sharpness
        self.register_buffer("place", 2 ** torch.arange(bits - 1, -1, -1), persistent=False)

    def quantize(self, z: Float[Tensor, "b n d"]) -> Quantized:
        if z.dim() != 3 or z.shape[2] != self.code_dim:
            raise ValueError(f"latents are (batch, elements, {self.code_dim}), got {tuple(z.shape)}")
        with full_precision(z):
            u = F.normalize(z.float() if z.dtype in (torch.bfloat16, torch.float16) else z, dim=-1)
            ids = ((u > 0) * self.place).sum(-1)
            codes = self.decode_ids(ids).to(u.dtype)
            each, mean = self.entropies(u)
            loss = self.beta * F.mse_loss(u, codes) + self.entropy * (each - mean)
        return Quantized(StraightThrough.apply(codes, u), ids, loss, usage(ids))

    def entropies(self, u: Float[Tensor, "b n d"]) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Mean entropy of a vector's soft choice, and the bound on that of the mean choice, in nats."""
        logit = 4 * self.sharpness * u / math.sqrt(self.code_dim)
        p = logit.sigmoid()
        each = p * F.softplus(-logit) + (1 - p) * F.softplus(logit)
        mean = p.flatten(0, 1).mean(0).clamp(1e-6, 1 - 1e-6)  # a share of exactly 0 would have no gradient
        return each.sum(-1).mean(), (torch.special.entr(mean) + torch.special.entr(1 - mean)).sum()

    def decode_ids(self, ids: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        bits = (ids[..., None] & self.place) != 0
        return torch.where(bits, 1.0, -1.0) / math.sqrt(self.code_dim)


def _closeness(z: Float[Tensor, "b n d"], table: Float[Tensor, "v d"]) -> Float[Tensor, "b n v"]:
    """Minus the squared distances."""
    return 2 * z @ table.T - table.square().sum(1) - z.square().sum(-1, keepdim=True)
