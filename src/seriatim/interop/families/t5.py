"""T5 (Raffel et al. 2020, arXiv 1910.10683), T5 1.1 and FLAN-T5: an encoder and a decoder, scores that are not scaled
and depend on distance, plain or gated feed-forward networks; the first T5 scales what its tied table of outputs meets.
"""

from __future__ import annotations

from seriatim.backbones.layer import TransformerConfig
from seriatim.backbones.relative import Relative
from seriatim.interop.blueprint import UNBOUNDED, EncoderDecoderBlueprint, Part
from seriatim.interop.fields import Fields

ACTIVATIONS = {  # of `feed_forward_proj` -> ours, and what transformers adds about it
    "relu": ("relu", "relu"), "gelu": ("gelu", "gelu"), "gelu_new": ("gelu_tanh", "gelu_new"),
    "gated-gelu": ("geglu_tanh", "gelu_new"), "gated-gelu_new": ("geglu_tanh", "gelu_new"),
    "gated-silu": ("swiglu", "silu"),
}  # fmt: skip
ASIDE = ("n_positions", "dropout_rate", "initializer_factor", "output_past")  # training; distances have no end
COPIES = (
    "encoder.embed_tokens.weight",
    "decoder.embed_tokens.weight",
    "EncDecAttention.relative_attention_bias.weight",
)


def read(f: Fields) -> EncoderDecoderBlueprint:
    for name in ASIDE:
        f.take(name)
    f.must("is_encoder_decoder", True)
    activation, inside = f.choice("feed_forward_proj", of=ACTIVATIONS, default="relu")
    f.must("dense_act_fn", inside)
    f.must("is_gated_act", "glu" in activation)
    width, heads = f.number("d_model", default=512), f.number("num_heads", default=8, most=100_000)
    dim, hidden = f.number("d_kv", default=64, most=100_000), f.number("d_ff", default=2048)
    depth = f.number("num_layers", default=6, most=10_000)
    eps = f.real("layer_norm_epsilon", default=1e-6)
    buckets = f.number("relative_attention_num_buckets", default=32, most=100_000)
    distance = f.number("relative_attention_max_distance", default=128, most=100_000)

    def stack(depth: int, encoder: bool) -> TransformerConfig:
        return TransformerConfig(
            width, depth, heads, head_dim=dim, hidden=hidden, activation=activation, score_scale=1.0, eps=eps,
            relative=Relative(buckets, distance, both=encoder), memory=None if encoder else width,
        )  # fmt: skip

    decoder = stack(f.number("num_decoder_layers", default=depth, most=10_000), encoder=False)
    encoder = stack(depth, encoder=True)
    tied = bool(f.take("tie_word_embeddings", default=True))
    scaled = bool(f.take("scale_decoder_outputs", default=tied))
    parts = [Part("embed.table", ("shared.weight",))]
    parts += [] if tied else [Part("heads.token.weight", ("lm_head.weight",))]
    parts += _parts(decoder, "backbone.", "decoder.", scaled)
    parts += _parts(encoder, "conditions.text.backbone.", "encoder.", False)
    start = f.number("decoder_start_token_id", "pad_token_id", default=0, least=0)
    return EncoderDecoderBlueprint(
        decoder, f.number("vocab_size", default=32_128), UNBOUNDED, tied, tuple(parts), ignored=COPIES, encoder=encoder,
        start=start,
    )  # fmt: skip


def _parts(c: TransformerConfig, ours: str, theirs: str, scaled: bool) -> list[Part]:
    """One stack. scaled: its last norm, as its output is."""
    first = theirs + "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    parts = [
        Part(ours + "norm", (theirs + "final_layer_norm.weight",), "over root" if scaled else "rows"),
        Part(ours + "relative", (first,)),
    ]
    up = ("wi_0", "wi_1") if "glu" in c.activation else ("wi",)
    last = 1 if c.memory is None else 2
    places = {
        "norm1": (0, "layer_norm"), "qkv": (0, "SelfAttention.q", "SelfAttention.k", "SelfAttention.v"),
        "out": (0, "SelfAttention.o"), "norm2": (last, "layer_norm"),
        "up": (last, *(f"DenseReluDense.{x}" for x in up)), "down": (last, "DenseReluDense.wo"),
    }  # fmt: skip
    if c.memory is not None:
        places |= {
            "norm3": (1, "layer_norm"), "cross_q": (1, "EncDecAttention.q"), "cross_out": (1, "EncDecAttention.o"),
            "cross_kv": (1, "EncDecAttention.k", "EncDecAttention.v"),
        }  # fmt: skip
    for i in range(c.depth):
        for name, (at, *of) in places.items():
            parts.append(
                Part(f"{ours}layers.{i}.{name}", tuple(f"{theirs}block.{i}.layer.{at}.{x}.weight" for x in of))
            )
    return parts
