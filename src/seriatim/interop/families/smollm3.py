"""SmolLM3 (Hugging Face 2025): Llama with some layers without positions (NoPE, arXiv 2501.18795)."""

from seriatim.interop.blueprint import Blueprint
from seriatim.interop.families.llama import biases, by_layer, decoder
from seriatim.interop.fields import Fields, rope_of


def read(f: Fields) -> Blueprint:
    f.presume(max_position_embeddings=32_768, num_key_value_heads=4)
    depth = f.number("num_hidden_layers", default=36, most=10_000)
    every = f.number("no_rope_layer_interval", default=4)
    turned = f.take("no_rope_layers") or [int((i + 1) % every != 0) for i in range(depth)]  # 1: with positions
    slides = bool(f.take("use_sliding_window", default=False))
    kinds, windows = by_layer(f, depth, [slides and not turned[i] for i in range(depth)])
    rope = rope_of(f, 2_000_000.0)
    seen = kinds if len(kinds) == depth else kinds * depth
    names = tuple(kind if t else f"{kind} unplaced" for kind, t in zip(seen, turned, strict=True))
    ropes = {name: None if name.endswith("unplaced") else rope for name in names}
    windows = {name: windows["local"] for name in names if name.startswith("local")}
    return decoder(f, windows, tied=True, kinds=names, rope=ropes, bias=biases(f))
