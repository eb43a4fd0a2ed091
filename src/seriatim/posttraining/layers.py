"""The decoder layers of draft parts."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from seriatim.backbones.layer import GATED, TransformerConfig
from seriatim.backbones.rope import RoPE
from seriatim.backbones.transformer import Transformer
from seriatim.initial import drawn
from seriatim.posttraining.drafting import Base


def to_states(base: Base, tokens: int = 1) -> Float[Tensor, "d w"]:
    """A fresh map of the vectors of so many tokens into the space of states: drawn at random, what it gives is half as
    large as states are. (Vectors of tokens may be thirty times smaller; a map that began with the usual numbers would
    need most of a short training to notice them.)"""
    d, norm = base.width, getattr(base.model.backbone, "norm", None)
    of_states = norm.float().square().mean().sqrt() if isinstance(norm, Tensor) else torch.ones(())
    some = torch.linspace(0, base.vocab - 1, min(base.vocab, 4096)).long().to(base.device)
    of_tokens = base.embed(some).float().square().mean().sqrt().clamp(min=1e-6)
    std = 0.5 * float(of_states) / (float(of_tokens) * (tokens * d) ** 0.5)
    return drawn(d, tokens * d, std=std).to(base.device)


def llama_layer(
    base: Base,
    heads: int | None = None,
    kv_heads: int | None = None,
    hidden: int | None = None,
    theta: float | None = None,
    eps: float | None = None,
    first_norm: bool = True,
    qkv_bias: bool = False,
) -> Transformer:
    """One layer in the shape of Llama's, without a norm behind it: it goes on in states. What is left out is as in the
    base, where that is a transformer. It begins by handing on what comes in."""
    own = getattr(base.model.backbone, "config", None)
    rope, dim = RoPE(), None
    if isinstance(own, TransformerConfig):
        if heads is None:
            heads, kv_heads, dim = own.heads, kv_heads or own.groups, own.dim
        last = own.rope[own.kinds[-1]] if isinstance(own.rope, Mapping) else own.rope
        rope, eps = last or rope, eps or own.eps
        hidden = hidden or (own.inner if own.activation in GATED else None)
    config = TransformerConfig(
        base.width, 1, heads or max(base.width // 64, 1), kv_heads, dim, hidden,
        rope=rope if theta is None else RoPE(theta), eps=eps or 1e-5, bias=("qkv",) if qkv_bias else False,
        first_norm=first_norm, last_norm=False,
    )  # fmt: skip
    layer = Transformer(config)
    with torch.no_grad():
        layer.layers[0].out.zero_()  # type: ignore[operator]
        layer.layers[0].down.zero_()  # type: ignore[operator]
    return layer.to(base.device)
