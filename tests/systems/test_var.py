"""VAR: what its paper says of order, feed and guidance, beyond the laws that every system obeys."""

import pytest
import torch

from seriatim import Generator, Guidance, Keyed, SampleAll, Target, decode, generate
from seriatim.systems.image import var
from seriatim.tokenizers.multiscale import MultiScaleConfig


def tiny(scales, vocab=3):
    return var.case(scales, vocab).model


@pytest.mark.parametrize(
    ("scales", "pairs"), [((1, 2, 3), 1 + 4 * 5 + 9 * 14), ((1, 2, 3, 4, 5, 6, 8, 10, 13, 16), 286_434)]
)
def test_each_scale_sees_itself_and_everything_coarser(scales, pairs):
    model = tiny(scales)
    plan = model.factorization.packed(model.blank(1))
    assert int(plan.views["all"].mask().sum()) == pairs
    assert [p.size for p in plan.steps()] == [s * s for s in scales]


def test_the_last_scale_is_never_cached():
    model = tiny((1, 2, 4))
    target = Target(model, {"class": torch.tensor([0])})
    for _ in decode(target, model.blank(1), SampleAll()):
        pass
    assert target.cache.columns == 0, "after the last step nothing is looked at any more"


def test_a_pyramid_of_single_tokens_is_next_token_over_residual_codes():
    model = tiny((1, 1, 1))
    plan = model.factorization.packed(model.blank(1))
    assert torch.equal(plan.views["all"].mask()[0], torch.ones(3, 3).tril().bool())
    assert [p.size for p in plan.steps()] == [1, 1, 1]


def test_the_first_scale_ignores_linear_guidance():
    model = tiny((1, 2, 4), vocab=16)
    labels = {"class": torch.tensor([0, 1, 2, 1])}

    def ids(scale):
        target = Target(model, labels, Guidance(scale, "linear"))
        return generate(target, model.blank(4), SampleAll(), random=Keyed(1)).value["token"]

    weak, strong = ids(0.0), ids(8.0)
    assert torch.equal(weak[:, 0], strong[:, 0])
    assert not torch.equal(weak[:, 5:], strong[:, 5:])


def test_the_class_matters():
    model = tiny((1, 2), vocab=2)
    x = torch.randint(2, (4, 5), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        one, two = (model.log_prob(model.canvas({"token": x}), {"class": torch.full((4,), c)}) for c in (0, 1))
    assert (one - two).abs().min() > 1e-3


def test_teacher_inputs_are_those_of_the_tokenizer():
    model = tiny((1, 2, 4))
    quantizer = model.embed.quantizer
    ids = torch.randint(3, (2, 21), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plan = model.factorization.packed(model.canvas({"token": ids}))
        slots = model.embed(model.canvas({"token": ids}), plan)
        scale = model.embed.scale[plan.slots.coord[0, 1:, 0]]
        want = model.embed.project(quantizer.teacher_inputs(ids)) + model.embed.position[1:] + scale
    torch.testing.assert_close(slots[:, 1:], want, atol=1e-12, rtol=0)


def test_the_tokenizer_is_frozen_and_not_trained():
    model = var.build(var.Config(MultiScaleConfig(scales=(1, 2), vocab=4, dim=3, width=8), width=16, depth=1, heads=2))
    assert not any(p.requires_grad for p in model.embed.quantizer.parameters())
    ids = torch.randint(4, (2, 5), generator=torch.Generator().manual_seed(0))
    model.losses(model.canvas({"token": ids}), {"class": torch.tensor([0, 1])}).sum().backward()
    assert all(p.grad is None for p in model.embed.quantizer.parameters())


def test_samples_repeat_with_their_seed():
    model, labels = tiny((1, 2)), {"class": torch.tensor([0, 1])}
    a, b = (
        generate(Target(model, labels), model.blank(2), SampleAll(), random=Generator(5)).value["token"] for _ in "ab"
    )
    assert torch.equal(a, b)
