"""A head that is a whole model: one distribution over groups of ids, which may end early."""

from __future__ import annotations

import itertools

import pytest
import torch

from seriatim.backbones.transformer import Transformer, TransformerConfig
from seriatim.conditions.prefix import PrefixCondition
from seriatim.decoding.filters import Warper
from seriatim.embed import TokenEmbed
from seriatim.factorization.line import Line
from seriatim.factorization.static import AnyOrder
from seriatim.heads.categorical import CategoricalHead
from seriatim.heads.flow import FlowConfig, FlowHead
from seriatim.heads.group import GroupHead
from seriatim.laws.case import randomise
from seriatim.layout import line
from seriatim.model import Model
from seriatim.random import Key, Keyed, enumerate_law

LENGTH, VOCAB, WIDTH, SMALL = 3, 3, 6, 8


def inner(order=None, head=None, name="state"):
    embed = TokenEmbed(VOCAB, SMALL, "byte", positions=(LENGTH,), start=False, mask=True)
    backbone = Transformer(TransformerConfig(SMALL, 2, 2))
    state = {name: PrefixCondition(WIDTH, SMALL)}
    return Model(line(LENGTH, "byte"), order or Line(1), embed, backbone, head or CategoricalHead(SMALL, VOCAB), state)


def dist_of(stop, rows=1, reads=1):
    head = GroupHead(randomise(inner(), std=0.6), stop)
    h = torch.randn(rows, reads, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return head.dist(h, None, None), h


GROUPS = torch.tensor(list(itertools.product(range(VOCAB), repeat=LENGTH)))


@pytest.mark.parametrize("warp", [None, Warper(temperature=0.6), Warper(top_k=2), Warper(temperature=0)])
@pytest.mark.parametrize("stop", [None, 0, 2])
def test_what_is_drawn_is_what_is_scored(stop, warp):
    """Every outcome with its probability; ids behind the stop id are 0, and have probability 1."""
    dist, _ = dist_of(stop)
    dist = dist if warp is None else warp(dist)
    law = enumerate_law(lambda random: tuple(dist.sample(random, Key(torch.tensor([0]), 0))[0, 0].tolist()))
    assert abs(sum(law.values()) - 1) < 1e-12
    for group, p in law.items():
        with torch.no_grad():
            assert abs(float(dist.log_prob(torch.tensor([[group]])).exp()) - p) < 1e-12
        if stop in group:
            assert not any(group[group.index(stop) + 1 :])


@pytest.mark.parametrize(("stop", "outcomes"), [(None, 27), (1, 15)])
def test_groups_have_total_mass_one(stop, outcomes):
    dist, h = dist_of(stop)
    many = dist.head.dist(h.expand(27, -1, -1), None, None)
    with torch.no_grad():
        mass = many.log_prob(GROUPS[:, None])[:, 0].exp()
        terms = many.log_probs(GROUPS[:, None])[:, 0]
    if stop is None:
        first = torch.ones(27, dtype=torch.bool)
    else:  # one of those that differ behind the stop id only
        ends = torch.eq(GROUPS, stop).long()
        behind = ends.cumsum(1) - ends > 0
        first = (GROUPS.masked_fill(~behind, 0) == 0).all(1)
        assert bool((terms[behind] == 0).all())
    assert int(first.sum()) == outcomes
    assert abs(float(mass[first].sum()) - 1) < 1e-12


def test_read_outs_keep_to_themselves_and_draws_to_their_element():
    dist, h = dist_of(0, rows=2, reads=3)
    key = Key(torch.tensor([4, 9]), torch.tensor([[5, 6, 2], [5, 0, 1]]))
    together = dist.sample(Keyed(3), key)
    assert len({tuple(group) for group in together.flatten(0, 1).tolist()}) > 2
    for row, read in itertools.product(range(2), range(3)):
        alone = dist.head.dist(h[row : row + 1, read : read + 1], None, None)
        one = Key(key.row[row : row + 1], key.element[row : row + 1, read : read + 1])
        assert torch.equal(alone.sample(Keyed(3), one)[0, 0], together[row, read])
    picked = dist.take(torch.tensor([[2, 0], [1, 1]]))
    x = together.gather(1, torch.tensor([[2, 0], [1, 1]])[..., None].expand(-1, -1, LENGTH))
    with torch.no_grad():
        assert (
            picked.log_prob(x) - dist.log_prob(together).gather(1, torch.tensor([[2, 0], [1, 1]]))
        ).abs().max() < 1e-12


def test_the_loss_is_the_surprise_and_trains_every_part():
    dist, h = dist_of(0, rows=4, reads=2)
    x = GROUPS[:24:3].view(4, 2, LENGTH)
    h = h.requires_grad_()
    loss = dist.head.loss(h, None, x)
    assert (loss + dist.log_prob(x)).abs().max() < 1e-12
    loss.sum().backward()
    assert bool((h.grad.abs().amax(-1) > 0).all())
    unused = {"model.embed.mask", "model.conditions.state.null"}
    assert all(p.grad is not None for name, p in dist.head.named_parameters() if name not in unused)


def test_impossible_heads_are_refused():
    with pytest.raises(ValueError, match="the one condition 'state'; this one has byte and word"):
        GroupHead(inner(name="word"))
    with pytest.raises(ValueError, match="AnyOrder has no exact likelihood"):
        GroupHead(inner(order=AnyOrder()))
    with pytest.raises(ValueError, match="FlowHead has no log_prob"):
        GroupHead(inner(head=FlowHead(SMALL, 2, FlowConfig(hidden=8, blocks=1))))
    with pytest.raises(ValueError, match=r"the stop id lies in 0\.\.2, got 3"):
        GroupHead(inner(), 3)
    dist, _ = dist_of(0)
    with pytest.raises(ValueError, match=r"values are \(1, 1, 3\) ids, got \(1, 3\)"):
        dist.log_prob(torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(TypeError, match="groups have no mixture"):
        dist.mix([dist], [2.0, -1.0])
    with pytest.raises(ValueError, match="already warped"):
        Warper(top_k=1)(Warper(top_k=2)(dist))
