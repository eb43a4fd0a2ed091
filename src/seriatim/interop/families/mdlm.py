"""MDLM (Sahoo et al. 2024, arXiv 2406.07524) and BD3-LM (Arriola et al. 2025, arXiv 2503.09573): transformers with
adaptive norms that are told no time, so that what these say is constant, and is folded into norms and matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seriatim.backbones.layer import TransformerConfig
from seriatim.backbones.rope import RoPE
from seriatim.interop.blueprint import Blueprint, How, MaskedBlueprint, Part, masked
from seriatim.interop.fields import Fields

LIKELIHOOD_OF_MASK = -1e6  # what is added to the logit of the mask: it is never written
TIME = tuple(f"backbone.sigma_map.mlp.{i}.{x}" for i in (0, 2) for x in ("weight", "bias"))


def read(f: Fields) -> MaskedBlueprint:
    blocks = f.raw["model_type"] == "bd3lm"
    f.must("time_conditioning", False)
    for key in ("dropout", "attn_backend", "var_min", "sampling_eps_min", "sampling_eps_max"):
        f.take(key)  # of training, and how attention is computed
    adaptive = True
    if blocks:
        f.must("causal", False)
        f.must("cross_attn", True)
        adaptive = bool(f.take("adaln", default=True))
    f.take("cond_dim")
    width, depth = f.number("hidden_dim", default=768), f.number("n_blocks", default=12, most=10_000)
    c = TransformerConfig(
        width, depth, f.number("n_heads", default=12, most=100_000), hidden=4 * width, norm="layer",
        activation="gelu_tanh", rope=RoPE(), bias=("up", "down"),
    )  # fmt: skip
    length, vocab = f.number("model_length", default=1024), f.number("vocab_size", default=50_258)
    ignored = ("rotary_emb.inv_freq", "sampling_eps_min", "sampling_eps_max")
    plan = Blueprint(c, vocab, length, False, _parts(depth, adaptive, vocab - 1), ignored=ignored)
    block = f.number("block_size", default=1) if blocks else None
    return masked(plan, f.where, vocab - 1, block=block, biased=True, rule="random", sampling={"temperature": 1.0})


def _parts(depth: int, adaptive: bool, mask: int) -> tuple[Part, ...]:
    last = "backbone.output_layer."
    parts = [
        Part("embed.table", ("backbone.vocab_embed.embedding",)), Part("heads.token.weight", (f"{last}linear.weight",)),
        Part("heads.token.bias", (f"{last}linear.bias",), _without(mask)),
        *_folded("backbone.norm", f"{last}norm_final.weight", last, "scale", 1, 2, adaptive),
        *_folded("backbone.norm_bias", f"{last}norm_final.weight", last, "shift", 0, 2, adaptive),
    ]  # fmt: skip
    for i in range(depth):
        ours, theirs = f"backbone.layers.{i}.", f"backbone.blocks.{i}."
        plain = (("qkv", "attn_qkv.weight"), ("up", "mlp.0.weight"), ("up_bias", "mlp.0.bias"))
        parts += [Part(ours + name, (theirs + of,)) for name, of in plain]
        for name, of, kind, number in (
            ("norm1_bias", "norm1.weight", "shift", 0), ("norm1", "norm1.weight", "scale", 1),
            ("out", "attn_out.weight", "gate", 2), ("norm2_bias", "norm2.weight", "shift", 3),
            ("norm2", "norm2.weight", "scale", 4), ("down", "mlp.2.weight", "gate", 5),
            ("down_bias", "mlp.2.bias", "gate", 5),
        ):  # fmt: skip
            parts += _folded(ours + name, theirs + of, theirs, kind, number, 6, adaptive)
    return tuple(parts)


def _folded(ours: str, tensor: str, layer: str, kind: str, number: int, of: int, adaptive: bool) -> list[Part]:
    """A parameter with what the adaptive norms of a layer say of it, the `number`th of so many."""
    if adaptive:
        said = (f"{layer}adaLN_modulation.weight", f"{layer}adaLN_modulation.bias", *TIME)
        return [Part(ours, (tensor, *said), How(_fold(kind, number, of), _not_apart))]
    if kind == "shift":
        return [Part(ours, (tensor,), How(lambda parts, c: torch.zeros_like(parts[0]), _not_apart))]
    return [Part(ours, (tensor,))]


def _fold(kind: str, number: int, of: int) -> Any:
    def together(parts: Sequence[Tensor], c: Any) -> Tensor:
        x, weight, bias, *time = (part.float() for part in parts)
        said = F.linear(_no_time(*time), weight, bias).chunk(of)[number]
        if kind != "shift":
            said = said + 1 if kind == "scale" else said
            said = x * (said if x.dim() == 1 else said[:, None])
        return said.to(parts[0].dtype)

    return together


def _no_time(w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """The vector of time 0, whose cosines are 1 and whose sines are 0."""
    half = w1.shape[1] // 2
    x = torch.cat([w1.new_ones(half), w1.new_zeros(w1.shape[1] - half)])
    return F.silu(F.linear(F.silu(F.linear(x, w1, b1)), w2, b2))


def _without(mask: int) -> How:
    """A head's bias by which the mask is never written."""
    there = torch.tensor([mask])
    together = lambda parts, c: parts[0].index_add(0, there, parts[0].new_tensor([LIKELIHOOD_OF_MASK]))  # noqa: E731
    return How(together, _not_apart)


def _not_apart(x: Tensor, names: Sequence[str], c: Any) -> Sequence[Tensor]:
    raise ValueError("what its adaptive norms say was folded into this model's weights: it has no published form")
