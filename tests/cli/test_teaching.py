"""Prediction alignment as a user does it: a small model learns what a large one writes, agrees with it more often, and
so drafts better for it; stopped and resumed it learns the same, and mistakes are answered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from seriatim.cli.main import main
from seriatim.systems.tuned import Aligned
from seriatim.training.run import read_lines
from seriatim.verbs import teaching
from seriatim.verbs.load import load
from seriatim.verbs.teaching import Written, continued, prompts_of
from support.tiny_chat import write_chat_model, write_conversations

SIZE = ["--length", "64", "--width", "32", "--depth", "1", "--heads", "2", "--learning-rate", "1e-2", "--batch", "8"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """Words in an order that depends on chance: what follows is never sure, what a model prefers is."""
    g, words = torch.Generator().manual_seed(0), ["one ", "two ", "three ", "four\n", "five ", "six\n"]
    chosen = torch.randint(len(words), (3000,), generator=g).tolist()
    path = tmp_path_factory.mktemp("texts") / "words.txt"
    path.write_text("".join(words[i] for i in chosen), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def pair(texts, tmp_path_factory) -> tuple[Path, Path]:
    """A large model that knows the words, and a small one that hardly does."""
    folders = []
    for name, steps in (("large", "40"), ("small", "2")):
        folders.append(tmp_path_factory.mktemp("runs") / name)
        command = ["train", "next-token", "--data", str(texts), "--out", str(folders[-1]), *SIZE, "--steps", steps]
        assert main(command) == 0
    return folders[0], folders[1]


@pytest.fixture(scope="module")
def command(pair, texts) -> list[str]:
    large, small = map(str, pair)
    asked = ["train", "next-token", "--from", small, "--teacher", large, "--data", str(texts), "--prompts", "32"]
    sizes = ["--length", "48", "--steps", "20", "--batch", "8", "--learning-rate", "1e-2"]
    return [*asked, *sizes, "--validate-every", "2"]


@pytest.fixture(scope="module")
def run(command, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "aligned"
    assert main([*command, "--out", str(out)]) == 0
    return out


def test_a_small_model_agrees_more_often_with_what_the_large_one_writes(pair, run):
    """Held-out prompts: as the training tells it, and as counted here, token by token."""
    large, small, better = (load(place) for place in (*pair, run))
    kept = json.loads((run / teaching.FILE).read_text())

    def agreement(model: Any) -> float:
        same = [
            int(model.logits(torch.tensor([[*prompt, *answer[:i]]]))[0, -1].argmax()) == token
            for prompt, answer in kept["test"][:6]
            for i, token in enumerate(answer)
        ]
        return sum(same) / len(same)

    assert agreement(large) == 1.0
    assert agreement(better) > agreement(small) + 0.2
    with torch.no_grad():
        told = Aligned(better).validate(Written(kept["test"][:6]))["agreement"]
    assert told == pytest.approx(agreement(better), abs=0.01)
    lines = [line["held_out_agreement"] for line in read_lines(run / "metrics.jsonl") if "held_out_agreement" in line]
    assert lines[-1] > lines[0] + 0.1


def test_what_is_learned_is_what_the_large_model_writes_greedily_behind_pieces_of_the_texts(pair, run, texts):
    large, kept = load(pair[0]), json.loads((run / teaching.FILE).read_text())
    assert len(kept["train"]) == 32
    text = texts.read_text()
    for prompt, answer in kept["train"][:5]:
        assert len(prompt) == len(answer) == 24 and large.tokenizer.decode(prompt) in text
        assert large.generate(prompt, max_new_tokens=24, temperature=0.0).ids == answer
    batch = Written(kept["train"]).take(torch.tensor([0, 1]))
    assert batch["counts"].sum(1).tolist() == [24, 24] and not bool(batch["counts"][:, :24].any())


def test_an_aligned_model_drafts_better(pair, run):
    """More of its tokens stand where no loss is tolerated."""
    large = load(pair[0])
    prompts = [list(prompt) for prompt, _ in json.loads((run / teaching.FILE).read_text())["test"][:6]]
    accepted = []
    for small in (pair[1], run):
        made: Any = large.generate(
            prompts, f"bild:{small}+fallback=0.0+rollback=0.0", max_new_tokens=24, temperature=0.0
        )
        accepted.append(sum(g.accepted for g in made) / sum(g.drafted for g in made))
    assert accepted[1] > accepted[0] + 0.1


def test_resumed_it_learns_the_same_and_asks_the_teacher_no_more(command, run, tmp_path, monkeypatch):
    out, wrote = tmp_path / "stopped", []
    stopped = teaching.continued
    monkeypatch.setattr(teaching, "continued", lambda *a: wrote.append(1) or stopped(*a))
    assert main([*command, "--out", str(out)]) == 0
    (out / "state.safetensors").unlink()  # as if killed before it saved for the first time
    assert main([*command, "--out", str(out), "--resume"]) == 0
    assert len(wrote) == 2  # once for each side
    ours, theirs = load(out), load(run)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_of_conversations_the_answers_are_the_teachers(tmp_path):
    model, talks = write_chat_model(tmp_path / "model"), write_conversations(tmp_path / "talks.jsonl")
    teacher = load(model)
    asked = ["train", "next-token", "--from", str(model), "--teacher", str(model), "--data", str(talks)]
    out = tmp_path / "out"
    assert (
        main(
            [
                *asked,
                "--prompts",
                "5",
                "--steps",
                "2",
                "--batch",
                "2",
                "--length",
                "64",
                "--lora",
                "2",
                "--out",
                str(out),
            ]
        )
        == 0
    )
    prompt, answer = json.loads((out / teaching.FILE).read_text())["train"][0]
    assert teacher.tokenizer.decode(prompt).endswith("assistant\n")
    assert teacher.generate(prompt, max_new_tokens=32, temperature=0.0).ids == answer
    assert continued(teacher, [prompt], 3) == [(prompt, answer[:3])]
    assert prompts_of(Written([([1, 2, 3], [4])]), 9, 4) == []  # there is no room for an answer


def test_mistakes_are_named(command, pair, tmp_path, capsys):
    chat = write_chat_model(tmp_path / "chat")
    for more, reason in (
        (["--teacher", str(chat)], "differ, so what one writes means nothing to the other"),
        (["--teacher", "zoo:image-kl"], "a teacher is a model that continues texts"),
        (["--teacher", str(tmp_path / "nothing")], "there is no folder"),
        (["--prompts", "0"], "at least 1 prompt"),
        (["--decoder", "skipdecode"], "with all its layers"),
    ):
        assert main([*command, *more, "--out", str(tmp_path / "run")]) == 2
        assert reason in capsys.readouterr().err
    alone = [x for i, x in enumerate(command) if "--teacher" not in (x, command[i - 1])]
    assert main([*alone, "--out", str(tmp_path / "run")]) == 2
    assert "a teacher (--teacher MODEL) writes" in capsys.readouterr().err
