"""Mamba-2 and Bamba beside `transformers`, on tiny random weights: logits, padded batches, greedy text, export. Each
trap of a family, switched off, must fail the same check.

Rows are compared one by one with `transformers`, which lets the bias of a projection and the limits of steps leak: the
first out of padding into the convolution, the second in no single step of decoding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from seriatim.backbones import mamba
from seriatim.backbones.hybrid import HybridConfig
from seriatim.backbones.mamba import MambaConfig
from seriatim.backbones.rope import RotaryTable
from seriatim.systems.published import Published, load_published
from seriatim.verbs.export import export

transformers = pytest.importorskip("transformers")

CONFIGS = Path(__file__).parent / "configs"
VOCAB, TEXT, NEW = 97, 40, 64
ENDS = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
MAMBA = {
    "hidden_size": 24, "num_heads": 6, "head_dim": 8, "state_size": 6, "n_groups": 1, "num_hidden_layers": 3,
    "chunk_size": 16,
}  # fmt: skip
BAMBA = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 6, "attn_layer_indices": [1, 3],
    "mamba_chunk_size": 16, "max_position_embeddings": 256,
}  # fmt: skip
TURNED = {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0, "partial_rotary_factor": 0.75}
CASES: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "mamba2": (
        "Mamba2Config",
        [
            {},
            {"n_groups": 2, "tie_word_embeddings": True, "conv_kernel": 3, "layer_norm_epsilon": 0.05},
            {"n_groups": 3, "use_bias": True, "use_conv_bias": False, "time_step_limit": (0.2, 0.9)},
            {"expand": 3, "num_heads": 9, "use_bias": True, "num_hidden_layers": 2},
        ],
    ),
    "bamba": (
        "BambaConfig",
        [
            {},
            {"attn_layer_indices": [0], "mamba_n_groups": 2, "tie_word_embeddings": True, "rms_norm_eps": 0.05},
            {
                "num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True, "mamba_proj_bias": True,
                "mamba_conv_bias": False, "rope_parameters": TURNED, "time_step_limit": (0.2, 0.9),
            },
            {"attn_layer_indices": None, "num_hidden_layers": 2, "mamba_expand": 3, "mamba_d_head": "auto"},
        ],
    ),
}  # fmt: skip
UNBIASED = [("mamba2", 0), ("mamba2", 1), ("bamba", 0), ("bamba", 1)]  # no bias leaks, no limit is forgotten
NAMED = [(family, n) for family, (_, configs) in CASES.items() for n in range(len(configs))]
_made: dict[tuple[str, int], tuple[Any, Published]] = {}


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Callable[[str, int], tuple[Any, Published]]:
    """A model of `transformers` with telling weights, and ours from the folder that it wrote."""

    def made(family: str, n: int) -> tuple[Any, Published]:
        if (family, n) not in _made:
            cls, configs = CASES[family]
            config = getattr(transformers, cls)(**ENDS, **{"mamba2": MAMBA, "bamba": BAMBA}[family] | configs[n])
            theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
            telling(theirs)
            folder = tmp_path_factory.mktemp("model")
            theirs.save_pretrained(folder)
            _made[family, n] = theirs, load_published(folder, torch.float32)
        return _made[family, n]

    return made


@torch.no_grad()
def telling(model: Any) -> None:
    """Logits with a standard deviation of 2 to 5; steps, decays and skips that differ; no norm at 1, no bias at 0."""
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if "A_log" in name:
            p.copy_(-1 + 0.7 * noise)
        elif p.dim() == 1:
            p.copy_((1 if "norm" in name or name.endswith("D") else 0) + 0.4 * noise)
        elif any(part in name for part in ("embed", "lm_head")):
            p.copy_(noise * (0.5 if model.config.tie_word_embeddings else 0.8))
        else:
            sharp = any(part in name for part in ("q_proj", "k_proj"))
            p.copy_(noise * (2.0 if sharp else 1.0) / p.shape[-1] ** 0.5)


def texts() -> tuple[torch.Tensor, torch.Tensor]:
    """Three rows of different lengths, padded on the left; one shorter than the convolution is wide."""
    ids = torch.randint(3, VOCAB, (3, TEXT), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, :7] = mask[2, :-2] = 0
    return ids, mask


def rows() -> list[list[int]]:
    return [row[there.bool()].tolist() for row, there in zip(*texts(), strict=True)]


@torch.no_grad()
def worst(theirs: Any, ours: Published) -> float:
    """The largest difference of logits where no padding stands, as a share of what is tolerated."""
    got = ours.logits(*texts())
    gaps = []
    for row, here in zip(rows(), got, strict=True):
        want = theirs(torch.tensor([row]), use_cache=False).logits[0]
        gaps.append(float((here[-len(row) :] - want).abs().max() / (1e-4 * want.abs().max())))
    return max(gaps)


@pytest.mark.parametrize(("family", "n"), NAMED)
def test_logits_of_padded_batches_equal_transformers(pair, family, n):
    theirs, ours = pair(family, n)
    assert 1.5 <= float(ours.logits(texts()[0])[:, -8:].std()) <= 6
    assert worst(theirs, ours) <= 1


@pytest.mark.parametrize(("family", "n"), UNBIASED)
@torch.no_grad()
def test_batches_padded_by_transformers_equal_where_no_bias_leaks(pair, family, n):
    theirs, ours = pair(family, n)
    ids, mask = texts()
    placed = {} if family == "mamba2" else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    want = theirs(ids, attention_mask=mask, use_cache=False, **placed).logits
    gap = (ours.logits(ids, mask) - want).abs() * mask[..., None]
    assert float(gap.max()) <= 1e-4 * float(want.abs().max())


@pytest.mark.parametrize(("family", "n"), NAMED)
def test_greedy_text_of_a_ragged_batch_equals_transformers(pair, family, n):
    """64 tokens behind each of three prompts: in one batch, alone, and with drafts from the text itself."""
    theirs, ours = pair(family, n)
    common: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    if (family, n) in UNBIASED:
        ids, mask = texts()
        want = theirs.generate(ids, attention_mask=mask, **common)[:, TEXT:].tolist()
    else:  # their steps of decoding know no limits, and their cache no stack without attention
        common["use_cache"] = theirs.config.time_step_limit[0] == 0 and (family, n) != ("bamba", 3)
        want = [theirs.generate(torch.tensor([row]), **common)[0, len(row) :].tolist() for row in rows()]
    settings = {"max_new_tokens": NEW, "temperature": 0.0, "stop": ()}
    assert [g.ids for g in ours.generate(rows(), **settings)] == want
    assert ours.generate(rows()[2], **settings).ids == want[2]
    drafted = ours.generate(rows()[1], "prompt-lookup", **settings)
    assert drafted.ids == want[1] and drafted.drafted > 0
    assert drafted.forwards == NEW - drafted.accepted


@pytest.mark.parametrize(("family", "n"), NAMED)
def test_log_probabilities_are_those_of_transformers(pair, family, n):
    theirs, ours = pair(family, n)
    ids, _ = texts()
    with torch.no_grad():
        said = torch.log_softmax(theirs(ids, use_cache=False).logits[:, :-1].double(), -1)
    want = said.gather(2, ids[:, 1:, None])[..., 0].sum(1)
    assert torch.allclose(ours.log_prob(ids).double(), want, rtol=1e-4)


@pytest.mark.parametrize(("family", "n"), NAMED)
def test_what_is_exported_is_what_was_read(pair, tmp_path, family, n):
    theirs, ours = pair(family, n)
    out, ids = export(ours, tmp_path / "out"), texts()[0]
    theirs.save_pretrained(tmp_path / "theirs")
    want, got = (load_file(place / "model.safetensors") for place in (tmp_path / "theirs", out))
    assert got.keys() == want.keys() and all(torch.equal(got[k], want[k]) for k in want)
    with torch.no_grad():
        gap = transformers.AutoModelForCausalLM.from_pretrained(out).eval()(ids, use_cache=False).logits
        gap -= theirs(ids, use_cache=False).logits
    assert float(gap.abs().max()) < 1e-3


@pytest.mark.parametrize(("family", "n"), [("mamba2", 1), ("bamba", 0), ("bamba", 2)])
@torch.no_grad()
def test_half_precision_is_no_further_off_than_that_of_transformers(pair, tmp_path, family, n):
    theirs, ours = pair(family, n)
    theirs.save_pretrained(tmp_path)
    ids, half = texts()[0], load_published(tmp_path, torch.bfloat16)
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    want = ours.logits(ids)
    errors = [float((x.float() - want).pow(2).mean()) for x in (half.logits(ids), other(ids, use_cache=False).logits)]
    assert errors[0] < 1.2 * errors[1]
    made = half.generate(rows(), max_new_tokens=5, temperature=0.0, stop=())
    assert [len(g.ids) for g in made] == [5, 5, 5]


# ---- traps -----------------------------------------------------------------------------------------------------------


def mixing(**changes: Any) -> Callable[[Published, Any], None]:
    """Other choices of the mixers, same weights."""

    def change(ours: Published, patch: Any) -> None:
        backbone = ours.model.backbone
        c = backbone.config
        inner = isinstance(c, HybridConfig)
        backbone.config = replace(c, mixer=replace(c.mixer, **changes)) if inner else replace(c, **changes)

    return change


def changed(**changes: Any) -> Callable[[Published, Any], None]:
    def change(ours: Published, patch: Any) -> None:
        ours.model.backbone.config = replace(ours.model.backbone.config, **changes)

    return change


def without(*names: str, value: float = 0.0) -> Callable[[Published, Any], None]:
    """Parameters at the value that would say nothing."""

    def change(ours: Published, patch: Any) -> None:
        for name, p in ours.model.named_parameters():
            if name.rpartition(".")[2] in names:
                p.fill_(value)

    return change


def turned(**changes: Any) -> Callable[[Published, Any], None]:
    def change(ours: Published, patch: Any) -> None:
        backbone = ours.model.backbone
        for kind, table in backbone.rotary.items():
            backbone.rotary[kind] = RotaryTable(replace(table.rope, **changes), backbone.config.dim)

    return change


def norm_before_gate(ours: Published, patch: Any) -> None:
    def gated(c: MambaConfig, w: dict[str, torch.Tensor], y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        parts = y.flatten(2).unflatten(2, (c.groups, -1))
        return F.rms_norm(parts, parts.shape[-1:], None, c.eps).flatten(2) * w["gated_norm"] * F.silu(gate)

    patch.setattr(mamba, "_gated", gated)


def norm_over_all_groups(ours: Published, patch: Any) -> None:
    def gated(c: MambaConfig, w: dict[str, torch.Tensor], y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(y.flatten(2) * F.silu(gate), (c.inner,), w["gated_norm"], c.eps)

    patch.setattr(mamba, "_gated", gated)


def no_activation(ours: Published, patch: Any) -> None:
    patch.setattr(mamba, "_scan_inputs", plain_inputs)


def plain_inputs(c: MambaConfig, conv: torch.Tensor) -> tuple[torch.Tensor, ...]:
    x, B, C = conv.split([c.inner, c.groups * c.state, c.groups * c.state], -1)
    return x.unflatten(-1, (c.count, -1)), B.unflatten(-1, (c.groups, -1)), C.unflatten(-1, (c.groups, -1))


def taps_reversed(ours: Published, patch: Any) -> None:
    for name, p in ours.model.named_parameters():
        if name.endswith(".conv"):
            p.copy_(p.flip(1).clone())


def untied(ours: Published, patch: Any) -> None:
    head = ours.model.heads["token"]
    head.weight = torch.nn.Parameter(head.weight.flip(0), requires_grad=False)


def groups_interleaved(ours: Published, patch: Any) -> None:
    """Heads dealt out to groups in turn, instead of in blocks."""
    scan = mamba._scan

    def dealt(c: MambaConfig, inputs: tuple[torch.Tensor, ...], *rest: Any):
        x, dt, A, B, C = inputs
        order = torch.arange(c.count).view(c.groups, -1).T.flatten()
        y, *states = scan(c, (x[:, :, order], dt[:, :, order], A[order], B, C), *rest)
        return y[:, :, order.argsort()], *states

    patch.setattr(mamba, "_scan", dealt)


TRAPS: list[tuple[str, int, str, Callable[[Published, Any], None]]] = [
    ("mamba2", 0, "norm before gate", norm_before_gate),
    ("mamba2", 1, "norm over all groups", norm_over_all_groups),
    ("mamba2", 1, "groups in blocks", groups_interleaved),
    ("mamba2", 0, "activation behind the convolution", no_activation),
    ("mamba2", 0, "taps in order", taps_reversed),
    ("mamba2", 0, "bias of the convolution", without("conv_bias")),
    ("mamba2", 2, "biases of projections", without("into_bias", "out_bias")),
    ("mamba2", 2, "limits of steps", mixing(step_limits=None)),
    ("mamba2", 2, "lower limit of steps", mixing(step_limits=(0.0, 0.9))),
    ("mamba2", 2, "upper limit of steps", mixing(step_limits=(0.2, 1e9))),
    ("mamba2", 0, "bias of steps", without("dt_bias")),
    ("mamba2", 0, "a decay a head", without("A_log")),
    ("mamba2", 0, "skip", without("D")),
    ("mamba2", 0, "a skip a head", without("D", value=1.0)),
    ("mamba2", 0, "norm", without("norm", value=1.0)),
    ("mamba2", 0, "gated norm", without("gated_norm", value=1.0)),
    ("mamba2", 1, "eps", mixing(eps=1e-5)),
    ("mamba2", 1, "tied table", untied),
    ("bamba", 0, "partial rope", turned(dims=None)),
    ("bamba", 0, "half of a head is turned", turned(dims=2)),
    ("bamba", 2, "stretched rope", turned(stretch=None)),
    ("bamba", 2, "theta", turned(theta=5_000.0)),
    ("bamba", 2, "biases of attention", without("qkv_bias")),
    ("bamba", 2, "biases of feed-forward networks", without("up_bias", "down_bias")),
    ("bamba", 2, "biases out", without("out_bias")),
    ("bamba", 2, "biases into mixers", without("into_bias")),
    ("bamba", 2, "limits of steps", mixing(step_limits=None)),
    ("bamba", 0, "norm before gate", norm_before_gate),
    ("bamba", 1, "norm over all groups", norm_over_all_groups),
    ("bamba", 1, "eps", changed(eps=1e-5)),
    ("bamba", 1, "eps of mixers", mixing(eps=1e-5)),
    ("bamba", 0, "norm before feed-forward networks", without("norm2", value=1.0)),
    ("bamba", 0, "gate's activation", changed(activation="geglu")),
]


@pytest.mark.parametrize(("family", "n", "name", "trap"), TRAPS, ids=[f"{t[0]}-{t[1]}-{t[2]}" for t in TRAPS])
def test_each_trap_of_a_family_fails_the_same_check(pair, tmp_path, monkeypatch, family, n, name, trap):
    theirs, _ = pair(family, n)
    theirs.save_pretrained(tmp_path)
    ours = load_published(tmp_path, torch.float32)
    with torch.no_grad():
        trap(ours, monkeypatch)
    assert worst(theirs, ours) > 10
