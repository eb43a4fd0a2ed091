"""Samples without a length: they grow until each row has said stop, and equal those of a fixed length."""

from __future__ import annotations

import pytest
import torch

from seriatim.backbones.rope import RoPE
from seriatim.backbones.transformer import Transformer, TransformerConfig
from seriatim.decoding.grow import Growing
from seriatim.decoding.loop import decode, generate
from seriatim.decoding.sample import SampleAll
from seriatim.decoding.target import Target
from seriatim.embed import TokenEmbed
from seriatim.factorization.line import Line
from seriatim.heads.categorical import CategoricalHead
from seriatim.laws.case import randomise
from seriatim.layout import line
from seriatim.model import Model
from seriatim.random import Keyed

VOCAB, WIDTH, STOP, LIMIT = 4, 16, 3, 5


def model():
    parts = TokenEmbed(VOCAB, WIDTH), Transformer(TransformerConfig(WIDTH, 2, 2, rope=RoPE()))
    return randomise(Model(line(1), Line(1), *parts, CategoricalHead(WIDTH, VOCAB)), std=0.3)


def test_a_text_that_grows_is_the_text_of_a_fixed_length():
    m = model()
    grown = generate(Target(m), m.blank(6), Growing(SampleAll(), STOP, LIMIT), random=Keyed(2))
    fixed = generate(Target(m), m.blank(6, layout=line(LIMIT)), SampleAll(stop=(STOP,)), random=Keyed(2))
    texts, expected = grown.read("token"), fixed.read("token")
    assert all(torch.equal(a, b) for a, b in zip(texts, expected, strict=True))
    assert len({len(t) for t in texts}) > 2
    assert any(len(t) == LIMIT for t in texts) and any(len(t) < LIMIT for t in texts)
    assert grown.layout.coord[:, 0].tolist() == list(range(LIMIT))


def test_growth_ends_with_the_last_row_that_goes_on():
    m = model()
    canvas = m.blank(1)
    steps = list(decode(Target(m), canvas, Growing(SampleAll(), STOP, 1000), random=Keyed(5)))
    text = canvas.read("token")[0].tolist()
    assert text.count(STOP) == 1 and text[-1] == STOP
    assert len(steps) == len(text) == canvas.layout.size < 1000


def test_a_sample_has_at_least_one_element():
    with pytest.raises(ValueError, match="at least 1 element, got a limit of 0"):
        Growing(SampleAll(), STOP, 0)
