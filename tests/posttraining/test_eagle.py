"""EAGLE's layer: its loss, what it is at first, that it learns, and that published layers say what the released module
says."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from seriatim.decoding.feature_draft import FeatureDraft
from seriatim.decoding.growth import Dynamic
from seriatim.decoding.loop import decode
from seriatim.decoding.target import Target
from seriatim.decoding.verify import Walk
from seriatim.factorization.line import run
from seriatim.interop.draft_heads import load_published_heads, published_heads
from seriatim.laws.case import randomise
from seriatim.laws.drafts import untrained
from seriatim.posttraining.drafting import Base, DraftLearner, config_of, load_part, ready, save_part
from seriatim.posttraining.eagle import Eagle, EagleConfig
from seriatim.random import Generator, Keyed
from seriatim.systems.text.next_token import Config, NextToken

torch.set_num_threads(1)
VOCAB, WIDTH = 24, 32


def system_of(std: float = 0.3, **config: Any) -> NextToken:
    settings = {"length": 64, "vocab": VOCAB, "width": WIDTH, "depth": 2, "heads": 4, **config}
    system = NextToken(Config(**settings), SimpleNamespace(special={}))  # type: ignore[arg-type]
    randomise(system.model, 3, std)
    return system.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def system() -> NextToken:
    return system_of()


def text(system: NextToken, rows: int = 3, n: int = 12, seed: int = 4) -> tuple[Tensor, Tensor]:
    ids = torch.randint(VOCAB, (rows, n), generator=torch.Generator().manual_seed(seed))
    return ids, system.states(ids)


def estimates(part: Eagle, system: NextToken, ids: Tensor, h: Tensor) -> Tensor:
    e = system.model.embed.vectors(ids[:, 1:, None])
    return part.layer(part.enter(h[:, :-1], e), run(0, ids.shape[1] - 1))


# ---- the loss --------------------------------------------------------------------------------------------------------


def test_loss_is_the_distance_of_states_and_the_cross_entropy_of_what_is_read_out_of_them(system):
    ids, h = text(system)
    part, base = untrained(Eagle, EagleConfig(noise=0.0, feature=0.7, said=0.3), system)
    total, count, figures = part.loss(base, h, ids, Generator(0))
    f, want = estimates(part, system, ids, h)[:, :-1], h[:, 1:-1]
    far = torch.where((f - want).abs() < 1, 0.5 * (f - want) ** 2, (f - want).abs() - 0.5).mean(-1)
    taught = torch.softmax(base.logits(want), -1)
    said = -(taught * torch.log_softmax(base.logits(f), -1)).sum(-1)
    assert int(count) == 3 * 10
    assert torch.allclose(total, 0.7 * far.sum() + 0.3 * said.sum(), rtol=1e-6)
    assert figures["feature"] == pytest.approx(float(far.mean()), rel=1e-5)


def test_tokens_that_are_not_drafted_are_left_out_of_the_loss(system):
    ids, h = text(system)
    part, base = untrained(Eagle, EagleConfig(noise=0.0, feature=0.0, said=1.0, draft_vocab=8), system)
    part.output.draft_only(base, torch.arange(5, 13))
    total, _, figures = part.loss(base, h, ids, Generator(0))
    f, want = estimates(part, system, ids, h)[:, :-1], h[:, 1:-1]
    taught = torch.softmax(base.logits(want)[..., 5:13], -1)
    said = -(taught * torch.log_softmax(base.logits(f)[..., 5:13], -1)).sum(-1)
    there = (ids[:, 2:] >= 5) & (ids[:, 2:] < 13)
    assert 0 < int(there.sum()) < there.numel()
    assert torch.allclose(total, said[there].sum(), rtol=1e-6)
    assert figures["covered"] == pytest.approx(float(there.double().mean()))


def test_noise_is_uniform_and_stronger_in_shorter_windows(system, monkeypatch):
    part, base = untrained(Eagle, EagleConfig(noise=0.2), system)
    enter = part.enter
    for n in (8, 32):
        ids, h = text(system, 8, n)
        met: list[Tensor] = []
        monkeypatch.setattr(part, "enter", lambda x, e, met=met: met.append(x) or enter(x, e))
        part.loss(base, h, ids, Generator(5))
        noise = met[0] - h[:, :-1]
        most = 0.1 * 512 / n
        assert 0.98 * most < float(noise.abs().max()) <= most
        assert abs(float(noise.mean())) < 0.05 * most
        assert float(noise.std()) == pytest.approx(most / 3**0.5, rel=0.05)


def test_an_estimate_sees_no_later_state_and_no_token_behind_its_own(system):
    ids, h = text(system)
    part = untrained(Eagle, EagleConfig(), system)[0]
    before = estimates(part, system, ids, h)
    later, behind = h.clone(), ids.clone()
    later[:, 5] += 1.0
    behind[:, 6] = (behind[:, 6] + 1) % VOCAB
    for changed in (estimates(part, system, ids, later), estimates(part, system, behind, h)):
        assert torch.equal(before[:, :5], changed[:, :5])
        assert bool(((before - changed)[:, 5:].abs().amax((0, 2)) > 1e-9).all())


def test_all_parameters_of_a_part_are_trained_and_none_of_the_base(system):
    ids, h = text(system)
    for config in (EagleConfig(), EagleConfig(own_output=True, bias=False, qkv_bias=True)):
        base = Base(system)
        learner = DraftLearner(randomise(Eagle(config, base), 1), base)  # type: ignore[arg-type]
        total, _ = learner({"token": ids, "state": h}, Generator(0), 0, 1)
        total.backward()
        assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in learner.part.parameters())
        assert all(p.grad is None for p in system.model.parameters())


# ---- what it is ------------------------------------------------------------------------------------------------------


def test_at_first_the_layer_hands_on_what_is_fused(system):
    ids, h = text(system)
    torch.manual_seed(0)
    part = Eagle(EagleConfig(), Base(system)).double()
    e = system.model.embed.vectors(ids[:, 1:, None])
    assert torch.allclose(estimates(part, system, ids, h), part.enter(h[:, :-1], e), atol=1e-12)
    token, state = (part.enter(*x) for x in ((0 * h[:, :-1], e), (h[:, :-1], 0 * e)))
    assert torch.allclose(state, h[:, :-1] / 2, atol=1e-12)
    assert 0.5 < float((token.square().mean() / state.square().mean()).sqrt().detach()) < 2
    plain = system.model.backbone.config
    assert (part.layer.config.heads, part.layer.config.groups) == (plain.heads, plain.groups)
    assert part.layer.config.inner == plain.inner and part.layer.norm is None and part.layer.layers[0].norm1 is None


def test_the_first_step_of_a_draft_is_what_training_computes(system):
    """Fed with true states, by way of a cache, the layer estimates what it estimates under teacher forcing."""
    part, _ = untrained(Eagle, EagleConfig(), system)
    met: list[tuple[list[int], Tensor]] = []
    canvas = system._begun([[1, 4, 2, 7]], 20)
    choices = part.choices

    class Watched:
        places, layer, looks_at, enter = part.places, part.layer, part.looks_at, part.enter

        def choices(self, estimate, last, depth, width):
            if depth == 1:
                met.append((canvas.value["token"][0, : canvas.length].tolist(), estimate))
            return choices(estimate, last, depth, width)

    with torch.inference_mode():
        list(decode(Target(system.model), canvas, Walk(), FeatureDraft(Watched(), Dynamic(6, 3, 2)), Keyed(0)))
    assert len(met) > 5
    for ids, estimate in met:
        known = torch.tensor([ids])
        want = estimates(part, system, known, system.states(known))[:, -1:]
        assert torch.allclose(estimate, want, atol=1e-12)


def test_a_part_is_the_same_after_saving_and_loading(system, tmp_path):
    part, base = untrained(Eagle, EagleConfig(hidden=24, draft_vocab=10), system)
    part.output.draft_only(base, torch.arange(3, 23, 2))
    save_part(part, base, tmp_path)
    again = load_part(tmp_path, base, Eagle)
    assert again.config == part.config
    assert config_of(Eagle, json.loads(json.dumps(asdict(part.config)))) == part.config
    ids, h = text(system)
    f = estimates(part, system, ids, h)
    assert torch.equal(f, estimates(again, system, ids, h))
    assert torch.equal(part.choices(f, h[:, :1], 1, 4).token, again.choices(f, h[:, :1], 1, 4).token)
    assert set(again.choices(f, h[:, :1], 1, 4).token.unique().tolist()) <= set(range(3, 23, 2))


def stepped(parameters: Any, steps: int, loss: Any) -> None:
    optimiser = torch.optim.AdamW(parameters, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(steps):
        total, count = loss(step)
        optimiser.zero_grad()
        (total / count).backward()
        optimiser.step()


@pytest.mark.slow
def test_it_learns_what_follows_from_states_and_tokens():
    """Texts in which mostly one token follows another: a short training multiplies what is accepted; one on states out
    of order does not."""
    torch.manual_seed(0)
    system = NextToken(Config(length=48, vocab=VOCAB, width=WIDTH, depth=1, heads=2), SimpleNamespace(special={}))  # type: ignore[arg-type]
    after, noise = torch.randperm(VOCAB), torch.rand(64, 32) < 0.1
    ids = torch.randint(VOCAB, (64, 32))
    for t in range(1, 32):
        ids[:, t] = torch.where(noise[:, t], ids[:, t], after[ids[:, t - 1]])
    stepped(system.model.parameters(), 120, lambda n: system.losses({"token": ids}, Generator(n), 0.0))
    system.eval().requires_grad_(False)
    base, h = Base(system), system.states(ids)

    def accepted(part: Eagle) -> float:
        drafted = stood = 0
        for row in range(4):
            canvas = system._begun([[row]], 40)
            proposer = FeatureDraft(ready(part, base), Dynamic(4, 4, 1))
            with torch.inference_mode():
                for step in decode(Target(system.model), canvas, Walk(), proposer, Keyed(row)):
                    drafted, stood = drafted + int(step.drafted), stood + int(step.accepted)
        return stood / drafted

    found = {}
    for name, states in (("fresh", h), ("trained", h), ("shuffled", h[:, torch.randperm(32)])):
        part = Eagle(EagleConfig(), base)
        steps = 0 if name == "fresh" else 100
        stepped(
            part.parameters(), steps, lambda n, states=states, part=part: part.loss(base, states, ids, Generator(n))[:2]
        )
        found[name] = accepted(part)
    assert found["trained"] > 0.4 and found["fresh"] < 0.15 and found["shuffled"] < 0.15, found


# ---- published layers ------------------------------------------------------------------------------------------------


class Released(nn.Module):
    """EAGLE's module as it was released: one decoder layer without its first norm, a linear map in front."""

    def __init__(self, transformers: Any, kv_heads: int, bias: bool):
        super().__init__()
        config = transformers.LlamaConfig(
            vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=40, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=kv_heads, rms_norm_eps=1e-5, rope_theta=500.0, attn_implementation="eager",
        )  # fmt: skip
        self.llama = transformers.LlamaModel(config)
        self.llama.layers[0].input_layernorm = nn.Identity()
        self.llama.norm = nn.Identity()
        self.fc = nn.Linear(2 * WIDTH, WIDTH, bias=bias)

    def forward(self, e: Tensor, h: Tensor) -> Tensor:
        return self.llama(inputs_embeds=self.fc(torch.cat([e, h], -1))).last_hidden_state

    def tensors(self) -> dict[str, Tensor]:
        found = {name.removeprefix("llama."): x.clone() for name, x in self.state_dict().items()}
        return {name: x for name, x in found.items() if "inv_freq" not in name}


SETTINGS = {
    "hidden_size": WIDTH, "vocab_size": VOCAB, "num_attention_heads": 4, "intermediate_size": 40, "rms_norm_eps": 1e-5,
    "rope_theta": 500.0, "num_hidden_layers": 1, "hidden_act": "silu",
}  # fmt: skip


def released(kv_heads: int = 2, bias: bool = True) -> Released:
    theirs = Released(pytest.importorskip("transformers"), kv_heads, bias)
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * (0.4 if p.dim() > 1 else 1.0))
    return theirs.eval()


def write(folder: Path, tensors: dict[str, Tensor], name: str = "model.safetensors", **settings: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(SETTINGS | settings))
    if name.endswith(".safetensors"):
        save_file(tensors, folder / name)
    else:
        torch.save(tensors, folder / name)
    return folder / name


@pytest.fixture(scope="module")
def single() -> NextToken:
    system = system_of()
    system.model.float()
    return system


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_a_published_layer_says_what_the_released_module_says(single, tmp_path, kv_heads, bias):
    theirs = released(kv_heads, bias)
    file = write(tmp_path, theirs.tensors(), num_key_value_heads=kv_heads)
    assert published_heads(tmp_path, "eagle-2") == file
    part = load_published_heads(file, Base(single), "eagle-2")
    ids, h = text(single)
    with torch.no_grad():
        want = theirs(single.model.embed.vectors(ids[:, 1:]), h[:, :-1])
        got = estimates(part, single, ids, h)
        assert torch.allclose(got, want, atol=1e-4 * float(want.abs().max()))
        said = single.model.heads["token"].logits(want)
        assert float(said.std()) > 2
        assert torch.equal(part.choices(got, h[:, :1], 1, 3).token, said.topk(3, -1).indices)


@pytest.mark.parametrize("trap", ["theta", "eps", "order", "norm"])
def test_parity_would_notice_a_wrong_reading(single, tmp_path, trap):
    theirs = released()
    tensors = theirs.tensors()
    settings: dict[str, Any] = {"num_key_value_heads": 2}
    if trap == "theta":
        settings["rope_theta"] = 10_000.0
    if trap == "eps":
        settings["rms_norm_eps"] = 1.0
    if trap == "order":
        tensors["fc.weight"] = tensors["fc.weight"].roll(WIDTH, 1)
    part = load_published_heads(write(tmp_path, tensors, **settings), Base(single), "eagle-2")
    if trap == "norm":
        part.layer.layers[0].norm2.data.fill_(1.0)
    ids, h = text(single)
    with torch.no_grad():
        want = theirs(single.model.embed.vectors(ids[:, 1:]), h[:, :-1])
        assert not torch.allclose(estimates(part, single, ids, h), want, atol=1e-3 * float(want.abs().max()))


def test_a_pickled_layer_is_read_only_on_demand(single, tmp_path):
    theirs = released()
    file = write(tmp_path, theirs.tensors(), "pytorch_model.bin", num_key_value_heads=2)
    with pytest.raises(ValueError, match=r"is a pickle.*\+pickled=true"):
        load_published_heads(file, Base(single), "eagle-2")
    part = load_published_heads(file, Base(single), "eagle-2", pickled=True)
    assert torch.equal(part.fuse.data, theirs.fc.weight.data)


def test_what_is_no_layer_of_eagle_or_of_another_base_is_refused(single, tmp_path):
    base, tensors = Base(single), released().tensors()

    def refused(match: str, gone: str = "", more: dict[str, Tensor] | None = None, **settings: Any) -> None:
        kept = {k: x for k, x in tensors.items() if k != gone} | (more or {})
        file = write(tmp_path, kept, **{"num_key_value_heads": 2, **settings})
        with pytest.raises(ValueError, match=match):
            load_published_heads(file, base, "eagle-2")

    refused("hidden_size is 64 there and 32 here", hidden_size=64)
    refused("vocab_size is 32,000 there and 24 here", vocab_size=32_000)
    refused("EAGLE-3", more={"midlayer.norm.weight": torch.ones(2)})
    refused("several layers", more={"layers.1.norm.weight": torch.ones(2)})
    refused("rotary embedding is scaled", rope_scaling={"type": "linear", "factor": 2.0})
    refused("fc.weight", gone="fc.weight")
    refused("there and .* for this base", num_key_value_heads=4)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_published_heads(tmp_path / "model.safetensors", base, "eagle-2")
