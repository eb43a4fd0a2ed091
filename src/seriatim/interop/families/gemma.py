"""Gemma 2 (arXiv 2408.00118): norms on both sides of each branch, capped scores and logits, every other layer with a
window. Gemma 3 (arXiv 2503.19786): norms of queries and keys instead of caps, five layers with a window to one without,
each kind with rotary embedding of its own."""

from seriatim.backbones.rope import RoPE
from seriatim.interop.blueprint import Blueprint
from seriatim.interop.families.llama import biases, by_layer, decoder
from seriatim.interop.fields import Fields, rope_from, rope_of

NAMES = {
    "norm1": "input_layernorm", "post1": "post_attention_layernorm", "norm2": "pre_feedforward_layernorm",
    "post2": "post_feedforward_layernorm",
}  # fmt: skip


def read(f: Fields) -> Blueprint:
    second = f.raw["model_type"] == "gemma2"
    f.presume(num_key_value_heads=4, head_dim=256, sliding_window=4096)
    if second:
        f.presume(max_position_embeddings=8192, final_logit_softcapping=30.0, attn_logit_softcapping=50.0)
    else:
        f.presume(max_position_embeddings=131_072)
    depth, width = f.number("num_hidden_layers", default=26, most=10_000), f.number("hidden_size", default=2304)
    f.must("use_bidirectional_attention", False)
    every = 2 if second else f.number("sliding_window_pattern", default=6)
    kinds, windows = by_layer(f, depth, [bool((i + 1) % every) for i in range(depth)])
    scalar = f.real("query_pre_attn_scalar", default=256.0)
    own = {"rope": rope_of(f)} if second else {"rope": _ropes(f, kinds), "qk_norm": "rms"}
    return decoder(
        f, windows, names=NAMES, tied=True, scale=width**0.5, softcap=f.real("final_logit_softcapping"),
        softcap_scores=f.real("attn_logit_softcapping"), act="gelu_pytorch_tanh", plus_one=True, kinds=kinds,
        place="both", bias=biases(f), score_scale=scalar**-0.5, **own,
    )  # fmt: skip


def _ropes(f: Fields, kinds: tuple[str, ...]) -> RoPE | dict[str, RoPE]:
    """Of layers that see everything, and of those with a window."""
    local = float(f.take("rope_local_base_freq", default=10_000.0))
    both = f.raw.get("rope_parameters") or {}
    if "full_attention" in both:
        f.take("rope_parameters")
        wide = rope_from(f, both["full_attention"], 1_000_000.0)
        near = rope_from(f, both.get("sliding_attention", {}), local)
    else:
        wide, near = rope_of(f, 1_000_000.0), RoPE(local)
    ropes = {"all": wide, "local": near}
    return {kind: ropes[kind] for kind in dict.fromkeys(kinds)}
