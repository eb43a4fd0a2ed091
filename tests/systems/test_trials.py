"""Trials count tokens and forwards of a decoder that begins with nothing, on texts that were held out."""

import random

import pytest

from seriatim.data.base import Data, Texts
from seriatim.laws.case import randomise
from seriatim.systems import trials
from seriatim.systems.text.next_token import Config, NextToken
from seriatim.systems.trials import held_out, tokens_per_forward

FILES = [bytes(random.Random(n).choices(range(97, 123), k=300 + 250 * n)).decode() for n in range(5)]


@pytest.fixture(scope="module")
def system():
    model = NextToken(Config(length=256, width=16, depth=1, heads=2))
    randomise(model.model, seed=5, std=0.35)
    return model.float().eval().requires_grad_(False)


@pytest.fixture(autouse=True)
def few_files(monkeypatch):
    """In place of the standard library."""
    data = Data("stdlib", "text", Texts([]), Texts(FILES))
    monkeypatch.setattr(trials, "load_data", lambda source, modality: data)


def test_plain_decoding_writes_one_token_a_forward(system):
    measured = tokens_per_forward("ancestral", prompts=2, new_tokens=6)(system, 0)
    assert measured["tokens_per_forward"] == 1.0
    assert measured["tokens"] == measured["forwards"] == 12
    assert measured["looping_tokens_per_forward"] is None


def test_what_a_decoder_learned_in_one_trial_does_not_flatter_it_in_the_next(system):
    measure = tokens_per_forward("token-recycling", prompts=3, new_tokens=24)
    assert measure(system, 0) == measure(system, 0)
    assert measure(system, 0) != measure(system, 1)


def test_prompts_are_stretches_of_held_out_files_none_of_them_twice(system):
    files = [list(text.encode()) for text in FILES]
    found = held_out(system, 8, 100)
    assert len({tuple(ids) for ids in found}) == len(found) == 8
    assert found[0] == files[0][100:200]
    assert found[5] == files[1][300:400]  # of the first file there is no second
    for ids in found:
        assert any(file[n : n + 100] == ids for file in files for n in range(100, len(file) - 99, 200))
    with pytest.raises(ValueError, match="have 18 stretches of 100 tokens, not 19"):
        held_out(system, 19, 100)
