"""Token-Shuffle: windows, who depends on whom, and its guidance, beyond the laws that every system obeys."""

import itertools

import pytest
import torch

from seriatim import Guidance, Keyed, SampleAll, Target, decode
from seriatim.factorization.cells import cells
from seriatim.factorization.windows import NextGroup
from seriatim.heads.fused import FusedEmbed, MultiTokenHead
from seriatim.laws.case import randomise
from seriatim.slots import Reads
from seriatim.systems.image import token_shuffle


def tiny(*shape, **settings):
    settings = {"vocab": 2, "classes": 3, "width": 16, "depth": 2, "heads": 2, "dropout": 0.0, "blocks": 1} | settings
    return randomise(token_shuffle.build(token_shuffle.Config(**settings), *shape))


def test_windows_hold_every_element_once_in_raster_order():
    members = NextGroup(cells(4, 6, 2, 2)).members
    assert members[0].tolist() == [0, 1, 6, 7] and members[3].tolist() == [12, 13, 18, 19]
    assert sorted(members.flatten().tolist()) == list(range(24))


@pytest.mark.parametrize(("window", "forwards"), [(1, 16), (2, 4), (4, 1)])
def test_as_many_forwards_as_windows(window, forwards):
    model = tiny(4, 4, window=window)
    target = Target(model, {"class": torch.tensor([1])})
    assert sum(step.forwards for step in decode(target, model.blank(1), SampleAll(), random=Keyed(0))) == forwards


def logits(model, x):
    canvas = model.canvas({"token": x})
    plan = model.factorization.packed(canvas)
    h = model.hidden(plan, canvas, None, model.encode({"class": torch.ones(len(x), dtype=torch.long)}))
    dist, element, _ = model.dist(h, plan, canvas)
    return dist.logits[:, element[0].argsort()]  # by element


def test_an_id_depends_on_all_earlier_windows_and_on_none_of_its_own():
    model = tiny(4, 4)
    group, x = model.factorization.group, torch.zeros(1, 16, dtype=torch.long)
    with torch.no_grad():
        before = logits(model, x)
        for e in range(16):
            other = x.clone()
            other[0, e] = 1
            moved = (logits(model, other) - before).abs().amax((0, 2)) > 1e-9
            assert torch.equal(moved, group > group[e])


def test_the_law_factorises_within_windows():
    model = tiny(2, 4)
    x = torch.tensor(list(itertools.product(range(2), repeat=8)))
    with torch.no_grad():
        p = model.log_prob(model.canvas({"token": x}), {"class": torch.ones(256, dtype=torch.long)}).exp()
    assert float(p.sum()) == pytest.approx(1, abs=1e-12)
    p = p.view([2] * 8)
    first = p.sum((2, 3, 6, 7))  # elements 0, 1, 4, 5
    product = torch.einsum("a,b,c,d->abcd", *(first.sum([j for j in range(4) if j != i]) for i in range(4)))
    torch.testing.assert_close(first, product, rtol=0, atol=1e-12)
    second = p.permute(0, 1, 4, 5, 2, 3, 6, 7).flatten(0, 3)  # earlier window, then elements 2, 3, 6, 7
    second = second / second.sum((1, 2, 3, 4), keepdim=True)
    parts = [second.sum([1 + j for j in range(4) if j != i]) for i in range(4)]
    torch.testing.assert_close(second, torch.einsum("ra,rb,rc,rd->rabcd", *parts), rtol=0, atol=1e-12)
    assert (second[0] - second[1]).abs().max() > 1e-3, "and it does depend on the earlier window"


def test_places_of_a_window_are_told_apart():
    """Trap: ids of a window that are summed, or read from one and the same part of a state."""
    embed, head = FusedEmbed(4, 8, 4, positions=()), MultiTokenHead(8, 4, 4)
    there = torch.ones(1, 1, 4, 1, dtype=torch.bool)
    ids = torch.tensor([[[0, 1, 2, 3]]])
    one, other = (embed.together(embed.vectors(x), there) for x in (ids, ids.flip(2)))
    assert (one - other).abs().max() > 1e-3
    reads = Reads(torch.zeros(1, 4, dtype=torch.long), torch.arange(4)[None], torch.arange(4)[None])
    said = head.logits(torch.randn(1, 1, 8).expand(-1, 4, -1), reads)
    assert (said[0, 1:] - said[0, :1]).abs().amax(1).min() > 1e-6


def test_z_loss_is_the_mean_squared_normaliser_and_of_training_only():
    plain, with_z = MultiTokenHead(8, 5, 4), MultiTokenHead(8, 5, 4, z_loss=0.1)
    with_z.load_state_dict(plain.state_dict())
    h, value = 9 * torch.randn(2, 1, 8).expand(-1, 4, -1), torch.tensor([[0, 1, 2, 3]] * 2)
    reads = Reads(torch.zeros(1, 4, dtype=torch.long), torch.arange(4)[None], torch.arange(4)[None])
    z = plain.logits(h, reads).logsumexp(-1)
    more = with_z.train().loss(h, reads, value) - plain.loss(h, reads, value)
    torch.testing.assert_close(more, 0.1 * z**2)
    assert torch.equal(with_z.eval().loss(h, reads, value), plain.loss(h, reads, value))


def test_guidance_starts_at_one_and_stays_after_the_first_half():
    guidance = Guidance(6.5, token_shuffle.TokenShuffle.schedule)
    shares = torch.linspace(0, 1, 9).tolist()
    want = [1, 2.625, 4.25, 5.875, 7.5, 7.5, 7.5, 7.5, 7.5]
    assert [1 + guidance.weight(p) for p in shares] == pytest.approx(want)


def test_windows_that_do_not_tile_are_refused():
    with pytest.raises(ValueError, match="do not tile"):
        token_shuffle.build(token_shuffle.Config(side=8, window=3))
    with pytest.raises(ValueError, match="multiple of 4"):
        token_shuffle.build(token_shuffle.Config(width=90, heads=3))
    with pytest.raises(ValueError, match="equally large"):
        NextGroup(torch.tensor([0, 0, 1]))
