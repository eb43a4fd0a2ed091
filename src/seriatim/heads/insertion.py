"""A head for insertions: one choice among (slot, token) pairs and stopping."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from seriatim.canvas import Canvas
from seriatim.heads.dist import Categorical
from seriatim.plan import Reads


class InsertionHead(nn.Module):
    """The first slot says whether to stop; otherwise one softmax over slots x vocabulary says what is inserted right
    behind which slot (Patel et al. 2025).

    Its distribution is one choice a row among m x vocab + 1 outcomes: slot * vocab + token, and stopping last.
    """

    exact = False  # many ways lead to a sample
    continuous = False
    value_shape: tuple[int, ...] = ()

    def __init__(self, width: int, vocab: int):
        super().__init__()
        if vocab < 1:
            raise ValueError(f"a head predicts at least 1 id, got {vocab}")
        self.width, self.vocab = width, vocab
        self.weight = nn.Parameter(torch.randn(vocab, width) * 0.02)
        self.stop = nn.Parameter(torch.randn(1, width) * 0.02)
        self.stop_bias = nn.Parameter(torch.zeros(1))

    def dist(self, h: Float[Tensor, "b m d"], reads: Reads, canvas: Canvas) -> Categorical:
        """The joint choice, (b, 1, m * vocab + 1) log-probabilities; impossible at slots that read nothing."""
        tokens = F.linear(h, self.weight)
        closed = (reads.slot < 0) | (reads.element < 0)
        tokens = tokens.masked_fill(closed.to(h.device)[..., None], -torch.inf)
        kind = torch.float64 if h.dtype == torch.float64 else torch.float32
        stop = F.linear(h[:, 0], self.stop, self.stop_bias).to(kind)
        gone = (reads.slot[:, :1] < 0).to(h.device).expand_as(stop)
        stop = stop.masked_fill(gone, torch.inf)  # a finished row: nothing but stopping
        where = torch.log_softmax(tokens.to(kind).flatten(1).masked_fill(gone, 0.0), -1)
        return Categorical(torch.cat([where + F.logsigmoid(-stop), F.logsigmoid(stop)], 1)[:, None])
