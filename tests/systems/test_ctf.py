"""CTF: clusters of codes, two stages and their law, beyond the laws that every system obeys."""

import itertools

import pytest
import torch

from seriatim import SampleAll, decode
from seriatim.canvas import Set
from seriatim.decoding.target import Target
from seriatim.factorization.coarse_fine import COARSE, FINE
from seriatim.laws.case import randomise
from seriatim.random import Generator, Keyed
from seriatim.systems.image import ctf
from seriatim.systems.system import Sampling
from seriatim.tokenizers.clusters import kmeans, members_of
from seriatim.tokenizers.pixels import PixelConfig, PixelTokenizer


def codes(n=40, d=3):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(0))


def test_clusters_follow_from_the_codes_whatever_their_numbers():
    x = codes()
    one, order = kmeans(x, 7), torch.randperm(40, generator=torch.Generator().manual_seed(1))
    assert torch.equal(one, kmeans(x, 7)), "no randomness"
    assert torch.equal(kmeans(x[order], 7), one[order])
    mine, other = members_of(one, x), members_of(kmeans(x[order], 7), x[order])
    assert torch.equal(mine, torch.where(other >= 0, order[other.clamp(min=0)], -1))


def test_every_code_is_in_the_cluster_of_the_nearest_centre():
    x = codes()
    label = kmeans(x, 5)
    centre = torch.stack([x[label == k].mean(0) for k in range(5)])
    assert torch.equal(torch.cdist(x, centre).argmin(1), label)


@pytest.mark.parametrize("count", [1, 4, 6])
def test_no_cluster_is_empty_even_where_codes_are_equal(count):
    x = torch.tensor([[0.0], [0.0], [0.0], [0.0], [5.0], [9.0]])
    assert kmeans(x, count).bincount(minlength=count).min() >= 1
    with pytest.raises(ValueError, match="make 1 to 6 clusters"):
        kmeans(x, 7)


def test_members_begin_with_the_one_in_the_middle():
    x = torch.tensor([[0.0], [1.0], [3.0], [10.0]])
    assert members_of(torch.tensor([0, 0, 0, 1]), x).tolist() == [[1, 0, 2], [3, -1, -1]]


def model(x, clusters, side=2):
    return randomise(ctf.build(ctf._tiny(vocab=len(x), clusters=clusters, side=side), x))


def enumerated(m, n):
    """All maps of n places, and their probabilities."""
    k, size = m.heads["token"].members.shape
    coarse = torch.tensor(list(itertools.product(range(k), repeat=n)))
    fine = torch.tensor(list(itertools.product(range(size), repeat=n)))
    x = torch.cat([coarse.repeat_interleave(len(fine), 0), fine.repeat(len(coarse), 1)], 1)
    with torch.no_grad():
        p = m.log_prob(m.canvas({"token": x}), {"class": torch.ones(len(x), dtype=torch.long)}).exp()
    return x, p, (len(coarse), len(fine))


def test_the_two_stages_are_one_law_and_ids_never_leave_their_cluster():
    """Clusters of three and one: places that a cluster lacks are impossible."""
    m = model(torch.tensor([[0.0], [1.0], [2.0], [9.0]]), 2)
    x, p, shape = enumerated(m, 4)
    assert float(p.sum()) == pytest.approx(1, abs=1e-12)
    missing = (m.heads["token"].members[x[:, :4], x[:, 4:]] < 0).any(1)
    assert bool((p[missing] == 0).all()) and bool((p[~missing] > 0).all())
    with torch.no_grad():
        coarse = m.canvas({"token": x[:: shape[1]]})
        condition = m.encode({"class": torch.ones(shape[0], dtype=torch.long)})
        first = m.losses_by(m.factorization.part(coarse, (COARSE,)), coarse, condition).neg().sum(1).exp()
    torch.testing.assert_close(p.view(shape).sum(1), first, rtol=0, atol=1e-12)


def test_one_cluster_is_one_shot_and_independent():
    m = model(torch.tensor([[0.0], [1.0], [5.0]]), 1)
    _, p, _ = enumerated(m, 4)
    p = p.view([3] * 4)
    parts = [p.sum([j for j in range(4) if j != i]) for i in range(4)]
    torch.testing.assert_close(p, torch.einsum("a,b,c,d->abcd", *parts), rtol=0, atol=1e-12)


def test_fine_logits_depend_on_all_clusters_and_on_no_fine_part():
    m = model(torch.tensor([[0.0], [1.0], [8.0], [9.0]]), 2)
    condition = m.encode({"class": torch.tensor([1])})

    def said(x):
        canvas = m.canvas({"token": x})
        plan = m.factorization.part(canvas, (FINE,))
        return m.dist(m.hidden(plan, canvas, None, condition), plan, canvas)[0].logits

    x = torch.zeros(1, 8, dtype=torch.long)
    with torch.no_grad():
        before = said(x)
        for e in range(8):
            other = x.clone()
            other[0, e] = 1
            moved = (said(other) - before).abs().amax((0, 2)) > 1e-9
            assert bool(moved.all()) if e < 4 else not bool(moved.any())


def test_each_stage_goes_through_its_own_layers():
    m = model(torch.tensor([[0.0], [1.0], [8.0], [9.0]]), 2)
    canvas, condition = m.canvas({"token": torch.zeros(1, 8, dtype=torch.long)}), m.encode({"class": torch.tensor([1])})
    for layer, changed in ((0, slice(0, 4)), (1, slice(4, 8))):
        with torch.no_grad():
            before = m.losses_by(m.factorization.packed(canvas), canvas, condition)
            m.backbone.layers[layer].down.mul_(2)
            moved = (m.losses_by(m.factorization.packed(canvas), canvas, condition) != before)[0]
        want = torch.zeros(8, dtype=torch.bool)
        want[changed] = True
        assert torch.equal(moved, want)


def test_training_by_stages_is_the_packed_loss_over_ids():
    system = ctf.CTF(ctf.Config(side=4, width=16, heads=2, depth=1, fine_depth=1), PixelTokenizer(PixelConfig(side=4)))
    system.eval()
    images = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    batch = {"image": images, "label": torch.tensor([0, 1, 2])}
    total, count = system.losses(batch, Generator(0), 0.0)
    canvas, condition = system.canvas(batch)
    torch.testing.assert_close(total, system.model.losses(canvas, condition).sum())
    assert int(count) == 3 * 16
    assert torch.equal(system.picture(canvas.value["token"]), system.tokenizer.decode(system.tokenizer.encode(images)))


def test_as_many_forwards_as_places_and_one_more():
    m = model(torch.tensor([[0.0], [1.0], [8.0], [9.0]]), 2)
    target = Target(m, {"class": torch.tensor([1])})
    assert sum(s.forwards for s in decode(target, m.blank(1), SampleAll(), random=Keyed(0))) == 5


def test_after_the_first_stage_a_film_shows_the_middle_member_of_each_cluster():
    system = ctf.CTF(ctf.Config(side=4, width=16, heads=2, depth=1, fine_depth=1), PixelTokenizer(PixelConfig(side=4)))
    canvas = system.model.blank(1).apply([Set(torch.full((1, 9), 2), torch.arange(9)[None])])
    middle = system.tokenizer.decode(system.members[2, 0].expand(1, 16))
    assert torch.equal(system.so_far(canvas).flatten()[:9], middle.flatten()[:9])
    assert not system.so_far(canvas).flatten()[9:].any(), "grey"
    made = system.draw(count=1, sampling=Sampling(), film=True)
    assert len(made.frames) == 16 and made.forwards == 17 and made.images.shape == (1, 1, 4, 4)
