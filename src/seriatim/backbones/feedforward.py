"""What a transformer's layer does to each slot by itself: activations, and mixtures of experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from seriatim.backbones.layer import Experts, Weights


def activate(kind: str, h: Tensor) -> Tensor:
    """Of the field's activations those that are not inlined: "gelu", "gelu_tanh", "relu", "silu", "geglu",
    "geglu_tanh"."""
    if kind == "relu":
        return F.relu(h)
    if kind == "silu":
        return F.silu(h)
    if kind.startswith("geglu"):
        gate, up = h.chunk(2, -1)
        return F.gelu(gate, approximate="tanh" if kind == "geglu_tanh" else "none") * up
    return F.gelu(h, approximate="tanh" if kind == "gelu_tanh" else "none")


def mixture(experts: Experts, activation: str, w: Weights, h: Float[Tensor, "b s d"]) -> Float[Tensor, "b s d"]:
    """Each slot through the experts that the router finds likeliest, by their shares of the softmax.

    Experts that nobody asks for cost nothing; each of the others runs once, over all slots that ask for it.
    """
    x = h.flatten(0, 1)
    shares = torch.softmax(F.linear(x, w["router"]).float(), -1)
    share, chosen = shares.topk(experts.active, -1)
    if experts.normalised:
        share = share / share.sum(-1, keepdim=True)
    share = share.to(x.dtype)
    out = torch.zeros_like(x)
    for expert in chosen.unique().tolist():
        slot, rank = (chosen == expert).nonzero(as_tuple=True)
        y = F.linear(x[slot], w["up"][expert])
        gate, up = y.chunk(2, -1)
        y = F.silu(gate) * up if activation == "swiglu" else activate(activation, y)
        out = out.index_add(0, slot, F.linear(y, w["down"][expert]) * share[slot, rank, None])
    return out.view_as(h)
