"""Adaptive norms driven by groups of slots: as by slots, and plain where a group is."""

from __future__ import annotations

import torch

from seriatim.backbones.driven import Driven
from seriatim.backbones.transformer import Transformer, TransformerConfig
from seriatim.laws.case import randomise
from seriatim.plan import plan_of
from seriatim.view import full, inclusive

WIDTH, SLOTS = 16, 6
GROUP = torch.tensor([1, 0, 2, 2, 0, 1])


def backbone(vector=8):
    return randomise(Transformer(TransformerConfig(WIDTH, 2, 2, vector=vector)), std=0.4)


def plan(view):
    return plan_of(view, [*range(SLOTS)], [*range(SLOTS)], [], source=1)


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_groups_of_slots_are_driven_as_each_of_their_slots_alone():
    b, x, vector = backbone(), draw(3, SLOTS, WIDTH), draw(3, 3, 8, seed=1)
    p = plan(full(SLOTS))
    by_group, by_slot = b(x, p, None, Driven(vector, GROUP)), b(x, p, None, vector[:, GROUP])
    assert (by_group - by_slot).abs().max() < 1e-12
    same = Driven(vector[:, :1], torch.zeros(SLOTS, dtype=torch.long))
    assert (b(x, p, None, same) - b(x, p, None, vector[:, 0])).abs().max() < 1e-12
    assert (by_group - b(x, p, None, vector[:, 0])).abs().max() > 1e-2


def test_plain_norms_do_not_hear_the_vector():
    """As in a stack without adaptive norms whose weights are one."""
    b, x, p = backbone(), draw(3, SLOTS, WIDTH), plan(inclusive([0, 0, 0, 1, 1, 1]))
    plain = Transformer(TransformerConfig(WIDTH, 2, 2)).double().eval()
    own = plain.state_dict()
    plain.load_state_dict({**own, **{k: v for k, v in b.state_dict().items() if k in own}})
    clean = torch.tensor([[True, False]]).expand(3, -1)
    group = torch.tensor([0, 0, 0, 1, 1, 1])
    first = [b(x, p, None, Driven(draw(3, 2, 8, seed=s), group, clean)) for s in (1, 2)]
    assert (first[0][:, :3] - plain(x, p)[:, :3]).abs().max() < 1e-12
    assert torch.equal(first[0][:, :3], first[1][:, :3])
    assert (first[0][:, 3:] - first[1][:, 3:]).abs().min() > 1e-6


def test_rows_may_differ_in_which_groups_are_plain():
    b, x, p = backbone(), draw(2, SLOTS, WIDTH), plan(full(SLOTS))
    vector, clean = draw(2, 3, 8, seed=1), torch.tensor([[True, False, False], [False, False, True]])
    both = b(x, p, None, Driven(vector, GROUP, clean))
    for row in range(2):
        one = slice(row, row + 1)
        assert (b(x[one], p, None, Driven(vector[one], GROUP, clean[one])) - both[one]).abs().max() < 1e-12
