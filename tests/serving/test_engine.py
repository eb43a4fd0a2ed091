"""The engine: what a request gets is what it would get alone, whoever comes and goes beside it."""

from __future__ import annotations

import random as stdlib
import threading

import pytest
import torch

from seriatim.laws.case import randomise
from seriatim.serving.engine import Engine
from seriatim.serving.request import Full, Request
from seriatim.systems.decoders import Ask
from seriatim.systems.system import Sampling
from seriatim.systems.text.next_token import Config, NextToken
from support.heard import Heard

VOCAB = 13


def tiny(length=96):
    torch.manual_seed(0)
    config = Config(vocab=VOCAB, width=16, depth=2, heads=2, length=length)
    system = NextToken(config, None).eval().requires_grad_(False)
    randomise(system.model, std=0.5)
    system.model.float()
    return system


@pytest.fixture(scope="module")
def system():
    return tiny()


def alone(system, request, decoder="ancestral"):
    """What the request gets offline."""
    s = request.sampling
    out = system.generate(
        list(request.prompt), decoder, max_new_tokens=request.max_new_tokens, temperature=s.temperature, top_k=s.top_k,
        top_p=s.top_p, min_p=s.min_p, typical=s.typical, repetition_penalty=s.repetition_penalty,
        presence_penalty=s.presence_penalty, frequency_penalty=s.frequency_penalty, seed=request.seed,
        n=request.copy + 1, logprobs=request.logprobs is not None,
    )  # fmt: skip
    return out if request.copy == 0 else out[request.copy]


def settings(rng):
    return Sampling(
        temperature=rng.choice([0.0, 0.7, 1.0, 1.3]), top_k=rng.choice([None, None, 3, 7]),
        top_p=rng.choice([None, 0.8, 1.0]), min_p=rng.choice([None, None, 0.05]),
        typical=rng.choice([None, None, None, 0.9]), repetition_penalty=rng.choice([1.0, 1.0, 1.3]),
        presence_penalty=rng.choice([0.0, 0.0, 0.5]), frequency_penalty=rng.choice([0.0, 0.0, 0.2]),
    )  # fmt: skip


def requests_of(rng, count, decoders, shared=()):
    out = []
    for _ in range(count):
        prompt = tuple(rng.randrange(VOCAB) for _ in range(rng.randint(1, 24)))
        if shared and rng.random() < 0.5:
            prompt = tuple(shared[: rng.randint(1, len(shared))]) + prompt
        out.append(Request(
            prompt, rng.randint(1, 24), settings(rng), rng.randrange(1000), rng.choice([0, 0, 0, 1]),
            rng.choice(decoders),
        ))  # fmt: skip
    return out


def scheduled(engine, heard, requests, rng):
    """Requests that come at random, and some that are cancelled; which number is whose, and who was cancelled."""
    numbers, cancelled, left = {}, set(), list(requests)
    while left or engine.busy:
        while left and rng.random() < 0.4:
            request = left.pop()
            numbers[engine.submit(request)] = request
        if numbers and rng.random() < 0.05:
            number = rng.choice([*numbers])
            if number not in heard.ends:
                cancelled.add(number)
            engine.cancel(number)
        engine.turn()
    return numbers, cancelled


DECODERS = ("ancestral", "prompt-lookup", "token-recycling+nodes=6")


@pytest.mark.parametrize("seed", range(10))
def test_each_request_gets_what_it_would_get_alone(system, seed):
    check_schedule(system, seed)


@pytest.mark.slow
def test_five_hundred_schedules(system):
    for seed in range(10, 510):
        check_schedule(system, seed)


def check_schedule(system, seed):
    """Requests with settings of their own come at random, some are cancelled; the rest is as offline."""
    rng = stdlib.Random(seed)
    heard = Heard()
    engine = Engine(system, DECODERS, heard, rows=rng.choice([1, 3, 8]))
    shared = [rng.randrange(VOCAB) for _ in range(40)]
    requests = requests_of(rng, 10, DECODERS, shared)
    numbers, cancelled = scheduled(engine, heard, requests, rng)
    assert heard.ends.keys() == numbers.keys()
    for number, request in numbers.items():
        whole = alone(system, request, request.decoder).ids
        if number in cancelled:
            assert heard.ids[number] == whole[: len(heard.ids[number])]
        else:
            assert heard.ids[number] == whole and heard.ends[number][0] in ("stop", "length")
    assert not any(batch.rows for batch in engine.batches.values())


@pytest.mark.parametrize("decoder", ["spec-sampling:small", "tree-verify:small"])
def test_drafts_of_a_small_model_are_sampled_as_their_row_is(system, monkeypatch, decoder):
    """So that they stand as often as alone, and the text is the same, token by token."""
    small = tiny()
    with torch.no_grad():
        for p in small.model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    monkeypatch.setattr(Ask, "draft_model", lambda self, translate=False: small)
    rng, heard = stdlib.Random(7), Heard()
    engine = Engine(system, (decoder,), heard, rows=4)
    numbers, cancelled = scheduled(engine, heard, requests_of(rng, 8, (decoder,)), rng)
    for number, request in numbers.items():
        if number not in cancelled:
            assert heard.ids[number] == alone(system, request, decoder).ids
    assert engine.figures()["drafted"] > engine.counts["accepted"] > 0


def test_a_prompt_that_begins_like_another_is_not_read_again(system):
    heard = Heard()
    engine = Engine(system, ("ancestral",), heard)
    start = tuple(i % VOCAB for i in range(30))
    first = engine.submit(Request((*start, 1, 2), 4))
    drain(engine)
    second = engine.submit(Request((*start, 5), 4, seed=3))
    drain(engine)
    assert heard.reused[first] == 0 and heard.reused[second] == 30
    assert engine.counts["reused_tokens"] == 30 and engine.counts["prompt_tokens"] == 1 + 31, "the learned start, too"
    assert heard.ids[second] == alone(system, Request((*start, 5), 4, seed=3)).ids


def drain(engine):
    while engine.busy:
        engine.turn()


def test_what_runs_goes_on_while_a_long_prompt_is_read():
    """A stream gets a token each turn, and prompts are read in parts beside it."""
    system, heard = tiny(4096), Heard()
    engine = Engine(system, ("ancestral",), heard)
    running = engine.submit(Request((1, 2, 3), 60, Sampling(temperature=1.0)))
    for _ in range(5):
        engine.turn()
    engine._slot, engine._step = 1.0, 100.0  # a step takes as long as 100 slots: a part is of 200
    before = len(heard.ids[running])
    late = engine.submit(Request(tuple([1] * 2000), 2))
    turns = 0
    while late not in heard.ids:
        engine._slot, engine._step = 1.0, 100.0
        engine.turn()
        turns += 1
    assert len(heard.ids[running]) - before == turns >= 2000 // 200
    assert turns <= 2000 // 200 + 1


def test_rows_are_limited_and_the_first_comes_first(system):
    heard = Heard()
    engine = Engine(system, ("ancestral",), heard, rows=2, queue=3)
    numbers = [engine.submit(Request((1,), 3, seed=i)) for i in range(3)]
    with pytest.raises(Full, match="3 requests wait"):
        engine.submit(Request((1,), 3))
    engine.turn()
    assert engine.figures()["running"] == 2 and engine.figures()["waiting"] == 1
    drain(engine)
    ended = [n for step in heard.order for n in step if n in heard.ends]
    assert heard.ends.keys() == set(numbers) and ended[-1] == numbers[-1]
    assert engine.counts["refused"] == 1 and engine.counts["finished"] == 3


def test_memory_limits_what_is_let_in(system):
    """Each text is counted as long as the longest, as they stand in one buffer."""
    column = Engine(system, ("ancestral",), Heard()).column
    heard = Heard()
    engine = Engine(system, ("ancestral",), heard, memory=column * 20 * 2 / 0.75)
    for i in range(4):
        engine.submit(Request((1, 2), 18, seed=i))
    engine.turn()
    assert engine.figures()["running"] == 2
    drain(engine)
    assert len(heard.ends) == 4
    with pytest.raises(ValueError, match="do not fit into"):
        engine.submit(Request((1, 2), 90))


def test_log_probabilities_are_those_of_the_model(system):
    """Of tokens that were drafted, too; beside each the likeliest."""
    for decoder in DECODERS:
        heard = Heard()
        engine = Engine(system, (decoder,), heard)
        request = Request((1, 2, 3, 1, 2, 3), 20, Sampling(temperature=0.7, repetition_penalty=1.2), 4, logprobs=3)
        other = engine.submit(Request((4,), 11, Sampling(temperature=0.0)))
        number = engine.submit(request)
        drain(engine)
        offline = alone(system, request, decoder)
        assert heard.ids[number] == offline.ids and not heard.logprobs[other]
        assert torch.allclose(torch.tensor(heard.logprobs[number]), torch.tensor(offline.logprobs), atol=1e-4)
        for mine, id_, top in zip(heard.logprobs[number], offline.ids, heard.top[number], strict=True):
            assert len(top) == 3 and top[0][1] >= mine - 1e-6 and dict(top).get(id_, mine) == mine


def test_a_row_that_breaks_is_told_and_others_go_on(system, monkeypatch):
    heard = Heard()
    engine = Engine(system, ("ancestral", "prompt-lookup"), heard)
    bad = engine.submit(Request((1, 2), 5, decoder="prompt-lookup"))
    good = engine.submit(Request((1, 2), 5))
    broken = engine.batches["prompt-lookup"]
    monkeypatch.setattr(broken, "step", lambda: (_ for _ in ()).throw(FloatingPointError("NaN")))
    drain(engine)
    assert heard.ends[bad] == ("failed", "FloatingPointError: NaN") and heard.ends[good][0] == "length"
    monkeypatch.undo()
    again = engine.submit(Request((1, 2), 5, decoder="prompt-lookup"))
    drain(engine)
    assert heard.ids[again] == alone(system, Request((1, 2), 5)).ids


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request((), 3), "empty"), (Request((1,), 0), "at least 1"), (Request((1,) * 90, 10), "96 in all"),
        (Request((VOCAB,), 1), "0 to 12"), (Request((1,), 1, decoder="beam"), "there is ancestral"),
        (Request((1,), 1, Sampling(temperature=-1.0)), "temperature"),
        (Request((1,), 1, Sampling(top_p=2.0)), "top_p"), (Request((1,), 1, Sampling(guidance=1.0)), "guidance"),
        (Request((1,), 1, Sampling(repetition_penalty=0.0)), "repetition"),
    ],
)  # fmt: skip
def test_what_can_never_be_written_is_refused_at_once(system, request_, message):
    engine = Engine(system, ("ancestral",), Heard())
    with pytest.raises(ValueError, match=message):
        engine.submit(request_)
    assert not engine.busy


def test_decoders_that_take_back_are_refused(system):
    with pytest.raises(ValueError, match="at least 1 row"):
        Engine(system, (), Heard())
    with pytest.raises(ValueError, match="nothing can be streamed"):
        Engine(system, ("beam",), Heard())


def test_it_works_in_a_thread_of_its_own_and_ends_what_runs(system):
    heard, done = Heard(), threading.Event()

    def sink(pieces):
        heard(pieces)
        if len(heard.ends) == 3:
            done.set()

    engine = Engine(system, ("ancestral",), sink)
    engine.start()
    requests = [Request((1, i), 8, Sampling(temperature=1.0), i) for i in range(3)]
    numbers = [engine.submit(r) for r in requests]
    assert done.wait(20)
    assert [heard.ids[n] for n in numbers] == [alone(system, r).ids for r in requests]
    engine.close(5)
    with pytest.raises(Full, match="shutting down"):
        engine.submit(requests[0])


def test_a_text_that_has_enough_counts_as_finished(system):
    heard = Heard()
    engine = Engine(system, ("ancestral",), heard)
    first, second = (engine.submit(Request((1, i), 8)) for i in range(2))
    engine.turn()
    engine.cancel(first, enough=True)
    engine.cancel(second)
    engine.turn()
    assert heard.ends == {first: ("stop", None), second: ("cancelled", None)} and not engine.busy
    assert engine.counts["finished"] == engine.counts["cancelled"] == 1


def test_closing_cancels_what_takes_too_long():
    system, heard = tiny(4000), Heard()
    engine = Engine(system, ("ancestral",), heard)
    number = engine.submit(Request((1, 2), 3000))
    engine.start()
    engine.close(0.05)
    assert heard.ends[number] == ("cancelled", "the engine was shut down")
