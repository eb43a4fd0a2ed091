"""NAR: anti-diagonals, who predicts whom, and its ends, beyond the laws that every system obeys."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from seriatim import Keyed, SampleAll, Target, generate
from seriatim.backbones.transformer import Transformer
from seriatim.embed import TokenEmbed
from seriatim.factorization.line import Line
from seriatim.factorization.neighbours import readers
from seriatim.heads.categorical import CategoricalHead
from seriatim.laws.case import randomise
from seriatim.layout import grid, line
from seriatim.model import Model
from seriatim.plan import Reads
from seriatim.random import Forced
from seriatim.systems.image import nar


def tiny(*shape, **settings):
    settings = {"vocab": 2, "classes": 3, "width": 16, "depth": 2, "heads": 2, "dropout": 0.0} | settings
    return randomise(nar.build(nar.Config(**settings), *shape))


@pytest.mark.parametrize(("shape", "forwards"), [((4, 4), 7), ((16, 16), 31), ((3, 5), 7), ((2, 3, 3), 6), ((1, 1), 1)])
def test_anti_diagonals_are_the_steps(shape, forwards):
    model = tiny(*shape, width=24 if len(shape) == 3 else 16)
    distance = model.layout.coord.sum(1)
    steps = model.factorization.packed(model.blank(1)).steps()
    assert len(steps) == forwards
    for d, step in enumerate(steps):
        assert sorted(set(step.reads.element[0].tolist())) == (distance == d).nonzero()[:, 0].tolist()


def test_groups_grow_to_the_diagonal_and_shrink_again():
    assert grid(4, 4).coord.sum(1).bincount().tolist() == [1, 2, 3, 4, 3, 2, 1]


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 2), (1, 4), (4, 1)])
def test_each_element_is_read_once_from_each_neighbour_before_it(shape):
    coord = grid(*shape).coord
    number = {tuple(c): e for e, c in enumerate(coord.tolist())}
    want = [(0, 0, a) for a in range(len(shape)) if shape[a] > 1]
    for e, place in enumerate(coord.tolist()):
        for a in range(len(shape)):
            before = (*place[:a], place[a] - 1, *place[a + 1 :])
            want += [(1 + number[before], e, a)] if before in number else []
    assert sorted(zip(*(x.tolist() for x in readers(coord)), strict=True)) == sorted(want)


def test_two_elements_of_a_diagonal_are_independent_given_the_corner():
    model = tiny(2, 2)
    x = torch.tensor(list(itertools.product(range(2), repeat=4)))
    with torch.no_grad():
        p = model.log_prob(model.canvas({"token": x}), {"class": torch.ones(16, dtype=torch.long)}).exp()
    assert float(p.sum()) == pytest.approx(1, abs=1e-12)
    joint = p.view(2, 2, 2, 2).sum(3)  # corner, right, below
    joint = joint / joint.sum((1, 2), keepdim=True)
    assert torch.allclose(joint, joint.sum(2, keepdim=True) * joint.sum(1, keepdim=True), rtol=0, atol=1e-12)
    assert (joint[0] - joint[1]).abs().max() > 1e-3, "and they do depend on it"


def test_two_predictors_of_an_element_are_averaged_in_logits():
    model = tiny(2, 2)
    x = torch.tensor([[0, 1, 1, 0]])
    with torch.no_grad():
        canvas, condition = model.canvas({"token": x}), model.encode({"class": torch.tensor([1])})
        plan = model.factorization.packed(canvas)
        below, right = model.hidden(plan, canvas, None, condition).split(16, -1)
        weight = model.heads["token"].weight.view(2, 2, 16)  # role 0 looks down, role 1 to the right
        both = (below[0, 2] @ weight[0].T + right[0, 3] @ weight[1].T) / 2
        said = model.dist(model.hidden(plan, canvas, None, condition), plan, canvas)[0].logits[0, 3]
    swapped = (right[0, 2] @ weight[0].T + below[0, 3] @ weight[1].T) / 2
    torch.testing.assert_close(said, both, rtol=0, atol=1e-12)
    assert (said - swapped).abs().max() > 1e-3


def as_raster(model):
    """Raster autoregression with the weights of a grid of one row: the trunk, and the head to the right."""
    c = model.backbone.config
    width, n = c.width, model.layout.size
    embed = TokenEmbed(2, width, positions=(n + 1,), start=False)
    other = Model(
        line(n), Line(prefix=1), embed, Transformer(c), CategoricalHead(width, 2), dict(model.conditions)
    ).double()
    rows, columns = model.embed.positions
    with torch.no_grad():
        embed.table.copy_(model.embed.table)
        embed.positions[0].copy_(torch.cat([columns[:1], columns]) + rows)
        other.backbone.load_state_dict(model.backbone.state_dict())
        other.heads["token"].weight.copy_(model.heads["token"].weight[2:])
    other.backbone.layers = other.backbone.layers[:-1]  # the branch's
    other.backbone.each_kind = other.backbone.each_kind[:-1]
    return other.eval()


def test_one_row_is_raster_with_the_head_to_the_right():
    model = tiny(1, 4, rope=False)
    raster = as_raster(model)
    x = torch.tensor(list(itertools.product(range(2), repeat=4)))
    label = {"class": torch.arange(16) % 3}
    with torch.no_grad():
        losses = [m.losses(m.canvas({"token": x}), label) for m in (model, raster)]
    torch.testing.assert_close(*losses, rtol=0, atol=1e-12)


def test_the_branch_changes_the_head_below_alone():
    model = tiny(1, 4), tiny(4, 1)
    x = torch.tensor([[0, 1, 1, 0]])
    label = {"class": torch.tensor([1])}
    for m, changes in zip(model, (False, True), strict=True):
        with torch.no_grad():
            before = m.losses(m.canvas({"token": x}), label)
            m.backbone.layers[-1].down.mul_(2)
            after = m.losses(m.canvas({"token": x}), label)
        assert torch.equal(before, after) is not changes


@pytest.mark.parametrize("form", ["driven", "llama"])
def test_rows_with_different_given_corners_decode_as_they_train(form):
    """Out-painting: each row knows another part."""
    model = tiny(2, 3, form=form)
    x = torch.randint(2, (3, 6), generator=torch.Generator().manual_seed(0))
    known = torch.tensor([[1, 0, 0, 0, 0, 0], [1, 1, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0]]).bool()
    label = {"class": torch.arange(3)}
    with torch.no_grad():
        packed = model.log_prob(model.canvas({"token": x}, known), label)
    for cached in (True, False):
        forced = Forced(x)
        canvas = model.canvas({"token": torch.where(known, x, 0)}, known)
        generate(Target(model, label, cached=cached), canvas, SampleAll(), random=forced)
        assert torch.equal(canvas.value["token"], x)
        torch.testing.assert_close(forced.log_prob, packed, rtol=0, atol=1e-9)


def test_a_third_axis_is_time_and_needs_no_other_code():
    model = tiny(2, 2, 2, width=24)
    canvas = generate(Target(model, {"class": torch.tensor([1])}), model.blank(1), SampleAll(), random=Keyed(0))
    assert canvas.done and len(model.factorization.packed(model.blank(1)).steps()) == 4
    assert model.backbone.branches == 2


def test_a_class_that_is_not_turned_is_seen_alike_by_all():
    """As released: its queries and keys are zero, so that its own direction changes nobody's score."""
    table = tiny(2, 3, form="llama").backbone.rotary["all"]
    plan = tiny(2, 3).factorization.packed(tiny(2, 3).blank(1))
    cos, sin = table.of(plan, torch.zeros(1))
    assert not cos[0, 0].any() and not sin[0, 0].any()
    assert torch.equal(cos[0, 1:], table.at(plan.slots.coord, torch.float32)[0][0, 1:])


@pytest.mark.parametrize(("wrong", "said"), [({"form": "gpt"}, "form is one of"), ({"rope": False}, "rotary")])
def test_forms_that_do_not_exist_are_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        nar.Config(**{"form": "llama"} | wrong)


class Side:
    """Eight pictures that a batch names by number."""

    def __len__(self):
        return 8

    def take(self, index):
        return index


def test_each_head_is_judged_alone_and_all_together():
    """On inner elements, by hand; both heads say a half of the logits, and one that is blind knows nothing."""
    torch.manual_seed(0)
    system = nar.NAR(nar.Config(side=3, vocab=4, classes=3, width=16, depth=2, heads=2, dropout=0.0), None).eval()
    randomise(system.model, std=0.6).float()
    ids = torch.randint(4, (8, 9), generator=torch.Generator().manual_seed(0))
    label = {"class": torch.arange(8) % 3}
    system.canvas = lambda index: (system.model.canvas({"token": ids[index]}), label)
    figures = nar.by_direction(system, SimpleNamespace(test=Side()))
    model, canvas, inner = system.model, system.model.canvas({"token": ids}), [4, 5, 7, 8]
    with torch.no_grad():
        h = model.hidden(model.factorization.packed(canvas), canvas, None, model.encode(label))
        said = {}
        for role, before in ((0, 3), (1, 1)):  # the slot of element e is 1 + e
            slots = torch.tensor([1 + e - before for e in inner])
            reads = Reads(slots[None], torch.tensor([inner]), torch.full((1, 4), role))
            said[role] = model.heads["token"].logits(h[:, slots], reads)
    for name, logits in (("below", said[0]), ("right", said[1]), ("merged", (said[0] + said[1]) / 2)):
        nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, inner].flatten())
        assert figures[f"bits_{name}"] == pytest.approx(float(nats) / math.log(2), rel=1e-5)
    assert len(set(figures.values())) == 3
