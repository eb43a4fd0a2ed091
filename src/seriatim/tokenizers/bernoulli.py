"""Bits that are drawn: the quantizer of a binary autoencoder, and ids cut into sub-codes.

Source: ELM (Liu et al. 2024, arXiv 2410.16257). A latent's numbers are the logits of as
many bits; all 2^bits codes are there without a codebook.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from seriatim.tokenizers.quantizers import Quantized, StraightThrough, full_precision, usage


class Bernoulli(nn.Module):
    """Each bit is drawn with the sigmoid of its logit in training, and by threshold 1/2 otherwise; gradients are those
    of the sigmoid. A code is the sum of the rows of `table` whose bits are set. The first bit is the most significant.
    entropy: weight of the mean of p (1 - p), which is 0 for sure bits."""

    depth, codebook = 1, None
    place: Tensor

    def __init__(self, bits: int, entropy: float = 0.1) -> None:
        super().__init__()
        if not 1 <= bits <= 62:
            raise ValueError(f"an id of 64 bits holds 1 to 62 bits, got {bits}")
        self.vocab, self.code_dim, self.entropy = 2**bits, bits, entropy
        self.table = nn.Parameter(torch.randn(bits, bits) / bits**0.5)
        self.register_buffer("place", 2 ** torch.arange(bits - 1, -1, -1), persistent=False)

    def quantize(self, z: Float[Tensor, "b n d"]) -> Quantized:
        """Draws come from the global generator, which trainers seed."""
        if z.dim() != 3 or z.shape[2] != self.code_dim:
            raise ValueError(f"latents are (batch, elements, {self.code_dim}), got {tuple(z.shape)}")
        with full_precision(z):
            p = z.to(self.table.dtype).sigmoid()
            bits = torch.bernoulli(p) if self.training else (p > 0.5).to(p)
            loss = self.entropy * (p * (1 - p)).mean()
            code = StraightThrough.apply(bits, p) @ self.table
            ids = (bits.long() * self.place).sum(-1)
        return Quantized(code, ids, loss, usage(ids))

    def decode_ids(self, ids: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        return ((ids[..., None] & self.place) != 0).to(self.table) @ self.table


def to_parts(ids: Int[Tensor, "*b"], parts: int, vocab: int) -> Int[Tensor, "*b parts"]:
    """Ids as so many sub-codes below `vocab`, the most significant first."""
    return ids[..., None] // vocab ** torch.arange(parts - 1, -1, -1, device=ids.device) % vocab


def from_parts(codes: Int[Tensor, "*b parts"], vocab: int) -> Int[Tensor, "*b"]:
    """The ids of sub-codes."""
    return (codes * vocab ** torch.arange(codes.shape[-1] - 1, -1, -1, device=codes.device)).sum(-1)
