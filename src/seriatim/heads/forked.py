"""A head with two matrices: one for each end of a backbone that has two (`backbones.forked`)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from seriatim.heads.categorical import CategoricalHead
from seriatim.plan import Reads


class ForkedHead(CategoricalHead):
    """Read-outs that name a role take the second matrix, all others the first."""

    def __init__(self, width: int, vocab: int, bias: bool = False):
        super().__init__(width, vocab, bias=bias)
        self.fork = CategoricalHead(width, vocab, bias=bias)

    def logits(self, h: Float[Tensor, "b m d"], reads: Reads | None = None) -> Float[Tensor, "b m v"]:
        if reads is None or reads.role is None:
            return super().logits(h, reads)
        return self.fork.logits(h)

    @torch.no_grad()
    def fork_from_end(self) -> None:
        """The second matrix begins as a copy of the first."""
        self.fork.weight.copy_(self.weight)
        if self.bias is not None and self.fork.bias is not None:
            self.fork.bias.copy_(self.bias)
