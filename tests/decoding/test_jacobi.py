"""Jacobi windows: the law stays the target's by enumeration whatever enters the window; greedy windows are greedy
decoding; no more forwards than tokens; the ways of going wrong that are known do fail."""

from __future__ import annotations

import pytest
import torch

from seriatim.decoding.filters import Warper
from seriatim.decoding.guess import Guess
from seriatim.decoding.jacobi import Window
from seriatim.decoding.loop import decode, generate
from seriatim.decoding.target import Target
from seriatim.decoding.verify import Chain, GreedyMatch, Recursive, Walk
from seriatim.factorization.line import Line
from seriatim.heads.dist import Categorical
from seriatim.laws.enumeration import enumerate_rows
from seriatim.laws.tabular import decoded_law, tabular, total_variation, true_law
from seriatim.layout import line
from seriatim.random import Keyed

MODEL = tabular(line(5), Line(1), 3, 1)
WRONG = 0.01


def gap(decider, proposer, warp=None, length=4):
    law = decoded_law(MODEL, length, decider, proposer, warp)
    assert abs(sum(law.values()) - 1) < 1e-12
    return total_variation(law, true_law(MODEL, length, warp))


@pytest.mark.parametrize("entering", ["repeat", "random"])
@pytest.mark.parametrize("size", [0, 1, 2, 3])
def test_the_law_is_the_targets_whatever_enters(size, entering):
    length = 4 if entering == "repeat" else 3
    assert gap(Chain, lambda: Window(size, entering), length=length) < 1e-12


@pytest.mark.parametrize("verifier", [Recursive, Walk])
def test_other_verifiers_are_exact_too(verifier):
    assert gap(verifier, lambda: Window(2)) < 1e-12


@pytest.mark.parametrize("warp", [Warper(0.6), Warper(top_k=2)], ids=str)
def test_the_law_is_that_of_the_filtered_target(warp):
    assert gap(Chain, lambda: Window(2), warp) < 1e-12


class Stale(Window):
    """Keeps the drafts behind a rejection with the rows they were drawn from: exact as well."""

    def propose(self, canvas, target, random):
        old = getattr(self, "_old", None)
        guess = super().propose(canvas, target, random)
        if guess is not None and old is not None:
            first = int(self._first[0])
            n = min(guess.size, old.size - first)
            if n > 0:
                guess = self.keep(guess, old, first, n)
        self._old = guess
        return guess

    def keep(self, guess, old, first, n):
        value = torch.cat([old.value[:, first : first + n], guess.value[:, n:]], 1)
        q = torch.cat([old.q.logits[:, first : first + n], guess.q.logits[:, n:]], 1)
        return Guess(value, q=Categorical(q))


class Relabelled(Stale):
    """Keeps the drafts, but records the new rows as if they had been drawn from them."""

    def keep(self, guess, old, first, n):
        value = torch.cat([old.value[:, first : first + n], guess.value[:, n:]], 1)
        return Guess(value, q=guess.q)


class FromTarget(Chain):
    """After a rejection a token of the target, not of what is left of it."""

    def rest(self, p, q):
        return p


def alone(decider, proposer):
    """One outcome after another: these variants know only one row."""
    model = tabular(line(4), Line(1), 3, 1)
    return total_variation(decoded_law(model, 3, decider, proposer, batch=1), true_law(model, 3))


def test_old_drafts_with_their_old_rows_are_exact_and_with_new_rows_are_not():
    assert alone(Chain, lambda: Stale(2)) < 1e-12
    assert alone(Chain, lambda: Relabelled(2)) > WRONG


def test_sampling_the_target_after_a_rejection_fails():
    assert gap(FromTarget, lambda: Window(2)) > WRONG


def test_a_random_token_against_a_flat_target_is_accepted_once_in_v():
    """Recorded as a point mass, as published."""
    flat = tabular(line(3), Line(1), 5, 0, spread=0.0)

    def run(random, rows):
        stream = decode(Target(flat), flat.blank(rows), Chain(), Window(1, "random"), random)
        next(stream)
        step = next(stream)
        return torch.as_tensor(step.accepted).expand(rows).tolist()

    assert abs(enumerate_rows(run)[1] - 1 / 5) < 1e-12


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("entering", ["repeat", "random"])
def test_greedy_windows_are_greedy_decoding_in_fewer_forwards(transformer, plain, entering, batch):
    model = transformer(60, seed=2)
    greedy = Warper(temperature=0)
    want = plain(Target(model, warp=greedy), batch, Keyed(0))
    for decider, warp in ((Chain(), greedy), (Walk(), greedy), (GreedyMatch(), None)):
        canvas = model.blank(batch)
        forwards = sum(1 for _ in decode(Target(model, warp=warp), canvas, decider, Window(8, entering), Keyed(1)))
        assert torch.equal(canvas.value["token"], want)
        assert forwards < 60


@pytest.mark.parametrize("verifier", [Chain, Walk])
def test_never_more_forwards_than_tokens(transformer, verifier):
    model = transformer()
    for seed in range(5):
        steps = list(decode(Target(model), model.blank(1), verifier(), Window(4, "random"), Keyed(seed)))
        assert len(steps) <= model.layout.size
        assert sum(s.accepted + 1 for s in steps) == model.layout.size


def test_no_window_is_plain_sampling(transformer, plain):
    model = transformer()
    canvas = model.blank(2)
    steps = list(decode(Target(model), canvas, Chain(), Window(0), Keyed(3)))
    assert [s.slots for s in steps] == [1] * model.layout.size
    assert torch.equal(canvas.value["token"], plain(Target(model), 2, Keyed(3)))


def entered(stride, size=3):
    """What a window drafts behind a text whose rows nobody has read yet."""
    model = tabular(line(20), Line(1), 9, 0)
    value = torch.tensor([[1, 2, 3, 4, 5, 6] + [0] * 14])
    window = Window(size, stride=stride)
    canvas = model.canvas({"token": value}, 5)
    target = Target(model)
    stream = decode(target, canvas, Walk(), window, Keyed(0))
    next(stream)
    guess = window.propose(canvas, target, Keyed(0))
    return canvas.value["token"][0, :6].tolist(), guess


def test_tokens_enter_from_the_neighbour_before_or_above():
    text, guess = entered(1)
    assert guess.value[0].tolist() == [text[-1]] * 3
    text, guess = entered(4)
    assert guess.value[0].tolist() == text[2:5]
    text, guess = entered(2, size=5)
    assert guess.value[0].tolist() == [text[4], text[5], text[4], text[5], text[4]]
    assert torch.equal(guess.q.probs()[0].argmax(-1), guess.value[0])  # point masses


def test_a_window_starts_anew_with_another_canvas(transformer):
    model, window = transformer(), Window(4)
    first = generate(Target(model), model.blank(1), Chain(), window, Keyed(0)).value["token"]
    again = generate(Target(model), model.blank(1), Chain(), window, Keyed(0)).value["token"]
    assert torch.equal(first, again)


@pytest.mark.parametrize("wrong", [{"size": -1}, {"stride": 0}, {"entering": "left"}])
def test_impossible_windows_are_refused(wrong):
    with pytest.raises(ValueError, match="window"):
        Window(**wrong)
