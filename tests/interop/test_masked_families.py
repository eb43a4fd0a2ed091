"""Published families that decide masks, held to what their own code said of the same weights.

`masked_families.json` has, of a tiny model of each family, its config.json, its tensors by name and shape as the
official model's `state_dict()` lists them, and official logits of tokens that are hidden; where greedy decoding is said
to be the same, what the official sampler wrote. They were computed once, outside of this repository, by the classes of
ML-GSAI/LLaDA (as kept in NVlabs/Fast-dLLM and ZHZisZZ/dllm; LLaDA-MoE: the latter), DreamLM/Dream (ditto), SDAR-8B-Chat
(its modelling file in AnZhong24/FOCUS), Fast-dLLM v2 (its modelling file in wangziyannb/Fast-dLLM), kuleshov-group/
bd3lms (MDLM is its backbone without blocks), Tencent/WeDLM, and transformers' GPT-2 and Llama as HKUNLP/DiffuLLaMA
calls them. Weights are those of `support.telling`, the same on every machine. Shifted logits were moved as official
samplers move them; of BD3-LM and MDLM a million was taken from the logit of the mask.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from seriatim.backbones.rope import RotaryTable
from seriatim.cli.main import main
from seriatim.factorization.static import AnyOrder, Blocks, KnownFirst
from seriatim.interop.blueprint import MaskedBlueprint
from seriatim.interop.families import MASKED, blueprint
from seriatim.systems.published_masked import PublishedMasked
from seriatim.verbs.export import export
from seriatim.verbs.load import load
from support.telling import BUFFERS, hidden_text, weights

CASES: dict[str, Any] = json.loads(Path(__file__).with_name("masked_families.json").read_text(encoding="utf-8"))
DECODED = [name for name, case in CASES.items() if "decoded" in case]
VOCAB = 97


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Callable[[str], Path]:
    """The folder of a tiny published model."""
    made: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in made:
            made[name] = written(CASES[name], tmp_path_factory.mktemp(name))
        return made[name]

    return of


def written(case: Any, out: Path, **changes: Any) -> Path:
    tensors = weights(case["tensors"], case["mask"], case.get("outer", 0.8))
    save_file(tensors, str(out / "model.safetensors"), {"format": "pt"})
    (out / "config.json").write_text(json.dumps({**case["config"], **changes}), encoding="utf-8")
    return out


def worst(ours: PublishedMasked, case: Any) -> float:
    """The largest difference of logits, as a share of what is tolerated: 1e-4 of the largest logit."""
    ids, hidden = hidden_text(VOCAB)
    rows, columns = torch.tensor(case["places"]).T
    got = ours.logits(ids, hidden)[rows, columns][:, case["ids"]]
    return float((got - torch.tensor(case["logits"])).abs().max()) / (1e-4 * case["largest"])


def test_every_family_has_a_case():
    said = {case["config"]["model_type"] for case in CASES.values()}
    assert said == set(MASKED) | {"gpt2", "llama"}  # which become DiffuGPT and DiffuLLaMA by a mask


# ---- what is computed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_those_of_the_official_code(folder, name):
    ours = load(folder(name), torch.float32)
    ids, hidden = hidden_text(VOCAB)
    said = ours.logits(ids, hidden)[hidden][:, :90]
    assert 1.5 <= float(said.std()) <= 6
    assert worst(ours, CASES[name]) <= 1


@pytest.mark.parametrize("name", DECODED)
def test_greedy_texts_equal_those_of_the_official_samplers(folder, name):
    ours, said = load(folder(name), torch.float32), CASES[name]["decoded"]
    ours.config = replace(ours.config, **said["settings"])
    prompt = hidden_text(VOCAB)[0][0, : said["prompt"]].tolist()
    ours.settings = {}
    made = ours.generate(prompt, max_new_tokens=said["length"], **said["sampling"])
    assert made.ids == said["ids"]
    assert made.forwards <= len(said["ids"])


def test_one_place_does_not_tell_what_another_is(folder):
    """What is hidden has no say: other ids there, same logits."""
    ids, hidden = hidden_text(VOCAB)
    other = torch.where(hidden, 5, ids)
    for name in ("llada", "dream", "mdlm", "wedlm"):
        ours = load(folder(name), torch.float32)
        assert torch.equal(ours.logits(ids, hidden), ours.logits(other, hidden))


# ---- traps -----------------------------------------------------------------------------------------------------------


def order(make: Callable[[Any], Any]) -> Callable[[PublishedMasked], None]:
    def change(ours: PublishedMasked) -> None:
        model = ours.model
        model.factorization = make(model.factorization)

    return change


def unshifted(was: Any) -> Any:
    return Blocks(was.size, "any", shift=not was.shift) if isinstance(was, Blocks) else AnyOrder(not was.shift)


def size(n: int) -> Callable[[Any], Any]:
    return lambda was: Blocks(n, "any", shift=was.shift)


def another_mask(ours: PublishedMasked) -> None:
    embed = ours.model.embed
    embed.mask.copy_(embed.table[ours.config.mask - 1])  # type: ignore[union-attr, operator, index]


def theta(value: float) -> Callable[[PublishedMasked], None]:
    def change(ours: PublishedMasked) -> None:
        backbone: Any = ours.model.backbone
        backbone.rotary = {
            kind: RotaryTable(replace(table.rope, theta=value), backbone.config.dim)
            for kind, table in backbone.rotary.items()
        }

    return change


def changed(**changes: Any) -> Callable[[PublishedMasked], None]:
    def change(ours: PublishedMasked) -> None:
        backbone: Any = ours.model.backbone
        backbone.config = replace(backbone.config, **changes)

    return change


def without(*names: str, value: float = 0.0) -> Callable[[PublishedMasked], None]:
    def change(ours: PublishedMasked) -> None:
        for name, p in ours.model.named_parameters():
            if name.removeprefix("heads.token.").rpartition(".")[2] in names:
                p.fill_(value)

    return change


def swapped(ours: PublishedMasked) -> None:
    for layer in ours.model.backbone.layers:  # type: ignore[union-attr]
        gate, up = layer.up.clone().chunk(2)
        layer.up.copy_(torch.cat([up, gate]))


def shares(ours: PublishedMasked) -> None:
    backbone: Any = ours.model.backbone
    experts = backbone.config.experts
    backbone.config = replace(backbone.config, experts=replace(experts, normalised=not experts.normalised))


SHIFT, THETA = order(unshifted), theta(37.0)
TRAPS: list[tuple[str, str, Callable[[PublishedMasked], None]]] = [
    ("llada", "shift", SHIFT), ("llada", "gate and up", swapped), ("llada", "eps", changed(eps=1e-2)),
    ("llada", "causal", order(lambda was: KnownFirst())), ("llada-biases", "biases", without("qkv_bias")),
    ("llada-moe", "norm of queries", changed(qk_norm=None)), ("llada-moe", "shares of experts", shares),
    ("dream", "shift", SHIFT), ("dream", "biases", without("qkv_bias")), ("sdar", "shift", SHIFT),
    ("dream", "causal", order(lambda was: KnownFirst())), ("sdar", "norm of queries", changed(qk_norm=None)),
    ("sdar", "size of blocks", order(size(8))), ("sdar-biases", "biases", without("qkv_bias", "out_bias")),
    ("sdar", "everybody sees everybody", order(lambda was: AnyOrder())), ("fast-dllm-v2", "shift", SHIFT),
    ("fast-dllm-v2", "size of blocks", order(size(4))), ("fast-dllm-v2", "biases", without("qkv_bias")),
    ("bd3lm", "shift", SHIFT), ("bd3lm", "size of blocks", order(size(5))), ("bd3lm", "head", without("bias")),
    ("bd3lm", "adaptive norms", without("norm1_bias", "norm2_bias")), ("mdlm", "biases", without("up_bias")),
    ("mdlm", "activation", changed(activation="relu")), ("mdlm", "gates", without("down_bias")),
    ("mdlm", "scales", without("norm1", "norm2", "norm", value=1.0)), ("diffugpt", "shift", SHIFT),
    ("diffugpt", "positions", without("0")), ("diffugpt", "biases", without("qkv_bias")),
    ("diffugpt", "causal", order(lambda was: KnownFirst())), ("diffullama", "shift", SHIFT),
    ("wedlm", "shift", order(lambda was: AnyOrder(True))), ("wedlm", "full", order(lambda was: AnyOrder())),
    ("wedlm", "biases", without("qkv_bias")), ("wedlm-norms", "norm of queries", changed(qk_norm=None)),
    *((name, "mask", another_mask) for name in CASES),
    *((name, "theta", THETA) for name in CASES if name != "diffugpt"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "trap", "fall"), TRAPS, ids=[f"{t[0]}-{t[1]}" for t in TRAPS])
def test_each_trap_of_a_family_fails_the_same_check(folder, name, trap, fall):
    ours = load(folder(name), torch.float32)
    with torch.no_grad():
        fall(ours)
    assert worst(ours, CASES[name]) > 10


# ---- what is stored --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_every_published_tensor_is_read_and_every_parameter_filled(name):
    plan = blueprint(CASES[name]["config"])
    assert isinstance(plan, MaskedBlueprint)
    with torch.device("meta"):
        model = plan.build()
    mine = {n for n, _ in model.named_parameters()} - set(plan.same)
    assert {part.ours for part in plan.parts} == mine
    theirs = {n for n in CASES[name]["tensors"] if not n.endswith(BUFFERS)}
    assert {t for part in plan.parts for t in part.theirs} == theirs


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith(("mdlm", "bd3lm"))])
def test_what_is_exported_is_what_was_read(folder, tmp_path, name):
    """Every tensor under its own name; the mask's vector goes back into its row, and what was trained with it."""
    ours = load(folder(name), torch.float32)
    stored, out = load_file(folder(name) / "model.safetensors"), export(ours, tmp_path / "out")
    written = load_file(out / "model.safetensors")
    assert written.keys() == stored.keys() and all(torch.equal(written[k], stored[k]) for k in stored)
    ids, hidden = hidden_text(VOCAB)
    assert torch.equal(load(out, torch.float32).logits(ids, hidden), ours.logits(ids, hidden))
    with torch.no_grad():
        ours.model.embed.mask.mul_(2)  # type: ignore[union-attr, operator]
    again = load(export(ours, tmp_path / "again"), torch.float32)
    assert torch.equal(again.model.embed.mask, ours.model.embed.mask)  # type: ignore[union-attr]


def test_folded_norms_have_no_published_form(folder, tmp_path):
    with pytest.raises(ValueError, match="folded into this model's weights"):
        export(load(folder("mdlm")), tmp_path / "out")


def test_a_diffugpt_is_known_by_its_tensors(tmp_path):
    """Its config is GPT-2's: the mask is that of the size it was published in."""
    case = json.loads(json.dumps(CASES["diffugpt"]))
    del case["config"]["mask_token_id"]
    with pytest.raises(ValueError, match="the mask is id 50257, and there are 97 ids"):
        load(written(case, tmp_path))
    named = {**case["config"], "mask_token_id": 95}
    (tmp_path / "config.json").write_text(json.dumps(named), encoding="utf-8")
    assert load(tmp_path).config.mask == 95


PUBLISHED = {
    "LLaDA-8B": {
        **CASES["llada"]["config"], "d_model": 4096, "n_heads": 32, "n_kv_heads": 32, "n_layers": 32,
        "mlp_hidden_size": 12288, "vocab_size": 126464, "embedding_size": 126464, "max_sequence_length": 4096,
        "mask_token_id": 126336, "eos_token_id": 126081,
    },
    "Dream-7B": {
        **CASES["dream"]["config"], "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "rope_theta": 1e6,
        "max_position_embeddings": 131072, "mask_token_id": 151666,
    },
}  # fmt: skip


@pytest.mark.parametrize(("name", "count"), [("LLaDA-8B", 8_015_581_184), ("Dream-7B", 7_615_616_512)])
def test_models_of_published_sizes_have_the_published_number_of_parameters(name, count):
    """And the vector of the mask, which is a row of the table."""
    plan = blueprint(PUBLISHED[name])
    with torch.device("meta"):
        model = plan.build()
    assert sum(p.numel() for p in model.parameters()) == count + plan.backbone.width


# ---- generation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_texts_are_as_long_as_asked_for_and_hold_no_mask(folder, name):
    ours = load(folder(name), torch.float32)
    ours.config = replace(ours.config, ends=())
    ours.settings = {}
    with torch.no_grad():  # a model that would write nothing else
        head = ours.model.heads["token"]
        head.weight[ours.config.mask] = 3 * head.weight.abs().sum(0)  # type: ignore[operator, index, union-attr]
    made = ours.generate([5, 6, 7], max_new_tokens=13, temperature=1.0, seed=3)
    assert len(made.ids) == 13 and ours.config.mask not in made.ids and made.text is None


@pytest.mark.parametrize("name", ["llada", "sdar", "fast-dllm-v2"])
def test_a_text_ends_before_an_end_that_nothing_unknown_precedes(folder, name):
    ours = load(folder(name), torch.float32)
    whole = ours.generate([5, 6, 7], max_new_tokens=16, temperature=0.0).ids
    ours.config = replace(ours.config, ends=(whole[5],))
    ends = [i for i, x in enumerate(whole) if x == whole[5]]
    assert ours.generate([5, 6, 7], max_new_tokens=16, temperature=0.0).ids == whole[: ends[0]]


@pytest.mark.parametrize("name", ["llada", "dream", "wedlm"])
def test_other_decoders_of_masks_decode_them(folder, name):
    """With a cache of what lies outside the block at work, and without it as one token after another would."""
    ours = load(folder(name), torch.float32)
    ours.config, ours.settings = replace(ours.config, ends=(), rule="confidence", threshold=None, within=4), {}
    settings = {"max_new_tokens": 12, "temperature": 0.0}
    own = ours.generate([5, 6, 7], **settings).ids
    plain = "fast-dllm+cache=none+block=4+threshold=none"
    assert ours.generate([5, 6, 7], decoder=plain, **settings).ids == own
    fast = ours.generate([5, 6, 7], decoder="fast-dllm+block=4+threshold=0.97", **settings)
    assert len(fast.ids) == 12 and sum(fast.rows) < 15 * fast.forwards


def test_the_command_line_continues_ids(folder, capsys):
    assert (
        main(["generate", str(folder("llada")), "--ids", "5,6,7", "--max-new-tokens", "8", "--temperature", "0"]) == 0
    )
    said = [int(word) for word in capsys.readouterr().out.split()]
    assert said == load(folder("llada")).generate([5, 6, 7], max_new_tokens=8, temperature=0.0).ids


def test_texts_and_conversations_are_continued_by_the_folders_own_tokenizer_and_template(tmp_path, capsys):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    case = json.loads(json.dumps(CASES["llada"]))
    case["tensors"] = {name: [300 if n == VOCAB else n for n in shape] for name, shape in case["tensors"].items()}
    written(case, tmp_path, vocab_size=300, embedding_size=300)
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator([""], trainers.BpeTrainer(special_tokens=["<eos>"], initial_alphabet=letters))
    inner.save(str(tmp_path / "tokenizer.json"))
    template = {"chat_template": "Q: {{ messages[0]['content'] }} A:"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(template), encoding="utf-8")
    model = load(tmp_path, torch.float32)
    for asked, flags in (("Hello", []), ("Q: Hello A:", ["--chat"])):
        made = model.generate(asked, max_new_tokens=12, temperature=0.0)
        assert made.text == model.tokenizer.decode(made.ids) and len(made.ids) == 12
        command = ["generate", str(tmp_path), "--prompt", "Hello", "--max-new-tokens", "12", "--temperature", "0"]
        assert main([*command, "--json", *flags]) == 0
        assert json.loads(capsys.readouterr().out)["text"] == made.text


def test_prompts_that_do_not_fit_are_refused(folder):
    dream, llada = (load(folder(name)) for name in ("dream", "llada"))
    with pytest.raises(ValueError, match="begins no text by itself"):
        dream.generate([], max_new_tokens=4)
    with pytest.raises(ValueError, match="this model takes 128 in all"):
        llada.generate([5] * 120, max_new_tokens=9)
    with pytest.raises(ValueError, match="came without a tokenizer"):
        llada.generate("a text")
    with pytest.raises(ValueError, match="a boolean as large"):
        llada.logits(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4))


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "complaint"),
    [
        ("llada", {"model_type": "llada2_moe"}, "models of type 'llada2_moe' are not understood; there are .*llada"),
        ("llada", {"alibi": True}, "alibi is True; only False is understood"),
        ("llada", {"block_type": "sequential"}, "block_type is 'sequential'"),
        ("llada", {"rope": False}, "rope is False"),
        ("llada", {"attention_layer_norm": True}, "attention_layer_norm is True"),
        ("llada", {"input_emb_norm": True}, "input_emb_norm is True"),
        ("llada", {"mask_token_id": 97}, "the mask is id 97, and there are 97 ids"),
        ("llada", {"relay_layer": 3}, "relay_layer = 3"),
        ("llada-moe", {"shared_expert_intermediate_size": 24}, "shared_expert_intermediate_size is 24"),
        ("llada-moe", {"moe_layer_freq": [0, 1, 1]}, "moe_layer_freq"),
        ("dream", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0}, "sliding windows"),
        ("fast-dllm-v2", {"use_relay": True}, "use_relay = True"),
        ("sdar", {"block_size": 0}, "block_size is a whole number from 1"),
        ("mdlm", {"time_conditioning": True}, "time_conditioning is True; only False is understood"),
        ("bd3lm", {"cross_attn": False}, "cross_attn is False"),
        ("bd3lm", {"causal": True}, "causal is True"),
        ("wedlm", {"mask_token_id": None}, "mask_token_id is a whole number"),
        ("wedlm", {"use_sliding_window": True}, "use_sliding_window is True"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(name, changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        blueprint({**CASES[name]["config"], **changes})
