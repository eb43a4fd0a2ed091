"""Features in front of a sequence: what stands in the prefix slots, and what stands there instead."""

from __future__ import annotations

import pytest
import torch

from seriatim.backbones.transformer import Transformer, TransformerConfig
from seriatim.conditions.prefix import PrefixCondition
from seriatim.decoding.guidance import Guidance
from seriatim.decoding.loop import generate
from seriatim.decoding.sample import SampleAll
from seriatim.decoding.target import Target
from seriatim.embed import TokenEmbed
from seriatim.factorization.line import Line
from seriatim.heads.categorical import CategoricalHead
from seriatim.laws.case import randomise
from seriatim.layout import line
from seriatim.model import Model
from seriatim.random import Forced, Keyed

WIDTH, VOCAB = 8, 3


def model():
    parts = TokenEmbed(VOCAB, WIDTH, start=False), Transformer(TransformerConfig(WIDTH, 2, 2))
    condition = {"features": PrefixCondition(5, WIDTH)}
    return randomise(Model(line(4), Line(2), *parts, CategoricalHead(WIDTH, VOCAB), condition))


FEATURES = torch.randn(3, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("cached", [True, False])
def test_every_feature_reaches_every_element_and_decoding_equals_one_pass(cached):
    m, x = model(), torch.tensor([[0, 2, 1, 1]] * 3)
    with torch.no_grad():
        packed = m.log_prob(m.canvas({"token": x}), {"features": FEATURES})
        for slot in range(2):
            other = FEATURES.clone()
            other[:, slot] += 0.5
            moved = m.losses(m.canvas({"token": x}), {"features": other})
            assert ((moved - m.losses(m.canvas({"token": x}), {"features": FEATURES})).abs() > 1e-6).all()
    random = Forced(x)
    blank = m.canvas({"token": torch.zeros_like(x)})
    generate(Target(m, {"features": FEATURES}, cached=cached), blank, SampleAll(), random=random)
    assert (random.log_prob - packed).abs().max() < 1e-9


def test_the_null_is_one_learned_vector_and_guidance_moves_away_from_it():
    m = model()
    encoder = m.conditions["features"]
    half = encoder(FEATURES, torch.tensor([True, False, True])).prefix
    assert torch.equal(half[0], encoder.null.expand(2, -1)) and torch.equal(half[0], half[2])
    assert torch.equal(half[1], encoder(FEATURES).prefix[1])
    texts = []
    for scale in (0.0, 8.0):
        target = Target(m, {"features": FEATURES}, Guidance(scale))
        texts.append(generate(target, m.blank(3), SampleAll(), random=Keyed(1)).value["token"])
    assert not torch.equal(*texts)
    plain = generate(Target(m, {"features": FEATURES}), m.blank(3), SampleAll(), random=Keyed(1)).value["token"]
    assert torch.equal(texts[0], plain)


def test_features_that_do_not_fit_are_refused():
    for wrong in (torch.zeros(3, 5), torch.zeros(3, 2, 4), torch.full((3, 2, 5), torch.nan)):
        with pytest.raises(ValueError, match=r"a prefix is \(batch, slots, 5\)"):
            model().encode({"features": wrong})
