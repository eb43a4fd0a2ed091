"""What claims of decoders in any order are measured with, on tiny inputs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from seriatim.data.base import Data, Texts
from seriatim.laws.case import randomise
from seriatim.random import Generator
from seriatim.systems import unmasking_trials as trials
from seriatim.systems.claim import Trial
from seriatim.systems.decoders import Decoding, decoder_of
from seriatim.systems.meta import load as load_module
from seriatim.systems.system import Sampling
from seriatim.systems.text.mdlm import MDLM, Config
from seriatim.systems.unmasking import learn2pd
from seriatim.tokenizers.text import ByteTokenizer

KEYS = ("adablock-dllm", "eoser-ass", "learn2pd")


@pytest.mark.parametrize("name", list(trials.TASKS))
def test_problems_have_one_right_answer_and_fit(name):
    task, eos = trials.TASKS[name], ByteTokenizer.special["eos"]
    train, test = trials.problems(task, 300, 0), trials.problems(task, 300, 7, test=True)
    assert train == trials.problems(task, 300, 0) and not {p for p, _ in train} & {p for p, _ in test}
    ids = trials.as_ids(task, ByteTokenizer(), train + test)
    assert ids.shape == (600, task.prompt + task.answer) and bool((ids[:, -1] == eos).all())
    for prompt, answer in train:
        if name == "lines":
            said = zip(prompt[::2], prompt[1::2], answer.splitlines(), strict=True)
            assert all(line == letter * int(n) for letter, n, line in said)
        elif prompt[0] == "*":
            assert answer == "".join(a * int(n) for a, n in zip(prompt[1::2], prompt[2::2], strict=True))
        else:
            assert answer == prompt[1:][:: 1 if prompt[0] == "=" else -1]


TINY = {"width": 16, "depth": 1, "heads": 2}


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setattr(trials, "HOME", tmp_path)
    return tmp_path


def test_a_model_is_taught_once_and_answers_alone_count(home, monkeypatch):
    recipe = replace(trials.RECIPE, steps=3, batch=4, bf16=False)
    first = trials.taught("lists", recipe, TINY, count=20)
    monkeypatch.setattr(trials, "train", None)
    again = trials.taught("lists", recipe, TINY, count=20)
    assert torch.equal(first.model.embed.table, again.model.embed.table)
    system = trials.Taught(Config(length=8, **TINY, block=None))
    system.prompt = 3
    assert int(system.losses({"token": torch.zeros(2, 8).long()}, Generator(0), 0.0)[1]) == 10
    assert first.config.block is None and first.config.length == 40


class Knows:
    """Decides the answers of these texts, one element a step from the left."""

    def __init__(self, ids, new):
        self.ids, self.new = ids, new

    def decide(self, canvas, guess, rows, random):
        from seriatim.canvas import Set
        from seriatim.decoding.loop import Step

        first = torch.where(canvas.open, torch.arange(canvas.layout.size), 10**6).amin(1, keepdim=True)
        return Step((Set(self.ids.gather(1, first), first),))


def test_answers_are_right_up_to_their_end(monkeypatch):
    """A decoder that knows them has no error; one whose ends come two tokens early has an error of two."""
    task, some = trials.TASKS["lists"], trials.problems(trials.TASKS["lists"], 6, 3, test=True)
    model = MDLM(Config(length=task.prompt + task.answer, **TINY, block=None)).eval()
    ids = trials.as_ids(task, model.tokenizer, some)
    monkeypatch.setattr(trials, "decoder_of", lambda *_: Decoding(Knows(ids, task.answer)))
    assert trials.answered(model, task, some, "knows") == {"accuracy": 1, "length_error": 0, "forwards": task.answer}
    early = ids.clone()
    for row, (_, answer) in zip(early, some, strict=True):
        row[task.prompt + max(len(answer) - 2, 0) :] = model.stop[0]
    monkeypatch.setattr(trials, "decoder_of", lambda *_: Decoding(Knows(early, task.answer)))
    told = trials.answered(model, task, some, "early")
    assert told["accuracy"] == 0 and told["length_error"] == pytest.approx(sum(min(len(a), 2) for _, a in some) / 6)


@pytest.mark.parametrize("key", KEYS[:2])
def test_every_arm_of_a_claim_of_answers_is_measured(key, home, monkeypatch):
    recipe = replace(trials.RECIPE, steps=2, batch=4, bf16=False)
    task = {"adablock-dllm": "lines", "eoser-ass": "lists"}[key]
    model = trials.taught(task, recipe, TINY, count=20)
    monkeypatch.setattr(trials, "taught", lambda name: {task: model}[name])
    claim, forwards = load_module(key).CLAIM, {}
    real = trials.problems
    monkeypatch.setattr(trials, "problems", lambda task, count, seed, test: real(task, 3, seed, test))
    for name, arm in claim.arms.items():
        assert isinstance(arm, Trial) and arm.model == "zoo:text-mdlm"
        told = arm.measure(None, 0)
        assert 0 <= told["accuracy"] <= 1 and told["length_error"] >= 0
        forwards[name] = told["forwards"]
    assert claim.metric in told and {claim.ours, claim.baseline} <= set(claim.arms)
    if key == "eoser-ass":
        assert all(forwards[n] <= 4 for n in forwards if n != "one at a time")
        assert forwards["even, ends wait"] <= forwards["one at a time"]


# ---- agreement -------------------------------------------------------------------------------------------------------


def small(length=32):
    one = MDLM(Config(length=length, **TINY, block=None))
    randomise(one.model, seed=3)
    return one.eval().requires_grad_(False)


def test_the_fastest_setting_that_agrees_is_told():
    system, prompts = small(), torch.randint(97, 104, (2, 6), generator=torch.Generator().manual_seed(0))
    ways = {
        name: lambda spec=spec: decoder_of(system, spec, Sampling(temperature=0))
        for name, spec in (("one", "unmask+block=8"), ("all", "unmask+block=8+threshold=1e-9"))
    }
    told = trials.most_parallel(system, prompts, 16, 8, ways)
    assert told["one: agreement"] == 1 and told["one: tokens_per_forward"] == 1
    assert told["all: tokens_per_forward"] == 8 and told["all: agreement"] < 0.8
    assert (told["tokens_per_forward"], told["setting"]) == (1.0, "one token at a time")
    same = trials.most_parallel(system, prompts, 16, 8, {"one": ways["one"], "twice": ways["one"]})
    assert same["agreement"] == 1


def test_every_arm_of_the_claim_of_agreement_is_measured(monkeypatch):
    """A filter is trained, thresholds are swept, and the oracle agrees with itself in the fewest forwards."""
    system, small_ = small(), {"prompts": 2, "window": 24, "block": 8}
    monkeypatch.setattr(learn2pd, "FILTERING", replace(learn2pd.FILTERING, batch=8))
    texts = Data("mine", "text", Texts(["abcdefg " * 40]), Texts(["gfedcba " * 40]))
    for module in (learn2pd, trials):
        monkeypatch.setattr(module, "load_data", lambda *_: texts)
    ways = {
        "filter": learn2pd.by_filter(8, tokens=96, steps=20), "threshold": learn2pd.by_threshold(8),
        "oracle": learn2pd.by_oracle(8),
    }  # fmt: skip
    told = {name: learn2pd.trial(way, **small_)(system, 0) for name, way in ways.items()}
    ends = {"ends kept", "cut behind ends", "cut without a floor"}
    assert set(told) | ends == set(learn2pd.CLAIM.arms) and learn2pd.CLAIM.metric in told["filter"]
    assert told["oracle"]["agreement"] == 1 and told["oracle"]["setting"] == "oracle"
    for name in ("filter", "threshold"):
        assert sum(k.endswith(": agreement") for k in told[name]) == len(learn2pd.SWEPT)
        assert told[name]["tokens_per_forward"] >= 1
    assert told["oracle"]["tokens_per_forward"] > 1


def test_what_cutting_behind_ends_saves_is_measured_apart(monkeypatch):
    """A model that expects ends nearly everywhere: what it would write behind the first is saved."""
    task = trials.TASKS["lists"]
    model = MDLM(Config(length=task.prompt + task.answer, **TINY, block=None)).eval()
    randomise(model.model, seed=3)
    bias = torch.zeros(model.config.vocab, dtype=torch.float64)
    bias[model.stop[0]] = 4.0
    model.model.heads["token"].bias = torch.nn.Parameter(bias, requires_grad=False)
    monkeypatch.setattr(learn2pd, "taught", lambda name: model)
    kept, cut, early = (learn2pd.by_ends(floor, 5)(None, 0)["forwards"] for floor in (None, 2.0, 0.0))
    assert max(cut, early) < kept <= task.answer


def test_prompts_are_drawn_by_the_seed():
    system = small()
    one, same, other = (trials.held_out(system, 3, 24, seed) for seed in (0, 0, 1))
    assert one.shape == (3, 24) and torch.equal(one, same) and not torch.equal(one, other)
