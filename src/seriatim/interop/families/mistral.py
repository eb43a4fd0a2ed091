"""Mistral (Jiang et al. 2023, arXiv 2310.06825): Llama whose layers see a window, where the config says so."""

from seriatim.interop.blueprint import Blueprint
from seriatim.interop.families.llama import by_layer, decoder
from seriatim.interop.fields import Fields


def read(f: Fields) -> Blueprint:
    f.presume(max_position_embeddings=131_072, num_key_value_heads=8, sliding_window=4096)
    depth = f.number("num_hidden_layers", most=10_000)
    kinds, windows = by_layer(f, depth, [True] * depth)
    return decoder(f, windows, kinds=kinds)
