"""The published Mamba-2 (transformers) and ours, on the same weights; each mistake that could be made is noticed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Mamba2Config, Mamba2ForCausalLM

from seriatim.backbones import mamba
from seriatim.backbones.mamba import Mamba, MambaConfig
from seriatim.decoding.draft import DraftModel
from seriatim.decoding.loop import decode, generate
from seriatim.decoding.sample import SampleAll
from seriatim.decoding.target import Target
from seriatim.decoding.verify import GreedyMatch
from seriatim.embed import TokenEmbed
from seriatim.factorization.line import Line
from seriatim.heads.categorical import CategoricalHead
from seriatim.layout import line
from seriatim.model import Model
from seriatim.random import Forced


def close(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---- the published model ---------------------------------------------------------------------------------------------

NAMES = {
    "norm": "norm.weight",
    "into": "mixer.in_proj.weight",
    "into_bias": "mixer.in_proj.bias",
    "conv": "mixer.conv1d.weight",
    "conv_bias": "mixer.conv1d.bias",
    "dt_bias": "mixer.dt_bias",
    "A_log": "mixer.A_log",
    "D": "mixer.D",
    "gated_norm": "mixer.norm.weight",
    "out": "mixer.out_proj.weight",
    "out_bias": "mixer.out_proj.bias",
}
IDS = torch.randint(40, (2, 23), generator=torch.Generator().manual_seed(9))


def published(groups: int) -> Mamba2ForCausalLM:
    """Three tiny layers, every parameter random and large enough to matter."""
    config = Mamba2Config(
        vocab_size=40, hidden_size=16, num_heads=4, head_dim=8, state_size=6, n_groups=groups, num_hidden_layers=3,
        conv_kernel=4, chunk_size=8, use_bias=True, pad_token_id=None, eos_token_id=None,
    )  # fmt: skip
    theirs = Mamba2ForCausalLM(config).eval()
    random = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            scale = 0.7 if parameter.dim() > 1 else 0.5
            parameter.copy_(scale * torch.randn(parameter.shape, generator=random) + (1.0 if "norm" in name else 0.0))
    return theirs


def loaded(theirs: Mamba2ForCausalLM, length: int, wrong: Callable[[dict[str, Tensor]], None] | None = None) -> Model:
    """Ours with the weights of the published model; `wrong` makes a mistake in those of each layer."""
    c = theirs.config
    config = MambaConfig(
        c.hidden_size, c.num_hidden_layers, c.num_heads, c.head_dim, c.state_size, c.n_groups, bias=c.use_bias, chunk=4
    )
    model = Model(line(length), Line(), TokenEmbed(40, 16), Mamba(config), CategoricalHead(16, 40)).eval()
    weights = theirs.state_dict()
    ours = {"norm": weights["backbone.norm_f.weight"]}
    for i in range(config.depth):
        layer = {name: weights[f"backbone.layers.{i}.{theirs_}"] for name, theirs_ in NAMES.items()}
        layer["conv"] = layer["conv"][:, 0]
        if wrong is not None:
            wrong(layer)
        ours |= {f"layers.{i}.{name}": weight for name, weight in layer.items()}
    model.backbone.load_state_dict(ours)
    with torch.no_grad():
        model.embed.table.copy_(weights["backbone.embeddings.weight"])
        model.heads["token"].weight.copy_(weights["lm_head.weight"])
    return model


def logits(model: Model) -> Tensor:
    """What one pass reads at all slots but the last."""
    canvas = model.canvas({"token": IDS}, 1)
    plan = model.factorization.packed(canvas)
    assert plan is not None
    return model.dist(model.hidden(plan, canvas), plan, canvas)[0].logits  # type: ignore[attr-defined]


def far(model: Model, theirs: Mamba2ForCausalLM) -> float:
    want = theirs(IDS).logits[:, :-1]
    assert 2 < want.std() < 5
    return float((logits(model) - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("groups", [1, 2])
@torch.no_grad()
def test_the_model_is_the_published_one(groups: int) -> None:
    theirs = published(groups)
    model = loaded(theirs, IDS.shape[1])
    assert far(model, theirs) < 1e-4
    forced = Forced(IDS)
    generate(Target(model), model.canvas({"token": IDS.clone()}, 5), SampleAll(), random=forced)
    want = theirs(IDS).logits.log_softmax(-1)[:, 4:-1].gather(-1, IDS[:, 5:, None]).sum((1, 2))
    close(forced.log_prob.float(), want, 1e-4)


@torch.no_grad()
def test_greedy_strings_with_drafts_are_those_of_the_published_model() -> None:
    theirs = published(2)
    model, draft = loaded(theirs, 23), loaded(theirs, 23)
    draft.heads["token"].weight.add_(0.3 * torch.randn(40, 16, generator=torch.Generator().manual_seed(1)))
    proposer, canvas = DraftModel(Target(draft), (-1, -1, 0, 0, 2, 2), "top"), model.canvas({"token": IDS.clone()}, 6)
    steps = list(decode(Target(model), canvas, GreedyMatch(), proposer))
    want = theirs.generate(IDS[:, :6], attention_mask=torch.ones(2, 6), max_new_tokens=17, do_sample=False)
    assert torch.equal(canvas.value["token"], want)
    assert 5 < sum(int(torch.as_tensor(step.accepted).sum()) for step in steps) < 30


def rows_of(layer: dict[str, Tensor], order: Sequence[int], sizes: Sequence[int]) -> None:
    for name in ("into", "into_bias"):
        parts = layer[name].split(list(sizes))
        layer[name] = torch.cat([parts[i] for i in order])


MISTAKES: dict[str, Callable[[dict[str, Tensor]], None]] = {
    "kernel reversed": lambda layer: layer.update(conv=layer["conv"].flip(1)),
    "gate last": lambda layer: rows_of(layer, (1, 0, 2), (32, 32, 28)),
    "B and C swapped": lambda layer: rows_of(layer, (0, 2, 1, 3), (64, 12, 12, 4)),
    "skips of other heads": lambda layer: layer.update(D=layer["D"][[0, 2, 1, 3]]),
    "no layer norm": lambda layer: layer.update(norm=torch.ones(16)),
    "no gated norm": lambda layer: layer.update(gated_norm=torch.ones(32)),
    "no skip": lambda layer: layer.update(D=torch.zeros(4)),
    "no step bias": lambda layer: layer.update(dt_bias=torch.zeros(4)),
    "no convolution bias": lambda layer: layer.update(conv_bias=torch.zeros(56)),
    "no bias in": lambda layer: layer.update(into_bias=torch.zeros(92)),
    "no bias out": lambda layer: layer.update(out_bias=torch.zeros(16)),
    "one decay": lambda layer: layer.update(A_log=torch.zeros(4)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@torch.no_grad()
def test_a_model_with_one_mistake_is_not(mistake: str) -> None:
    theirs = published(2)
    assert far(loaded(theirs, IDS.shape[1], MISTAKES[mistake]), theirs) > 1e-2


def gate_after_the_norm(c: MambaConfig, w: dict[str, Tensor], y: Tensor, gate: Tensor) -> Tensor:
    parts = y.flatten(2).unflatten(2, (c.groups, -1))
    return F.rms_norm(parts, parts.shape[-1:], None, c.eps).flatten(2) * w["gated_norm"] * F.silu(gate)


def norm_over_all_groups(c: MambaConfig, w: dict[str, Tensor], y: Tensor, gate: Tensor) -> Tensor:
    return F.rms_norm(y.flatten(2) * F.silu(gate), (c.inner,), w["gated_norm"], c.eps)


@pytest.mark.parametrize("gated", [gate_after_the_norm, norm_over_all_groups])
@torch.no_grad()
def test_a_model_with_another_norm_is_not(gated: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = published(2)
    monkeypatch.setattr(mamba, "_gated", gated)
    assert far(loaded(theirs, IDS.shape[1]), theirs) > 1e-2


@torch.no_grad()
def test_half_precision_is_no_further_off_than_the_published_model() -> None:
    theirs = published(2)
    want, model = theirs(IDS).logits[:, :-1], loaded(theirs, IDS.shape[1]).bfloat16()
    errors = [
        float((got.float() - want).pow(2).mean()) for got in (logits(model), theirs.bfloat16()(IDS).logits[:, :-1])
    ]
    assert errors[0] < 1.2 * errors[1]
    cache = model.backbone.new_cache(2)  # type: ignore[operator]
    assert [t.dtype for t in cache.states[0]] == [torch.bfloat16, torch.float32]
