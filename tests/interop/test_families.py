"""Published families beside `transformers`, on tiny random weights: logits, padded batches, greedy text. Weights are
scaled so that a mistake would show; each trap of a family, switched off, must fail the same check."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from seriatim.backbones.rope import RoPE, RotaryTable, Stretch
from seriatim.systems.published import Published, load_published
from seriatim.verbs.export import export

transformers = pytest.importorskip("transformers")

VOCAB, TEXT, NEW = 97, 40, 64
BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NEOX = {k: v for k, v in BASE.items() if k != "num_key_value_heads"}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 8.0, "original_max_position_embeddings": 32}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 500.0,
    "short_factor": [1.0, 1.5, 2.0, 3.0],
    "long_factor": [2.0, 4.0, 6.0, 9.0],
    "original_max_position_embeddings": 32,
}
BOTH = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 16}

# family -> (class of the config, what differs from BASE in each of its configurations)
CASES: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "llama": (
        "LlamaConfig",
        [
            {},
            {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "rope_parameters": LLAMA3},
            {"head_dim": 16, "num_key_value_heads": 4, "rope_parameters": YARN, "rms_norm_eps": 0.01},
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}, "num_key_value_heads": 1},
        ],
    ),
    "mistral": (
        "MistralConfig",
        [
            {"sliding_window": 9},
            {"sliding_window": None, "head_dim": 16},
            {"sliding_window": 25, "rope_parameters": YARN},
        ],
    ),
    "qwen2": (
        "Qwen2Config",
        [
            {},
            {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2},
            {"tie_word_embeddings": True, "rope_parameters": YARN},
        ],
    ),
    "qwen3": (
        "Qwen3Config",
        [
            {"head_dim": 16},
            {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": True},
            {"head_dim": 16, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
        ],
    ),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        [MOE, {**MOE, "norm_topk_prob": True}, {**MOE, "num_experts_per_tok": 6, "num_key_value_heads": 4}],
    ),
    "gemma2": (
        "Gemma2Config",
        [
            {
                "head_dim": 16,
                "sliding_window": 9,
                "query_pre_attn_scalar": 20,
                "attn_logit_softcapping": 4.0,
                "final_logit_softcapping": 6.0,
            },
            {"head_dim": 8, "sliding_window": 200, "query_pre_attn_scalar": 8},
            {"head_dim": 16, "sliding_window": 9, "attn_logit_softcapping": None},
        ],
    ),
    "gemma3": (
        "Gemma3TextConfig",
        [
            {
                "head_dim": 16,
                "sliding_window": 9,
                "query_pre_attn_scalar": 20,
                "num_hidden_layers": 7,
                "rope_parameters": BOTH,
            },
            {"head_dim": 8, "sliding_window": 9, "query_pre_attn_scalar": 4},
            {"head_dim": 16, "sliding_window": 12, "num_hidden_layers": 6, "num_key_value_heads": 1},
        ],
    ),
    "phi3": (
        "Phi3Config",
        [
            {"sliding_window": 11},
            {"rope_parameters": LONG, "original_max_position_embeddings": 32},
            {
                "tie_word_embeddings": True,
                "num_key_value_heads": 4,
                "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
            },
        ],
    ),
    "olmo2": (
        "Olmo2Config",
        [
            {},
            {"num_key_value_heads": 4, "attention_bias": True},
            {"tie_word_embeddings": True, "rope_parameters": YARN},
        ],
    ),
    "smollm3": (
        "SmolLM3Config",
        [
            {},
            {"no_rope_layers": [0, 1, 0, 1]},
            {"tie_word_embeddings": False, "no_rope_layer_interval": 2, "attention_bias": True},
        ],
    ),
    "gpt2": (
        "GPT2Config",
        [
            GPT2,
            {**GPT2, "n_inner": 40, "activation_function": "relu"},
            {**GPT2, "tie_word_embeddings": False, "layer_norm_epsilon": 0.01},
        ],
    ),
    "gpt-neox": (
        "GPTNeoXConfig",
        [
            NEOX,
            {**NEOX, "use_parallel_residual": False, "rotary_pct": 1.0},
            {
                **NEOX,
                "attention_bias": False,
                "rope_parameters": {
                    "rope_type": "linear",
                    "factor": 3.0,
                    "rope_theta": 500.0,
                    "partial_rotary_factor": 0.5,
                },
            },
        ],
    ),
}
NAMED = [(family, n) for family, (_, configs) in CASES.items() for n in range(len(configs))]
_made: dict[tuple[str, int], tuple[Any, Published]] = {}


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Callable[[str, int], tuple[Any, Published]]:
    """A model of `transformers` with telling weights, and ours from the folder that it wrote."""

    def made(family: str, n: int) -> tuple[Any, Published]:
        if (family, n) not in _made:
            cls, configs = CASES[family]
            config = getattr(transformers, cls)(
                **(configs[n] if "vocab_size" in configs[n] else {**BASE, **configs[n]})
            )
            theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
            telling(theirs)
            folder = tmp_path_factory.mktemp("model")
            theirs.save_pretrained(folder)
            _made[family, n] = theirs, load_published(folder, torch.float32)
        return _made[family, n]

    return made


@torch.no_grad()
def telling(model: Any) -> None:
    """Logits with a standard deviation of 2 to 5, scores that reach 5, no norm at 1 and no bias at 0."""
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if p.dim() == 1:
            p.copy_((p if "norm" in name or "ln_" in name else 0) + 0.3 * noise)
        elif any(part in name for part in ("embed", "wte", "wpe", "lm_head")):
            p.copy_(noise * (0.45 if model.config.tie_word_embeddings else 0.8))
        else:
            sharp = any(part in name for part in ("q_proj", "k_proj", "qkv", "c_attn", "query_key"))
            p.copy_(noise * (2.0 if sharp else 1.0) / p.shape[-1] ** 0.5)


def texts() -> tuple[torch.Tensor, torch.Tensor]:
    """Three rows of different lengths, padded on the left; longer than every window."""
    ids = torch.randint(3, VOCAB, (3, TEXT), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, :7] = mask[2, :19] = 0
    return ids, mask


@torch.no_grad()
def worst(theirs: Any, ours: Published) -> float:
    """The largest difference of logits where no padding stands, as a share of what is tolerated."""
    ids, mask = texts()
    want = theirs(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    gap = (ours.logits(ids, mask) - want).abs() * mask[..., None]
    return float(gap.max() / (1e-4 * want.abs().max()))


@pytest.mark.parametrize(("family", "n"), NAMED)
def test_logits_of_padded_batches_equal_transformers(pair, family, n):
    theirs, ours = pair(family, n)
    ids, mask = texts()
    assert 1.5 <= float(ours.logits(ids)[:, -8:].std()) <= 6
    assert worst(theirs, ours) <= 1


@pytest.mark.parametrize(("family", "n"), NAMED)
def test_greedy_text_of_a_ragged_batch_equals_transformers(pair, family, n):
    """64 tokens behind each of three prompts: in one batch, alone, and with drafts from the text itself."""
    theirs, ours = pair(family, n)
    ids, mask = texts()
    if "longrope" in repr(ours.config.backbone.rope):  # of rows of one length: `transformers` goes by the longest
        ids, mask = ids.roll(1, 0), torch.ones_like(mask)
    want = theirs.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0
    )[:, TEXT:].tolist()
    rows = [row[there.bool()].tolist() for row, there in zip(ids, mask, strict=True)]
    settings = {"max_new_tokens": NEW, "temperature": 0.0, "stop": ()}
    assert [g.ids for g in ours.generate(rows, **settings)] == want
    assert ours.generate(rows[2], **settings).ids == want[2]
    drafted = ours.generate(rows[2], "prompt-lookup", **settings)
    assert drafted.ids == want[2] and drafted.drafted > 0
    assert drafted.forwards == NEW - drafted.accepted


@pytest.mark.parametrize(("family", "n"), NAMED)
def test_log_probabilities_are_those_of_transformers(pair, family, n):
    """By the packed form, whose views of every kind of layer are checked for peeking first."""
    theirs, ours = pair(family, n)
    ids, _ = texts()
    with torch.no_grad():
        said = torch.log_softmax(theirs(ids).logits[:, :-1].double(), -1)
    want = said.gather(2, ids[:, 1:, None])[..., 0].sum(1)
    assert torch.allclose(ours.log_prob(ids).double(), want, rtol=1e-4)


@pytest.mark.parametrize(("family", "n"), NAMED)
def test_what_is_exported_is_what_was_read(pair, tmp_path, family, n):
    """Every tensor under its own name, put together and taken apart again; read by `transformers` with equal logits."""
    theirs, ours = pair(family, n)
    out, ids = export(ours, tmp_path / "out"), texts()[0]
    theirs.save_pretrained(tmp_path / "theirs")
    want, got = (load_file(place / "model.safetensors") for place in (tmp_path / "theirs", out))
    assert got.keys() == want.keys() and all(torch.allclose(got[k], want[k], atol=1e-6) for k in want)
    with torch.no_grad():
        gap = transformers.AutoModelForCausalLM.from_pretrained(out).eval()(ids).logits - theirs(ids).logits
    assert float(gap.abs().max()) < 1e-3


# ---- traps -----------------------------------------------------------------------------------------------------------


def changed(**changes: Any) -> Callable[[Published], None]:
    """Other choices of the backbone, same weights."""

    def change(ours: Published) -> None:
        backbone = ours.model.backbone
        backbone.config = replace(backbone.config, **changes)

    return change


def turned(**changes: Any) -> Callable[[Published], None]:
    """Another rotary embedding."""

    def change(ours: Published) -> None:
        backbone = ours.model.backbone
        for kind, table in backbone.rotary.items():
            rope = RoPE() if table is None else table.rope
            backbone.rotary[kind] = RotaryTable(replace(rope, **changes), backbone.config.dim)

    return change


def without(*names: str, value: float = 0.0) -> Callable[[Published], None]:
    """Parameters at the value that would say nothing."""

    def change(ours: Published) -> None:
        for name, p in ours.model.named_parameters():
            if name.rpartition(".")[2] in names:
                p.fill_(value)

    return change


def no_windows(ours: Published) -> None:
    ours.model.factorization.windows = {}


def no_scale(ours: Published) -> None:
    ours.model.embed.scale = 1.0


def no_cap(ours: Published) -> None:
    ours.model.heads["token"].softcap = None


def shifted_norms(ours: Published) -> None:
    """Norms as they are stored, without the 1."""
    for name, p in ours.model.named_parameters():
        if "norm" in name or "post" in name:
            p.sub_(1)


def untransposed(ours: Published) -> None:
    for layer in ours.model.backbone.layers:
        layer.out.copy_(layer.out.T.clone())


def one_rope(ours: Published) -> None:
    tables = ours.model.backbone.rotary
    tables["local"] = tables["all"]


def by_parts(ours: Published) -> None:
    """Queries, keys and values read as if they were not side by side in each head."""
    for layer in ours.model.backbone.layers:
        x = layer.qkv
        x.copy_(x.unflatten(0, (3, 4, -1)).transpose(0, 1).flatten(0, 2).clone())


def equal_shares(ours: Published) -> None:
    backbone = ours.model.backbone
    experts = backbone.config.experts
    backbone.config = replace(backbone.config, experts=replace(experts, normalised=not experts.normalised))


TRAPS: list[tuple[str, int, str, Callable[[Published], None]]] = [
    ("llama", 0, "theta", turned(theta=500.0)),
    ("llama", 2, "eps", changed(eps=1e-6)),
    ("llama", 1, "llama3 scaling", turned(stretch=None)),
    ("llama", 2, "yarn scaling", turned(stretch=None)),
    ("llama", 2, "yarn's attention", turned(stretch=Stretch("yarn", 8.0, 32, attention=1.0))),
    ("llama", 3, "linear scaling", turned(stretch=None)),
    ("llama", 1, "attention biases", without("qkv_bias", "out_bias")),
    ("llama", 1, "mlp biases", without("up_bias", "down_bias")),
    ("mistral", 0, "window", no_windows),
    ("qwen2", 1, "window of some layers", no_windows),
    ("qwen2", 0, "biases", without("qkv_bias")),
    ("qwen3", 0, "norm of queries", changed(qk_norm=None)),
    ("qwen3", 2, "window", no_windows),
    ("qwen3-moe", 0, "shares of experts", equal_shares),
    ("qwen3-moe", 1, "shares of experts", equal_shares),
    ("gemma2", 0, "capped scores", changed(softcap=None)),
    ("gemma2", 0, "capped logits", no_cap),
    ("gemma2", 0, "scaled embeddings", no_scale),
    ("gemma2", 0, "window", no_windows),
    ("gemma2", 0, "norms from one", shifted_norms),
    ("gemma2", 0, "scale of scores", changed(score_scale=None)),
    ("gemma2", 0, "norms behind branches", without("post1", "post2", value=1.0)),
    ("gemma2", 0, "gelu", changed(activation="swiglu")),
    ("gemma3", 0, "norm of queries", changed(qk_norm=None)),
    ("gemma3", 0, "rope of windows", one_rope),
    ("gemma3", 0, "window", no_windows),
    ("phi3", 0, "window", no_windows),
    ("phi3", 1, "longrope", turned(stretch=None)),
    ("phi3", 2, "partial rope", turned(dims=None)),
    ("olmo2", 0, "norms behind branches", without("post1", "post2", value=1.0)),
    ("olmo2", 0, "norm over all heads", without("q_norm", "k_norm", value=1.0)),
    ("smollm3", 0, "layers without rope", turned()),
    ("gpt2", 0, "columns", untransposed),
    ("gpt2", 0, "positions", without("0")),
    ("gpt2", 0, "tanh of gelu", changed(activation="relu")),
    ("gpt2", 2, "eps", changed(eps=1e-5)),
    ("gpt-neox", 0, "parallel", changed(parallel=False)),
    ("gpt-neox", 1, "not parallel", changed(parallel=True)),
    ("gpt-neox", 0, "partial rope", turned(dims=None)),
    ("gpt-neox", 0, "heads side by side", by_parts),
]


@pytest.mark.parametrize(("family", "n", "name", "trap"), TRAPS, ids=[f"{t[0]}-{t[1]}-{t[2]}" for t in TRAPS])
def test_each_trap_of_a_family_fails_the_same_check(pair, tmp_path, family, n, name, trap):
    theirs, _ = pair(family, n)
    theirs.save_pretrained(tmp_path)
    ours = load_published(tmp_path, torch.float32)
    with torch.no_grad():
        trap(ours)
    assert worst(theirs, ours) > 10


def test_dynamic_scaling_equals_transformers_beyond_the_first_length(tmp_path):
    """All rows as long as each other: there `transformers` reads the longest row's length for all."""
    rope = {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 4.0}
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{**BASE, "max_position_embeddings": 20, "rope_parameters": rope})
    ).eval()
    telling(theirs)
    theirs.save_pretrained(tmp_path)
    ours, ids = load_published(tmp_path, torch.float32), texts()[0]
    for length in (15, 20, 21, TEXT):
        with torch.no_grad():
            want = theirs(ids[:, :length]).logits
        assert float((ours.logits(ids[:, :length]) - want).abs().max()) <= 1e-4 * float(want.abs().max())


# ---- both dialects ---------------------------------------------------------------------------------------------------


def test_the_older_dialect_says_the_same(pair, tmp_path):
    """rope_theta and rope_scaling, torch_dtype, as files of 2023 to 2025 have them."""
    theirs, ours = pair("llama", 1)
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {
        "rope_theta": rope.pop("rope_theta"),
        "rope_scaling": rope,
        "torch_dtype": config.pop("dtype", "float32"),
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    ids, _ = texts()
    assert torch.equal(load_published(tmp_path, torch.float32).logits(ids), ours.logits(ids))
