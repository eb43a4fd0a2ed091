"""Any order with causal attention: what is known stands before what is not."""

from __future__ import annotations

import pytest
import torch

from seriatim.backbones.rope import RoPE
from seriatim.backbones.transformer import Transformer, TransformerConfig
from seriatim.decoding.filters import Warper
from seriatim.decoding.loop import generate
from seriatim.decoding.sample import Above, Select
from seriatim.decoding.target import Target
from seriatim.embed import TokenEmbed
from seriatim.factorization.line import Line
from seriatim.factorization.static import KnownFirst
from seriatim.heads.categorical import CategoricalHead
from seriatim.laws.case import Case, Unmasked, randomise
from seriatim.laws.laws import LAWS, Broken
from seriatim.layout import line
from seriatim.model import Model
from seriatim.objectives.masked import Masked, by_time
from seriatim.plan import OrderError
from seriatim.random import Forced, Keyed

VOCAB, WIDTH = 2, 16
WHY = {1: "decided in any order", 2: "decided in any order"}


def model_of(length):
    backbone = Transformer(TransformerConfig(WIDTH, 2, 2, rope=RoPE()))
    embed, head = TokenEmbed(VOCAB, WIDTH, mask=True, start=False), CategoricalHead(WIDTH, VOCAB)
    return randomise(Masked(line(length), KnownFirst(), embed, backbone, head, masking=by_time))


def case(given=0):
    return Case(model_of(3), VOCAB, given, decider=lambda: Select("random", steps=3), exempt=WHY)


def ids(rows, length, seed=0):
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def test_known_elements_see_known_ones_before_them_and_masks_see_all_known_ones_and_masks_before_them():
    model, known = model_of(5), torch.tensor([[1, 0, 1, 0, 0], [1, 1, 0, 0, 1]]).bool()
    plan = model.factorization.step(model.canvas({"token": ids(2, 5)}, known), None, 0)
    seen = plan.views["all"].mask()
    for row in range(2):
        for q in range(5):
            for k in range(5):
                both_alike = known[row, q] == known[row, k]
                want = (both_alike and k <= q) or (not known[row, q] and bool(known[row, k]))
                assert bool(seen[row, q, k]) == bool(want)


def test_what_is_known_is_seen_as_a_next_token_model_sees_it():
    """The states of a known beginning are those of causal attention."""
    model, x = model_of(6), ids(1, 6)
    plain = Model(model.layout, Line(), model.embed, model.backbone, model.heads["token"])
    with torch.no_grad():
        canvas = model.canvas({"token": x}, 4)
        ours = model.hidden(model.factorization.step(canvas, None, 0), canvas)[:, :4]
        whole = plain.canvas({"token": x}, 1)
        want = plain.hidden(plain.factorization.packed(whole), whole)[:, :4]
    assert torch.allclose(ours, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("given", [0, 1])
@pytest.mark.parametrize("number", [1, 2, 3, 5, 6, 9, 10, 11])
def test_law(number, given):
    LAWS[number][1](case(given))


def test_values_in_place_of_masks_are_caught():
    wrong = case()
    wrong.model.embed.__class__ = Unmasked
    with pytest.raises(Broken):
        LAWS[2][1](wrong)


@pytest.mark.parametrize("prompts", [(0, 0), (3, 3), (5, 3), (0, 4)], ids=str)
def test_the_cache_changes_nothing(prompts):
    model, x = model_of(8), ids(2, 8, seed=2)
    known = torch.arange(8) < torch.tensor(prompts)[:, None]
    met, texts = [], []
    for cached in (True, False):
        forced, select = Forced(x), Select("confidence", commit=Above(0.6))
        canvas = model.canvas({"token": torch.where(known, x, 0)}, known)
        generate(Target(model, cached=cached), canvas, select, random=forced)
        met.append(forced.log_prob)
        canvas = model.canvas({"token": torch.where(known, x, 0)}, known)
        target = Target(model, cached=cached, warp=Warper(temperature=0))
        texts.append(generate(target, canvas, Select("confidence", commit=Above(0.6))).value["token"])
    assert torch.allclose(*met, rtol=0, atol=1e-9) and torch.equal(*texts)


def test_the_known_beginning_stays_in_the_cache():
    model = model_of(8)
    target, canvas = Target(model), model.canvas({"token": ids(1, 8)}, 4)
    generate(target, canvas, Select("random", steps=4), random=Keyed(0))
    assert target.cache.length >= 4
    with pytest.raises(OrderError, match="element 4 is unknown again"):
        model.factorization.step(model.canvas({"token": ids(1, 8)}, 4), None, 6)
