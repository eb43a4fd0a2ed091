"""Folders of published models: read, written, and refused with what is wrong."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from seriatim.cli.main import main
from seriatim.systems.published import load_published
from seriatim.systems.text.next_token import Config, NextToken
from seriatim.verbs.export import export
from seriatim.verbs.load import load

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
IDS = torch.randint(3, 300, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """A folder that `transformers` wrote, with a tokenizer of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=letters, special_tokens=["<s>"], show_progress=False)
    tokenizer.train_from_iterator(["the quick brown fox"], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def copy(published, tmp_path) -> Path:
    for file in published.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def config_with(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# ---- reading and writing ---------------------------------------------------------------------------------------------


def test_one_object_reads_publishes_and_reads_again(published, tmp_path):
    ours = load(published)
    again = load(export(ours, tmp_path / "again"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(ours.logits(IDS), again.logits(IDS))
    with torch.no_grad():
        assert float((theirs(IDS).logits - ours.logits(IDS)).abs().max()) < 1e-5


@pytest.mark.parametrize("tied", [True, False])
def test_a_run_of_ours_is_a_llama_elsewhere(tmp_path, tied):
    """Its learned start is their first id; logits of everything behind it are equal."""
    torch.manual_seed(0)
    system = NextToken(Config(length=64, width=32, depth=2, heads=2, tied=tied)).eval()
    with torch.no_grad():
        for p in system.parameters():
            p.add_(0.1 * torch.randn_like(p))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(export(system, tmp_path / "out")).eval()
    ids = torch.randint(256, (2, 30), generator=torch.Generator().manual_seed(1))
    bos = torch.full((2, 1), system.tokenizer.special["bos"])
    with torch.no_grad():
        want = theirs(torch.cat([bos, ids], 1)).logits
    assert float((want[:, 1:] - system.logits(ids)).abs().max()) < 1e-5
    assert float(want.std()) > 0.1


def test_a_large_model_is_written_in_several_files(published, tmp_path, monkeypatch):
    from seriatim.interop import export as writer

    monkeypatch.setattr(writer, "LARGEST", 20_000)
    out = export(published, tmp_path / "out")
    assert len(list(out.glob("model-*.safetensors"))) > 2
    assert torch.equal(load(out).logits(IDS), load(published).logits(IDS))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(theirs.model.embed_tokens.weight, load(published).model.embed.table)


def test_text_is_generated_at_the_terminal(published, capsys):
    arguments = ["generate", str(published), "--prompt", "the fox", "--max-new-tokens", "8", "--temperature", "0"]
    assert main([*arguments, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert len(said["ids"]) == said["forwards"] == 8 and said["tokens_per_second"] > 0
    assert said["mean_accepted_length"] == 1.0
    assert main(arguments) == 0
    assert capsys.readouterr().out == "the fox" + said["text"] + "\n"


def test_a_model_without_a_tokenizer_works_on_ids(copy, capsys):
    (copy / "tokenizer.json").unlink()
    assert main(["generate", str(copy), "--ids", "5,6,7", "--max-new-tokens", "4", "--temperature", "0", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["text"] is None and len(said["ids"]) == 4
    assert main(["generate", str(copy), "--prompt", "x"]) == 2
    assert "came without a tokenizer: give ids" in capsys.readouterr().err


def test_ends_of_text_are_those_of_the_generation_config(copy):
    ours = load(copy)
    first = ours.generate(IDS[0], temperature=0, max_new_tokens=12, stop=()).ids
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [299, first[3]]}))
    assert load(copy).stop == (299, first[3])
    assert load(copy).generate(IDS[0], temperature=0, max_new_tokens=12).ids == first[: first.index(first[3]) + 1]


def test_log_probabilities_are_those_of_the_logits(published):
    ours = load(published)
    made = ours.generate(IDS[0], temperature=0.9, max_new_tokens=6, seed=3, logprobs=True, stop=())
    whole = torch.cat([IDS[0], torch.tensor(made.ids)])[None]
    want = torch.log_softmax(ours.logits(whole)[0, -7:-1], -1).gather(1, whole[0, -6:, None])[:, 0]
    assert torch.allclose(torch.tensor(made.logprobs), want, atol=1e-5)
    every = torch.log_softmax(ours.logits(whole)[0, :-1], -1).gather(1, whole[0, 1:, None]).sum()
    assert float((ours.log_prob(whole)[0] - every).abs()) < 1e-3


def test_a_published_model_is_evaluated_on_a_text(published, tmp_path, capsys):
    """Bits per byte of a byte-level tokenizer: all bytes of the text count."""
    ours = load(published)
    sentence = "The quick brown f\u00f6x jumps over the lazy dog. "
    assert int(ours.tokenizer.bytes_of[ours.tokenizer.encode(sentence)].sum()) == len(sentence.encode())
    text = tmp_path / "text.txt"
    text.write_text(sentence * 200, encoding="utf-8")
    assert main(["evaluate", str(published), "--data", str(text), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["likelihood"] == "exact" and said["bits_per_byte"] > 1
    assert main(["evaluate", str(published)]) == 2
    assert "say on which data" in capsys.readouterr().err


# ---- broken and hostile files ----------------------------------------------------------------------------------------


def refused(folder: Path, *says: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        load_published(folder)
    assert all(part in str(error.value) for part in says), str(error.value)


def test_pickles_are_refused(copy):
    state = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(pickle.dumps(state))
    refused(copy, "pytorch_model.bin", "pickles, which run any code")


def test_missing_unexpected_and_misshapen_tensors_are_named(copy):
    file = copy / "model.safetensors"
    state = load_file(file)
    save_file({k: v for k, v in state.items() if "q_proj" not in k}, file)
    refused(copy, "lacks model.layers.0.self_attn.q_proj.weight", "layers.1")
    save_file({**state, "model.extra.weight": torch.zeros(2)}, file)
    refused(copy, "does not explain: model.extra.weight")
    save_file({**state, "model.layers.1.mlp.down_proj.weight": torch.zeros(32, 40)}, file)
    refused(copy, "backbone.layers.1.down (32, 48)", "model.layers.1.mlp.down_proj.weight (32, 40)")


def test_a_truncated_file_is_told_from_a_missing_one(copy):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    refused(copy, "cannot be read", "cut short")
    file.unlink()
    refused(copy, "holds no *.safetensors file")
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    refused(copy, "lacks one.safetensors of its 1 files")


def test_an_index_that_leads_out_of_the_folder_is_refused(copy):
    for name in ("../secret.safetensors", "/etc/passwd", "sub/one.safetensors"):
        (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        refused(copy, "stand in the folder itself")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden_size": 10**9}, "hidden_size is a whole number from 1"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is a whole number from 1"),
        ({"vocab_size": 9_000_000, "hidden_size": 9_000_000}, "parameters: that is no model"),
        ({"num_key_value_heads": 3}, "cannot share 3 key-value heads"),
        ({"model_type": "unheard"}, "models of type 'unheard' are not understood; there are llama"),
        ({"hidden_act": "sine"}, "hidden_act is 'sine'"),
        ({"query_scaling_factor": 2.0}, "not understood and may change what is computed: query_scaling_factor = 2.0"),
        ({"rope_parameters": {"rope_type": "spiral"}}, "rotary embedding of type 'spiral'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "twist": 1}}, "rotary parameters twist"),
        ({"quantization_config": {"bits": 4}}, "quantised weights are not read"),
        ({"hidden_size": "32"}, "hidden_size is a whole number from 1"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps is a positive number"),
        ({"rope_interleaved": True}, "may change what is computed: rope_interleaved"),
    ],
)
def test_configs_that_are_absurd_or_not_understood_are_refused_before_anything_is_made(copy, changes, says):
    config_with(copy, **changes)
    refused(copy, says)


def test_a_config_that_is_none_is_said_to_be_none(copy):
    (copy / "config.json").write_text("{half")
    refused(copy, "is no JSON")
    (copy / "config.json").write_text("[]")
    refused(copy, "does not say what model")
    (copy / "config.json").unlink()
    refused(copy, "neither a run (run.json) nor a published model")


def test_a_sentencepiece_tokenizer_alone_is_answered_with_how_to_convert_it(copy):
    (copy / "tokenizer.json").unlink()
    (copy / "tokenizer.model").write_bytes(b"x")
    refused(copy, "tokenizer.model (SentencePiece) only", "AutoTokenizer")


def test_prompts_that_cannot_be_are_refused(published):
    ours = load(published)
    for prompt, says in (
        ([], "begins no text by itself"),
        ([1] * 60, "takes 64 in all"),
        ([400], "ids of 'token' lie in"),
    ):
        with pytest.raises(ValueError, match=says):
            ours.generate(prompt, max_new_tokens=10)
    with pytest.raises(ValueError, match="no decoder 'magic'"):
        ours.generate([1], "magic")


def test_number_formats_go_by_name(copy):
    for kind in ("bfloat16", torch.bfloat16):
        assert next(load(copy, kind).model.parameters()).dtype == torch.bfloat16
    for wrong in ("bf16", "int8", torch.int32):
        with pytest.raises(ValueError, match="a number format is float32, bfloat16"):
            load(copy, wrong)


def test_a_mistyped_path_is_not_asked_of_the_hub(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    monkeypatch.setattr("seriatim.verbs.load.from_hub", lambda name: pytest.fail(f"asked for {name}"))
    assert main(["generate", "runs/vra"]) == 2
    assert "there is no folder runs/vra" in capsys.readouterr().err


def test_a_name_on_the_hub_without_a_network_is_answered(monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert main(["generate", "nobody/nothing-at-all"]) == 2
    assert "there is no folder nobody/nothing-at-all" in capsys.readouterr().err


# ---- GGUF ------------------------------------------------------------------------------------------------------------


def test_a_gguf_file_is_the_model_it_was_made_of(published, tmp_path):
    """Written here as llama.cpp's converter does: heads turned in pairs, matrices in 8 bits."""
    gguf = pytest.importorskip("gguf")
    from gguf.quants import quantize

    state, path = load_file(published / "model.safetensors"), tmp_path / "model.gguf"
    tokenizer = json.loads((published / "tokenizer.json").read_text())["model"]
    writer = gguf.GGUFWriter(str(path), "llama")
    for name, value in (
        ("context_length", 64), ("embedding_length", 32), ("block_count", 2), ("feed_forward_length", 48),
        ("head_count", 4), ("head_count_kv", 2), ("layer_norm_rms_eps", 1e-6), ("rope_dimension_count", 8),
    ):  # fmt: skip
        getattr(writer, f"add_{name}")(value)
    writer.add_tokenizer_model("gpt2")
    tokens = sorted(tokenizer["vocab"], key=tokenizer["vocab"].get)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if t == "<s>" else 1 for t in tokens])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["merges"]])
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    from seriatim.interop.gguf import LAYER

    for name, x in state.items():
        stem = name.removesuffix(".weight")
        theirs = names.get(stem)
        if theirs is None:
            _, _, layer, part = stem.split(".", 3)
            theirs = f"blk.{layer}." + next(k for k, v in LAYER.items() if v == part)
        if "q_proj" in name or "k_proj" in name:
            x = x.unflatten(0, (-1, 2, 4)).transpose(1, 2).flatten(0, 2)
        kind = (
            gguf.GGMLQuantizationType.Q8_0 if x.dim() == 2 and x.shape[1] % 32 == 0 else gguf.GGMLQuantizationType.F32
        )
        writer.add_tensor(f"{theirs}.weight", quantize(x.float().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours, plain = load(path), load(published)
    gap = float((ours.logits(IDS) - plain.logits(IDS)).abs().max() / plain.logits(IDS).abs().max())
    assert 0 < gap < 0.05, "8 bits differ a little"
    assert ours.tokenizer.encode("the fox") == plain.tokenizer.encode("the fox")
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match="cannot be read as GGUF"):
        load(path)
