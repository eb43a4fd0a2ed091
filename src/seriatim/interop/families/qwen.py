"""Qwen2 (arXiv 2407.10671): biases of queries, keys and values. Qwen3 (arXiv 2505.09388): norms of queries and keys
instead, dense or with experts."""

from seriatim.backbones.layer import Experts
from seriatim.interop.blueprint import Blueprint
from seriatim.interop.families.llama import biases, by_layer, decoder
from seriatim.interop.fields import Fields


def read(f: Fields) -> Blueprint:
    kind = f.raw["model_type"]
    f.presume(max_position_embeddings=32_768, sliding_window=4096, num_key_value_heads=4 if kind == "qwen3_moe" else 32)
    if kind == "qwen3":
        f.presume(head_dim=128)
    depth = f.number("num_hidden_layers", most=10_000)
    first = f.take("max_window_layers", default=28)  # the layers before see everything
    slides = bool(f.take("use_sliding_window", default=False))
    kinds, windows = by_layer(f, depth, [slides and i >= first for i in range(depth)])
    if not slides and f.raw.get("layer_types") is None:
        kinds, windows = ("all",), {}
    if kind == "qwen2":
        return decoder(f, windows, kinds=kinds, bias=("qkv",))
    experts = None
    if kind == "qwen3_moe":
        f.must("decoder_sparse_step", 1)
        f.must("mlp_only_layers", [])
        experts = Experts(
            f.number("num_experts", "num_local_experts", default=128), f.number("num_experts_per_tok", default=8),
            f.number("moe_intermediate_size", default=768), bool(f.take("norm_topk_prob", default=False)),
        )  # fmt: skip
    return decoder(f, windows, kinds=kinds, bias=biases(f), qk_norm="rms", experts=experts)
