"""FreeCache with a guide, as a user names it: whose guide it takes, what it refuses, and how its claim is measured."""

from __future__ import annotations

import random

import pytest

from seriatim.data.base import Data, Texts
from seriatim.laws.case import randomise
from seriatim.systems import draft_model, trials
from seriatim.systems.decoders import decoder_of
from seriatim.systems.system import Sampling
from seriatim.systems.text.mdlm import MDLM, Config
from seriatim.systems.text.next_token import Config as LineConfig
from seriatim.systems.text.next_token import NextToken
from seriatim.systems.unmasking.freecache_guided import trial
from seriatim.tokenizers.text import ByteTokenizer, PairTokenizer
from seriatim.verbs import load

SHAPE = {"width": 16, "depth": 1, "heads": 2}
GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def whole():
    one = MDLM(Config(**SHAPE, length=40, block=None), ByteTokenizer())
    randomise(one.model)
    return one.eval()


@pytest.fixture(scope="module")
def line():
    one = NextToken(LineConfig(**SHAPE, length=40), ByteTokenizer())
    randomise(one.model, 1)
    return one.eval()


@pytest.fixture
def named(monkeypatch, whole, line):
    """Models by name, in place of files."""
    other = NextToken(LineConfig(**SHAPE, length=40, vocab=280), PairTokenizer.train(["abc abc abd"] * 9, 280))
    there = {"line": line, "masked": whole, "other": other.double()}
    monkeypatch.setattr(draft_model, "_opened", draft_model._opened.__wrapped__)
    monkeypatch.setattr(load, "load", lambda name: there[name])
    return there


def test_the_guide_is_the_source(whole, named):
    """A guide that is always content decides all tokens at once; the cache alone takes as many forwards as tokens."""
    for spec, forwards in (
        ("freecache-guided:line+agree=likely+least=0.0", 1), ("freecache-guided:line+agree=likely+least=1.0", 12),
        ("freecache-guided", 12), ("freecache-guided+block=4+threshold=1e-9", 3),
    ):  # fmt: skip
        steps = []
        list(whole.stream("ab", 12, GREEDY, decoding=decoder_of(whole, spec, GREEDY, ()), trace=steps))
        assert len(steps) == forwards


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("freecache-guided:masked", "is no next-token model"), ("freecache-guided:other", "the tokenizers differ"),
        ("freecache-guided:line+agree=often", "agree is equal, likely"), ("freecache-guided+block=0", "at least 1"),
        ("freecache-guided:line+least=2.0", "from 0 to 1"), ("freecache-guided:line+ahead=0", "at least 1"),
        ("freecache-guided:line+agree=near+share=3.0", "a share of 0 to 1"),
    ],
)  # fmt: skip
def test_mistakes_are_named(whole, named, spec, message):
    with pytest.raises(ValueError, match=message):
        list(whole.stream("ab", 8, decoding=decoder_of(whole, spec, Sampling())))


@pytest.mark.parametrize(("rewrite", "late"), [("false", 0), ("true", 1)])
def test_finished_blocks_are_not_computed_again(whole, named, rewrite, late):
    """12 tokens behind a prompt of 4, in blocks of 4: 16 slots, of which the prompt and then each block drop out; to be
    rewritten a block is computed once more."""
    steps = []
    way = decoder_of(whole, f"freecache-guided+block=4+rewrite={rewrite}", GREEDY, ())
    list(whole.stream("abcd", 12, GREEDY, decoding=way, trace=steps))
    assert [step.slots for step in steps] == [16] + [12] * (3 + late) + [8] * 4 + [4] * (4 - late)


def test_a_trial_compares_with_one_token_at_a_time_on_the_same_prompts(whole, named, monkeypatch):
    files = [bytes(random.Random(n).choices(range(97, 123), k=40)).decode() for n in range(3)]
    data = Data("stdlib", "text", Texts([]), Texts(files))
    monkeypatch.setattr(trials, "load_data", lambda source, modality: data)
    asked = []
    monkeypatch.setattr(load, "load", lambda name: asked.append(name) or named["line"])
    plain = trial("unmask+block=32", 1, 8, 12)(whole, 0)
    assert plain["same_tokens"] == 1
    assert plain["tokens_per_forward"] == 1
    assert plain["nats_per_token"] == plain["plain_nats_per_token"]
    assert plain["slots"] == 12 * 20
    found = trial("freecache-guided:line+agree=likely+least=0.0", 1, 8, 12)(whole, 2)
    assert found["tokens_per_forward"] == 12
    assert found["times_as_fast"] > 1
    assert 0 < found["guide_seconds"] < found["seconds"]
    worse = found["nats_per_token"] > found["plain_nats_per_token"] + 0.1 or (
        found["entropy"] < 0.9 * found["plain_entropy"]
    )
    assert found["kept"] == (1.0 if worse else found["times_as_fast"])
    assert set(asked) == {"zoo:text-base", "line"}
