"""GPT-2 (Radford et al. 2019): learned positions, layer norm, biases, matrices stored by columns."""

from seriatim.backbones.layer import TransformerConfig
from seriatim.interop.blueprint import Blueprint, Part
from seriatim.interop.fields import Fields

ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}


def read(f: Fields) -> Blueprint:
    f.must("scale_attn_weights", True)
    f.must("scale_attn_by_inverse_layer_idx", False)
    f.take("reorder_and_upcast_attn")  # the same numbers, in another order
    width, depth = f.number("n_embd", default=768), f.number("n_layer", default=12, most=10_000)
    c = TransformerConfig(
        width, depth, f.number("n_head", default=12, most=100_000), hidden=f.number("n_inner", default=4 * width),
        norm="layer", activation=f.choice("activation_function", of=ACTIVATIONS, default="gelu_new"), bias=True,
        eps=f.real("layer_norm_epsilon", default=1e-5),
    )  # fmt: skip
    length, tied = f.number("n_positions", default=1024), bool(f.take("tie_word_embeddings", default=True))
    parts = [
        Part("embed.table", ("transformer.wte.weight",)), Part("embed.positions.0", ("transformer.wpe.weight",)),
        Part("backbone.norm", ("transformer.ln_f.weight",)), Part("backbone.norm_bias", ("transformer.ln_f.bias",)),
    ]  # fmt: skip
    parts += [] if tied else [Part("heads.token.weight", ("lm_head.weight",))]
    for i in range(depth):
        ours, theirs = f"backbone.layers.{i}.", f"transformer.h.{i}."
        for name, of in (("norm1", "ln_1"), ("norm2", "ln_2")):
            parts += [Part(ours + name, (f"{theirs}{of}.weight",)), Part(f"{ours}{name}_bias", (f"{theirs}{of}.bias",))]
        for name, of in (("qkv", "attn.c_attn"), ("out", "attn.c_proj"), ("up", "mlp.c_fc"), ("down", "mlp.c_proj")):
            parts.append(Part(ours + name, (f"{theirs}{of}.weight",), "columns"))
            parts.append(Part(f"{ours}{name}_bias", (f"{theirs}{of}.bias",)))
    ignored = (".attn.bias", ".attn.masked_bias", "lm_head.weight")
    vocab = f.number("vocab_size", default=50257)
    return Blueprint(c, vocab, length, tied, tuple(parts), positions=length, ignored=ignored)
