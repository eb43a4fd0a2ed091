"""Axial Transformer: full context of the raster order, folded lines, rows that are computed once, colours."""

from __future__ import annotations

import itertools

import pytest
import torch

from seriatim.backbones.axial import AxialConfig, _shifted_down, kinds_of
from seriatim.decoding.guidance import Guidance
from seriatim.decoding.loop import decode, generate
from seriatim.decoding.sample import SampleAll
from seriatim.decoding.target import Target
from seriatim.factorization.axes import DOWN, INNER, UPPER
from seriatim.random import Generator, Keyed
from seriatim.systems.image import axial_transformer as axial
from seriatim.systems.system import Sampling
from seriatim.tokenizers.pixels import PixelConfig, PixelTokenizer

SHAPES = [(1, 3, 4), (2, 3, 2), (3, 2, 2)]


def tiny(shape, vocab=5):
    return axial.case(*shape, given=0, vocab=vocab)


def labels(n):
    return {"class": torch.arange(n) % 3}


def logits(model, ids):
    canvas = model.canvas({"token": ids})
    plan = model.factorization.packed(canvas)
    with torch.no_grad():
        h = model.hidden(plan, canvas, None, model.encode(labels(len(ids))))
        return model.dist(h, plan, canvas)[0].log_probs()


# ---- who depends on whom ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_every_value_depends_on_all_before_it_and_on_nothing_else(shape):
    """Earlier channels, earlier rows, earlier pixels of the row: the whole context of the raster order."""
    case = tiny(shape)
    x = case.sample(1)
    base, n = logits(case.model, x), x.shape[1]
    for e in range(n):
        moved = x.clone()
        moved[:, e] = (x[:, e] + 1) % 5
        changed = (logits(case.model, moved) - base).abs().amax(-1)[0] > 1e-12
        assert torch.equal(changed, torch.arange(n) > e)


@pytest.mark.parametrize("shape", [(1, 2, 2), (2, 1, 2)])
def test_probabilities_of_all_pictures_sum_to_one(shape):
    case = tiny(shape, vocab=2)
    every = torch.tensor(list(itertools.product(range(2), repeat=4)))
    with torch.no_grad():
        assert float(case.total(every).exp().sum()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("shape", [*SHAPES, (1, 1, 4), (2, 4, 1)])
def test_folded_lines_are_dense_attention_under_their_masks(shape):
    case = tiny(shape)
    canvas = case.canvas(case.sample(3))
    model, plan = case.model, case.model.factorization.packed(canvas)
    loose = plan.take(torch.arange(plan.size)[None])
    assert plan.grids == shape and loose.grids is None
    with torch.no_grad():
        both = [model.hidden(p, canvas, None, model.encode(labels(3))) for p in (plan, loose)]
    inner = plan.slots.coord[0, :, 0] == INNER
    torch.testing.assert_close(both[0][:, inner], both[1][:, inner], rtol=0, atol=1e-10)


def test_what_is_shifted_leaves_zeros_in_the_first_row_and_column():
    x = torch.randn(2, 2 * 3 * 4, 5)
    shifted, maps = _shifted_down(x, (2, 3, 4)).view(4, 3, 4, 5), x.view(4, 3, 4, 5)
    assert not shifted[:, 0].any() and torch.equal(shifted[:, 1:], maps[:, :-1])
    case = tiny((1, 3, 4))
    canvas = case.canvas(case.sample(1))
    plan, embed = case.model.factorization.packed(canvas), case.model.embed
    slots = embed(canvas, plan)[0].view(2, 3, 4, 16)
    place = embed.row[:, None] + embed.column
    assert torch.equal(slots[1, :, 0], place[:, 0])
    torch.testing.assert_close(slots[1, :, 1:] - place[:, 1:], slots[0, :, :-1] - place[:, :-1], rtol=0, atol=1e-12)


def test_a_value_is_handed_down_to_the_place_below_it_alone():
    case = tiny((2, 3, 2))
    plan = case.model.factorization.packed(case.canvas(case.sample(1)))
    seen = plan.views[DOWN].mask()[0]
    stage, channel, row, column = plan.slots.coord[0].unbind(1)
    below = (stage == INNER)[:, None] & (stage == UPPER) & (channel[:, None] == channel)
    below = below & (row[:, None] == row + 1) & (column[:, None] == column)
    assert torch.equal(seen, below | torch.eye(plan.size, dtype=torch.bool))


# ---- decoding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("guidance", [None, Guidance(1.5)])
def test_rows_computed_once_give_the_pictures_of_computing_everything_again(shape, guidance):
    model = tiny(shape).model

    def drawn(cached):
        target = Target(model, labels(3), guidance, cached=cached)
        return generate(target, model.blank(3), SampleAll(), random=Keyed(2)).value["token"]

    assert torch.equal(drawn(True), drawn(False))


def test_a_row_is_computed_at_its_end_and_a_pixel_takes_one_slot():
    case = tiny((1, 3, 4))
    target = Target(case.model, labels(2))
    slots = [step.slots for step in decode(target, case.model.blank(2), SampleAll(), random=Keyed(0))]
    assert [n // 2 if slots[0] == 2 else n for n in slots] == [1] * 4 + ([5] + [1] * 3) * 2
    case = tiny((2, 2, 2))
    target = Target(case.model, labels(1))
    slots = [step.slots for step in decode(target, case.model.blank(1), SampleAll(), random=Keyed(0))]
    assert slots == [5, 1, 3, 1] * 2, "a channel begins with all that is told of earlier ones"
    assert target.cache.columns == 0


def test_rows_of_a_batch_with_other_parts_given_are_drawn_together():
    model, case = tiny((2, 2, 2)).model, tiny((2, 2, 2))
    ids = case.sample(2)
    known = torch.zeros(2, 8, dtype=torch.bool)
    known[0, :5], known[1, ::3] = True, True

    def drawn(rows):
        canvas = model.canvas({"token": ids[rows]}, known[rows], row=torch.tensor(rows))
        label = {"class": torch.tensor(rows)}
        return generate(Target(model, label), canvas, SampleAll(), random=Keyed(3)).value["token"]

    both = drawn([0, 1])
    assert torch.equal(both[known], ids[known])
    assert torch.equal(both, torch.cat([drawn([0]), drawn([1])]))


# ---- training, colours, pictures -------------------------------------------------------------------------------------


def colours(channels=3, side=4):
    torch.manual_seed(0)
    tokenizer = PixelTokenizer(PixelConfig(side=side, channels=channels, levels=5))
    c = axial.Config(side, side, channels, 5, 3, 16, 2, 2, 1, 2, 0.0)
    return axial.AxialTransformer(c, tokenizer)


def test_the_mean_over_channels_is_the_whole_loss():
    system = colours()
    with torch.no_grad():
        for p in system.model.parameters():
            p.normal_(0, 0.3)
    batch = {"image": torch.rand(3, 3, 4, 4) * 2 - 1, "label": torch.arange(3)}
    canvas, condition = system.canvas(batch)
    with torch.no_grad():
        whole = float(system.model.losses(canvas, condition).sum())
        parts = {float(system.train().losses(batch, Generator(seed), 0.0)[0]) for seed in range(40)}
        scored, count = system.eval().losses(batch, Generator(0), 0.0)
    assert len(parts) == 3 and sum(parts) / 3 == pytest.approx(whole, rel=1e-5)
    assert float(scored) == pytest.approx(whole, rel=1e-5) and int(count) == 3 * 48


def test_branches_and_logits_begin_near_zero():
    system = colours(1)
    batch = {"image": torch.rand(2, 1, 4, 4) * 2 - 1, "label": torch.arange(2)}
    total, count = system.losses(batch, Generator(0), 0.0)
    assert float(total.detach()) / int(count) == pytest.approx(torch.tensor(5.0).log().item(), abs=1e-3)


def test_channels_stand_outermost_and_pictures_come_back():
    system = colours()
    images = system.tokenizer.decode(torch.randint(5, (2, 16, 3)))
    ids = system.elements(images, system.model.layout)
    assert torch.equal(system.picture(ids), images)
    moved = images.clone()
    moved[:, 1, 2, 3] = -images[:, 1, 2, 3] + 0.5
    changed = (system.elements(moved, system.model.layout) != ids).any(0).nonzero()[:, 0].tolist()
    assert changed == [16 + 2 * 4 + 3]


def test_pictures_are_completed_from_their_upper_half():
    system = colours().eval()
    images, keep = system.tokenizer.decode(torch.randint(5, (2, 16, 3))), torch.zeros(4, 4, dtype=torch.bool)
    keep[:2] = True
    out = system.repaint(images, keep, torch.tensor([0, 1]), Sampling(), seed=1, film=True)
    assert torch.equal(out.images[:, :, :2], images[:, :, :2]) and out.forwards == 48
    assert not torch.equal(out.images[:, :, 2:], images[:, :, 2:])


def test_what_does_not_fit_is_said():
    with pytest.raises(ValueError, match="an even number"):
        kinds_of(0, 3, 1)
    with pytest.raises(ValueError, match="heads of their own"):
        AxialConfig(16, 1, 4, kv_heads=2, kinds=kinds_of(0, 0, 1))
    model = tiny((1, 2, 2)).model
    plan = model.factorization.packed(model.blank(1))
    with pytest.raises(ValueError, match="as a prefix only"):
        model.backbone(torch.zeros(1, plan.size, 16).double(), plan, None, torch.zeros(1, 16))
