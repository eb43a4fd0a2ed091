"""Bamba (IBM, Princeton, CMU, UIUC 2024): Mamba-2 mixers, attention with half of each head turned in a few layers, a
gated feed-forward network in all."""

from __future__ import annotations

from seriatim.backbones.hybrid import HybridConfig
from seriatim.backbones.mamba import MambaConfig
from seriatim.interop.blueprint import Blueprint, Part
from seriatim.interop.families.llama import ACTIVATIONS, biases
from seriatim.interop.families.mamba2 import mixer_parts
from seriatim.interop.fields import Fields, rope_of

ASIDE = ("mamba_chunk_size", "num_logits_to_keep", "use_mamba_kernels", "z_loss_coefficient")  # speed, training


def read(f: Fields) -> Blueprint:
    f.presume(num_key_value_heads=8, max_position_embeddings=262_144)
    for name in ASIDE:
        f.take(name)
    width, heads = f.number("hidden_size", default=4096), f.number("num_attention_heads", default=32, most=100_000)
    depth, eps = f.number("num_hidden_layers", default=32, most=10_000), f.real("rms_norm_eps", default=1e-5)
    attends = _attending(f, depth)
    c = HybridConfig(
        width, depth, heads, f.number("num_key_value_heads", default=heads, most=100_000),
        hidden=f.number("intermediate_size", default=14_336), rope=rope_of(f, dims=_turned(f, width // heads)),
        activation=f.choice("hidden_act", of=ACTIVATIONS, default="silu"), bias=biases(f), eps=eps, attends=attends,
        mixer=_mixer(f, width, depth - len(attends), eps),
    )  # fmt: skip
    tied = bool(f.take("tie_word_embeddings", default=False))
    length = f.number("max_position_embeddings", most=100_000_000)
    return Blueprint(c, f.number("vocab_size", default=128_000), length, tied, _parts(c, tied))


def _attending(f: Fields, depth: int) -> tuple[int, ...]:
    said = f.take("attn_layer_indices", default=[])
    if not isinstance(said, list) or not all(isinstance(i, int) and 0 <= i < depth for i in said):
        raise ValueError(f"{f.where}: attn_layer_indices are numbers of layers, 0 to {depth - 1}, got {said!r}")
    if len(set(said)) == depth:
        raise ValueError(f"{f.where}: attn_layer_indices names every layer, which leaves none that mixes by a state")
    return tuple(sorted(set(said)))


def _turned(f: Fields, dim: int) -> int:
    """Dimensions of a head that are turned: half of them where nothing else is said."""
    share = (f.raw.get("rope_parameters") or f.raw.get("rope_scaling") or {}).get("partial_rotary_factor")
    dims = int(dim * (0.5 if share is None else share))
    f.take("partial_rotary_factor")  # of the file's own level: not read by those who made it
    f.must("attn_rotary_emb", dims)
    return dims


def _mixer(f: Fields, width: int, depth: int, eps: float) -> MambaConfig:
    heads = f.number("mamba_n_heads", default=128, most=100_000)
    inner = int(width * f.real("mamba_expand", default=2))
    dim = f.take("mamba_d_head", default="auto")
    if inner % heads or dim not in ("auto", inner // heads):
        raise ValueError(
            f"{f.where}: {heads} heads of {dim} channels are not {inner}, what hidden_size and mamba_expand make"
        )
    return MambaConfig(
        width, depth, heads, inner // heads, f.number("mamba_d_state", default=256, most=100_000),
        f.number("mamba_n_groups", default=1, most=100_000), f.number("mamba_d_conv", default=4, most=1000),
        bias=bool(f.take("mamba_proj_bias", default=False)), conv_bias=bool(f.take("mamba_conv_bias", default=True)),
        eps=eps, step_limits=f.limits("time_step_limit"),
    )  # fmt: skip


def _parts(c: HybridConfig, tied: bool) -> tuple[Part, ...]:
    assert c.mixer is not None
    parts = [
        Part("embed.table", ("model.embed_tokens.weight",)), Part("backbone.norm", ("model.final_layernorm.weight",)),
    ]  # fmt: skip
    parts += [] if tied else [Part("heads.token.weight", ("lm_head.weight",))]
    for i in range(c.depth):
        ours, theirs = f"backbone.layers.{i}.", f"model.layers.{i}."
        matrices = {"up": ("feed_forward.gate_proj", "feed_forward.up_proj"), "down": ("feed_forward.down_proj",)}
        if i in c.attends:
            matrices["qkv"] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
            matrices["out"] = ("self_attn.o_proj",)
        else:
            parts += mixer_parts(c.mixer, ours, theirs + "mamba.")
        for name, of in matrices.items():
            parts.append(Part(ours + name, tuple(f"{theirs}{x}.weight" for x in of)))
            if c.biased(name):
                parts.append(Part(f"{ours}{name}_bias", tuple(f"{theirs}{x}.bias" for x in of)))
        for name, norm in (("norm1", "input_layernorm"), ("norm2", "pre_ff_layernorm")):
            parts.append(Part(ours + name, (f"{theirs}{norm}.weight",)))
    return tuple(parts)
