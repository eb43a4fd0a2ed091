"""How random ids are: exact where every number is known."""

import math

import pytest
import torch

from seriatim.evaluation.token_statistics import (
    commonest,
    save_token_statistics,
    statistics_of,
    token_statistics,
)

COUNTS = torch.tensor([[2, 4, 0], [1, 3, 4], [3, 1, 6]])  # of pairs; each id follows as often as it is followed


def walk(counts):
    """A closed walk that takes each step (row, column) as often as it is counted (Hierholzer)."""
    left, stack, out = counts.clone(), [0], []
    while stack:
        here = stack[-1]
        if left[here].any():
            to = int(left[here].argmax())
            left[here, to] -= 1
            stack.append(to)
        else:
            out.append(stack.pop())
    return torch.tensor(out[::-1])


def entropy(p):
    return -sum(x * math.log(x) for x in p if x)


def test_a_known_markov_chain_is_found_exactly():
    """Ids that take every step of the chain in its share: their entropies are those of its law."""
    ids = walk(COUNTS)
    assert len(ids) == int(COUNTS.sum()) + 1
    law, steps = [6 / 24, 8 / 24, 10 / 24], [[2 / 6, 4 / 6], [1 / 8, 3 / 8, 4 / 8], [3 / 10, 1 / 10, 6 / 10]]
    rate = sum(share * entropy(row) for share, row in zip(law, steps, strict=True))
    found = token_statistics(ids[None], 3)
    assert (found.single, found.following, found.pair) == pytest.approx((entropy(law), rate, entropy(law) + rate))
    assert found.single_from_uniform == pytest.approx(math.log(3) - entropy(law))
    assert found.pair_from_uniform == pytest.approx(2 * math.log(3) - entropy(law) - rate)
    assert found.randomness == pytest.approx(rate / math.log(3))


def test_uniform_pairs_are_as_random_as_can_be_and_a_cycle_is_not_at_all():
    even, cycle = statistics_of(torch.ones(5, 5)), statistics_of(torch.eye(5).roll(1, 1))
    assert even.randomness == pytest.approx(1) and even.pair_from_uniform == pytest.approx(0, abs=1e-12)
    assert cycle.randomness == pytest.approx(0, abs=1e-12) and cycle.single_from_uniform == pytest.approx(0, abs=1e-12)
    assert cycle.pair_from_uniform == pytest.approx(math.log(5)), "each id says the next one"


def test_pairs_are_not_counted_across_sequences():
    apart = token_statistics(torch.tensor([[0, 0], [1, 1]]), 2)
    assert apart.following == pytest.approx(0, abs=1e-12) and apart.single == pytest.approx(math.log(2))
    assert token_statistics(torch.tensor([[0, 0, 1, 1]]), 2).following > 0.4


def test_the_commonest_ids_come_first_and_the_rest_are_one():
    assert commonest(torch.tensor([7, 9, 9, 3, 9, 7, 5]), 3).tolist() == [1, 0, 0, 2, 0, 1, 2]


@pytest.mark.parametrize(("ids", "vocab", "said"), [([[0]], 2, "2 places"), ([[0, 2]], 2, "0..1"), ([[-1, 0]], 2, "0")])
def test_what_cannot_be_counted_is_refused(ids, vocab, said):
    with pytest.raises(ValueError, match=said):
        token_statistics(torch.tensor(ids), vocab)


def test_counts_that_are_none_are_refused():
    for wrong in (torch.ones(2, 3), torch.zeros(2, 2), -torch.ones(2, 2)):
        with pytest.raises(ValueError, match=r"counts of pairs|in a square"):
            statistics_of(wrong)


def test_a_picture_of_them_is_written(tmp_path):
    found = {"ids": statistics_of(COUNTS), "uniform": statistics_of(torch.ones(3, 3))}
    assert save_token_statistics(found, tmp_path / "bars.png").read_bytes()[:4] == b"\x89PNG"
