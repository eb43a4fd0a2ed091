"""ADJUST as a user trains, uses and judges it."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from seriatim.canvas import Set
from seriatim.cli.main import main
from seriatim.data.base import Data, Texts
from seriatim.decoding.loop import Step
from seriatim.laws.drafts import untrained
from seriatim.posttraining.adjust import Adjust, AdjustConfig
from seriatim.posttraining.drafting import Base, read_card, save_part
from seriatim.systems import trials
from seriatim.systems.decoders import Decoding, decoder_of
from seriatim.systems.system import Sampling
from seriatim.systems.text.next_token import Config, NextToken
from seriatim.systems.unmasking import adjust
from seriatim.systems.unmasking.adjust import CLAIM, independently, shown, shuffling_trial, trial, written
from seriatim.verbs import drafting
from seriatim.verbs import load as loading
from seriatim.verbs.load import load
from seriatim.verbs.train import Trained, train

TEXT = "the cat sat on the mat and the dog sat on the log; " * 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny masked model, and texts."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("adjust")
    (root / "texts").mkdir()
    for i in range(4):
        (root / "texts" / f"{i}.txt").write_text(TEXT[i:])
    settings = {"steps": 2, "batch": 2, "length": 200, "width": 16, "depth": 1, "heads": 2, "block": 16, "bf16": False}
    train("mdlm", root / "texts", out=root / "base", settings=settings)
    return root


@pytest.fixture(scope="module")
def part(folder):
    """A layer of arbitrary weights."""
    system = load(folder / "base")
    made, base = untrained(Adjust, AdjustConfig(rule="margin"), system)
    save_part(made, base, folder / "part")
    return folder / "part"


def text(system, spec, temperature=0.8, steps=None, length=24):
    sampling, taken = Sampling(temperature=temperature, steps=steps), []
    way = decoder_of(system, spec, sampling, ())
    return "".join(system.stream("the ", length, sampling, seed=3, decoding=way, trace=taken)), len(taken)


def test_the_command_trains_a_layer_that_decodes(folder, monkeypatch, capsys):
    monkeypatch.setattr(drafting, "HOME", folder / "home")
    out = folder / "run"
    command = ["train", "adjust", "--base", str(folder / "base"), "--data", str(folder / "texts"), "--out", str(out)]
    assert main([*command, "--steps", "3", "--batch", "2", "--window", "40", "--unroll", "2"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "marginal" in said and f"--decoder adjust:{out}" in said
    card = read_card(out)
    assert card["key"] == "adjust"
    assert card["config"]["unroll"] == 2
    assert {"held_out_kl", "held_out_marginal", "parameters"} <= card["training"].keys()
    assert {"loss.png", "texts.html", "summary.json"} <= {p.name for p in out.iterdir()}
    assert text(load(folder / "base"), f"adjust:{out}+tokens=4")[1] == 6


def test_one_token_a_forward_is_plain_unmasking(folder, part):
    """Bit for bit, by the rule that the layer was trained for, and by another."""
    system = load(folder / "base")
    for spec, plain in (
        (f"adjust:{part}+tokens=1", "unmask+rule=margin"),
        (f"adjust:{part}+tokens=1+rule=confidence", "unmask"),
    ):
        assert text(system, spec) == text(system, plain)
        assert text(system, spec)[1] == 24


def test_more_tokens_a_forward_take_fewer_forwards_and_are_not_independent(folder, part):
    system = load(folder / "base")
    found, forwards = text(system, f"adjust:{part}+tokens=3")
    independent, as_many = text(system, "unmask+rule=margin+block=24", steps=8)
    assert forwards == as_many == 8
    assert found != independent


def test_no_token_of_a_forward_is_what_may_not_be_written(folder, part):
    """In a gap no end of text, neither by the model nor by what the sampler says."""
    system = load(folder / "base")
    (end,) = system.stop
    towards = system.model.heads["token"].weight[end].detach() * 1000.0
    way = decoder_of(system, f"adjust:{part}+tokens=6", Sampling(temperature=0))
    way.decider.sampler = lambda e, h, plan: towards.expand_as(h)  # states of which an end of text is read
    kept = []
    text = "".join(system.infill("the <mask:12> sat", Sampling(temperature=0), decoding=way, trace=kept))
    assert len(kept) == 2
    assert text.startswith("the ") and text.endswith(" sat")
    with pytest.raises(ValueError, match="as proposer, too"):
        list(system.infill("a<mask:3>b", decoding=Decoding(way.decider.__class__(way.decider.one, None, 2))))


def test_mistakes_are_named(folder, part, tmp_path):
    system = load(folder / "base")
    for spec, message in (
        ("adjust", "as in adjust:runs/adjust"), (f"adjust:{part}+tokens=0", "at least 1 token"),
        (f"adjust:{part}+rule=surest", "rule is random"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            text(system, spec)
    with pytest.raises(FileNotFoundError, match="no trained adjust"):
        text(system, f"adjust:{tmp_path}")
    line = tmp_path / "line"
    settings = {"steps": 1, "batch": 2, "length": 24, "width": 16, "depth": 1, "heads": 2, "bf16": False}
    train("next-token", folder / "texts", out=line, settings=settings)
    with pytest.raises(ValueError, match="next-token, and adjust is trained beside models of tokens in any order"):
        train("adjust", folder / "texts", from_=line, out=tmp_path / "a")
    with pytest.raises(ValueError, match="mdlm, and medusa is trained beside next-token models"):
        train("medusa", folder / "texts", from_=folder / "base", out=tmp_path / "b")
    with pytest.raises(ValueError, match="say which"):
        train("adjust", folder / "texts", out=tmp_path / "c")


# ---- what there is to see, and the claim -----------------------------------------------------------------------------


def test_the_page_shows_both_texts_and_which_tokens_repeat(folder, part):
    found = shown(SimpleNamespace(system=load(folder / "base")), part, length=20, tokens=4)
    page = (part / "texts.html").read_text()
    assert page.count("<pre>") == 2
    assert page.count("outline") == round(20 * sum(found.values()))
    assert page.count("#238b45") == 5  # of the adjusted text every fourth; independent tokens are all first
    assert page.count("#ffffff") == 20 + 5


@pytest.fixture
def judged(monkeypatch):
    """A judge and held-out texts that are here."""
    judge = NextToken(Config(length=200, width=16, depth=1, heads=2)).eval()
    monkeypatch.setattr(loading, "load", lambda name: judge if name == "zoo:text-base" else load(name))
    data = Data("stdlib", "text", Texts([]), Texts([TEXT * 4] * 4))
    monkeypatch.setattr(trials, "load_data", lambda source, modality: data)
    for name, value in {"PROMPTS": 3, "NEW": 16}.items():
        monkeypatch.setattr(adjust, name, value)
    return judge


def test_texts_are_judged_by_what_context_tells_of_them(folder, part, judged):
    system = load(folder / "base")
    found = trial(4)(system, 0)
    assert found["tokens_per_forward"] == 4
    assert trial(1)(system, 0)["tokens_per_forward"] == 1
    assert abs(found["context"] - (found["entropy"] * math.log(2) - found["nats_per_token"])) < 1e-9
    assert abs(found["nats_per_token"] - math.log(judged.config.vocab)) < 0.5  # a fresh judge knows nothing
    assert trial(4)(system, 0)["nats_per_token"] == found["nats_per_token"] != trial(4)(system, 1)["nats_per_token"]
    adjusted = written(system, f"adjust:{part}", 0)
    assert adjusted["tokens_per_forward"] == 4
    assert adjusted["nats_per_token"] != found["nats_per_token"]


def test_the_arm_that_is_trained_is_judged_at_several_numbers_of_tokens(folder, part, judged):
    history = [{"loss": 1.0, "held_out_kl": 0.1, "held_out_marginal": 0.2}]
    made = CLAIM.arms["text, adjusted"].measure(Trained(load(folder / "base"), None, part, history))
    assert made["tokens_per_forward"] == 4
    assert {"context", "context_at_2", "context_at_8", "held_out_kl", "held_out_marginal"} <= made.keys()
    assert Base(load(folder / "base")).fingerprint == read_card(part)["base"]["fingerprint"]


def test_independent_places_have_a_closed_form():
    """Six things, three at a time: 0.1235; against all 6^6 texts for all at once, and by enumeration for two at a time
    of four."""
    expected = {1: 1.0, 2: 5 / 6 * 3 / 4 / 2, 3: 5 / 6 * 4 / 6 * 2 / 3 / 3, 6: 720 / 6**6}
    assert all(abs(independently(k) - p) < 1e-12 for k, p in expected.items())
    assert abs(independently(3) - 0.1235) < 1e-4
    firsts = [(a, b) for a in range(4) for b in range(4) if a != b]
    right = sum(1 / 16 * sum(1 / 4 for c in rest for d in rest if c != d)
                for a, b in firsts if (rest := {0, 1, 2, 3} - {a, b}))  # fmt: skip
    assert abs(independently(2, 4) - right) < 1e-12


def test_shuffled_things_are_judged_by_being_there_once_and_varied(monkeypatch, tmp_path):
    """With little training, of model and layer: one a forward is the same for both, and the model is trained once."""
    for name, value in {"HOME": tmp_path, "STEPS": 40, "UNROLLED": 2, "DRAWN": 200}.items():
        monkeypatch.setattr(adjust, name, value)
    plain = shuffling_trial(False)(None, 0)
    monkeypatch.setattr(adjust, "fit", None)
    ours = shuffling_trial(True)(None, 0)
    assert ours["right_1"] == plain["right_1"] > plain["right_6"]
    assert ours["right_6"] != plain["right_6"] or ours["bits_6"] != plain["bits_6"]
    for found in (plain, ours):
        varied = found["bits_3"] >= 0.9 * found["true_bits_3"]
        assert found["right"] == (found["right_3"] if varied else 0)
        assert found["true_bits_1"] > found["true_bits_6"]  # of fewer right texts fewer are different
    assert CLAIM.metric in ours


def test_a_sampler_that_writes_the_same_again_and_again_gains_nothing(monkeypatch, tmp_path):
    """A layer that always ends in the same text, which is right."""
    for name, value in {"HOME": tmp_path, "STEPS": 1, "UNROLLED": 1, "DRAWN": 50}.items():
        monkeypatch.setattr(adjust, name, value)

    class Same(adjust.Adjusted):
        def decide(self, canvas, guess, rows, random):
            every = torch.arange(6).expand(canvas.batch, -1)
            return Step((Set(every, every),))

    monkeypatch.setattr(adjust, "Adjusted", Same)
    found = shuffling_trial(True)(None, 0)
    assert found["right_3"] == 1
    assert found["bits_3"] == 0
    assert found["right"] == 0
