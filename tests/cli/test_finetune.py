"""Fine-tuning as a user does it: a published folder and a file of conversations in, a run out that is in every way the
model it was; stopped, resumed, exported, and what mistakes are answered with."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from seriatim.cli import training
from seriatim.cli.main import main
from seriatim.data.base import Data, Texts
from seriatim.systems.published import Published
from seriatim.systems.text.next_token import NextToken
from seriatim.training.run import read_lines
from seriatim.verbs.export import export
from seriatim.verbs.load import load
from seriatim.verbs.train import train
from support.tiny_chat import says, write_chat_model, write_conversations

transformers = pytest.importorskip("transformers")

IDS = torch.randint(0, 250, (2, 20), generator=torch.Generator().manual_seed(0))
SETTINGS = ["--steps", "16", "--batch", "4", "--learning-rate", "2e-2", "--seed", "3"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("base"), dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def talks(tmp_path_factory) -> Path:
    return write_conversations(tmp_path_factory.mktemp("data") / "talks.jsonl")


@pytest.fixture(scope="module")
def command(base, talks):
    return ["train", "next-token", "--from", str(base), "--data", str(talks), *SETTINGS]


@pytest.fixture(scope="module")
def adapter_run(command, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "adapter"
    assert main([*command, "--lora", "8", "--lora-alpha", "32", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def whole_run(command, tmp_path_factory) -> Path:
    """All weights."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert main([*command, "--out", str(out)]) == 0
    return out


# ---- a run -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["adapter_run", "whole_run"])
def test_the_loss_falls_and_the_run_is_the_model_it_was(kind, request):
    run = request.getfixturevalue(kind)
    losses = [line["loss"] for line in read_lines(run / "metrics.jsonl")]
    assert sum(losses[-4:]) / 4 < 0.8 * losses[0]
    card = json.loads((run / "run.json").read_text())
    base, made = load(card["from"]), load(run)
    assert isinstance(made, Published) and made.chat == base.chat and made.raw["model_type"] == "llama"
    assert made.tokenizer.encode("Hi") == base.tokenizer.encode("Hi") and made.stop == base.stop
    assert next(made.parameters()).dtype == next(base.parameters()).dtype
    assert not torch.equal(made.logits(IDS), base.logits(IDS))
    assert (run / "answer.txt").read_text().startswith("user: ")


def test_an_adapter_alone_is_kept_and_it_is_small(adapter_run, base):
    stored, state = load_file(adapter_run / "adapter_model.safetensors"), load_file(adapter_run / "state.safetensors")
    assert {name.split(".")[-2] for name in stored} == {"lora_A", "lora_B"}
    assert not (adapter_run / "model.safetensors").exists() and not (adapter_run / "config.json").exists()
    assert sum(x.numel() for n, x in state.items() if n.startswith("model.")) == sum(x.numel() for x in stored.values())
    about = json.loads((adapter_run / "adapter_config.json").read_text())
    assert about["base_model_name_or_path"] == str(base) and (about["r"], about["lora_alpha"]) == (8, 32)


def test_peft_reads_the_run(adapter_run, base):
    peft = pytest.importorskip("peft")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        said = peft.PeftModel.from_pretrained(theirs, adapter_run).eval()(IDS).logits
    assert torch.allclose(said, load(adapter_run, torch.float32).logits(IDS), atol=1e-4)


@pytest.mark.parametrize("kind", ["adapter_run", "whole_run"])
def test_its_export_is_read_by_transformers_with_equal_logits(kind, request, tmp_path):
    run = request.getfixturevalue(kind)
    assert main(["export", str(run), str(tmp_path / "out"), "--dtype", "float32"]) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    want = load(tmp_path / "out").logits(IDS)
    with torch.no_grad():
        assert torch.allclose(theirs(IDS).logits, want, atol=1e-4) and float(want.std()) > 0.1
    assert torch.allclose(want, load(run).logits(IDS).float(), atol=0.05 * float(want.abs().max()))
    chat = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    talk = [says("user", "one")]
    assert chat.apply_chat_template(talk, add_generation_prompt=True)["input_ids"] == load(run).chat_ids(talk)


def test_a_run_of_all_weights_is_a_published_folder_by_itself(whole_run):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(whole_run).eval()
    with torch.no_grad():
        assert torch.equal(theirs.model.embed_tokens.weight, load(whole_run).model.embed.table)
        assert theirs.dtype == torch.bfloat16


def test_it_converses_and_is_evaluated_on_answers(adapter_run, talks, capsys):
    assert main(["generate", str(adapter_run), "--chat", "--prompt", "one", "--temperature", "0", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["ids"] and said["forwards"] <= 200
    assert main(["evaluate", str(adapter_run), "--json"]) == 0  # on the data it was trained on
    ours = json.loads(capsys.readouterr().out)
    last = read_lines(adapter_run / "metrics.jsonl")[-1]
    assert ours["bits_per_byte"] == pytest.approx(last["held_out_bits_per_byte"], rel=0.02)  # trained in bfloat16
    assert main(["evaluate", json.loads((adapter_run / "run.json").read_text())["from"], "--data", str(talks)]) == 0


@pytest.mark.parametrize("lora", [["--lora", "8", "--lora-alpha", "32"], []], ids=["adapter", "all weights"])
def test_stopped_by_ctrl_c_and_resumed_it_is_as_if_never_stopped(
    lora, command, adapter_run, whole_run, tmp_path, monkeypatch, capsys
):
    class Impatient(training.Bar):
        def update(self, step, steps, figures):
            super().update(step, steps, figures)
            if step == 9:
                signal.raise_signal(signal.SIGINT)

    stopped, whole = tmp_path / "stopped", adapter_run if lora else whole_run
    with monkeypatch.context() as patch:
        patch.setattr(training, "Bar", Impatient)
        assert main([*command, *lora, "--out", str(stopped)]) == 130
    assert len(read_lines(stopped / "metrics.jsonl")) == 9
    load(stopped)
    assert main([*command, *lora, "--out", str(stopped), "--batch", "8", "--resume"]) == 2
    assert "started with other settings" in capsys.readouterr().err
    if lora:
        assert main([*command, "--lora", "4", "--out", str(stopped), "--resume"]) == 2
        assert json.loads((stopped / "adapter_config.json").read_text())["r"] == 8
    assert main([*command, *lora, "--out", str(stopped), "--resume"]) == 0
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    assert (stopped / name).read_bytes() == (whole / name).read_bytes()
    losses = [[line["loss"] for line in read_lines(run / "metrics.jsonl")] for run in (stopped, whole)]
    assert losses[0] == losses[1] and len(losses[0]) == 16


# ---- other bases and data --------------------------------------------------------------------------------------------


def test_texts_are_packed_with_an_end_behind_each(base, tmp_path):
    for n in range(12):
        (tmp_path / f"{n}.txt").write_text(f"text number {n} " * 10, encoding="utf-8")
    made = train("next-token", tmp_path, from_=base, lora=4, out=tmp_path / "run", settings={"steps": 2, "batch": 2})
    examples = made.system.examples([f"{n}" for n in range(200)])
    assert examples.length == 160 and int((examples.ids == made.system.stop[0]).sum()) == 200
    assert any("windows are" in note for note in made.data.notes), "the held-out text is shorter than a window"
    assert made.history[-1]["held_out_loss"] > 0 and isinstance(load(tmp_path / "run"), Published)


@pytest.mark.parametrize("lora", [None, 4])
def test_a_run_of_ours_is_trained_further(lora, tmp_path):
    text = "The quick brown fox jumps over the lazy dog.\n" * 40
    data = Data("fox", "text", Texts((text,)), Texts((text[:500],)))
    sizes = {"steps": 2, "batch": 2, "length": 32, "width": 32, "depth": 1, "heads": 2}
    train("next-token", data, out=tmp_path / "first", settings=sizes)
    more = {"steps": 3, "batch": 2, "learning_rate": 1e-2}
    made = train("next-token", data, from_=tmp_path / "first", lora=lora, out=tmp_path / "more", settings=more)
    first, again = load(tmp_path / "first"), load(tmp_path / "more")
    assert isinstance(again, NextToken) and again.config == first.config
    assert torch.allclose(again.logits(IDS), made.system.eval().logits(IDS), atol=1e-5)
    assert not torch.equal(again.logits(IDS), first.logits(IDS))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(export(again, tmp_path / "out")).eval()
    bos = torch.full((2, 1), again.tokenizer.special["bos"])
    with torch.no_grad():
        assert torch.allclose(theirs(torch.cat([bos, IDS], 1)).logits[:, 1:], again.logits(IDS), atol=1e-4)


def test_an_adapter_is_trained_on_an_adapter(adapter_run, talks, tmp_path):
    settings = {"steps": 2, "batch": 2, "lora_targets": "q_proj,v_proj"}
    made = train("next-token", talks, from_=adapter_run, lora=2, out=tmp_path / "run", settings=settings)
    want = made.system.logits(IDS)  # in float32; what is loaded has the format of the first base
    assert torch.allclose(load(tmp_path / "run").logits(IDS).float(), want, atol=0.05 * float(want.abs().max()))
    about = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert about["base_model_name_or_path"] == str(adapter_run) and about["target_modules"] == ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "next-token", "--from", "nowhere", "--data", "{talks}"], "there is no folder nowhere"),
        (["train", "next-token", "--from", "{base}"], "say on what to train the model further"),
        (["train", "next-token", "--from", "{base}", "--data", "gone.jsonl"], "no data at 'gone.jsonl'"),
        (["train", "next-token", "--lora", "8"], "an adapter is on a model that there is already"),
        (["train", "ilm", "--from", "{base}", "--data", "{talks}"], "next-token models are trained further"),
        (["train", "next-token", "--from", "{base}", "--data", "{talks}", "--size", "tiny"], "are not chosen anew"),
        (["train", "next-token", "--from", "{base}", "--data", "{talks}", "--widht", "3"], "no setting 'widht'"),
        (["train", "next-token", "--from", "{base}", "--data", "{talks}", "--lenght", "3"], "did you mean length?"),
        (["train", "next-token", "--from", "{base}", "--data", "{talks}", "--length", "999"], "takes 160 tokens"),
        (["train", "next-token", "--from", "{base}", "--data", "{talks}", "--lora", "99"], "no smaller than the"),
        (["train", "next-token", "--from", "{base}", "--data", "{talks}", "--out", "{adapter}"], "holds a training"),
        (["train", "next-token", "--data", "{talks}"], "holds conversations: they train a next-token model further"),
    ],
)
def test_mistakes_are_answered_with_what_to_do(
    arguments, said, base, talks, adapter_run, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    filled = [a.format(base=base, talks=talks, adapter=adapter_run) for a in arguments]
    assert main(filled) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.rglob("run.json"))
