"""A head for edits in continuous time: the rate of every insertion, substitution and deletion."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from seriatim.canvas import DECIDED, Canvas
from seriatim.heads.dist import Categorical
from seriatim.initial import drawn
from seriatim.plan import Reads


class Rates:
    """Log-rates (b, m, edits) of what may happen at each slot: `vocab` insertions right behind it and, where there are
    more, `vocab` substitutions of its token and its deletion. -inf: impossible.

    In units of the hazard of a column, so that a rate is the expected number of such edits that are left."""

    __slots__ = ("logits", "vocab")

    def __init__(self, logits: Float[Tensor, "b m edits"], vocab: int):
        self.logits, self.vocab = logits, vocab

    def groups(self) -> tuple[Float[Tensor, "b m v"], ...]:
        """Log-rates of insertions, and of substitutions and deletion, if there are any."""
        sizes = [self.vocab, self.logits.shape[-1] - self.vocab]
        return tuple(part for part in self.logits.split(sizes, -1) if part.shape[-1])

    def warped(self, warper: Any) -> Rates:
        """Temperature and filters change which token is inserted or put, not how often that happens."""
        sizes = [self.vocab] if self.logits.shape[-1] == self.vocab else [self.vocab, self.vocab, 1]
        insert, *rest = self.logits.split(sizes, -1)
        parts = [_warped(insert, warper)] + ([_warped(rest[0], warper), rest[1]] if rest else [])
        return Rates(torch.cat(parts, -1), self.vocab)


def _warped(rates: Float[Tensor, "b m v"], warper: Any) -> Tensor:
    total = rates.logsumexp(-1, keepdim=True)
    possible = total > -torch.inf
    said = warper(Categorical(rates.masked_fill(~possible, 0.0))).log_probs()
    return torch.where(possible, said + total, -torch.inf).to(rates.dtype)


class EditHead(nn.Module):
    """Rates of insertions at every slot that reads and, with `edits`, of putting another token in place of an inserted
    one and of deleting it. Each rate is how often, times which token (lambda and Q of Edit Flows)."""

    exact = False
    continuous = False
    value_shape: tuple[int, ...] = ()

    def __init__(self, width: int, vocab: int, edits: bool = True):
        super().__init__()
        if vocab < 1 + edits:
            raise ValueError(f"a head of edits chooses among at least {1 + edits} ids, got {vocab}")
        self.width, self.vocab, self.edits = width, vocab, edits
        kinds = 2 if edits else 1  # of edits that bring a token
        self.weight = nn.Parameter(drawn(kinds * vocab, width))
        self.rate = nn.Parameter(drawn(kinds + edits, width))
        self.rate_bias = nn.Parameter(torch.zeros(kinds + edits))

    def dist(self, h: Float[Tensor, "b m d"], reads: Reads, canvas: Canvas) -> Rates:
        """The rates at each slot."""
        kind = torch.float64 if h.dtype == torch.float64 else torch.float32
        batch, v = h.shape[0], self.vocab
        said, rate = F.linear(h, self.weight).to(kind), F.linear(h, self.rate, self.rate_bias).to(kind)
        element = reads.element.expand(batch, -1)
        live = (element >= 0) & (reads.slot >= 0)
        insert = torch.log_softmax(said[..., :v], -1) + rate[..., :1]
        insert = insert.masked_fill(~live.to(h.device)[..., None], -torch.inf)
        if not self.edits:
            return Rates(insert, v)
        inserted = live & (canvas.status.gather(1, element.clamp(min=0)) == DECIDED)
        index = canvas.layout.index[element.clamp(min=0)].to(h.device)
        (own,) = (x.gather(1, index) for x in canvas.value.values())
        other = said[..., v:].scatter(-1, own[..., None], -torch.inf)  # a token is not put in place of itself
        change = torch.cat([torch.log_softmax(other, -1) + rate[..., 1:2], rate[..., 2:]], -1)
        return Rates(torch.cat([insert, change.masked_fill(~inserted.to(h.device)[..., None], -torch.inf)], -1), v)
