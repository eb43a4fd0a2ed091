"""Train, generate, evaluate and compare as a user does: what comes out, and what mistakes are answered with."""

from __future__ import annotations

import json
import time

import pytest
import torch
from PIL import Image

from seriatim.cli.main import main
from seriatim.cli.training import settings_of
from seriatim.verbs.train import train

TINY = ["--steps", "3", "--width", "16", "--depth", "1", "--heads", "2"]


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text("The quick brown fox jumps over the lazy dog.\n\n" * 400, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def text_run(tmp_path_factory, text_file):
    out = tmp_path_factory.mktemp("runs") / "text"
    arguments = ["train", "next-token", "--data", str(text_file), "--out", str(out), "--length", "64", "--batch", "2"]
    assert main([*arguments, *TINY]) == 0
    return out


@pytest.fixture(scope="module")
def picture_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "raster"
    assert main(["train", "raster-ar", "--out", str(out), *TINY]) == 0
    return out


def test_a_run_says_what_it_is_and_leaves_things_to_look_at(text_run, picture_run):
    for run, key in ((text_run, "next-token"), (picture_run, "raster-ar")):
        card = json.loads((run / "run.json").read_text(encoding="utf-8"))
        assert card["system"] == key and card["config"]["width"] == 16 and card["recipe"]["steps"] == 3
        assert len((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) == 3
        assert Image.open(run / "loss.png").size[0] > 100
    assert Image.open(picture_run / "film.gif").n_frames > 3
    assert (text_run / "continuation.txt").read_text(encoding="utf-8").startswith("def read(path")


def test_text_is_generated_the_same_for_the_same_seed(text_run, capsys):
    texts = []
    for seed in ("1", "1", "2"):
        assert main(["generate", str(text_run), "--prompt", "The ", "--length", "20", "--seed", seed, "--json"]) == 0
        texts.append(json.loads(capsys.readouterr().out)["text"])
    assert texts[0] == texts[1] != texts[2]


def test_lossless_decoders_write_what_the_plain_one_writes(text_run, capsys):
    """Noise is keyed by place, so drafting changes forwards and not the text."""
    texts = {}
    for decoder in ("ancestral", "prompt-lookup", "jacobi"):
        assert (
            main(["generate", str(text_run), "--prompt", "The ", "--length", "30", "--decoder", decoder, "--json"]) == 0
        )
        texts[decoder] = json.loads(capsys.readouterr().out)["text"]
    assert texts["ancestral"] == texts["prompt-lookup"] == texts["jacobi"]


def test_pictures_of_a_label_come_as_grid_and_film(picture_run, tmp_path, capsys):
    out = tmp_path / "seven"
    assert main(["generate", str(picture_run), "--label", "7", "--count", "4", "--out", str(out), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["pictures"] == 4 and said["forwards"] == 64
    assert {p.name for p in out.iterdir()} == {"samples.png", "film.gif", "order.png"}


def test_evaluation_says_whether_a_likelihood_is_exact(text_run, text_file, capsys):
    assert main(["evaluate", str(text_run), "--data", str(text_file), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["likelihood"] == "exact" and 0 < figures["bits_per_byte"] < 9


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate", "nowhere"], "there is no folder nowhere"),
        (["generate", "zoo:nothing"], "the zoo has no 'nothing'"),
        (["generate", "{picture_run}", "--label", "12"], "labels lie in 0..9, got 12"),
        (["generate", "{picture_run}", "--label", "seven"], "no class 'seven'"),
        (["generate", "{text_run}", "--length", "1000"], "shorten the prompt or --length"),
        (["generate", "{text_run}", "--decoder", "magic"], "there is no decoder 'magic'"),
        (["generate", "{text_run}", "--temperature", "-1"], "temperature is 0 (greedy) or more"),
        (["train", "next-token", "--widht", "3"], "did you mean width?"),
        (["train", "next-token", "--width", "30"], "heads"),
        (["train", "next-token", "--size", "huge"], "comes in the sizes tiny, small"),
        (["train", "next-token", "--data", "nowhere.txt"], "nowhere.txt"),
        (["train", "next-token", "loose"], "belongs to no option"),
        (["train", "var", "--tokenizer", "{text_run}"], "which is no tokenizer"),
        (["train", "raster-ar", "--out", "{picture_run}"], "holds a training already"),
        (["compare", "var", "var"], "each system is named once"),
        (["compare", "var", "next-token"], "only systems of one modality compare"),
        (["claim", "image-vq"], "states no claim"),
    ],
)
def test_mistakes_are_answered_with_what_to_do(arguments, said, text_run, picture_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    filled = [a.format(text_run=text_run, picture_run=picture_run) for a in arguments]
    assert main(filled) == 2
    assert said in capsys.readouterr().err


def test_weights_of_another_system_and_pickles_are_refused(text_run, picture_run, tmp_path, capsys):
    import shutil

    for content, said in (
        ((picture_run / "model.safetensors").read_bytes(), "another model"),
        ((text_run / "model.safetensors").read_bytes()[:-50], "cut short"),
        (b"\x80\x04pickle", "not a whole safetensors file"),
    ):
        broken = tmp_path / said.replace(" ", "-")
        shutil.copytree(text_run, broken)
        (broken / "model.safetensors").write_bytes(content)
        assert main(["generate", str(broken)]) == 2
        assert said in capsys.readouterr().err


def test_a_run_that_is_there_is_not_touched_by_a_mistaken_second_one(text_run, text_file, capsys):
    before = {p.name: p.read_bytes() for p in text_run.iterdir() if p.is_file()}
    arguments = ["train", "next-token", "--data", str(text_file), "--out", str(text_run), "--tokenizer", "words"]
    assert main([*arguments, "--length", "64", *TINY]) == 2
    assert "holds a training already" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in text_run.iterdir() if p.is_file()} == before


def test_a_run_cut_off_while_its_tokenizer_was_trained_can_be_resumed(tmp_path):
    """And ends with the weights of one that was never cut off."""

    class CutOff:
        def __init__(self, name):
            self.name = name

        def update(self, step, steps, figures):
            if self.name == "image-msvq" and step == 2:
                raise KeyboardInterrupt

        def close(self):
            """Nothing to close."""

    settings = {"steps": 2, "batch": 4, "tokenizer_steps": 4, "width": 16, "depth": 1, "heads": 2}
    with pytest.raises(KeyboardInterrupt):
        train("var", "digits", out=tmp_path / "a", settings=settings, bar=CutOff)
    train("var", "digits", out=tmp_path / "a", settings=settings, resume=True)
    train("var", "digits", out=tmp_path / "b", settings=settings)
    for name in ("model.safetensors", "tokenizer/model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_settings_are_read_as_numbers_truths_and_tuples():
    words = ["--width", "256", "--betas", "0.9,0.95", "--bf16", "--tied=false", "--learning-rate", "1e-3"]
    assert settings_of(words) == {
        "width": 256, "betas": (0.9, 0.95), "bf16": True, "tied": False, "learning_rate": 0.001,
    }  # fmt: skip


def test_listing_imports_no_torch():
    import subprocess
    import sys

    code = (
        "import sys; from seriatim.cli.main import main; main(['list']); main(['show', 'var']); "
        "print('torch' in sys.modules)"
    )
    start = time.monotonic()
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip().endswith("False") and time.monotonic() - start < 10


@pytest.mark.slow
def test_a_comparison_makes_one_file_that_needs_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setenv("SERIATIM_HOME", str(tmp_path / "home"))
    torch.set_num_threads(1)
    out = tmp_path / "compare"
    assert main(["compare", "raster-ar:pixels", "var", "--minutes", "0.05", "--samples", "40", "--out", str(out)]) == 0
    page = (out / "report.html").read_text(encoding="utf-8")
    assert (
        "raster-ar" in page
        and "var" in page
        and "data:image" in page
        and "http-equiv" in page
        and 'src="http' not in page
    )
