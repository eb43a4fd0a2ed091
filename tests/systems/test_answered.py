"""Prompts whose answers alone are learned: padding does not matter, and systems train, write and are judged on them."""

from __future__ import annotations

import json

import pytest
import torch

from seriatim.cli.main import main
from seriatim.data.list_tasks import list_tasks
from seriatim.laws.case import randomise
from seriatim.random import Generator
from seriatim.systems.text import mdlm, next_token, sdar
from seriatim.systems.text_system import beside
from seriatim.verbs.evaluate import evaluate
from seriatim.verbs.load import load
from seriatim.verbs.train import train

SHAPE = {"length": 12, "vocab": 20, "width": 16, "depth": 2, "heads": 2}
TINY = {"length": 32, "width": 16, "depth": 1, "heads": 2, "steps": 2, "batch": 4}
PAIRS = [([3, 4, 5, 6], [7, 8, 1]), ([2, 9], [9, 1]), ([3, 4, 5], [8, 7, 6, 1])]


def masked(kind):
    if kind == "mdlm":
        return mdlm.MDLM(mdlm.Config(**SHAPE), None)
    return sdar.SDAR(sdar.Config(**SHAPE, block=4), None)


@pytest.mark.parametrize("kind", ["mdlm", "sdar"])
def test_a_row_learns_the_same_whatever_it_is_padded_to(kind):
    system = masked(kind)
    randomise(system.model)
    together, _ = system.canvas(beside(PAIRS))
    with torch.no_grad():
        whole = system.model.hidden_losses(together, together.open)
        for row, pair in enumerate(PAIRS):
            alone, _ = system.canvas(beside([pair]))
            want = system.model.hidden_losses(alone, alone.open)[0]
            n = len(pair[0]) + len(pair[1])
            assert torch.allclose(whole[row, :n], want, rtol=0, atol=1e-12) and float(whole[row, n:].abs().sum()) == 0
            assert bool((want[len(pair[0]) :] > 0).all()) and float(want[: len(pair[0])].sum()) == 0


@pytest.mark.parametrize("kind", ["mdlm", "sdar"])
def test_an_answer_is_learned_from_its_prompt_as_it_is_written(kind):
    """The loss of an answer whose tokens are all hidden (of the first block, where there are blocks) is that of the
    first step of decoding."""
    from seriatim.decoding.target import Target

    system = masked(kind)
    randomise(system.model)
    canvas, _ = system.canvas(beside(PAIRS[:1]))
    fresh, _ = system.canvas(beside(PAIRS[:1]))
    target = Target(system.model)
    rows = target.forward(target.plan(fresh), fresh)
    with torch.no_grad():
        losses = system.model.hidden_losses(canvas, canvas.open)[0]
    seen = 0
    for m, e in enumerate(rows.element.expand(1, -1)[0].tolist()):
        if e >= 0:
            x = canvas.value["token"][0, e]
            assert abs(float(losses[e] + rows.dist.log_probs()[0, m, x])) < 1e-9
            seen += 1
    assert seen == 3


def test_losses_count_answers_only():
    batch = beside(PAIRS)
    for system in (masked("mdlm"), masked("sdar"), next_token.NextToken(next_token.Config(**SHAPE), None)):
        _, count = system.losses(batch, Generator(0), 0.0)
        assert int(count) == 9


def test_masking_by_count_hides_something_of_every_answer():
    system = mdlm.MDLM(mdlm.Config(**SHAPE, masking="count"), None).train()
    canvas, _ = system.canvas(beside(PAIRS * 20))
    hidden, weight = system.model.drawn(canvas, Generator(0))
    assert bool(hidden.any(1).all()) and not bool((hidden & ~canvas.open).any())
    with pytest.raises(ValueError, match="time or count"):
        mdlm.Config(masking="size")


@pytest.mark.parametrize("key", ["mdlm", "sdar", "next-token"])
def test_a_system_trains_on_prompts_and_is_judged_by_their_answers(key, tmp_path, capsys):
    command = [f"--{k}={v}" for k, v in TINY.items()]
    assert main(["train", key, "--data", "list-tasks", "--out", str(tmp_path / "run"), *command]) == 0
    told = (tmp_path / "run" / "answers.txt").read_text().splitlines()
    assert len(told) == 10 and all(" = " in line for line in told)
    capsys.readouterr()
    figures = evaluate(load(tmp_path / "run"), list_tasks(200))
    assert 1 < figures["bits_per_byte"] < 8 and figures["bytes"] < 4000
    assert main(["generate", str(tmp_path / "run"), "--prompt", "copy - - Ada Ben - - - - =", "--length", "2"]) == 0
    assert json.loads((tmp_path / "run" / "tokenizer.json").read_text())["kind"] == "words"


def test_a_tokenizer_that_splits_names_is_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="leave out --tokenizer"):
        train("mdlm", "list-tasks", out=tmp_path / "a", tokenizer="bytes", settings=TINY)
    with pytest.raises(ValueError, match="leave out --tokenizer"):
        train("mdlm", "list-tasks", out=tmp_path / "b", tokenizer="bpe", settings=TINY)
