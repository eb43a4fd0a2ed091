"""Ids as cluster and place in it: places are told by the classifier of all ids, limited to members of the cluster."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from seriatim.canvas import Canvas
from seriatim.factorization.coarse_fine import COARSE
from seriatim.heads.categorical import CategoricalHead
from seriatim.heads.dist import Categorical
from seriatim.plan import Reads


class Clustered(Categorical):
    """Which asks the canvas for nothing more."""

    __slots__ = ()

    def loss(self, x: Int[Tensor, "b m"]) -> Float[Tensor, "b m"]:
        return -self.log_prob(x)


class ClusterHead(nn.Module):
    """members: the ids of each cluster, -1 behind its last. Read-outs of role `COARSE` say the cluster of a place; the
    others the place in it of the id, whose cluster stands on the canvas half the elements earlier."""

    exact = True
    continuous = False
    value_shape: tuple[int, ...] = ()
    in_place = True  # its loss asks the canvas for clusters
    members: Tensor

    def __init__(self, width: int, members: Int[Tensor, "k m"]):
        super().__init__()
        self.width, self.vocab = width, max(members.shape)
        self.coarse = CategoricalHead(width, len(members))
        self.fine = CategoricalHead(width, int(members.max()) + 1)
        self.register_buffer("members", members)

    def dist(self, h: Float[Tensor, "b m d"], reads: Reads | None, canvas: Canvas) -> Clustered:
        assert reads is not None and reads.role is not None
        coarse = (reads.role[0] == COARSE).nonzero()[:, 0].to(h.device)
        fine = (reads.role[0] != COARSE).nonzero()[:, 0].to(h.device)
        out = h.new_full((*h.shape[:2], self.vocab), -torch.inf)
        if coarse.numel():
            said = self.coarse.logits(h[:, coarse])
            out = out.to(said.dtype).index_copy(1, coarse, self._wide(said))
        if fine.numel():
            of = (reads.element[:, fine.cpu()] - canvas.layout.size // 2).clamp(min=0).expand(canvas.batch, -1)
            cluster = canvas.value[canvas.layout.kinds[0]].gather(1, of.to(h.device))
            member = self.members[cluster.clamp(max=len(self.members) - 1)]
            said = self.fine.logits(h[:, fine]).gather(2, member.clamp(min=0)).masked_fill(member < 0, -torch.inf)
            out = out.to(said.dtype).index_copy(1, fine, self._wide(said))
        return Clustered(out)

    def _wide(self, x: Float[Tensor, "b m v"]) -> Float[Tensor, "b m w"]:
        return nn.functional.pad(x, (0, self.vocab - x.shape[-1]), value=-torch.inf)
