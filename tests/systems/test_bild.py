"""The big little decoder: what it comes to at the ends of its settings, what stands and what is taken back, and the
same text as a plain account of the released code, on tiny models of both kinds."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from seriatim.canvas import Canvas
from seriatim.decoding.bild import Confident, Rollback
from seriatim.decoding.draft import DraftModel
from seriatim.decoding.loop import Step, decode
from seriatim.decoding.target import Target
from seriatim.decoding.verify import GreedyMatch
from seriatim.laws.case import randomise
from seriatim.layout import line
from seriatim.random import Keyed
from seriatim.systems.decoder.bild import Options, aligned, between
from seriatim.systems.decoders import Ask, Decoding
from seriatim.systems.encoder_decoder import EncoderDecoder
from seriatim.systems.published import load_published
from seriatim.systems.system import Sampling
from seriatim.systems.text.next_token import Config, NextToken
from seriatim.training.recipe import Recipe

torch.set_num_threads(1)
VOCAB, PROMPT = 23, [3, 1, 4, 1, 5]
GREEDY = Sampling(temperature=0)
SURE = 0.4  # a confidence that these models reach now and then


def near(model: torch.nn.Module, std: float) -> Any:
    """A copy that differs a little."""
    other = copy.deepcopy(model)
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(std * p.std().nan_to_num(1.0) * torch.randn(p.shape, generator=g, dtype=p.dtype))
    return other


@pytest.fixture(scope="module")
def pair() -> tuple[NextToken, NextToken]:
    """A large model in float64, and a small one that often agrees with it."""
    config = Config(length=160, vocab=VOCAB, width=32, depth=2, heads=2)
    large = NextToken(config, SimpleNamespace(special={}))
    randomise(large.model, seed=2, std=0.8)
    large.eval().requires_grad_(False)
    large.__dict__["tokenizer"] = None
    return large, near(large, 0.1)


def run(
    models: tuple[Any, Any], options: Options, new: int, rows: Sequence[Sequence[int]] = (PROMPT,), sampling=GREEDY
) -> tuple[list[list[int]], list[Step], Decoding, Target]:
    """New tokens of each row, and how they came about."""
    large, small = models
    way = between(Ask(large, sampling, (), None, options), small)
    target = large.target(None, sampling)
    canvas = large._begun(rows, new)
    with torch.inference_mode():
        steps = list(decode(target, canvas, way.decider, way.proposer, Keyed(0)))
    texts = [v[len(r) : len(r) + new] for v, r in zip(canvas.value["token"].tolist(), rows, strict=True)]
    return texts, steps, way, target


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
    (text,), steps, _, _ = run(pair, Options(fallback=0.0, rollback=math.inf), 44)
    assert [(s.drafted, s.accepted) for s in steps] == [(10, 10)] * 4
    for start in range(0, 44, 11):
        assert text[start : start + 10] == greedy(small, PROMPT + text[:start], 10)
        assert text[start + 10 : start + 11] == greedy(large, PROMPT + text[: start + 10], 1)
    assert text != greedy(large, PROMPT, 44)


def test_a_small_model_that_is_never_sure_writes_nothing(pair):
    (text,), steps, _, _ = run(pair, Options(fallback=1.01, rollback=math.inf), 30)
    assert text == greedy(pair[0], PROMPT, 30)
    assert [(s.drafted, s.accepted, s.forwards) for s in steps] == [(0, 0, 1)] * 30


def test_always_sure_and_nothing_tolerated_is_greedy_verification_of_a_chain(pair):
    large, small = pair
    (text,), steps, _, _ = run(pair, Options(fallback=0.0, rollback=0.0), 60)
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


# ---- the released code -----------------------------------------------------------------------------------------------

Says = Callable[[list[int]], Tensor]


def says(model: NextToken) -> Says:
    return lambda ids: model.logits(torch.tensor([ids]))[0]


def as_released(
    large: Says, small: Says, ids: list[int], total: int, confidence: float, most: float, turns: int = 10
) -> tuple[list[int], dict[str, int]]:
    """The loop of the released code, in plain words and without caches; how often it went back, and how often it spared
    a draft whose first unlikely token was the likeliest though a later one was not."""
    ids, seen, by_large, left = list(ids), len(ids) - 1, True, 1
    told = {"back": 0, "spared": 0, "unsure": 0}
    while len(ids) < total:
        if not by_large:
            p = torch.softmax(small(ids)[-1], -1)
            if float(p.max()) < confidence:
                by_large, told["unsure"] = True, told["unsure"] + 1
                continue
            ids.append(int(p.argmax()))
            left -= 1
            by_large = left == 0
            continue
        rows = large(ids)[seen:]
        written = torch.tensor(ids[seen + 1 :])
        if len(written):
            loss = torch.nn.functional.cross_entropy(rows[:-1], written, reduction="none")
            over = loss > most
            if bool(over.any()):
                first = int(over.int().argmax())
                best = int(rows[first].argmax())
                if best != int(written[first]):
                    ids, told["back"] = [*ids[: seen + 1 + first], best], told["back"] + 1
                    continue  # still the large model's turn, which has remembered nothing of this
                told["spared"] += bool((over & (rows[:-1].argmax(-1) != written)).any())
        ids.append(int(rows[-1].argmax()))
        seen, by_large, left = len(ids) - 1, False, turns
    return ids, told


SETTINGS = [(0.0, 1.0), (SURE, 0.5), (SURE, 2.0), (0.5, 1.0), (0.0, 100.0)]


@pytest.mark.parametrize("confidence, most", SETTINGS)
def test_text_of_the_released_loop(pair, confidence, most):
    large, small = pair
    want, told = as_released(says(large), says(small), PROMPT, 100, confidence, most)
    options = Options(fallback=confidence, rollback=most, released=True)
    (text,), _, _, _ = run(pair, options, 95)
    assert text[:80] == want[len(PROMPT) :][:80]  # near the end ours leaves room for a token of the large model
    if most <= 1:
        assert told["back"]


def test_the_slip_of_the_released_code_lets_a_large_model_be_overruled_where_nothing_is_tolerated(pair):
    large, small = pair
    options = Options(fallback=0.0, rollback=0.0, released=True)
    want, told = as_released(says(large), says(small), PROMPT, 100, 0.0, 0.0)
    (text,), _, _, _ = run(pair, options, 95)
    assert told["spared"] and text[:80] == want[len(PROMPT) :][:80]
    assert text != greedy(large, PROMPT, 95)
    assert run(pair, replace(options, released=False), 95)[0][0] == greedy(large, PROMPT, 95)


@pytest.fixture(scope="module")
def t5(tmp_path_factory) -> tuple[Any, Any, EncoderDecoder, EncoderDecoder]:
    """Two models of `transformers` with telling weights, and ours from the folders that they wrote."""
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=61, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, relative_attention_num_buckets=8,
        relative_attention_max_distance=20, decoder_start_token_id=0, tie_word_embeddings=False,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    torch.manual_seed(3)
    large = transformers.T5ForConditionalGeneration(config).eval()
    large.lm_head.weight = torch.nn.Parameter(torch.empty(61, 32))
    stds = {"shared": 2.0, "relative": 2.0, "lm_head": 0.6}
    with torch.no_grad():
        for name, p in large.named_parameters():
            std = next((std for part, std in stds.items() if part in name), 0.35)
            p.copy_(1 + 0.3 * torch.randn_like(p) if p.dim() == 1 else std * torch.randn_like(p))
    small = near(large, 0.03)
    ours = []
    for model in (large, small):
        folder: Path = tmp_path_factory.mktemp("model")
        model.save_pretrained(folder)
        ours.append(load_published(folder, torch.float32))
    return large, small, *ours


@pytest.mark.parametrize("confidence, most", [(0.0, 1.0), (SURE, 0.5), (SURE, 2.0)])
def test_answers_of_two_models_with_encoders_are_those_of_the_released_loop(t5, confidence, most):
    theirs, little, large, small = t5
    prompt = torch.tensor([[5, 9, 33, 17, 2, 40, 1]])

    def answers(model: Any) -> Says:
        return lambda ids: model(input_ids=prompt, decoder_input_ids=torch.tensor([ids])).logits[0]

    with torch.no_grad():
        want, told = as_released(answers(theirs), answers(little), [0], 60, confidence, most)
    bound = [m.answering(prompt) for m in (large, small)]
    options = Options(fallback=confidence, rollback=most, released=True)
    (text,), _, _, _ = run((bound[0], bound[1]), options, 59, [[0]])
    assert text[:45] == want[1:46]
    assert told["back"] and len(set(want)) > 8


def test_answers_where_no_loss_is_tolerated_are_the_large_models(t5):
    _, _, large, small = t5
    prompts = [[5, 9, 33, 1], [17, 2, 40, 8, 8, 1]]
    padded = torch.tensor([[5, 9, 33, 1, -1, -1], prompts[1]])
    models = large.answering(padded), small.answering(padded)
    texts, steps, _, _ = run(models, Options(fallback=0.0, rollback=0.0), 40, [[0], [0]])
    want = large.generate(prompts, max_new_tokens=40, temperature=0.0, stop=())
    assert texts == [g.ids for g in want]
    assert sum(int(s.accepted.sum()) for s in steps) > 0


# ---- prediction alignment, mistakes ----------------------------------------------------------------------------------


def test_an_aligned_model_agrees_more_often_with_what_the_large_one_writes(pair):
    large, _ = pair
    small = near(large, 0.5)
    before = [p.clone() for p in small.parameters()]
    prompts = [[i % VOCAB, (3 * i) % VOCAB, (i * i) % VOCAB][: 1 + i % 3] for i in range(16)]
    better = aligned(small, large, prompts, 12, Recipe(60, batch=8, learning_rate=2e-3))

    def agreement(model: Any, rows: Sequence[Sequence[int]]) -> float:
        written = torch.tensor([[*row, *greedy(large, row, 12)] for row in rows])
        same = model.logits(written)[:, 1:-1].argmax(-1) == written[:, 2:]
        return float(same.double().mean())

    taught = [row for row in prompts if len(row) == 2]
    others = [[(5 * i + 2) % VOCAB, i % VOCAB] for i in range(8)]
    assert agreement(better, taught) > agreement(small, taught) + 0.2
    assert agreement(better, others) > agreement(small, others)
    assert all(torch.equal(a, b) for a, b in zip(before, small.parameters(), strict=True))
    assert next(better.parameters()).dtype == torch.float64


def test_mistakes_are_named(pair, t5):
    large, small = pair
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
    with pytest.raises(ValueError, match="wrote nothing"):
        aligned(small, large, [])
    with pytest.raises(ValueError, match="an encoder's input"):
        aligned(t5[3], large, [PROMPT])
