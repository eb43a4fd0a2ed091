"""config.json of published models, in the dialect of 2023 to 2025, read here and by `transformers`: every field that
changes what is computed, the tensors, and how rotary embedding turns. (The factors of longrope are made up.)"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from seriatim.backbones.layer import MATRICES
from seriatim.backbones.rope import RoPE, RotaryTable
from seriatim.interop.blueprint import Blueprint
from seriatim.interop.families import FAMILIES, blueprint
from support.variations import variations

transformers = pytest.importorskip("transformers")
StrictDataclassError = pytest.importorskip("huggingface_hub.errors").StrictDataclassError

CONFIGS = Path(__file__).parent / "configs"
# file -> numbers in the published weights
NUMBERS = {
    "gpt2": 124_439_808,
    "pythia-160m": 162_322_944,
    "llama-2-7b": 6_738_415_616,
    "llama-3.2-1b": 1_235_814_400,
    "tinyllama-1.1b": 1_100_048_384,
    "smollm2-135m-instruct": 134_515_008,
    "smollm3-3b": 3_075_098_624,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "qwen2.5-0.5b-instruct": 494_032_768,
    "qwen3-0.6b": 596_049_920,
    "qwen3-30b-a3b": 30_532_122_624,
    "gemma-2-2b": 2_614_341_888,
    "gemma-3-1b-it": 999_885_952,
    "phi-3-mini-4k-instruct": 3_821_079_552,
    "phi-3-mini-128k-instruct": 3_821_079_552,
    "olmo-2-7b": 7_298_617_344,
}
# in test_other_configs.py
OTHERS = {"mamba2-130m", "mamba-codestral-7b", "bamba-9b", "t5-small", "flan-t5-base", "mt5-small"}
ACTIVATIONS = {
    "swiglu": "silu", "geglu_tanh": "gelu_pytorch_tanh", "geglu": "gelu", "gelu": "gelu", "gelu_tanh": "gelu_new",
}  # fmt: skip
# published file + what its users or its larger sisters add to it
ADDED: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2.5 with yarn": (
        "qwen2.5-0.5b-instruct",
        {"rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}},
    ),
    "qwen2.5 with windows": ("qwen2.5-0.5b-instruct", {"use_sliding_window": True}),
    "gemma-3 stretched": ("gemma-3-1b-it", {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}}),
    "gemma-2 with a leftover": ("gemma-2-2b", {"hidden_act": "gelu"}),
    "qwen3 with biases": ("qwen3-0.6b", {"attention_bias": True}),
    "llama-2 stretched": ("llama-2-7b", {"rope_scaling": {"factor": 2.0, "type": "linear"}}),
    "llama-2 with a growing base": ("llama-2-7b", {"rope_scaling": {"factor": 2.0, "type": "dynamic"}}),
    "phi-3 by its first name of longrope": (
        "phi-3-mini-128k-instruct",
        {
            "rope_scaling": {
                "type": "su",
                "short_factor": [1.5] * 48,
                "long_factor": [9.5] * 48,
                "original_max_position_embeddings": 4096,
            }
        },
    ),
    "phi-4-mini, part of a head turned": (
        "phi-3-mini-4k-instruct",
        {"partial_rotary_factor": 0.75, "num_key_value_heads": 8, "tie_word_embeddings": True, "sliding_window": None},
    ),
}
ALL = [*NUMBERS, *ADDED]


@cache
def text(name: str) -> str:
    return (CONFIGS / f"{name}.json").read_text(encoding="utf-8")


def raw(name: str) -> dict[str, Any]:
    file, added = ADDED.get(name, (name, {}))
    return {**json.loads(text(file)), **added}


def parsed(said: dict[str, Any]) -> Any:
    """The config as `transformers` has it."""
    return transformers.CONFIG_MAPPING[said["model_type"]].from_dict(json.loads(json.dumps(said)))


# ---- one vocabulary for both sides -----------------------------------------------------------------------------------


def ours(b: Blueprint) -> dict[str, Any]:
    c = b.backbone
    kinds = c.kinds if len(c.kinds) > 1 else c.kinds * c.depth
    ropes = c.rope if isinstance(c.rope, dict) else dict.fromkeys(kinds, c.rope)
    e = c.experts
    return {
        "width": c.width, "depth": c.depth, "heads": c.heads, "kv_heads": c.groups, "head_dim": c.dim,
        "hidden": c.inner, "eps": c.eps, "activation": ACTIVATIONS[c.activation], "norm": c.norm,
        "parallel": c.parallel, "vocab": b.vocab, "tied": b.tied, "positions": b.positions,
        "windows": [b.windows.get(kind) for kind in kinds], "ropes": [turn(ropes[kind], c.dim) for kind in kinds],
        "score_cap": c.softcap, "logit_cap": b.softcap, "score_scale": c.score_scale or c.dim**-0.5, "scale": b.scale,
        "biases": tuple(m for m in MATRICES if c.biased(m)),
        "experts": e and (e.count, e.active, e.hidden, e.normalised),
    }  # fmt: skip


def turn(rope: RoPE | None, dim: int) -> dict[str, Any] | None:
    """How a layer turns queries and keys, in the words of `rope_parameters`."""
    if rope is None:
        return None
    said: dict[str, Any] = {"rope_theta": rope.theta, "dims": rope.dims or dim, "rope_type": "default"}
    s = rope.stretch
    if s is None:
        return said
    said |= {"rope_type": s.kind, "factor": s.factor}
    if s.kind in ("llama3", "yarn", "longrope"):
        said["original_max_position_embeddings"] = s.length
    if s.kind == "llama3":
        said |= {"high_freq_factor": s.fast, "low_freq_factor": s.slow}
    if s.kind == "longrope":
        said |= {"short_factor": list(s.near), "long_factor": list(s.far)}
    return said


def theirs(c: Any) -> dict[str, Any]:
    def get(*names: str) -> Any:
        return next((getattr(c, n) for n in names if getattr(c, n, None) is not None), None)

    width, depth, heads = c.hidden_size, c.num_hidden_layers, c.num_attention_heads
    dim, gpt2, gemma = get("head_dim") or width // heads, c.model_type == "gpt2", c.model_type.startswith("gemma")
    kinds = get("layer_types") or ["sliding_attention" if get("sliding_window") else "full_attention"] * depth
    turned = get("no_rope_layers") or [not gpt2] * depth
    return {
        "width": width, "depth": depth, "heads": heads, "kv_heads": get("num_key_value_heads") or heads,
        "head_dim": dim, "hidden": get("n_inner", "intermediate_size") or 4 * width,
        "eps": get("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"),
        "activation": get("hidden_activation", "hidden_act", "activation_function"),
        "norm": "rms" if hasattr(c, "rms_norm_eps") else "layer", "parallel": bool(get("use_parallel_residual")),
        "vocab": c.vocab_size, "tied": c.tie_word_embeddings, "positions": c.n_positions if gpt2 else None,
        "windows": [c.sliding_window if kind == "sliding_attention" else None for kind in kinds],
        "ropes": [their_turn(c, kind, dim) if t else None for kind, t in zip(kinds, turned, strict=True)],
        "score_cap": get("attn_logit_softcapping"), "logit_cap": get("final_logit_softcapping"),
        "score_scale": (get("query_pre_attn_scalar") or dim) ** -0.5, "scale": width**0.5 if gemma else 1.0,
        "biases": their_biases(c),
        "experts": (c.num_experts, c.num_experts_per_tok, c.moe_intermediate_size, c.norm_topk_prob)
        if c.model_type == "qwen3_moe"
        else None,
    }  # fmt: skip


def their_biases(c: Any) -> tuple[str, ...]:
    if c.model_type == "qwen2":
        return ("qkv",)
    old = c.model_type in ("gpt2", "gpt_neox")  # their feed-forward networks always have some
    attention, mlp = getattr(c, "attention_bias", c.model_type == "gpt2"), getattr(c, "mlp_bias", old)
    return ("qkv", "out") * attention + ("up", "down") * mlp


def their_turn(c: Any, kind: str, dim: int) -> dict[str, Any]:
    said = dict(c.rope_parameters.get(kind, c.rope_parameters))
    said.pop("type", None)
    said["dims"] = int(dim * said.pop("partial_rotary_factor", 1.0))
    if said["rope_type"] == "longrope":
        said.setdefault("factor", c.max_position_embeddings / said["original_max_position_embeddings"])
    return said


# ---- laws ------------------------------------------------------------------------------------------------------------


def test_every_family_has_a_published_file():
    assert {p.stem for p in CONFIGS.iterdir()} == set(NUMBERS) | OTHERS
    assert {raw(name)["model_type"] for name in [*NUMBERS, *OTHERS]} == set(FAMILIES)


@pytest.mark.parametrize("name", ALL)
def test_fields_equal_those_of_transformers(name):
    said = raw(name)
    b, config = blueprint(said, name), parsed(said)
    assert ours(b) == theirs(config)
    grown = 2 if name == "llama-2 with a growing base" else 1
    assert b.length == grown * config.max_position_embeddings


@pytest.mark.parametrize("name", [*NUMBERS, "qwen2.5 with windows"])
def test_without_any_one_key_or_with_another_value_fields_still_equal(name):
    """Numbers doubled, yes for no: a default or a key that only one side reads would show. What either refuses is
    passed over."""
    said, compared = raw(name), 0
    for key, changed in variations(said):
        try:
            b, config = blueprint(changed, name), parsed(changed)
        except (ValueError, StrictDataclassError):
            continue
        assert ours(b) == theirs(config), f"{key}: {changed.get(key)}"
        assert b.length == config.max_position_embeddings, f"{key}: {changed.get(key)}"
        compared += 1
    assert compared > len(said)


@pytest.mark.parametrize("name", NUMBERS)
def test_tensors_and_numbers_equal_those_of_transformers(name):
    b = blueprint(raw(name), name)
    with torch.device("meta"):
        model, other = b.build(), transformers.AutoModelForCausalLM.from_config(parsed(raw(name)))
    assert sum(p.numel() for p in model.parameters()) == NUMBERS[name]
    assert sum(p.numel() for p in other.parameters()) == NUMBERS[name]
    assert {part.ours for part in b.parts} == {key for key, _ in model.named_parameters()}
    assert {stored(t) for part in b.parts for t in part.theirs} == {key for key, _ in other.named_parameters()}
    attention = [m for key, m in other.named_modules() if re.search(r"layers\.\d+\.(self_attn|attention)$", key)]
    assert all(m.scaling == ours(b)["score_scale"] for m in attention)
    assert getattr(other.get_input_embeddings(), "scalar_embed_scale", 1.0) == b.scale


def stored(name: str) -> str:
    """A published tensor's name -> its name in `transformers`, which has experts in one tensor."""
    name = re.sub(r"experts\.\d+\.(gate|up)_proj\.weight", "experts.gate_up_proj", name)
    return re.sub(r"experts\.\d+\.down_proj\.weight", "experts.down_proj", name).replace("embed_out.", "lm_head.")


@pytest.mark.parametrize("name", [name for name in ALL if name != "gpt2"])
def test_rotary_frequencies_and_their_scale_equal_those_of_transformers(name):
    """Read off what is turned at position 1 of texts up to 8 times as long as those of the first training."""
    config, c = parsed(raw(name)), blueprint(raw(name), name).backbone
    module = rotary(config)
    kinds = c.kinds if len(c.kinds) > 1 else c.kinds * c.depth
    layers = getattr(config, "layer_types", None) or ["full_attention"] * c.depth
    nested = "full_attention" in config.rope_parameters
    first = getattr(config, "original_max_position_embeddings", config.max_position_embeddings)
    for ours_kind, layer in dict(zip(kinds, layers, strict=True)).items():
        rope = c.rope[ours_kind] if isinstance(c.rope, dict) else c.rope
        if rope is None:
            continue
        for length in (8, first, first + 1, 8 * first):
            place = torch.tensor([[1, length - 1]])
            module(torch.zeros(1), place, **({"layer_type": layer} if nested else {}))
            prefix = f"{layer}_" if nested else ""
            cos, sin = (x[0, 0, 0] for x in RotaryTable(rope, c.dim).at(place[..., None], torch.float64))
            cos, sin = cos[: len(cos) // 2], sin[len(sin) // 2 :]
            want = getattr(module, prefix + "inv_freq").double(), getattr(module, prefix + "attention_scaling")
            torch.testing.assert_close(torch.atan2(sin, cos), want[0], rtol=1e-6, atol=0)
            torch.testing.assert_close(torch.hypot(sin, cos), torch.full_like(cos, want[1]), rtol=1e-6, atol=0)


def rotary(config: Any) -> Any:
    """The module of `transformers` that turns, on the CPU."""
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config)
    return type(model.rotary_emb)(config)
