"""Requests that come at times of their own, on a clock that ticks once a step: beside what an oracle of events says."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from seriatim.evaluation.timelines import figures_of, percentile, save_timelines
from seriatim.laws.case import randomise
from seriatim.serving.engine import Engine
from seriatim.serving.request import Request
from seriatim.serving.workload import Arrival, Gathering, Story, closed, poisson, serve, steady
from seriatim.studies import flover
from seriatim.systems.claim import Trial
from seriatim.systems.text.next_token import Config, NextToken

VOCAB = 13


@pytest.fixture(scope="module")
def system():
    torch.manual_seed(0)
    made = NextToken(Config(vocab=VOCAB, width=16, depth=1, heads=2, length=600), None).eval().requires_grad_(False)
    randomise(made.model, std=0.5)
    made.model.float()
    return made


class Clock:
    """A step takes a second, and nothing else takes any."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


def served(system, arrivals, gathering, rows=32):
    clock = Clock()

    class Ticking(Engine):
        def turn(self):
            clock.now += 1.0
            super().turn()

    return serve(lambda sink: Ticking(system, ("ancestral",), sink, rows=rows), arrivals, gathering, clock, clock.sleep)


LENGTHS = (3, 9, 4, 7, 2)


def requests():
    return [Request((1, 2, i), n, seed=i) for i, n in enumerate(LENGTHS)]


def test_in_flight_each_joins_when_it_comes_and_leaves_when_it_ends(system):
    times = (0.0, 2.0, 2.5, 6.0, 30.0)
    stories = served(system, [Arrival(t, r) for t, r in zip(times, requests(), strict=True)], Gathering())
    for at, length, story in zip(times, LENGTHS, stories, strict=True):
        begun = -(-at // 1) if at < 30 else at  # at the next step
        assert story.begun == begun and story.tokens == [begun + 1 + i for i in range(length)]
        assert story.ended == begun + length and story.latency == begun + length - at


def test_one_by_one_each_waits_for_those_before_it(system):
    stories = served(system, poisson(requests(), float("inf")), Gathering(1, 0.0), rows=1)
    ends, now = [], 0
    for length in LENGTHS:
        now += length
        ends.append(now)
    assert [s.ended for s in stories] == ends
    assert all(b.begun >= a.ended for a, b in pairwise(stories))


def test_a_batch_that_nobody_joins_runs_to_its_longest_text(system):
    arrivals = [Arrival(t, r) for t, r in zip((0.0, 0.5, 1.5, 1.6, 20.0), requests(), strict=True)]
    stories = served(system, arrivals, Gathering(32, 1.0))
    first, second = stories[:2], stories[2:4]
    assert {s.begun for s in first} == {1.0} and {s.begun for s in second} == {max(s.ended for s in first)}
    assert max(s.ended for s in first) - 1.0 == 9
    assert stories[4].begun == 20.0, "the last waits for nobody"


def test_batches_of_a_size_wait_until_they_are_full_or_nobody_comes(system):
    stories = served(system, [Arrival(2.0 * i, r) for i, r in enumerate(requests())], Gathering(2, float("inf")))
    begun = [s.begun for s in stories]
    assert begun[0] == begun[1] == 2.0 and begun[2] == begun[3] > begun[1] and begun[4] >= 8.0


def test_whatever_the_way_a_request_gets_the_same_text(system):
    texts = [
        [s.ids for s in served(system, poisson(requests(), 0.4, seed=3), way, rows=way.most)]
        for way in flover.WAYS.values()
    ]
    assert all(t == texts[0] for t in texts) and [len(x) for x in texts[0]] == [*LENGTHS]


def test_in_a_closed_loop_a_client_asks_again_when_it_has_had_a_text(system):
    clock = Clock()

    class Ticking(Engine):
        def turn(self):
            clock.now += 1.0
            super().turn()

    stories = closed(lambda sink: Ticking(system, ("ancestral",), sink), requests(), 2, clock)
    assert [s.arrived for s in stories] == [0.0, 0.0, 3.0, 7.0, 9.0]
    assert [s.ended for s in stories] == [3.0, 9.0, 7.0, 14.0, 11.0]
    assert all(sum(s.arrived <= t < s.ended for s in stories) == 2 for t in range(11)), "two at a time"
    assert steady(stories, 1) == sum(3 < t <= 9 for s in stories for t in s.tokens) / 6 == 2.0
    assert steady(stories, 2) == pytest.approx(sum(LENGTHS) / 14), "two seconds between are too few"
    assert steady(stories[:1], 5) == pytest.approx(1.0)


def test_arrivals_are_a_poisson_process_and_of_their_seed():
    many = [Request((1,))] * 4000
    arrivals = poisson(many, 5.0, seed=1)
    gaps = torch.tensor([b.at - a.at for a, b in pairwise(arrivals)])
    assert gaps.mean() == pytest.approx(0.2, rel=0.06) and gaps.std() == pytest.approx(0.2, rel=0.1)
    assert arrivals == poisson(many, 5.0, seed=1) != poisson(many, 5.0, seed=2)
    assert all(a.at == 0 for a in poisson(many[:5], float("inf")))
    with pytest.raises(ValueError, match="positive number"):
        poisson(many, 0.0)


def test_figures_and_picture(tmp_path):
    stories = [Story(0.0, 3, 0.0, [1.0, 2.0, 4.0], 4.0), Story(1.0, 3, 1.0, [3.0, 3.5], 3.5)]
    said = figures_of(stories)
    assert said["tokens_per_second"] == 5 / 4 and said["latency"] == (4 + 2.5) / 2 and said["first"] == 1.5
    assert said["gap_median"] == 1.0 and said["gap_99"] == 2.0 and said["first_99"] == 2.0
    assert percentile(range(100), 0.99) == 99 and percentile([4.0], 0.5) == 4.0
    path = save_timelines({"in flight": stories, "one by one": stories}, tmp_path / "lines.png")
    assert path.stat().st_size > 5000
    with pytest.raises(ValueError, match="no requests"):
        save_timelines({"in flight": []}, path)


def test_the_claim_measures_what_its_arms_are_named(system, monkeypatch):
    monkeypatch.setattr(flover, "requests_of", lambda system, count, seed: requests()[:count])
    monkeypatch.setattr(flover, "RATE", 1e6)
    arm = flover.CLAIM.arms["in flight"]
    assert isinstance(arm, Trial) and arm.model == "zoo:text-base"
    figures = arm.measure(system, 0)
    assert flover.CLAIM.metric in figures and figures["tokens_per_second"] > 0
    assert set(flover.CLAIM.arms) == set(flover.WAYS)


def test_requests_have_prompts_and_lengths_of_their_own(system):
    made = flover.requests_of(system, 20, 1, vocab=VOCAB)
    assert made == flover.requests_of(system, 20, 1, vocab=VOCAB) != flover.requests_of(system, 20, 2, vocab=VOCAB)
    assert all(32 <= len(r.prompt) <= 256 and 32 <= r.max_new_tokens <= 256 for r in made)
    assert len({r.seed for r in made}) == 20
