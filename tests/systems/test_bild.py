"""The big little decoder: what it comes to at the ends of its settings, what stands and what is taken back, and the
same text as plain accounts of its rule and of the released code. Models that answer: test_bild_answers.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from seriatim.canvas import Canvas
from seriatim.decoding.bild import Confident, Rollback
from seriatim.decoding.draft import DraftModel
from seriatim.decoding.loop import decode
from seriatim.decoding.verify import GreedyMatch
from seriatim.laws.case import randomise
from seriatim.layout import line
from seriatim.random import Keyed
from seriatim.systems.decoder.bild import Options, between
from seriatim.systems.decoders import Ask
from seriatim.systems.system import Sampling
from seriatim.systems.text.next_token import Config, NextToken
from support.bild import GREEDY, Says, as_corrected, as_released, near, remembering, run

torch.set_num_threads(1)
VOCAB, PROMPT = 23, [3, 1, 4, 1, 5]
SURE = 0.4  # a confidence that these models reach now and then


@pytest.fixture(scope="module")
def pair() -> tuple[NextToken, NextToken]:
    """A large model in float64, and a small one that often agrees with it."""
    config = Config(length=160, vocab=VOCAB, width=32, depth=2, heads=2)
    large = NextToken(config, SimpleNamespace(special={}))
    randomise(large.model, seed=2, std=0.8)
    large.eval().requires_grad_(False)
    large.__dict__["tokenizer"] = None
    return large, near(large, 0.1)


def greedy(model: Any, prompt: Sequence[int], new: int) -> list[int]:
    return model.generate(list(prompt), max_new_tokens=new, temperature=0.0, stop=()).ids


# ---- the ends of the settings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("confidence", [0.0, SURE, 0.6])
def test_where_no_loss_is_tolerated_the_text_is_the_large_models(pair, confidence):
    rows = [PROMPT, [7], [2, 2, 9, 11, 0, 8]]
    texts, steps, _, _ = run(pair, Options(fallback=confidence, rollback=0.0), 60, rows)
    assert texts == [greedy(pair[0], row, 60) for row in rows]
    if confidence <= SURE:
        assert len(steps) < 60 and sum(int(s.accepted.sum()) for s in steps) > 0


def test_a_small_model_that_is_always_sure_and_never_wrong_is_interrupted_every_ten_tokens(pair):
    large, small = pair
    (text,), steps, _, _ = run(pair, Options(fallback=0.0, rollback=math.inf), 44, [PROMPT])
    assert [(s.drafted, s.accepted) for s in steps] == [(10, 10)] * 4
    for start in range(0, 44, 11):
        assert text[start : start + 10] == greedy(small, PROMPT + text[:start], 10)
        assert text[start + 10 : start + 11] == greedy(large, PROMPT + text[: start + 10], 1)
    assert text != greedy(large, PROMPT, 44)


def test_a_small_model_that_is_never_sure_writes_nothing(pair):
    (text,), steps, _, _ = run(pair, Options(fallback=1.01, rollback=math.inf), 30, [PROMPT])
    assert text == greedy(pair[0], PROMPT, 30)
    assert [(s.drafted, s.accepted, s.forwards) for s in steps] == [(0, 0, 1)] * 30


def test_always_sure_and_nothing_tolerated_is_greedy_verification_of_a_chain(pair):
    large, small = pair
    (text,), steps, _, _ = run(pair, Options(fallback=0.0, rollback=0.0), 60, [PROMPT])
    canvas = large._begun([PROMPT], 60)
    chain = DraftModel(small.target(None, GREEDY), 10, "top")
    with torch.inference_mode():
        want = list(decode(large.target(None, GREEDY), canvas, GreedyMatch(), chain))
    assert text == canvas.value["token"][0, len(PROMPT) :].tolist()
    assert [(s.slots, s.drafted, s.accepted) for s in steps] == [(s.slots, s.drafted, s.accepted) for s in want]


# ---- what stands, and what is taken back -----------------------------------------------------------------------------


def test_tokens_stand_up_to_the_first_whose_loss_is_too_large_and_who_is_not_the_likeliest(pair):
    """Each step beside the large model's own words about it: what was kept had to be, and what was not had not."""
    large, _ = pair
    most, kept, cut = 2.0, 0, 0
    way = between(Ask(large, GREEDY, (), None, Options(fallback=SURE, rollback=most)), pair[1])
    proposed: list[list[int]] = []
    propose = way.proposer.propose

    def watched(*args: Any) -> Any:
        guess = propose(*args)
        proposed.append([] if guess is None else guess.value[0].tolist())
        return guess

    way.proposer.propose = watched
    canvas, known = large._begun([PROMPT], 90), len(PROMPT)
    for step in decode(large.target(None, GREEDY), canvas, way.decider, way.proposer):
        draft, n = proposed[-1], step.accepted
        ids = canvas.value["token"][:1, :known].tolist()[0]
        said = torch.log_softmax(large.logits(torch.tensor([[*ids, *draft]])), -1)[0, known - 1 :]
        fine = [float(-said[i, x]) <= most or int(said[i].argmax()) == x for i, x in enumerate(draft)]
        assert n == (fine.index(False) if False in fine else len(draft))
        assert canvas.value["token"][0, known : known + n].tolist() == draft[:n]
        assert int(canvas.value["token"][0, known + n]) == int(said[n].argmax())
        kept += sum(int(said[i].argmax()) != x for i, x in enumerate(draft[:n]))
        cut += n < len(draft)
        known += n + 1
    assert kept >= 3 and cut >= 3  # both happen


def test_caches_after_going_back_are_those_of_a_fresh_reading(pair):
    """Of both models, in the middle of a text, after a draft of which a part was taken back."""
    large, small = pair
    way = between(Ask(large, GREEDY, (), None, Options(fallback=SURE, rollback=2.0)), small)
    target, canvas, seen = large.target(None, GREEDY), large._begun([PROMPT], 90), 0
    for step in decode(target, canvas, way.decider, way.proposer):
        if 0 < step.accepted < step.drafted and not seen:
            seen = canvas.length
            for ours, model in ((target, large), (way.proposer.draft, small)):
                held = ours.cache.columns
                fresh = model.model.new_cache(1)
                again = model.model.canvas({"token": canvas.value["token"][:, :seen]}, seen, layout=line(seen))
                plan = model.model.factorization.fill(again, 0, held)
                model.model.hidden(plan, again, fresh)
                assert held > len(PROMPT)
                assert torch.allclose(ours.cache.buffer[..., :held, :], fresh.buffer[..., :held, :], atol=1e-12)
    assert seen


def test_rows_of_a_batch_are_as_they_are_alone(pair):
    rows = [PROMPT, [7], [2, 2, 9, 11, 0, 8], [1, 1]]
    for released in (False, True):
        options = Options(fallback=SURE, rollback=2.0, released=released)
        together = run(pair, options, 40, rows)[0]
        assert together == [run(pair, options, 40, [row])[0][0] for row in rows]


def test_what_is_excluded_never_stands_however_much_is_tolerated(pair):
    def shape(logits: Tensor, canvas: Canvas, guess: Any) -> Tensor:
        return logits.masked_fill(torch.arange(VOCAB) % 2 == 1, -torch.inf)

    large, small = pair
    way = between(Ask(large, GREEDY, (), None, Options(fallback=0.0, rollback=math.inf)), small)
    target, canvas = large.target(None, GREEDY), large._begun([PROMPT], 60)
    target.shapers = (shape,)
    steps = list(decode(target, canvas, way.decider, way.proposer))
    assert all(x % 2 == 0 for x in canvas.value["token"][0, len(PROMPT) :].tolist())
    assert sum(s.accepted for s in steps) > 0
    few = Sampling(temperature=1.0, top_k=2)
    way = between(Ask(large, few, (), None, Options(fallback=0.0, rollback=math.inf)), small)
    canvas = large._begun([PROMPT], 60)
    steps = list(decode(large.target(None, few), canvas, way.decider, way.proposer, Keyed(1)))
    said = large.logits(canvas.value["token"][:, :-1])[0, len(PROMPT) - 1 :]
    rank = (said > said.gather(1, canvas.value["token"][0, len(PROMPT) :, None])).sum(1)
    assert int(rank.max()) < 2 and sum(s.accepted for s in steps) > 0


# ---- the rule, and the released code ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def says(pair) -> list[Says]:
    """What the large and the small model say."""
    return [remembering(lambda ids, model=model: model.logits(torch.tensor([ids]))[0]) for model in pair]


SETTINGS = [(0.0, 1.0), (SURE, 0.5), (SURE, 2.0), (0.5, 1.0), (0.0, 100.0)]


@pytest.mark.parametrize("confidence, most", SETTINGS)
def test_text_of_the_rule_as_a_plain_loop(pair, says, confidence, most):
    want, told = as_corrected(*says, PROMPT, 100, confidence, most)
    (text,), _, _, _ = run(pair, Options(fallback=confidence, rollback=most), 95, [PROMPT])
    assert text == want[len(PROMPT) :]
    assert told["back"] or told["stood"]


@pytest.mark.parametrize("confidence, most", SETTINGS)
def test_text_of_the_released_loop(pair, says, confidence, most):
    want, told = as_released(*says, PROMPT, 100, confidence, most)
    options = Options(fallback=confidence, rollback=most, released=True)
    (text,), _, _, _ = run(pair, options, 95, [PROMPT])
    assert text[:80] == want[len(PROMPT) :][:80]  # near the end ours leaves room for a token of the large model
    if most <= 1:
        assert told["back"]


def test_the_slip_of_the_released_code_lets_a_large_model_be_overruled_where_nothing_is_tolerated(pair, says):
    large, _ = pair
    options = Options(fallback=0.0, rollback=0.0, released=True)
    want, told = as_released(*says, PROMPT, 100, 0.0, 0.0)
    (text,), _, _, _ = run(pair, options, 95, [PROMPT])
    assert told["spared"] and text[:80] == want[len(PROMPT) :][:80]
    assert text != greedy(large, PROMPT, 95)
    assert run(pair, replace(options, released=False), 95, [PROMPT])[0][0] == greedy(large, PROMPT, 95)


def test_mistakes_are_named(pair):
    _, small = pair
    plain = small.target(None, Sampling())
    with pytest.raises(ValueError, match="0 or more tokens"):
        Confident(plain, -1)
    with pytest.raises(ValueError, match="a confidence is 0"):
        Confident(plain, 10, -0.1)
    with pytest.raises(ValueError, match="without temperature and filters"):
        Confident(small.target(None, GREEDY))
    with pytest.raises(ValueError, match="tolerated is 0"):
        Rollback(-1.0)
    with pytest.raises(ValueError, match="tolerated is 0"):
        Rollback(math.nan)
