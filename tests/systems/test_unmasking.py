"""Decoders of tokens in any order: what they refuse, and what their options mean."""

import pytest

from seriatim.laws.case import randomise
from seriatim.laws.interface import small
from seriatim.systems.decoders import decoder_names, decoder_of
from seriatim.systems.system import Sampling
from seriatim.systems.text.mdlm import MDLM, Config
from seriatim.systems.text.sdar import SDAR
from seriatim.systems.text.sdar import Config as Blocks
from seriatim.tokenizers.text import ByteTokenizer

SHAPE = {"length": 24, "width": 16, "depth": 1, "heads": 2}


@pytest.fixture(scope="module")
def whole():
    one = MDLM(Config(**SHAPE, block=None), ByteTokenizer())
    randomise(one.model)
    return one.eval()


@pytest.fixture(scope="module")
def blocks():
    one = SDAR(Blocks(**SHAPE, block=4), ByteTokenizer())
    randomise(one.model)
    return one.eval()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("unmask+rule=margins", "rule is random"), ("unmask+threshold=1.5", "at most 1"),
        ("unmask+threshold=0", "above 0"),
        ("unmask+threshold=0.9+factor=1.0", "give one"), ("unmask+factor=1.0+rule=entropy", "goes by confidence"),
        ("unmask+budget=0.3", "goes by entropy"), ("fast-dllm+cache=both", "none, prefix or dual"),
        ("unmask+schedule=slow", "schedule is"), ("unmask:zoo", "needs no other"), ("fast-dllm+block=0", "at least 1"),
        ("ancestral", "needs a next-token model; for mdlm there are own, .*unmask"),
    ],
)  # fmt: skip
def test_mistakes_are_named(whole, spec, message):
    with pytest.raises(ValueError, match=message):
        list(whole.stream("ab", 8, decoding=decoder_of(whole, spec, Sampling())))


def test_a_next_token_model_has_decoders_of_its_own():
    with pytest.raises(ValueError, match="tokens in any order; for next-token there are own"):
        decoder_of(small(), "unmask", Sampling())
    assert set(decoder_names("unmasking")).isdisjoint(decoder_names("decoder"))


def test_a_model_of_blocks_keeps_its_blocks(blocks):
    with pytest.raises(ValueError, match="blocks of 4"):
        list(blocks.stream("ab", 8, decoding=decoder_of(blocks, "unmask+block=8", Sampling())))
    assert len("".join(blocks.stream("ab", 8, decoding=decoder_of(blocks, "fast-dllm", Sampling())))) > 0


def test_blocks_of_a_decoder_replace_those_of_the_config(whole):
    """Of 12 tokens behind a prompt of 2, in blocks of 5, or of 1, 4 and 7."""
    canvas = whole.begun([1, 2], 12)
    assert whole.blocked(canvas, 5).rank[0, 2:].tolist() == [0] * 5 + [1] * 5 + [2] * 2
    assert whole.blocked(canvas, (1, 4, 7)).rank[0, 2:].tolist() == [0] + [1] * 4 + [2] * 7
    for wrong in (0, (5, 5), (12, 0)):
        with pytest.raises(ValueError, match="12 in all"):
            whole.blocked(canvas, wrong)


@pytest.mark.parametrize(("spec", "forwards"), [
    ("unmask", 12), ("unmask+block=4", 12), ("unmask+schedule=powers", 3), ("unmask+budget=1000.0+rule=entropy", 1),
    ("unmask+factor=1000.0+block=6", 2), ("fast-dllm+block=6+threshold=1e-9", 2),
])  # fmt: skip
def test_options_say_how_many_forwards_12_tokens_take(whole, spec, forwards):
    trace = []
    list(whole.stream("ab", 12, Sampling(), decoding=decoder_of(whole, spec, Sampling()), trace=trace))
    assert len(trace) == forwards


def test_a_dual_cache_computes_fewer_slots(whole):
    """6 steps of a block of 6 each: 14 slots at the first of a block, 6 at the others."""
    slots = {}
    for cache in ("none", "prefix", "dual"):
        trace = []
        way = decoder_of(whole, f"fast-dllm+block=6+threshold=none+cache={cache}", Sampling())
        list(whole.stream("ab", 12, Sampling(), decoding=way, trace=trace))
        slots[cache] = [step.slots for step in trace]
    assert slots["none"] == [14] * 12
    assert slots["prefix"] == [14] + [12] * 5 + [14] + [6] * 5
    assert slots["dual"] == [14] + [6] * 5 + [14] + [6] * 5
