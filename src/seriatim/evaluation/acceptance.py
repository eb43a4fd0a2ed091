"""How likely it is that one of k drafted tokens is accepted, by each rule, and the most that any rule can reach.

For laws p of the target and q of the draft at one place; k tokens drawn independently from q. What decoders count
beside this says where the gap is: in the rule, or in the draft.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from seriatim.decoding.verify import Ratio, kseq_scale


def best_acceptance(p: Float[Tensor, "n v"], q: Float[Tensor, "n v"], k: int) -> Float[Tensor, "n"]:
    """The most that any lossless rule can reach: the smallest p(S) + 1 - q(S)^k over sets S of tokens (the cut that is
    dual to the transport problem of SpecTr, Sun et al. 2023, section 3).

    For a given q(S) the smallest p(S) takes the tokens of smallest p / q, and in between the sum is concave: so only
    the sets that a threshold on p / q cuts off have to be looked at.
    """
    order = (p / q).nan_to_num(torch.inf, posinf=torch.inf).argsort(-1)
    below, drawn = (x.gather(-1, order).cumsum(-1) for x in (p, q))
    return (below + 1 - drawn.clamp(max=1) ** k).amin(-1).clamp(max=1)


def kseq_acceptance(p: Float[Tensor, "n v"], q: Float[Tensor, "n v"], k: int) -> Float[Tensor, "n"]:
    """That of K-SEQ: 1 - (1 - b)^k with b = sum_x min(q, p / g), at the smallest valid g."""
    scale = kseq_scale(p, q, torch.full((len(p),), k))
    return 1 - (1 - torch.minimum(q, p / scale[:, None]).sum(-1).clamp(max=1)) ** k


def recursive_acceptance(p: Float[Tensor, "n v"], q: Float[Tensor, "n v"], k: int) -> Float[Tensor, "n"]:
    """That of recursive rejection, children drawn with replacement: what is left of p behind a rejection does not
    depend on what was rejected."""
    none = torch.ones_like(p[:, 0])
    for _ in range(k):
        none = none * (1 - torch.minimum(p, q).sum(-1)).clamp(min=0)
        p = Ratio().rest(p, q)
    return 1 - none
