"""Who can influence whom through several layers: reachability along visibility, for `Plan`.

`seen[b, q, k]` says whether slot q sees slot k directly in some layer. Knows nothing of orders.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from seriatim.view import INF


def closure(seen: Bool[Tensor, "b s s"], start: Int[Tensor, "b s"]) -> Int[Tensor, "b s"]:
    """The largest start value among all slots that can influence each slot through any number of layers."""
    x = start.expand(max(seen.shape[0], start.shape[0]), -1)
    if x.shape[1] == 0:
        return x
    for turn in range(64):
        y = torch.where(seen, x[:, None], -INF).amax(2)
        if bool((y == x).all()):
            break
        x = y
        if turn:  # a long way through many layers (windows): let each turn look twice as far
            seen = _twice(seen)
    return x


def last_look(seen: Bool[Tensor, "b s s"], step: Int[Tensor, "b s"]) -> Int[Tensor, "b s"]:
    """The last step at which each slot is seen by a slot that is computed at all (-1: never)."""
    if step.shape[1] == 0:
        return step
    looks = torch.where(step < INF, step, -1)[:, :, None]
    return torch.where(seen, looks, -1).amax(1)


def _twice(graph: Bool[Tensor, "*b s s"]) -> Bool[Tensor, "*b s s"]:
    """Who influences whom in two layers."""
    return (graph.float() @ graph.float()) > 0


def transitive(graph: Bool[Tensor, "s s"]) -> Bool[Tensor, "s s"]:
    while not torch.equal(wider := _twice(graph), graph):
        graph = wider
    return graph


def nearest(graph: Bool[Tensor, "s s"], start: int, wanted: Bool[Tensor, "s"]) -> list[int]:
    """Breadth first from `start` along visibility: the nearest wanted slots."""
    reached = torch.zeros(graph.shape[0], dtype=torch.bool)
    reached[start] = True
    while not bool((reached & wanted).any()):
        reached = reached | graph[reached].any(0)
    return (reached & wanted).nonzero()[:, 0].tolist()
