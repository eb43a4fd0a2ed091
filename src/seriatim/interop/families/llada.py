"""LLaDA 8B and 1.5 (Nie et al. 2025, arXiv 2502.09992; arXiv 2505.19223) and LLaDA-MoE (arXiv 2509.24389): trained from
scratch to decide masks anywhere in a text, and read where they stand."""

from seriatim.backbones.layer import Experts, TransformerConfig
from seriatim.backbones.rope import RoPE
from seriatim.interop.blueprint import Blueprint, MaskedBlueprint, Part, masked
from seriatim.interop.families.llama import decoder
from seriatim.interop.fields import Fields

EOS, END_OF_TURN = 126_081, 126_348
# how it was trained and computed; and what says something only where the choices below are others
SILENT = (
    "alibi_bias_max", "attention_layer_norm_with_affine", "block_group_size", "flash_attention", "init_cutoff_factor",
    "init_device", "init_fn", "init_std", "precision", "residual_dropout", "rope_full_precision",
    "train_max_sequence_length",
)  # fmt: skip
PARTS = {
    "norm1": ("attn_norm",), "norm2": ("ff_norm",), "qkv": ("q_proj", "k_proj", "v_proj"), "out": ("attn_out",),
    "up": ("ff_proj", "up_proj"), "down": ("ff_out",),
}  # fmt: skip


def read(f: Fields) -> MaskedBlueprint:
    mixture = "LLaDAMoEModelLM" in f.raw.get("architectures", ())
    plan, mask = (_mixture(f), 156_895) if mixture else (_dense(f), 126_336)
    ends = tuple(i for i in (EOS, END_OF_TURN) if not mixture and i < plan.vocab)
    return masked(
        plan, f.where, f.number("mask_token_id", default=mask, least=0), ends=ends, within=32,
        sampling={"temperature": 0.0},
    )  # fmt: skip


def _dense(f: Fields) -> Blueprint:
    for key, expected, default in (
        ("block_type", "llama", "sequential"), ("activation_type", "silu", "swiglu"), ("rope", True, False),
        ("layer_norm_type", "rms", "default"), ("layer_norm_with_affine", True, True), ("alibi", False, False),
        ("attention_layer_norm", False, False), ("input_emb_norm", False, False), ("scale_logits", False, False),
        ("include_bias", False, False), ("bias_for_layer_norm", False, False),
    ):  # fmt: skip
        f.must(key, expected, default)
    for key in SILENT:
        f.take(key)
    biased = ("qkv",) if f.take("include_qkv_bias", default=False) else ()
    width, heads, depth = f.number("d_model"), f.number("n_heads", most=100_000), f.number("n_layers", most=10_000)
    one = bool(f.take("multi_query_attention", default=False))
    groups = f.number("n_kv_heads", default=1 if one else heads, most=100_000)
    ratio = f.number("mlp_ratio", default=4)
    c = TransformerConfig(
        width, depth, heads, groups, hidden=f.number("mlp_hidden_size", default=ratio * width),
        rope=RoPE(f.real("rope_theta", default=10_000.0)), eps=f.real("rms_norm_eps", default=1e-5),
        bias=biased,
    )  # fmt: skip
    tied, words = bool(f.take("weight_tying", default=True)), f.number("vocab_size", default=50_257)
    f.take("tie_word_embeddings")  # of transformers' own, which this model does not read
    length = f.number("max_sequence_length", default=1024, most=100_000_000)
    return Blueprint(c, f.number("embedding_size", default=words), length, tied, _parts(c, tied))


def _parts(c: TransformerConfig, tied: bool) -> tuple[Part, ...]:
    stem = "model.transformer."
    parts = [Part("embed.table", (f"{stem}wte.weight",)), Part("backbone.norm", (f"{stem}ln_f.weight",))]
    parts += [] if tied else [Part("heads.token.weight", (f"{stem}ff_out.weight",))]
    for i in range(c.depth):
        for name, of in PARTS.items():
            theirs = [f"{stem}blocks.{i}.{x}." for x in of]
            parts.append(Part(f"backbone.layers.{i}.{name}", tuple(f"{t}weight" for t in theirs)))
            if name in ("qkv", "out", "up", "down") and c.biased(name):
                parts.append(Part(f"backbone.layers.{i}.{name}_bias", tuple(f"{t}bias" for t in theirs)))
    return tuple(parts)


def _mixture(f: Fields) -> Blueprint:
    hidden, depth = f.number("expert_intermediate_size"), f.number("num_hidden_layers", most=10_000)
    f.presume(intermediate_size=hidden)
    f.take("dense_intermediate_size")
    f.must("moe_layer_freq", [1] * depth)
    for key, expected in (
        ("partial_rotary_factor", 1), ("qk_layernorm", True), ("moe_router_enable_expert_bias", False),
        ("clip_qkv", None), ("shared_expert_intermediate_size", None),
    ):  # fmt: skip
        f.must(key, expected)
    for key in ("norm_topk_prob", "routed_scaling_factor", "moe_router_score_function", "router_num_group"):
        f.take(key, "router_topk_group")  # its code goes by none of them
    experts = Experts(f.number("num_experts"), f.number("num_experts_per_tok"), hidden, normalised=False)
    return decoder(
        f, eps=1e-5, qk_norm="rms", experts=experts, bias=("qkv",) if f.take("attention_bias", default=False) else ()
    )
