"""Mamba-2 (Dao & Gu 2024, arXiv 2405.21060): a stack of state-space mixers, no attention, any length.

The gate comes before the norm whatever `norm_before_gate` says: published files say true and mean it so.
"""

from __future__ import annotations

from seriatim.backbones.mamba import MambaConfig
from seriatim.interop.blueprint import UNBOUNDED, Blueprint, Part
from seriatim.interop.fields import Fields

ASIDE = (  # how weights are drawn, what is a matter of speed, and precision that ours always has
    "time_step_rank", "time_step_min", "time_step_max", "time_step_floor", "time_step_init_scheme", "time_step_scale",
    "rescale_prenorm_residual", "residual_in_fp32", "norm_before_gate", "chunk_size",
)  # fmt: skip
MIXER = {  # our parameter -> what it is called inside a published mixer, and how it is put together
    "into": ("in_proj.weight", "rows"), "into_bias": ("in_proj.bias", "rows"), "conv": ("conv1d.weight", "taps"),
    "conv_bias": ("conv1d.bias", "rows"), "dt_bias": ("dt_bias", "rows"), "A_log": ("A_log", "rows"),
    "D": ("D", "rows"), "gated_norm": ("norm.weight", "rows"), "out": ("out_proj.weight", "rows"),
    "out_bias": ("out_proj.bias", "rows"),
}  # fmt: skip


def read(f: Fields) -> Blueprint:
    for name in ASIDE:
        f.take(name)
    f.must("rms_norm", True)
    f.must("hidden_act", "silu")
    width, heads = f.number("hidden_size", default=4096), f.number("num_heads", default=128, most=100_000)
    dim = f.number("head_dim", default=64, most=100_000)
    inner = int(width * f.real("expand", default=2))
    if heads * dim != inner or f.take("intermediate_size", default=inner) != inner:
        raise ValueError(
            f"{f.where}: {heads} heads of {dim} channels are not {inner}, what hidden_size and expand make"
        )
    c = MambaConfig(
        width, f.number("num_hidden_layers", default=64, most=10_000), heads, dim,
        f.number("state_size", default=128, most=100_000), f.number("n_groups", default=8, most=100_000),
        f.number("conv_kernel", default=4, most=1000), bias=bool(f.take("use_bias", default=False)),
        conv_bias=bool(f.take("use_conv_bias", default=True)), eps=f.real("layer_norm_epsilon", default=1e-5),
        step_limits=f.limits("time_step_limit"),
    )  # fmt: skip
    tied = bool(f.take("tie_word_embeddings", default=False))
    parts = [
        Part("embed.table", ("backbone.embeddings.weight",)),
        Part("backbone.norm", ("backbone.norm_f.weight",)),
    ]
    parts += [] if tied else [Part("heads.token.weight", ("lm_head.weight",))]
    for i in range(c.depth):
        ours, theirs = f"backbone.layers.{i}.", f"backbone.layers.{i}."
        parts.append(Part(ours + "norm", (theirs + "norm.weight",)))
        parts += mixer_parts(c, ours, theirs + "mixer.")
    return Blueprint(c, f.number("vocab_size", default=32_768), UNBOUNDED, tied, tuple(parts))


def mixer_parts(c: MambaConfig, ours: str, theirs: str) -> list[Part]:
    """The parameters of one mixer."""
    absent = set() if c.bias else {"into_bias", "out_bias"}
    absent |= set() if c.conv_bias else {"conv_bias"}
    return [Part(ours + name, (theirs + of,), how) for name, (of, how) in MIXER.items() if name not in absent]
