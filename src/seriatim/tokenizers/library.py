"""Quantizers of the package vector-quantize-pytorch (extra `quantizers`) behind our protocol, set as published.

Thin on purpose: the package trains and chooses, the wrapper fixes options whose defaults are not the published thing,
and takes the value of `z_q` from `decode_ids`, so that what the decoder is trained on is what ids decode to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from seriatim.tokenizers.quantizers import Quantized, StraightThrough, full_precision, usage


def _package() -> Any:
    try:
        import vector_quantize_pytorch
    except ImportError:
        raise ValueError("this quantizer needs an extra: pip install 'seriatim[quantizers]'") from None
    return vector_quantize_pytorch


class _Wrapped(nn.Module):
    """What the wrappers share: shapes are checked, the value is that of the ids, the gradient the package's."""

    codebook = None
    depth = 1

    def __init__(self, inner: nn.Module, vocab: int, dim: int) -> None:
        super().__init__()
        self.inner, self.vocab, self.code_dim = inner, vocab, dim

    def _run(self, z: Float[Tensor, "b n d"]) -> tuple[Tensor, Tensor, Tensor]:
        """The package's z_q, ids and loss."""
        raise NotImplementedError

    def quantize(self, z: Float[Tensor, "b n d"]) -> Quantized:
        if z.dim() != 3 or z.shape[2] != self.code_dim:
            raise ValueError(f"latents are (batch, elements, {self.code_dim}), got {tuple(z.shape)}")
        with full_precision(z):
            z_q, ids, loss = self._run(z.float() if z.dtype in (torch.bfloat16, torch.float16) else z)
            ids = ids.long()
            codes = self.decode_ids(ids).detach()
        return Quantized(StraightThrough.apply(codes, z_q), ids, loss, usage(ids))

    def decode_ids(self, ids: Int[Tensor, "b n *depth"]) -> Float[Tensor, "b n d"]:
        raise NotImplementedError


class FSQ(_Wrapped):
    """Finite scalar quantization: each dimension bounded, then rounded to its number of levels; no loss of its own.

    Source: Mentzer et al. 2023, arXiv 2309.15505. `levels` are at least 3 each; the vocabulary is their product.
    """

    def __init__(self, levels: Sequence[int]) -> None:
        if not levels or min(levels) < 3:
            raise ValueError(f"levels are at least 3 in each of at least 1 dimension, got {tuple(levels)}")
        super().__init__(_package().FSQ(list(levels)), math.prod(levels), len(levels))
        self.levels = tuple(levels)

    def _run(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z_q, ids = self.inner(z)
        return z_q, ids, z.new_zeros(())

    def decode_ids(self, ids: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        return self.inner.indices_to_codes(ids)  # type: ignore[operator]


class LFQ(_Wrapped):
    """Lookup-free quantization: the sign of each dimension; the first bit of an id is the most significant.

    Source: MAGVIT-v2 (Yu et al. 2023, arXiv 2310.05737). The package holds the whole table of 2^bits codes, so `bits`
    ends at 18; `BSQ` has no such end. A zero counts as negative.
    """

    def __init__(self, bits: int, entropy: float = 0.1, beta: float = 0.25) -> None:
        if not 1 <= bits <= 18:
            raise ValueError(f"LFQ takes 1 to 18 bits (it holds a table of 2^bits codes), got {bits}; BSQ takes 62")
        inner = _package().LFQ(
            dim=bits, codebook_size=2**bits, entropy_loss_weight=entropy, commitment_loss_weight=beta
        )
        super().__init__(inner, 2**bits, bits)

    def _run(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z_q, ids, loss = self.inner(z)
        return z_q, ids, loss

    def decode_ids(self, ids: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        return self.inner.indices_to_codes(ids)  # type: ignore[operator]


class SimVQ(_Wrapped):
    """A frozen Gaussian table seen through one learned linear map, so that every code moves in every step.

    Source: Zhu et al. 2024, arXiv 2411.02038. The package's default gradient is the rotation trick; here it is the
    paper's straight-through.
    """

    def __init__(self, vocab: int, dim: int, beta: float = 0.25) -> None:
        inner = _package().SimVQ(
            dim=dim, codebook_size=vocab, rotation_trick=False, input_to_quantize_commit_loss_weight=beta
        )
        super().__init__(inner, vocab, dim)

    def _run(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.inner(z)

    def decode_ids(self, ids: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        return self.inner.indices_to_codes(ids)  # type: ignore[operator]


class ResidualVQ(_Wrapped):
    """Several codebooks, each quantizing what the ones before left over; an id of -1 means that its level is dropped.

    Source: SoundStream (Zeghidour et al. 2021, arXiv 2107.03312): codebooks as moving averages of decay 0.99, dead
    codes replaced by latents (all of them at first). The package's defaults (decay 0.8, rotation trick) are not used,
    nor its gradient, which passes straight through every level and so is `depth` times too large. It draws from the
    global random state in training.
    """

    def __init__(self, vocab: int, dim: int, depth: int, beta: float = 0.25) -> None:
        if depth < 1:
            raise ValueError(f"a residual quantizer has at least 1 level, got {depth}")
        inner = _package().ResidualVQ(
            dim=dim,
            num_quantizers=depth,
            codebook_size=vocab,
            decay=0.99,
            threshold_ema_dead_code=2,
            rotation_trick=False,
            commitment_weight=beta,
        )
        super().__init__(inner, vocab, dim)
        self.depth = depth

    def _run(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z_q, ids, losses = self.inner(z)
        z_q = StraightThrough.apply(z_q, z)
        return z_q, ids if self.depth > 1 else ids[..., 0], losses.sum()

    def decode_ids(self, ids: Int[Tensor, "b n depth"]) -> Float[Tensor, "b n d"]:
        """Levels may be dropped from the end: fewer than `depth`, or -1."""
        ids = ids[..., None] if ids.dim() == 2 else ids
        short = self.depth - ids.shape[2]
        ids = nn.functional.pad(ids, (0, short), value=-1) if short > 0 else ids
        return self.inner.get_output_from_indices(ids)  # type: ignore[operator]
