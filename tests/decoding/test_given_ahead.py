"""Given elements further on in a line (infilling): drafts end where one stands, and go on behind it."""

from __future__ import annotations

import pytest
import torch

from seriatim.decoding.draft import DraftModel, NGram
from seriatim.decoding.filters import Warper
from seriatim.decoding.guess import branching, room
from seriatim.decoding.jacobi import Window
from seriatim.decoding.loop import decode, generate
from seriatim.decoding.sample import SampleAll
from seriatim.decoding.target import Target
from seriatim.decoding.verify import Chain, GreedyMatch, KSeq, Recursive, Walk
from seriatim.factorization.line import Line
from seriatim.laws.enumeration import enumerate_rows
from seriatim.laws.tabular import tabular, total_variation
from seriatim.layout import line
from seriatim.random import Keyed

SIZE = 16
KNOWN = torch.zeros(3, SIZE, dtype=torch.bool)
KNOWN[0, [0, 3, 7]] = KNOWN[1, [0, 1, 5, 6, 15]] = KNOWN[2, [4]] = True
IDS = torch.randint(7, (3, SIZE), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def model(transformer):
    return transformer(SIZE)


def written(model, rows, decider, proposer=None, warp=None):
    canvas = model.canvas({"token": IDS[rows]}, KNOWN[rows], row=torch.tensor(rows))
    steps = list(decode(Target(model, warp=warp), canvas, decider, proposer, Keyed(1)))
    return canvas.value["token"], steps


PROPOSERS = {
    "chain": lambda model: DraftModel(Target(model), 5),
    "tree": lambda model: DraftModel(Target(model), branching((2, 2, 1)), "top"),
    "n-gram": lambda model: NGram(6, sizes=(2, 1)),
    "window": lambda model: Window(6),
}


@pytest.mark.parametrize("rows", [[0], [1], [2], [0, 1, 2]], ids=str)
@pytest.mark.parametrize("proposer", PROPOSERS)
@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_strings_are_those_of_plain_decoding(model, rows, proposer, temperature):
    """Under the same noise, row by row and in company."""
    warp = Warper(temperature)
    want, _ = written(model, rows, SampleAll(), warp=warp)
    got, _ = written(model, rows, Walk(), PROPOSERS[proposer](model), warp)
    assert torch.equal(got, want) and torch.equal(got[KNOWN[rows]], IDS[rows][KNOWN[rows]])
    if not temperature:
        got, _ = written(model, rows, GreedyMatch(), PROPOSERS[proposer](model), warp)
        assert torch.equal(got, want)


def test_every_run_is_drafted_to_its_end(model):
    """By the target itself: runs of 2, 3 and 8 elements, of which the verifier adds one a step."""
    warp = Warper(0)
    _, steps = written(model, [0], GreedyMatch(), DraftModel(Target(model, warp=warp), 5), warp)
    assert [step.accepted for step in steps] == [1, 2, 5, 1]
    assert [step.drafted for step in steps] == [1, 2, 5, 1]


def test_room_ends_at_the_next_given_element(model):
    canvas = model.canvas({"token": IDS}, KNOWN)
    assert room(canvas) == [2, 3, 4]
    generate(Target(model), canvas, SampleAll())
    assert room(canvas) == [0, 0, 0]


V, N = 2, 5
TABLE, DRAFT = tabular(line(N), Line(1), V, 3), tabular(line(N), Line(1), V, 4)


@pytest.mark.parametrize(
    ("verifier", "shape"), [(Chain, 3), (Walk, 3), (Recursive, (-1, -1, 0)), (KSeq, (-1, -1, 0, 1))], ids=str
)
def test_the_law_is_the_targets_around_what_is_given(verifier, shape):
    """By enumeration, with a draft of another law."""
    known = torch.tensor([False, False, True, False, False])

    def law(decider, proposer):
        def run(random, rows):
            canvas = TABLE.canvas({"token": torch.ones(rows, N, dtype=torch.long)}, known)
            text = generate(Target(TABLE), canvas, decider(), proposer(), random).value["token"]
            return [tuple(row) for row in text.tolist()]

        return enumerate_rows(run)

    want = law(SampleAll, lambda: None)
    got = law(verifier, lambda: DraftModel(Target(DRAFT), shape))
    assert len(want) == V ** (N - 1) and total_variation(want, got) < 1e-12
