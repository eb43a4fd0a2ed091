"""Drafts that pay: what stands is learned without trying it out, and what costs more than it brings is not drafted."""

import time

import pytest
import torch

from seriatim.decoding.auto import Auto, Turns, part, standing
from seriatim.decoding.draft import NGram
from seriatim.decoding.guess import Guess, room
from seriatim.decoding.loop import decode
from seriatim.decoding.verify import Walk
from seriatim.laws.interface import small
from seriatim.random import Keyed

NEW = 40
SYSTEM = small()


def plain_text(prompt: str = "abab") -> list[int]:
    return SYSTEM.generate(prompt, temperature=0, max_new_tokens=NEW).ids


class Oracle:
    """Drafts what greedy decoding will write, or always something else."""

    def __init__(self, right: bool, length: int = 4):
        self.text = [*SYSTEM.prompt_ids("abab"), *plain_text()]
        self.right, self.length, self.asked = right, length, 0

    def propose(self, canvas, target, random):
        self.asked += 1
        n = min(self.length, room(canvas)[0] - 1)
        if n < 1:
            return None
        ids = self.text[canvas.length : canvas.length + n]
        return Guess(torch.tensor([ids if self.right else [(i + 1) % 256 for i in ids]]))

    def observe(self, canvas, rows, step):
        """Learns nothing."""


def run(auto: Auto, system=SYSTEM, prompt: str = "abab") -> tuple[list[int], int]:
    """What is written greedily, and by how many forwards."""
    canvas = system._begun([system.prompt_ids(prompt)], NEW)
    target, forwards = system.target(None, _greedy()), 0
    with torch.inference_mode():
        for step in decode(target, canvas, Walk(), auto, Keyed(0)):
            forwards += step.forwards
    return canvas.value["token"][0, len(prompt) :].tolist(), forwards


def _greedy():
    from seriatim.systems.system import Sampling

    return Sampling(temperature=0)


def cheap(rows: float) -> float:
    return 1 + 0.01 * rows


def dear(rows: float) -> float:
    return float(rows)


@pytest.mark.parametrize(
    ("text", "stood"),
    [
        ([], None), ([5], None), ([5, 6], {0, 2}), ([5, 9], {0}), ([7], {1}), ([8], set()), ([5, 6, 1], {0, 2}),
    ],
)  # fmt: skip
def test_a_draft_is_judged_by_the_text_behind_it(text, stood):
    """Nodes 5, 7 below the text; 6 below 5; nothing below 7."""
    assert standing([5, 7, 6], [-1, -1, 0], text) == stood


def test_part_of_a_draft_keeps_its_tree():
    guess = Guess(torch.tensor([[5, 7, 6, 4]]), (-1, -1, 0, 2))
    some = part(guess, (0, 2, 3))
    assert some.value.tolist() == [[5, 6, 4]] and some.parent is None and some.chain
    assert part(guess, (0, 1)).parent == (-1, -1) and part(guess, (0, 1, 2, 3)) is guess


def test_what_stands_is_drafted_and_texts_are_those_of_plain_decoding():
    auto = Auto([Oracle(False), Oracle(True)], cheap)
    text, forwards = run(auto)
    assert text == plain_text()
    assert forwards < 0.4 * NEW, "four tokens of each draft stand"
    assert auto.taken.get(1, 0) > 0.7 * forwards
    assert auto.arms[1].stands[3] > 0.5 > auto.arms[0].stands[0]


def test_where_rows_are_dear_nothing_is_drafted():
    auto = Auto([Oracle(True), NGram()], dear)
    text, forwards = run(auto)
    assert text == plain_text() and forwards == NEW and auto.taken == {-1: NEW}


def test_a_draft_that_nobody_verified_is_learned_of_all_the_same():
    auto = Auto([Oracle(True)], dear)
    run(auto)
    assert auto.arms[0].stands[0] > 0.4, "it would have stood each time"


def test_a_drafter_that_does_not_pay_is_asked_less_and_less():
    wrong = Oracle(False)
    run(Auto([wrong], lambda n: 1 + 0.1 * n))
    assert wrong.asked < NEW / 2


def test_it_stops_drafting_when_drafts_stop_standing():
    auto = Auto([Oracle(False)], lambda n: 1 + 0.1 * n)
    text, forwards = run(auto)
    assert text == plain_text() and forwards == NEW
    assert auto.taken.get(0, 0) <= 6, "hope ends soon"


class Slow(Walk):
    """Judges drafts by the clock's loss."""

    def decide(self, canvas, guess, rows, random):
        if guess is not None:
            time.sleep(0.03)
        return super().decide(canvas, guess, rows, random)


@pytest.mark.parametrize(("decider", "drafts"), [(Walk(), True), (Slow(), False)])
def test_it_stops_drafting_where_judging_takes_longer_than_drafts_save(decider, drafts):
    auto = Auto([Oracle(right=True, length=1)], lambda rows: 0.01 + 1e-4 * rows)
    canvas = SYSTEM._begun([SYSTEM.prompt_ids("abab")], NEW)
    with torch.inference_mode():
        for _ in decode(SYSTEM.target(None, _greedy()), canvas, decider, auto, Keyed(0)):
            pass
    assert canvas.value["token"][0, 4:].tolist() == plain_text()
    assert auto.taken[0] > NEW // 4 if drafts else auto.taken[0] < NEW // 4


def test_a_pause_of_the_reader_is_no_cost_of_drafts():
    turns = Turns()
    for drafted in (True, False, True, False):
        turns.begin(drafted, 0.001)
        time.sleep(0.01)
        turns.end()
    assert turns.dearer < 1e-4
    turns.begin()
    turns.end()
    assert turns.dearer < 1e-4
