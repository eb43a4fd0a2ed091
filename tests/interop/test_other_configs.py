"""config.json of published models that are no plain transformers (Mamba-2, Bamba, T5), read here and by `transformers`:
every field that changes what is computed, the tensors, and what is refused."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from seriatim.backbones.hybrid import HybridConfig
from seriatim.backbones.layer import TransformerConfig
from seriatim.backbones.mamba import MambaConfig
from seriatim.interop.blueprint import Blueprint, EncoderDecoderBlueprint
from seriatim.interop.families import blueprint
from seriatim.interop.fields import read_config
from support.variations import variations

transformers = pytest.importorskip("transformers")
StrictDataclassError = pytest.importorskip("huggingface_hub.errors").StrictDataclassError

CONFIGS = Path(__file__).parent / "configs"
# file -> numbers in the published weights
NUMBERS = {
    "mamba2-130m": 128_989_632,
    "mamba-codestral-7b": 7_285_403_648,
    "bamba-9b": 9_780_235_392,
    "t5-small": 60_506_624,
    "flan-t5-base": 247_577_856,
    "mt5-small": 300_176_768,
}
ACTIVATIONS = {
    "relu": "relu", "gelu": "gelu", "gelu_tanh": "gelu_new", "swiglu": "gated silu", "geglu_tanh": "gated gelu_new",
    "geglu": "gated gelu",
}  # fmt: skip


@cache
def text(name: str) -> str:
    return (CONFIGS / f"{name}.json").read_text(encoding="utf-8")


def raw(name: str) -> dict[str, Any]:
    return json.loads(text(name))


def parsed(said: dict[str, Any]) -> Any:
    """The config as `transformers` has it."""
    return transformers.CONFIG_MAPPING[said["model_type"]].from_dict(json.loads(json.dumps(said)))


# ---- one vocabulary for both sides -----------------------------------------------------------------------------------


def mixer(c: MambaConfig) -> dict[str, Any]:
    return {
        "width": c.width, "heads": c.count, "head_dim": c.head_dim, "state": c.state, "groups": c.groups,
        "kernel": c.kernel, "bias": c.bias, "conv_bias": c.conv_bias, "eps": c.eps,
        "limits": c.step_limits or (0.0, float("inf")),
    }  # fmt: skip


def stack(c: TransformerConfig) -> dict[str, Any]:
    return {
        "width": c.width, "depth": c.depth, "heads": c.heads, "kv_heads": c.groups, "head_dim": c.dim,
        "hidden": c.inner, "eps": c.eps, "activation": ACTIVATIONS[c.activation], "scale": c.score_scale,
        "bias": c.bias, "memory": c.memory,
        "rope": None if c.rope is None else (c.rope.theta, c.rope.dims),
        "relative": c.relative and (c.relative.buckets, c.relative.distance, c.relative.both),
    }  # fmt: skip


def ours(b: Blueprint) -> dict[str, Any]:
    c, both = b.backbone, {"vocab": b.vocab, "tied": b.tied}
    if isinstance(c, MambaConfig):
        return both | {"mixer": mixer(c), "depth": c.depth}
    if isinstance(c, HybridConfig):
        assert c.mixer is not None
        return both | {"mixer": mixer(c.mixer), "attends": c.attends, "stack": stack(c), "length": b.length}
    assert isinstance(b, EncoderDecoderBlueprint)
    scaled = any(part.how == "over root" for part in b.parts)
    return both | {"decoder": stack(c), "encoder": stack(b.encoder), "start": b.start, "scaled": scaled}


def theirs(c: Any) -> dict[str, Any]:
    both = {"vocab": c.vocab_size, "tied": c.tie_word_embeddings}
    if c.model_type == "mamba2":
        said = {
            "width": c.hidden_size, "heads": c.num_heads, "head_dim": c.head_dim, "state": c.state_size,
            "groups": c.n_groups, "kernel": c.conv_kernel, "bias": c.use_bias, "conv_bias": c.use_conv_bias,
            "eps": c.layer_norm_epsilon, "limits": tuple(c.time_step_limit),
        }  # fmt: skip
        return both | {"mixer": said, "depth": c.num_hidden_layers}
    if c.model_type == "bamba":
        return both | their_hybrid(c)
    layers = {"decoder": c.num_decoder_layers, "encoder": c.num_layers}
    activation = "gated " * c.is_gated_act + c.dense_act_fn
    said = {
        "width": c.d_model, "heads": c.num_heads, "kv_heads": c.num_heads, "head_dim": c.d_kv, "hidden": c.d_ff,
        "eps": c.layer_norm_epsilon, "activation": activation, "scale": 1.0, "bias": False, "rope": None,
    }  # fmt: skip
    buckets, distance = c.relative_attention_num_buckets, c.relative_attention_max_distance
    for half, depth in layers.items():
        memory = c.d_model if half == "decoder" else None
        both[half] = said | {"depth": depth, "memory": memory, "relative": (buckets, distance, half == "encoder")}
    start = c.pad_token_id if getattr(c, "decoder_start_token_id", None) is None else c.decoder_start_token_id
    both["tied"] = getattr(c, "scale_decoder_outputs", False)  # they tie always, and untie by what is stored
    return both | {"start": start, "scaled": both["tied"]}


def their_hybrid(c: Any) -> dict[str, Any]:
    dim = c.hidden_size // c.num_attention_heads
    said = {
        "width": c.hidden_size, "heads": c.mamba_n_heads, "head_dim": c.mamba_d_head, "state": c.mamba_d_state,
        "groups": c.mamba_n_groups, "kernel": c.mamba_d_conv, "bias": c.mamba_proj_bias,
        "conv_bias": c.mamba_conv_bias, "eps": c.rms_norm_eps, "limits": tuple(c.time_step_limit),
    }  # fmt: skip
    turned = int(dim * c.rope_parameters["partial_rotary_factor"])
    attention = {
        "width": c.hidden_size, "depth": c.num_hidden_layers, "heads": c.num_attention_heads,
        "kv_heads": c.num_key_value_heads, "head_dim": dim, "hidden": c.intermediate_size, "eps": c.rms_norm_eps,
        "activation": f"gated {c.hidden_act}", "scale": None, "memory": None, "relative": None,
        "bias": ("qkv", "out") * c.attention_bias + ("up", "down") * c.mlp_bias,
        "rope": (c.rope_parameters["rope_theta"], turned),
    }  # fmt: skip
    attends = tuple(i for i, kind in enumerate(c.layers_block_type) if kind == "full_attention")
    return {"mixer": said, "attends": attends, "stack": attention, "length": c.max_position_embeddings}


# ---- laws ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NUMBERS)
def test_fields_equal_those_of_transformers(name):
    assert ours(blueprint(raw(name), name)) == theirs(parsed(raw(name)))


@pytest.mark.parametrize("name", NUMBERS)
def test_without_any_one_key_or_with_another_value_fields_still_equal(name):
    """Numbers doubled, yes for no: a default or a key that only one side reads would show. What either refuses is
    passed over."""
    said, compared = raw(name), 0
    for key, changed in variations(said):
        if said["model_type"] == "mt5" and key == "tie_word_embeddings":
            continue  # they tie whatever it says, and what is stored unties them
        try:
            b, config = blueprint(changed, name), parsed(changed)
        except (ValueError, StrictDataclassError):
            continue
        assert ours(b) == theirs(config), f"{key}: {changed.get(key)}"
        compared += 1
    assert compared > len(said)


@pytest.mark.parametrize("name", NUMBERS)
def test_tensors_and_numbers_equal_those_of_transformers(name):
    b, config = blueprint(raw(name), name), parsed(raw(name))
    answers = config.model_type in ("t5", "mt5")
    kind = "AutoModelForSeq2SeqLM" if answers else "AutoModelForCausalLM"
    with torch.device("meta"):
        model, other = b.build(), getattr(transformers, kind).from_config(config)
    apart = 0 if b.tied or not answers else b.vocab * b.backbone.width  # they tie until they load
    assert sum(p.numel() for p in model.parameters()) == NUMBERS[name]
    assert sum(p.numel() for p in other.parameters()) + apart == NUMBERS[name]
    assert {part.ours for part in b.parts} == {key for key, _ in model.named_parameters()}
    tensors = {key for key, _ in other.named_parameters()} | ({"lm_head.weight"} if apart else set())
    assert {t for part in b.parts for t in part.theirs} == tensors
    assert NUMBERS[name] / 2 < b.numbers < NUMBERS[name] * 2


def test_infinity_is_read_as_both_dialects_write_it(tmp_path):
    said = raw("mamba2-130m")
    for limit in (float("inf"), {"__float__": "Infinity"}):
        (tmp_path / "config.json").write_text(json.dumps({**said, "time_step_limit": [0.0, limit]}))
        assert read_config(tmp_path)["time_step_limit"] == [0.0, float("inf")]


@pytest.mark.parametrize(
    ("name", "changes", "complaint"),
    [
        ("mamba2-130m", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("mamba2-130m", {"rms_norm": False}, "rms_norm is False"),
        ("mamba2-130m", {"num_heads": 23}, "23 heads of 64 channels are not 1536"),
        ("mamba2-130m", {"intermediate_size": 3072}, "are not 1536"),
        ("mamba2-130m", {"n_groups": 5}, "24 heads cannot share 5 groups"),
        ("mamba2-130m", {"time_step_limit": [0.1]}, "time_step_limit is two numbers"),
        ("mamba2-130m", {"time_step_limit": [0.1, 0.01]}, "the lower one first"),
        ("mamba2-130m", {"attn_cfg": {"every": 8}}, "attn_cfg"),
        (
            "mamba2-130m",
            {"num_hidden_layers": 10_000, "hidden_size": 2_000_000, "num_heads": 62_500},
            "that is no model",
        ),
        ("bamba-9b", {"attn_layer_indices": [9, 32]}, "attn_layer_indices are numbers of layers, 0 to 31"),
        ("bamba-9b", {"attn_layer_indices": 9}, "attn_layer_indices are numbers of layers"),
        ("bamba-9b", {"attn_layer_indices": list(range(32))}, "leaves none that mixes by a state"),
        ("bamba-9b", {"attn_rotary_emb": 128}, "attn_rotary_emb is 128; only 64"),
        ("bamba-9b", {"mamba_d_head": 32}, "128 heads of 32 channels are not 8192"),
        ("bamba-9b", {"num_local_experts": 4}, "num_local_experts"),
        ("t5-small", {"feed_forward_proj": "gated-tanh"}, "feed_forward_proj is 'gated-tanh'"),
        ("flan-t5-base", {"dense_act_fn": "relu"}, "dense_act_fn is 'relu'; only 'gelu_new'"),
        ("t5-small", {"is_encoder_decoder": False}, "is_encoder_decoder is False"),
        ("t5-small", {"relative_attention_num_buckets": 30}, "buckets halve into near and far on both sides"),
        ("t5-small", {"relative_attention_max_distance": 4}, "far distances begin beyond"),
        ("t5-small", {"d_model": "512"}, "d_model is a whole number"),
    ],
)
def test_what_is_not_understood_or_does_not_fit_is_refused(name, changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        blueprint({**raw(name), **changes}, "config.json")
