"""The likeliest few of very many tokens, fast: drafters ask for them at every step."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

RUN = 64  # tokens that are represented by the largest of them
MANY = 8192  # tokens, from which on sorting all of them costs more than looking twice


def ranked(logits: Float[Tensor, "n v"], k: int) -> Int[Tensor, "n k"]:
    """The k likeliest ids of each row, the likeliest first; of a vocabulary that is smaller, all of them.

    The k largest numbers lie in the k runs whose largest numbers are the largest, so only those runs are sorted: four
    times as fast as `topk` at 13 rows of 49 thousand. Which of equals comes first is not said.
    """
    n, v = logits.shape
    k = min(k, v)
    if v < MANY or k * RUN > v // 4:
        return logits.topk(k).indices
    x = logits if logits.dtype == torch.float64 else logits.float()  # the largest of bfloat16 is found one by one
    whole = v - v % RUN
    runs = x[:, :whole].view(n, -1, RUN)
    best = runs.amax(-1).topk(k, sorted=False).indices
    some = runs.gather(1, best[..., None].expand(-1, -1, RUN)).flatten(1)
    ids = (best[..., None] * RUN + torch.arange(RUN, device=x.device)).flatten(1)
    if whole < v:
        some = torch.cat([some, x[:, whole:]], 1)
        ids = torch.cat([ids, torch.arange(whole, v, device=x.device).expand(n, -1)], 1)
    return ids.gather(1, some.topk(k).indices)
