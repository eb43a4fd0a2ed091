"""Low-rank adapters: a fresh one changes nothing, folding one in changes what the formula says, PEFT agrees."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from seriatim.interop import peft as ours
from seriatim.interop.export import published_tensors
from seriatim.posttraining.lora import LoRA
from seriatim.random import Generator
from seriatim.systems.published import Published, load_published
from seriatim.systems.tuned import Tuned, Tuning
from seriatim.verbs.load import load
from support.tiny_chat import write_chat_model

transformers = pytest.importorskip("transformers")

IDS = torch.randint(3, 90, (2, 24), generator=torch.Generator().manual_seed(0))
BASE = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
# what is stored differently: three matrices in one of ours, biases, one of theirs, by columns, heads in turn, experts
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "phi3": ("Phi3Config", {}),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "gpt-neox": ("GPTNeoXConfig", {}),
    "qwen3-moe": ("Qwen3MoeConfig", MOE),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """family -> (a model of `transformers`, its folder)."""
    made: dict[str, tuple[Any, Path]] = {}

    def get(family: str) -> tuple[Any, Path]:
        if family not in made:
            cls, changes = FAMILIES[family]
            torch.manual_seed(0)
            sizes = {**({"vocab_size": 97} if family == "gpt2" else BASE), **changes}
            if family == "gpt-neox":
                del sizes["num_key_value_heads"]
            model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, cls)(**sizes)).eval()
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(0.2 * torch.randn_like(p))
            folder = tmp_path_factory.mktemp(family)
            model.save_pretrained(folder)
            made[family] = model, folder
        return made[family]

    return get


def adapted(folder: Path, config: LoRA | None = None, seed: int = 0) -> Tuned:
    """A base with an adapter that says something."""
    torch.manual_seed(seed)
    tuned = Tuned(load_published(folder), config or LoRA(4))
    with torch.no_grad():
        for p in tuned.parameters():
            if p.requires_grad:
                p.normal_(std=0.1)
    return tuned


def written(tuned: Tuned, base: Path, out: Path) -> Path:
    """Its adapter as a folder of PEFT's."""
    out.mkdir(exist_ok=True)
    weights = {n.removeprefix("system.model."): p.detach() for n, p in tuned.named_parameters()}
    name, tensors = tuned.stored(weights)
    save_file(dict(tensors), out / name)
    about = ours.adapter_config(str(base), tuned.adapter, tuned.system.parts, tuned.targets)
    (out / ours.CONFIG).write_text(json.dumps(about))
    return out


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


# ---- the mathematics -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_adapter_is_its_base_bit_for_bit(models, family):
    """Law 8; and folded in, too."""
    folder = models(family)[1]
    want = load_published(folder).logits(IDS)
    tuned = Tuned(load_published(folder), LoRA(4)).eval()
    assert torch.equal(tuned.system.logits(IDS), want)
    assert torch.equal(tuned.finished().logits(IDS), want)


def test_an_adapter_adds_scale_times_b_a_to_the_matrix_it_is_on(models):
    folder = models("llama")[1]
    tuned = adapted(folder, LoRA(3, alpha=12.0, targets=("k_proj", "up_proj")))
    weights = {n.removeprefix("system.model."): p.detach().clone() for n, p in tuned.named_parameters()}
    factors = tuned.stored(weights)[1]
    before = load_published(folder).publication().tensors
    after = tuned.finished().publication().tensors
    for name, x in before.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if name.endswith(("k_proj.weight", "up_proj.weight")):
            change = 4.0 * factors[f"{module}.lora_B.weight"] @ factors[f"{module}.lora_A.weight"]
            assert torch.allclose(after[name], x + change, atol=1e-6) and float(change.abs().max()) > 0.05
        else:
            assert torch.equal(after[name], x)
    assert len(factors) == 2 * 2 * 2, "layers, matrices, halves"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_adapter_learns_and_its_base_does_not(models, family):
    """Under autocast, as it is trained: every half gets a gradient, and nothing else; steps change nothing else."""
    folder = models(family)[1]
    tuned = adapted(folder).train()
    before = {n: p.detach().clone() for n, p in tuned.named_parameters()}
    trained = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = tuned({"token": IDS}, Generator(0), 0, 1)
    loss.backward()
    for name, p in tuned.named_parameters():
        adapter = ".a." in name or ".b." in name
        assert p.requires_grad == adapter and (p.grad is not None and bool(p.grad.abs().sum() > 0)) == adapter, name
        assert p.dtype == torch.float32
    optimizer.step()
    for name, p in tuned.named_parameters():
        assert torch.equal(p, before[name]) != p.requires_grad, name


@pytest.mark.parametrize("family", FAMILIES)
def test_all_weights_learn_where_there_is_no_adapter(models, family):
    tuned = Tuned(load_published(models(family)[1], torch.bfloat16)).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = tuned({"token": IDS}, Generator(0), 0, 1)
    loss.backward()
    assert tuned.dtype == torch.bfloat16 and {p.dtype for p in tuned.parameters()} == {torch.float32}
    assert not [n for n, p in tuned.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    weights = {n.removeprefix("system.model."): p.detach() for n, p in tuned.named_parameters()}
    kept = tuned.stored(weights)[1]
    want = load_file(models(family)[1] / "model.safetensors")
    assert kept.keys() == want.keys() and {x.dtype for x in kept.values()} == {torch.bfloat16}
    assert all(torch.equal(kept[k], want[k].bfloat16()) for k in want), "as it was published"


# ---- PEFT ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_reads_what_is_written_with_equal_logits(models, family, tmp_path):
    peft = pytest.importorskip("peft")
    theirs, folder = models(family)
    out = written(adapted(folder), folder, tmp_path / "adapter")
    mine = load(out).logits(IDS)
    with torch.no_grad():
        said = peft.PeftModel.from_pretrained(copy.deepcopy(theirs), out).eval()(IDS).logits
    assert gap(mine, said) < 1e-5 and gap(mine, load(folder).logits(IDS)) > 0.01


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("more", [{}, {"use_rslora": True, "alpha_pattern": {}}], ids=["plain", "patterns"])
def test_what_peft_writes_is_read_with_equal_logits(models, family, more, tmp_path):
    peft = pytest.importorskip("peft")
    theirs, folder = models(family)
    names = list(Tuned(load_published(folder), LoRA(4)).targets)
    if "alpha_pattern" in more:
        more = {**more, "alpha_pattern": {names[0]: 3}, "rank_pattern": {names[-1]: 2}}
    config = peft.LoraConfig(r=4, lora_alpha=9, target_modules=names, task_type="CAUSAL_LM", **more)
    model = peft.get_peft_model(copy.deepcopy(theirs), config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.1)
        said = model(IDS).logits
    model.save_pretrained(tmp_path)
    assert gap(load(folder, adapter=tmp_path).logits(IDS), said) < 1e-5
    assert gap(load(folder).logits(IDS), said) > 0.01


# ---- folders ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chat(tmp_path_factory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("base"), dtype=torch.bfloat16)


@pytest.fixture
def adapter(chat, tmp_path) -> Path:
    return written(adapted(chat), chat, tmp_path / "adapter")


def config_with(folder: Path, **changes: Any) -> None:
    path = folder / ours.CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_an_adapter_is_its_base_in_every_other_way(chat, adapter):
    """Type, number format, tokenizer, template; nothing is left to compute while it generates."""
    base, made = load(chat), load(adapter)
    assert isinstance(made, Published) and made.chat == base.chat and made.stop == base.stop
    assert {p.dtype for p in made.parameters()} == {torch.bfloat16} == {p.dtype for p in base.parameters()}
    assert [n for n, _ in made.named_parameters()] == [n for n, _ in base.named_parameters()]
    whole = load(adapter, torch.float32)
    assert gap(made.logits(IDS).float(), whole.logits(IDS)) < 0.05 and whole.logits(IDS).dtype == torch.float32
    other = load(chat, torch.float32, adapter=adapter)
    assert torch.equal(other.logits(IDS), whole.logits(IDS))


def test_an_adapter_may_be_on_another_one(chat, adapter, tmp_path):
    second = written(adapted(chat, seed=1), adapter, tmp_path / "second")
    first, alone = (load(x, torch.float32).publication().tensors for x in (adapter, second))
    base = load(chat, torch.float32).publication().tensors
    other = load(chat, torch.float32, adapter=second).publication().tensors  # over the base it was not made on
    for name in base:
        assert torch.allclose(alone[name] - first[name], other[name] - base[name], atol=1e-5), name


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"peft_type": "IA3"}, "an adapter of type 'IA3'; LORA is understood"),
        ({"use_dora": True}, "may change what is computed: use_dora = True"),
        ({"modules_to_save": ["lm_head"]}, "may change what is computed: modules_to_save"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4', which changes the base model, too"),
        ({"lora_alpha": "many"}, "are numbers, got 'many'"),
        ({"alpha_pattern": {"nothing": 1}}, "alpha_pattern names 'nothing'"),
        ({"base_model_name_or_path": None}, "does not name its base: seriatim.load(BASE, adapter="),
        ({"base_model_name_or_path": "gone/away/far"}, "an adapter on gone/away/far, which is not found"),
        ({"something_new": 3}, "not understood and may change what is computed: something_new = 3"),
    ],
)
def test_configs_that_are_not_understood_are_refused(adapter, changes, says):
    config_with(adapter, **changes)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        load(adapter)
    assert says in str(error.value)


def test_an_adapter_on_itself_is_refused(adapter):
    config_with(adapter, base_model_name_or_path=str(adapter))
    with pytest.raises(ValueError, match="an adapter on itself"):
        load(adapter)


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ("another", r"does not fit .*base.*: .* does not have: model\.layers\.9\.mlp\.down_proj"),
        ("shape", r"has A \(4, 7\) and B \(32, 4\); the matrix is \(32, 32\): another model's"),
        ("rank", "has rank 4 in A and 5 in B"),
        ("half", "holds half an adapter of model.layers.0.self_attn.q_proj"),
        ("head", "holds base_model.model.lm_head.weight, which is not understood"),
        ("cut", "not a whole safetensors file"),
        ("pickle", "adapter_model.bin is a pickle"),
    ],
)
def test_weights_that_do_not_fit_are_named(adapter, broken, says):
    file = adapter / ours.WEIGHTS
    state, q = load_file(file), "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    if broken == "another":
        state = {k.replace("layers.0", "layers.9"): v for k, v in state.items()}
    elif broken == "shape":
        state[f"{q}A.weight"] = torch.zeros(4, 7)
    elif broken == "rank":
        state[f"{q}B.weight"] = torch.zeros(32, 5)
    elif broken == "half":
        del state[f"{q}B.weight"]
    elif broken == "head":
        state["base_model.model.lm_head.weight"] = torch.zeros(2)
    save_file(state, file)
    if broken == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif broken == "pickle":
        file.rename(adapter / "adapter_model.bin")
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        load(adapter)


def test_adapters_that_cannot_be_made_are_refused(chat):
    for config, says in (
        (LoRA(4, targets=("c_attn",)), "no matrices c_attn to adapt; there are q_proj, k_proj"),
        (LoRA(64), "rank 64 is no smaller than the matrices"),
    ):
        with pytest.raises(ValueError, match=says):
            Tuned(load_published(chat), config)
    with pytest.raises(ValueError, match="at least 1"):
        LoRA(0)
    with pytest.raises(ValueError, match="alpha of an adapter is positive"):
        LoRA(4, alpha=-1.0)
    with pytest.raises(ValueError, match="give its rank, too"):
        Tuning(lora_targets="q_proj")
    assert Tuning(lora=4, lora_targets="q_proj,v_proj").adapter == LoRA(4, targets=("q_proj", "v_proj"))


def test_quantised_weights_are_not_trained(chat):
    system = load_published(chat, torch.float32)
    layer = system.model.backbone.layers[0]
    del layer._parameters["qkv"]
    layer.register_buffer("qkv_0", torch.zeros(64, 32, dtype=torch.int8))
    with pytest.raises(ValueError, match=r"quantised \(backbone.layers.0.qkv\), and cannot be trained"):
        Tuned(system)
    with pytest.raises(ValueError, match="quantised"):
        published_tensors(system.model.state_dict(), system.parts, system.config.backbone)
