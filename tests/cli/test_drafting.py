"""Draft parts as a user trains and uses them: any model and text in, a small folder out that decodes that model, and no
other; and what mistakes are answered with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from seriatim.cli.main import main
from seriatim.data.base import Data, Texts
from seriatim.posttraining.drafting import Base, save_part
from seriatim.posttraining.heads import Hydra, HydraConfig, Medusa, MedusaConfig
from seriatim.training.run import read_lines
from seriatim.verbs import drafting
from seriatim.verbs.load import load
from seriatim.verbs.train import train
from support.tiny_chat import write_chat_model, write_conversations

transformers = pytest.importorskip("transformers")

SETTINGS = ["--steps", "24", "--batch", "4", "--learning-rate", "1e-2", "--window", "32", "--tokens", "640"]
TEXT = "the cat sat on the mat and the dog sat on the log; " * 40


@pytest.fixture(scope="module", autouse=True)
def surroundings(tmp_path_factory):
    """One thread; states are kept in a folder of the tests."""
    before, patch = torch.get_num_threads(), pytest.MonkeyPatch()
    torch.set_num_threads(1)
    patch.setattr(drafting, "HOME", tmp_path_factory.mktemp("home"))
    yield drafting.HOME
    patch.undo()
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("base"), dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for i in range(4):
        (folder / f"{i}.txt").write_text(TEXT[i:])
    return folder


@pytest.fixture(scope="module")
def trained(base, texts, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "hydra"
    command = ["train", "hydra", "--base", str(base), "--data", str(texts), "--out", str(out), "--heads", "3"]
    assert main([*command, *SETTINGS]) == 0
    return out


def test_a_training_leaves_a_part_that_knows_its_base_and_how_it_was_made(trained, base):
    card = json.loads((trained / "draft.json").read_text())
    assert card["key"] == "hydra" and card["config"]["heads"] == 3
    of = Base(load(base))
    assert card["base"] == {
        "name": str(base), "fingerprint": of.fingerprint, "vocab": of.vocab, "width": 32, "sample": of.sample,
    }  # fmt: skip
    facts = card["training"]
    assert facts["steps"] == 24 and facts["recipe"]["learning_rate"] == 1e-2 and facts["reading"]["window"] == 32
    assert len(facts["chance"]) == 3 and all(0 <= sum(row) <= 1.001 for row in facts["chance"])
    assert (trained / "draft.safetensors").stat().st_size < 100_000
    lines = read_lines(trained / "metrics.jsonl")
    assert len(lines) == 24 and lines[-1]["held_out_loss"] < lines[0]["loss"]
    assert {"held_out_top1_1", "held_out_top5_3"} <= lines[-1].keys()


def test_it_leaves_something_to_look_at(trained):
    for name in ("accuracy.png", "loss.png"):
        assert (trained / name).read_bytes()[:4] == b"\x89PNG"
    page = (trained / "drafted.html").read_text()
    assert page.count("<span") > 20 and "def read(path)" in page
    summary = json.loads((trained / "summary.json").read_text())
    assert summary["tokens_per_forward"] >= 1 and 0 <= summary["accepted"] <= 1


@pytest.mark.parametrize("more", [[], ["--temperature", "0.8", "--seed", "3"], ["--weights", "int8"]])
def test_generation_with_it_writes_what_plain_decoding_writes(trained, base, capsys, more):
    """In float32: bfloat16 rows depend on how many are computed together."""
    command = ["generate", str(base), "--prompt", "the cat", "--length", "24", "--dtype", "float32", "--json", *more]
    said = []
    for decoder in ("ancestral", f"hydra:{trained}", f"hydra:{trained}+nodes=3"):
        assert (
            main([*command, *(["--temperature", "0"] if "--temperature" not in more else []), "--decoder", decoder])
            == 0
        )
        said.append(json.loads(capsys.readouterr().out))
    assert said[0]["text"] == said[1]["text"] == said[2]["text"]


def test_states_are_computed_once_for_all_parts_and_seeds(base, texts, trained, tmp_path, monkeypatch, surroundings):
    before = {p.name: p.stat().st_mtime_ns for p in (surroundings / "states").glob("*.bf16")}
    assert len(before) == 2, "of both sides"
    monkeypatch.setattr(Base, "states", None)
    for key, seed in (("medusa", 0), ("hydra", 1)):
        settings = {"steps": 2, "batch": 4, "window": 32, "tokens": 640, "seed": seed}
        train(key, texts, from_=base, out=tmp_path / f"{key}{seed}", settings=settings)
    assert {p.name: p.stat().st_mtime_ns for p in (surroundings / "states").glob("*.bf16")} == before


def test_hydra_plus_is_a_size(base, texts, tmp_path):
    settings = {"steps": 2, "batch": 2, "window": 32, "tokens": 320, "heads": 2, "draft_vocab": 20}
    run = train("hydra", texts, from_=base, out=tmp_path, size="plus", settings=settings)
    card = json.loads((tmp_path / "draft.json").read_text())
    assert card["config"] | {"layers": 4, "prefix": True, "distill": True, "draft_vocab": 20} == card["config"]
    assert any("20 tokens are drafted, which make up" in note for note in run.data.notes)
    model = load(base, dtype=torch.float32)
    plain = model.generate(["the cat", "a"], max_new_tokens=20, temperature=0)
    ours = model.generate(["the cat", "a"], decoder=f"hydra:{tmp_path}", max_new_tokens=20, temperature=0)
    assert [g.ids for g in ours] == [g.ids for g in plain]


def test_conversations_are_read_by_the_models_template(base, tmp_path):
    talks = write_conversations(tmp_path / "talks.jsonl")
    settings = {"steps": 2, "batch": 2, "window": 24}
    run = train("medusa", talks, from_=base, out=tmp_path / "run", settings=settings)
    assert run.history[-1]["held_out_loss"] > 0
    assert json.loads((tmp_path / "run" / "draft.json").read_text())["training"]["data"] == str(talks)


def test_a_run_of_ours_has_parts_too(tmp_path):
    """With a learned start in front, over bytes."""
    data = Data("mine", "text", Texts([TEXT] * 3), Texts([TEXT]))
    settings = {"steps": 2, "batch": 2, "length": 64, "width": 16, "depth": 1, "heads": 2}
    train("next-token", data, out=tmp_path / "base", settings=settings)
    train("medusa", data, from_=tmp_path / "base", out=tmp_path / "part", settings={"steps": 3, "batch": 2})
    model = load(tmp_path / "base")
    ours = model.generate("the", decoder=f"medusa:{tmp_path / 'part'}", max_new_tokens=30, temperature=0)
    assert ours.ids == model.generate("the", max_new_tokens=30, temperature=0).ids and ours.drafted > 0


def test_a_training_goes_on_where_it_was(base, texts, tmp_path):
    settings = {"steps": 6, "batch": 4, "window": 32, "tokens": 640, "heads": 2}
    whole = train("medusa", texts, from_=base, out=tmp_path / "whole", settings=settings)

    class Stops:
        def __init__(self, name: str):
            self.name = name

        def update(self, step, steps, figures):
            if self.name == "medusa" and step == 3:
                raise KeyboardInterrupt

        def close(self):
            """Nothing to close."""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("seriatim.training.trainer.SAVE_EVERY", 0.0)
        with pytest.raises(KeyboardInterrupt):
            train("medusa", texts, from_=base, out=tmp_path / "cut", settings=settings, bar=Stops)
    train("medusa", texts, from_=base, out=tmp_path / "cut", settings=settings, resume=True)
    files = [(tmp_path / x / "draft.safetensors").read_bytes() for x in ("whole", "cut")]
    assert files[0] == files[1] and len(whole.history) == 6
    with pytest.raises(ValueError, match="holds a training already"):
        train("medusa", texts, from_=base, out=tmp_path / "cut", settings=settings)


# ---- in the zoo ------------------------------------------------------------------------------------------------------


def test_what_ships_for_a_model_is_found_by_its_fingerprint(base, tmp_path, monkeypatch):
    model = load(base)
    other = write_chat_model(tmp_path / "other", dtype=torch.bfloat16, initializer_range=0.3)
    monkeypatch.setattr("seriatim.verbs.load.ZOO", (tmp_path / "zoo",))
    with pytest.raises(FileNotFoundError, match="zoo has medusa for no model yet"):
        model.generate("the", decoder="medusa:zoo")
    for name, system in (("a", load(other)), ("b", model)):
        save_part(
            Medusa(MedusaConfig(heads=2), Base(system)), Base(system), tmp_path / "zoo" / name / "draft-medusa", name
        )
    assert model.generate("the", decoder="medusa:zoo", max_new_tokens=4).ids
    shutil.rmtree(tmp_path / "zoo" / "b")
    with pytest.raises(FileNotFoundError, match="zoo has medusa for a, and this model is llama"):
        model.generate("the", decoder="medusa:zoo")


def test_a_part_is_read_once_and_again_when_its_files_change(base, tmp_path, monkeypatch):
    from seriatim.systems import draft_parts

    model, read = load(base), []
    real = draft_parts.load_part
    monkeypatch.setattr(draft_parts, "load_part", lambda *a: read.append(1) or real(*a))
    for count in (1, 2):
        save_part(Medusa(MedusaConfig(heads=2), Base(model)), Base(model), tmp_path)
        for nodes in (3, 4, 3):
            model.generate("the", decoder=f"medusa:{tmp_path}+nodes={nodes}", max_new_tokens=4)
        assert len(read) == count


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "changes", "message"), [
    ("hydra", {"from_": None}, "is trained beside a model that there is already: say which"),
    ("hydra", {"lora": 4}, "no adapter and no tokenizer to choose"),
    ("hydra", {"tokenizer": "bytes"}, "no adapter and no tokenizer to choose"),
    ("hydra", {"size": "plsu"}, "hydra comes in plain, plus, not in 'plsu'"),
    ("medusa", {"size": "plus"}, "medusa comes in one size"),
    ("hydra", {"settings": {"head": 3}}, "no setting 'head'; did you mean heads"),
    ("hydra", {"settings": {"window": 10_000}}, "a window of 10000 is asked for"),
    ("hydra", {"settings": {"window": 1}}, "windows of at least 2"),
    ("hydra", {"settings": {"heads": 0}}, "at least 1 head"),
    ("hydra", {"settings": {"draft_vocab": 10**6}}, "draft_vocab is 1,000,000, and the base has"),
])  # fmt: skip
def test_mistaken_trainings_are_refused_before_anything_is_computed(key, changes, message, base, texts, tmp_path):
    settings = {"data": texts, "from_": base, "out": tmp_path / "run", **changes}
    with pytest.raises(ValueError, match=message):
        train(key, **settings)
    assert not (tmp_path / "run").exists()


def test_bases_that_nothing_drafts_for_are_refused(tmp_path, texts):
    with pytest.raises(ValueError, match="is trained beside next-token models"):
        train("medusa", texts, from_="zoo:var", out=tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        train("medusa", texts, from_=tmp_path / "nothing", out=tmp_path / "run")


@pytest.mark.parametrize(("spec", "error", "message"), [
    ("hydra", ValueError, "name the folder of what was trained behind the decoder, as in hydra:runs/hydra"),
    ("hydra:{empty}", FileNotFoundError, "there is no trained hydra in"),
    ("medusa:{trained}", ValueError, "holds a part of hydra, and medusa is asked for"),
    ("hydra:{trained}+nodes=0", ValueError, "at least 1 node"),
    ("hydra:{trained}+nods=3", ValueError, "no option 'nods'"),
    ("medusa:{published}", ValueError, "is a pickle"),
])  # fmt: skip
def test_mistaken_sources_are_answered(spec, error, message, base, trained, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "published").mkdir()
    (tmp_path / "published" / "config.json").write_text("{}")
    (tmp_path / "published" / "medusa_lm_head.pt").write_bytes(b"x")
    places = {"empty": tmp_path / "empty", "trained": trained, "published": tmp_path / "published"}
    with pytest.raises(error, match=message):
        load(base).generate("the", decoder=spec.format(**places))


def test_heads_of_another_base_are_refused_on_the_command_line(trained, tmp_path, capsys):
    other = write_chat_model(tmp_path / "other", dtype=torch.bfloat16, initializer_range=0.3)
    assert main(["generate", str(other), "--prompt", "a", "--decoder", f"hydra:{trained}"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "was trained for" in said and "a part fits the base it was trained for" in said


def test_a_part_is_not_taken_for_a_model(trained):
    with pytest.raises(ValueError, match=r"is a part beside .*, and no model: decode that by --decoder hydra:"):
        load(trained)


def test_published_heads_beside_their_config_decode(base, tmp_path):
    """Hydra heads in the released layout, of random weights: greedy texts are those of the model."""
    model = load(base, dtype=torch.float32)
    part = Hydra(HydraConfig(heads=2, own_output=True), Base(model))
    tensors = {}
    for i in range(2):
        keep, gate = part.first[i].detach().chunk(2)
        keep_bias, gate_bias = part.first_bias[i].detach().chunk(2)
        tensors |= {
            f"hydra_mlp.{i}.0.res_connection.weight": keep, f"hydra_mlp.{i}.0.res_connection.bias": keep_bias,
            f"hydra_mlp.{i}.0.linear.weight": gate, f"hydra_mlp.{i}.0.linear.bias": gate_bias,
            f"hydra_lm_head.{i}.weight": part.output.weight[i].detach(),
            f"hydra_lm_head.{i}.bias": part.output.bias[i].detach(),
        }  # fmt: skip
    torch.save({k: v.clone() for k, v in tensors.items()}, tmp_path / "hydra_lm_head.pt")
    (tmp_path / "config.json").write_text(json.dumps({"hydra_num_layers": 1, "grounded_heads": True}))
    ours = model.generate("the cat", decoder=f"hydra:{tmp_path}+pickled=true", max_new_tokens=20, temperature=0)
    assert ours.ids == model.generate("the cat", max_new_tokens=20, temperature=0).ids and ours.drafted > 0
