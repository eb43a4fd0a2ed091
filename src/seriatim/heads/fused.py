"""Several ids in one slot: fused into its vector, and predicted from its state by one shared matrix.

Token-Shuffle (Ma et al. 2025, arXiv 2504.17789): ids of pictures need few dimensions, so a vector has room for a whole
window. Each embedding is squeezed to width / count and they are concatenated; behind the backbone a state is split into
as many parts, each widened again for the classifier that all share (`backbones.flanked` has the networks between).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from seriatim.embed import TokenEmbed
from seriatim.heads.categorical import CategoricalHead
from seriatim.plan import Reads


def _share(width: int, count: int) -> int:
    if count < 1 or width % count:
        raise ValueError(f"{count} ids share a vector of {width} numbers: make the width a multiple of {count}")
    return width // count


class FusedEmbed(TokenEmbed):
    """A slot carries `count` ids: their squeezed vectors side by side."""

    def __init__(self, vocab: int, width: int, count: int, positions: tuple[int, ...] = ()):
        super().__init__(vocab, width, positions=positions, start=False, std=0.4)
        share = _share(width, count)
        self.squeeze = nn.Linear(width, share) if count > 1 else nn.Identity()

    def vectors(self, value: Int[Tensor, "*rest"]) -> Float[Tensor, "*rest share"]:
        """Squeezed: the whole table is, so that an id's vector does not depend on its company, to the last bit."""
        return F.embedding(value, self.squeeze(self.table))

    def together(self, x: Float[Tensor, "b s c share"], there: Bool[Tensor, "b s c 1"]) -> Float[Tensor, "b s d"]:
        return (x * there.to(x)).flatten(2)


class MultiTokenHead(CategoricalHead):
    """`count` ids of a state, independently: role j is predicted from its j-th part.

    z_loss: weight of the squared logarithm of the normaliser in training, which keeps logits from drifting."""

    def __init__(self, width: int, vocab: int, count: int, z_loss: float = 0.0):
        super().__init__(width, vocab)
        share = _share(width, count)
        self.count, self.z_loss = count, z_loss
        self.widen = nn.Linear(share, width) if count > 1 else nn.Identity()

    def logits(self, h: Float[Tensor, "b m d"], reads: Reads | None = None) -> Float[Tensor, "b m v"]:
        if reads is None or reads.role is None:
            raise ValueError(
                "this head reads ids by their place in a window; the plan's reads must name it as the role"
            )
        role = reads.role.clamp(min=0).to(h.device).expand(h.shape[0], -1)[..., None, None]
        parts = h.unflatten(-1, (self.count, -1))
        part = parts.gather(2, role.expand(-1, -1, 1, parts.shape[-1]))[:, :, 0]
        return super().logits(self.widen(part))

    def _loss(self, h: Float[Tensor, "b m d"], reads: Reads | None, value: Int[Tensor, "b m"]) -> Float[Tensor, "b m"]:
        x = self.logits(h, reads)
        x = x if x.dtype == torch.float64 else x.float()
        loss = F.cross_entropy(x.flatten(0, 1), value.flatten(), reduction="none").view(value.shape)
        return loss + self.z_loss * x.logsumexp(-1).square() if self.training and self.z_loss else loss
