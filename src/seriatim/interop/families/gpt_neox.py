"""GPT-NeoX (Black et al. 2022, arXiv 2204.06745) and Pythia: parallel branches, some dimensions turned, queries, keys
and values of each head side by side."""

from seriatim.backbones.layer import TransformerConfig
from seriatim.interop.blueprint import Blueprint, Part
from seriatim.interop.fields import Fields, rope_of

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def read(f: Fields) -> Blueprint:
    width, heads = f.number("hidden_size"), f.number("num_attention_heads", most=100_000)
    depth, biased = f.number("num_hidden_layers", most=10_000), bool(f.take("attention_bias", default=True))
    share = (f.raw.get("rope_parameters") or {}).get("partial_rotary_factor")
    share = f.take("rotary_pct", "partial_rotary_factor", default=0.25 if share is None else share)
    dims = int(width // heads * share)
    rope = rope_of(f, float(f.take("rotary_emb_base", default=10_000.0)), dims)
    c = TransformerConfig(
        width, depth, heads, hidden=f.number("intermediate_size"), norm="layer",
        parallel=bool(f.take("use_parallel_residual", default=True)), rope=rope,
        activation=f.choice("hidden_act", of=ACTIVATIONS, default="gelu"),
        bias=True if biased else ("up", "down"), eps=f.real("layer_norm_eps", default=1e-5),
    )  # fmt: skip
    tied = bool(f.take("tie_word_embeddings", default=False))
    parts = [
        Part("embed.table", ("gpt_neox.embed_in.weight",)),
        Part("backbone.norm", ("gpt_neox.final_layer_norm.weight",)),
        Part("backbone.norm_bias", ("gpt_neox.final_layer_norm.bias",)),
    ]
    parts += [] if tied else [Part("heads.token.weight", ("embed_out.weight",))]
    for i in range(depth):
        ours, theirs = f"backbone.layers.{i}.", f"gpt_neox.layers.{i}."
        for name, of in (("norm1", "input_layernorm"), ("norm2", "post_attention_layernorm")):
            parts += [Part(ours + name, (f"{theirs}{of}.weight",)), Part(f"{ours}{name}_bias", (f"{theirs}{of}.bias",))]
        for name, of, how in (
            ("qkv", "attention.query_key_value", "heads"), ("out", "attention.dense", "rows"),
            ("up", "mlp.dense_h_to_4h", "rows"), ("down", "mlp.dense_4h_to_h", "rows"),
        ):  # fmt: skip
            parts.append(Part(ours + name, (f"{theirs}{of}.weight",), how))
            if c.biased(name):
                parts.append(Part(f"{ours}{name}_bias", (f"{theirs}{of}.bias",), how))
    ignored = ("attention.rotary_emb.inv_freq", "attention.bias", "attention.masked_bias", "embed_out.weight")
    vocab, length = f.number("vocab_size"), f.number("max_position_embeddings", default=2048)
    return Blueprint(c, vocab, length, tied, tuple(parts), ignored=ignored)
