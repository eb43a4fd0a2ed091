"""Llama 1 to 3 (Touvron et al. 2023, arXiv 2302.13971), TinyLlama, SmolLM2: and what its descendants share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from seriatim.backbones.layer import Experts, TransformerConfig
from seriatim.backbones.rope import RoPE
from seriatim.interop.blueprint import Blueprint, Part
from seriatim.interop.fields import Fields, rope_of

ACTIVATIONS = {
    "silu": "swiglu",
    "swish": "swiglu",
    "gelu_pytorch_tanh": "geglu_tanh",
    "gelu_new": "geglu_tanh",
    "gelu": "geglu",
}


def read(f: Fields) -> Blueprint:
    return decoder(f, bias=biases(f))


def biases(f: Fields) -> tuple[str, ...]:
    """The matrices that have one, by the two keys of the field."""
    pairs = {"attention_bias": ("qkv", "out"), "mlp_bias": ("up", "down")}
    return tuple(x for key, both in pairs.items() if f.take(key, default=False) for x in both)


def decoder(
    f: Fields, windows: Mapping[str, int] | None = None, tied: bool = False,
    names: Mapping[str, str | None] | None = None, eps: float = 1e-6, scale: float = 1.0, softcap: float | None = None,
    softcap_scores: float | None = None, act: str = "silu", fused: bool = False, plus_one: bool = False,
    theta: float = 10_000.0, **backbone: Any,
) -> Blueprint:  # fmt: skip
    """A decoder whose tensors have Llama's names.

    names: where the norms of a layer are called otherwise (norm1, norm2, post1, post2; None: absent); tied: where the
    config does not say; fused: queries, keys and values in one tensor, gate and up in another; plus_one: norms are
    stored as their distance from 1; backbone: fields of the transformer beyond sizes.
    """
    width, heads = f.number("hidden_size"), f.number("num_attention_heads", most=100_000)
    hidden_act = f.choice("hidden_activation", "hidden_act", of=ACTIVATIONS, default=act)
    if "rope" not in backbone:
        backbone["rope"] = rope_of(f, theta)
    c = TransformerConfig(
        width, f.number("num_hidden_layers", most=10_000), heads,
        f.number("num_key_value_heads", default=heads, most=100_000),
        f.number("head_dim", default=max(width // heads, 1), most=100_000), f.number("intermediate_size"),
        activation=hidden_act, eps=f.real("rms_norm_eps", default=eps), softcap=softcap_scores, **backbone,
    )  # fmt: skip
    tied = bool(f.take("tie_word_embeddings", default=tied))
    length = f.number("max_position_embeddings", default=2048, most=100_000_000)
    vocab = f.number("vocab_size")
    rope = backbone["rope"]
    if isinstance(rope, RoPE) and rope.stretch is not None and rope.stretch.kind == "dynamic":
        length = int(length * rope.stretch.factor)  # it is made to go beyond
    return Blueprint(
        c, vocab, length, tied, parts_of(c, tied, dict(NORMS) | dict(names or {}), fused, plus_one), windows or {},
        scale=scale, softcap=softcap,
    )  # fmt: skip


NORMS: dict[str, str | None] = {
    "norm1": "input_layernorm",
    "norm2": "post_attention_layernorm",
    "post1": None,
    "post2": None,
}


def parts_of(
    c: TransformerConfig, tied: bool, names: Mapping[str, str | None], fused: bool, plus_one: bool
) -> tuple[Part, ...]:
    """Every parameter and where it comes from."""
    how = "from one" if plus_one else "rows"
    parts = [Part("embed.table", ("model.embed_tokens.weight",)), Part("backbone.norm", ("model.norm.weight",), how)]
    if not tied:
        parts.append(Part("heads.token.weight", ("lm_head.weight",)))
    for i in range(c.depth):
        ours, theirs = f"backbone.layers.{i}.", f"model.layers.{i}."
        attention, mlp = theirs + "self_attn.", theirs + "mlp."
        qkv = ("qkv_proj",) if fused else ("q_proj", "k_proj", "v_proj")
        up = ("gate_up_proj",) if fused else ("gate_proj", "up_proj")
        for name, where, of in (
            ("qkv", attention, qkv),
            ("out", attention, ("o_proj",)),
            ("up", mlp, up),
            ("down", mlp, ("down_proj",)),
        ):
            if c.experts is None or name in ("qkv", "out"):
                parts.append(Part(ours + name, tuple(f"{where}{x}.weight" for x in of)))
            if c.biased(name):
                parts.append(Part(f"{ours}{name}_bias", tuple(f"{where}{x}.bias" for x in of)))
        parts += [Part(ours + o, (f"{theirs}{t}.weight",), how) for o, t in names.items() if t is not None]
        if c.qk_norm is not None:
            parts += [Part(f"{ours}{x}_norm", (f"{attention}{x}_norm.weight",), how) for x in "qk"]
        if c.experts is not None:
            parts += _expert_parts(c.experts, ours, mlp)
    return tuple(parts)


def _expert_parts(experts: Experts, ours: str, mlp: str) -> list[Part]:
    each = [f"{mlp}experts.{e}." for e in range(experts.count)]
    gates = tuple(f"{e}{x}_proj.weight" for e in each for x in ("gate", "up"))
    downs = tuple(f"{e}down_proj.weight" for e in each)
    return [
        Part(ours + "router", (mlp + "gate.weight",)), Part(ours + "up", gates, "experts"),
        Part(ours + "down", downs, "experts"),
    ]  # fmt: skip


def by_layer(f: Fields, depth: int, sliding: list[bool]) -> tuple[tuple[str, ...], dict[str, int]]:
    """Kinds of layers and their windows: `layer_types` says which slide, or else the family's rule (`sliding`)."""
    window = f.take("sliding_window")
    types = f.take("layer_types")
    if types is not None:
        odd = set(types) - {"full_attention", "sliding_attention"}
        if odd or len(types) != depth:
            raise ValueError(
                f"{f.where}: layer_types names {len(types)} layers ({', '.join(sorted(set(types)))}) of {depth}"
            )
        sliding = [t == "sliding_attention" for t in types]
    if window is None or not any(sliding):
        return ("all",), {}
    return tuple("local" if s else "all" for s in sliding), {"local": int(window)}
