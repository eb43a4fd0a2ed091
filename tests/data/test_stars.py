"""Star graphs: each is one, its path is the only one, and a first step cannot be told from nearby."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from seriatim.data.base import Pairs, load_data
from seriatim.systems.text import mdlm, next_token


def read(prompt):
    edges, asked = prompt.removesuffix(":").split(" | ")
    return [tuple(e.split()) for e in edges.split(", ")], asked.split()


@pytest.mark.parametrize(
    "options", [{"arms": "equal"}, {"arms": "uneven"}, {"degree": 5, "shortest": 5, "longest": 11, "nodes": 56}]
)
def test_the_answer_is_the_path_of_a_star(options):
    data = load_data("stars", "text", count=200, held_out=0.2, **options)
    lengths, degree = set(), options.get("degree", 3)
    for side in (data.train, data.test):
        for prompt, answer in side.pairs:
            edges, (start, goal) = read(prompt)
            path = answer.split()
            assert path[0] == start and path[-1] == goal
            assert set(pairwise(path)) <= set(edges)
            following = dict(edges)
            arms = [b for a, b in edges if a == start]
            assert len(arms) == degree and len({b for _, b in edges}) == len(edges)
            ends = []
            for node in arms:
                length = 1
                while node in following:
                    node, length = following[node], length + 1
                ends.append(node)
                lengths.add(length)
            assert goal in ends
    wide = options.get("arms") != "equal"
    assert lengths == ({4} if not wide else set(range(options.get("shortest", 2), options.get("longest", 4) + 1)))


def test_it_follows_from_the_seed_and_sides_share_nothing():
    one, again, other = (load_data("stars", "text", count=300, seed=s) for s in (1, 1, 2))
    assert one.train.pairs == again.train.pairs != other.train.pairs
    assert not set(one.train.pairs) & set(one.test.pairs)
    assert len(one.train) + len(one.test) == 300


@pytest.mark.parametrize(
    "wrong", [{"arms": "long"}, {"degree": 0}, {"shortest": 5}, {"nodes": 12}, {"nodes": 9999}, {"count": 1}]
)
def test_impossible_graphs_are_refused(wrong):
    with pytest.raises(ValueError):
        load_data("stars", "text", **wrong)


# ---- prompts with answers as training draws them ---------------------------------------------------------------------


PAIRS = Pairs((("ab", "cde"), ("f", "g"), ("hij", "kl")), fill=True)


def test_only_answers_and_their_ends_count():
    system = next_token.NextToken(next_token.Config(length=16, width=16, depth=1, heads=2))
    (end,) = system.stop
    batch = system.answered(PAIRS).take(torch.tensor([0, 1]))
    assert batch["token"].tolist() == [[*b"abcde", end], [*b"fg", end, 0, 0, 0]]
    assert batch["counts"].tolist() == [
        [False, False, True, True, True, True],
        [False, True, True, False, False, False],
    ]
    assert system.bytes_in(system.answered(PAIRS)) == 6


def test_masked_texts_are_filled_with_ends():
    """Lengths are not known before, so that every answer takes as many places."""
    system = mdlm.MDLM(mdlm.Config(length=16, width=16, depth=1, heads=2))
    (end,) = system.stop
    batch = system.answered(PAIRS).take(torch.tensor([1, 2]))
    assert batch["token"].tolist() == [[*b"fg", end, end, end, 0, 0], [*b"hijkl", end, end]]
    canvas = system.canvas(batch)[0]
    assert canvas.open.tolist() == batch["counts"].tolist()
    assert canvas.known.tolist() == [[True, *[False] * 6], [True] * 3 + [False] * 4]
    nats, elements = system.score(system.answered(PAIRS))
    assert elements == 12 and nats > 0


def test_an_answer_that_has_no_room_or_is_empty_is_refused():
    system = next_token.NextToken(next_token.Config(length=5, width=16, depth=1, heads=2))
    with pytest.raises(ValueError, match="take 6 tokens, and a window 5"):
        system.answered(PAIRS).take(torch.tensor([0]))
    from seriatim.systems.text.ilm import ILM, Config

    with pytest.raises(ValueError, match="empty answer"):
        ILM(Config(length=16, width=16, depth=1, heads=2)).answered(Pairs((("ab", ""),))).take(torch.tensor([0]))
