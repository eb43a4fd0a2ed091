"""Near neighbours in a codebook as clusters: each id is the number of its cluster and its place in it.

Ids whose codes are near each other stand for nearly the same picture (CTF, Guo et al. 2025, arXiv 2503.16194), so that
the cluster alone says the coarse part. Clusters follow from the codes alone, whatever their numbers.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def kmeans(codes: Float[Tensor, "v d"], count: int, rounds: int = 100) -> Int[Tensor, "v"]:
    """The cluster of each code, by Lloyd's rounds from centres far from each other. No cluster is empty; they are
    numbered by their centres, so the same codes in another order are clustered alike (equal codes aside)."""
    if not 1 <= count <= len(codes):
        raise ValueError(f"{len(codes)} codes make 1 to {len(codes)} clusters, not {count}")
    x = codes.double()
    order = _sorted(x)
    x = x[order]
    centre = x[_far(x, count)]
    for _ in range(rounds):
        distance = torch.cdist(x, centre)
        label = distance.argmin(1)
        for empty in (label.bincount(minlength=count) == 0).nonzero()[:, 0].tolist():
            size = label.bincount(minlength=count)
            own = distance.gather(1, label[:, None])[:, 0].masked_fill(size[label] == 1, -1)
            label[own.argmax()] = empty  # the code farthest from its centre becomes one
        total = torch.zeros_like(centre).index_add(0, label, x)
        moved = total / label.bincount(minlength=count)[:, None]
        if torch.equal(moved, centre):
            break
        centre = moved
    number = _sorted(centre).argsort()[label]
    return torch.empty_like(number).scatter(0, order, number)


def _sorted(x: Float[Tensor, "v d"]) -> Int[Tensor, "v"]:
    """Rows in the order of their first numbers, then their second, ..."""
    order = torch.arange(len(x))
    for column in x.T.flip(0):
        order = order[column[order].argsort(stable=True)]
    return order


def _far(x: Float[Tensor, "v d"], count: int) -> Int[Tensor, "count"]:
    """Rows far from each other: the one nearest to the mean, then always the farthest from those that are chosen."""
    chosen = [int((x - x.mean(0)).square().sum(1).argmin())]
    near = (x - x[chosen[0]]).square().sum(1)
    while len(chosen) < count:
        near[chosen] = -1
        chosen.append(int(near.argmax()))
        near = torch.minimum(near, (x - x[chosen[-1]]).square().sum(1))
    return torch.tensor(chosen)


def members_of(cluster: Int[Tensor, "v"], codes: Float[Tensor, "v d"]) -> Int[Tensor, "k m"]:
    """The ids of each cluster, from the one nearest to its centre outwards; -1 behind its last."""
    size, x = cluster.bincount(), codes.double()
    centre = torch.zeros(len(size), x.shape[1], dtype=x.dtype).index_add(0, cluster, x) / size[:, None]
    order = _sorted(x)
    order = order[(x - centre[cluster]).square().sum(1)[order].argsort(stable=True)]
    order = order[cluster[order].argsort(stable=True)]
    place = torch.arange(len(cluster)) - (size.cumsum(0) - size)[cluster[order]]
    out = torch.full((len(size), int(size.max())), -1)
    out[cluster[order], place] = order
    return out
