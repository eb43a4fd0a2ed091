"""MaskGIT: what is hidden, how many are decided, and the bound of groups, beyond the laws that every system obeys."""

import itertools
import math

import pytest
import torch

from seriatim.laws.case import randomise
from seriatim.objectives.masked import ByGroups
from seriatim.random import Generator
from seriatim.systems.image import maskgit
from seriatim.systems.image_orders import watched
from seriatim.systems.system import Sampling
from seriatim.tokenizers.pixels import PixelConfig, PixelTokenizer

TINY = {"side": 2, "vocab": 2, "classes": 3, "width": 16, "depth": 2, "heads": 2, "dropout": 0.0}


def test_each_place_is_decided_once_by_the_cosine():
    order = watched("maskgit")
    left = [64 - n for n in itertools.accumulate(order.turn.bincount().tolist())]
    assert left == [max(0, math.floor(64 * math.cos(math.pi / 2 * t / 16) + 1e-9)) for t in range(1, 17)]
    assert order.forwards == 16 and order.likelihood == "bound" and int(order.turn.min()) == 0


def test_groups_are_as_large_as_anti_diagonals_and_lie_anywhere():
    system = maskgit.MaskGIT(maskgit.Config(groups="diagonals"), None).eval()
    order, again = watched("maskgit", system), watched("maskgit", system, 1)
    assert order.turn.bincount().tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 7, 6, 5, 4, 3, 2, 1]
    assert not torch.equal(order.turn, again.turn) and not torch.equal(order.turn, order.coord.sum(1))


def test_as_much_is_hidden_in_training_as_a_step_of_the_cosine_finds_unknown():
    model = maskgit.build().train()
    hidden, weight = model.drawn(model.canvas({"token": torch.zeros(64, 64, dtype=torch.long)}), Generator(0))
    count, unit = hidden.sum(1), (torch.arange(64) + 0.5) / 64
    assert bool(((count - 64 * torch.sin(math.pi / 2 * unit)).abs() < 3).all()), "times are spread evenly"
    torch.testing.assert_close(weight[:, 0] * count, torch.full((64,), 64.0), check_dtype=False)


def bound(model, x, sizes):
    """The mean over all groupings of the negative log-likelihood, group by group."""
    label, total, seen = {"class": torch.tensor([1])}, 0.0, set()
    canvas = model.canvas({"token": x})
    ends = [0, *itertools.accumulate(sizes)]
    for places in itertools.permutations(range(4)):
        groups = tuple(tuple(sorted(places[a:b])) for a, b in itertools.pairwise(ends))
        if groups in seen:
            continue
        seen.add(groups)
        for i in range(len(groups)):
            hidden = torch.tensor([[e in sum(groups[i:], ()) for e in range(4)]])
            total += float(model.hidden_losses(canvas, hidden, label)[0, list(groups[i])].sum())
    return total / len(seen)


@pytest.mark.parametrize("sizes", [(1, 2, 1), (1, 1, 1, 1), (4,), (3, 9)])
def test_the_loss_of_groups_is_the_mean_over_all_groupings(sizes):
    """By all orders of the noise and all steps: no draw is left to chance."""
    model, x = randomise(maskgit.build(maskgit.Config(**TINY))), torch.tensor([[0, 1, 1, 0]])
    noise = torch.tensor(list(itertools.permutations([0.1, 0.3, 0.6, 0.8])), dtype=torch.double)
    canvas, got = model.canvas({"token": x.expand(24, -1)}), []
    with torch.no_grad():
        for step in range(len(sizes)):
            hidden, weight = ByGroups(sizes)(canvas.open, torch.full((24,), (step + 0.5) / len(sizes)), noise)
            losses = model.hidden_losses(canvas, hidden, {"class": torch.ones(24, dtype=torch.long)})
            got.append((losses.sum(1) * weight).mean())
        assert float(torch.stack(got).mean()) == pytest.approx(bound(model, x, (3, 1) if sizes == (3, 9) else sizes))


def test_a_row_of_which_some_is_given_has_fewer_groups():
    free = torch.tensor([[True, True, True, False], [False] * 4])
    hidden, weight = ByGroups((1, 2, 1))(free, torch.tensor([0.9, 0.9]), torch.tensor([[0.1, 0.2, 0.3, 0.0]] * 2))
    assert hidden.tolist() == [[True, True, False, False], [False] * 4] and weight.tolist() == [2.0, 0.0]
    with pytest.raises(ValueError, match="at least one element"):
        ByGroups((1, 0))


def test_known_parts_stay_and_are_seen_from_the_beginning():
    tokenizer = PixelTokenizer(PixelConfig(side=4, levels=2))
    system = maskgit.MaskGIT(maskgit.Config(**{**TINY, "side": 4}), tokenizer).eval()
    images = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)).round() * 2 - 1
    keep = torch.tensor([True, True, False, False])[:, None].expand(4, 4)
    out = system.repaint(images, keep, torch.tensor([0, 1]), Sampling(steps=4))
    assert torch.equal(out.images[:, :, :2], images[:, :, :2]) and out.forwards == 4


def test_groups_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="groups is one of"):
        maskgit.Config(groups="rows")
