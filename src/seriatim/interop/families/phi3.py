"""Phi-3 (Abdin et al. 2024, arXiv 2404.14219): fused matrices, LongRoPE, a window."""

from seriatim.interop.blueprint import Blueprint
from seriatim.interop.families.llama import by_layer, decoder
from seriatim.interop.fields import Fields, rope_of


def read(f: Fields) -> Blueprint:
    f.presume(max_position_embeddings=4096, original_max_position_embeddings=4096)
    depth = f.number("num_hidden_layers", most=10_000)
    kinds, windows = by_layer(f, depth, [True] * depth)
    dim = f.number("hidden_size") // f.number("num_attention_heads", most=100_000)
    share = (f.raw.get("rope_parameters") or {}).get("partial_rotary_factor")
    share = f.take("partial_rotary_factor", default=share if share is not None else 1.0)
    rope = rope_of(f, dims=None if share == 1 else int(dim * share))
    return decoder(f, windows, eps=1e-5, kinds=kinds, rope=rope, fused=True)
