"""SAR: what the second forward is fed, what it is to say, and where gradients flow."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from seriatim.random import Generator
from seriatim.systems.image import flexvar, sar
from seriatim.systems.pyramid_system import layout_of
from seriatim.systems.pyramid_trials import exposure_gap
from seriatim.tokenizers import FlexConfig, FlexTokenizer


def system(cls=sar.SAR, scales=(1, 2, 3, 4), **changes):
    torch.manual_seed(0)
    tokenizer = FlexTokenizer(FlexConfig(side=4 * scales[-1], scales=scales, vocab=16, dim=4, width=8)).eval()
    c = cls.Config(scales, vocab=16, dim=4, grid=8, classes=3, width=16, depth=2, heads=2, dropout=0.0, **changes)
    made = cls(c, tokenizer).eval()
    with torch.no_grad():
        for p in made.model.parameters():
            p.copy_(torch.randn(p.shape) * 0.3)
    return made


def batch(n=4, side=16):
    images = torch.rand(n, 1, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return {"image": images, "label": torch.arange(n) % 3}


def first(made, scales=None):
    """Plan, canvas, condition, states and predictions of the first forward."""
    canvas, condition = made.canvas(batch(), scales)
    plan, encoded = made.model.factorization.packed(canvas), made.model.encode(condition)
    with torch.no_grad():
        h = made.model.hidden(plan, canvas, None, encoded)
        own = made.model.canvas({"token": sar.predicted(made.model, plan, canvas, h)}, layout=canvas.layout)
    return plan, canvas, encoded, h, own


def test_what_is_predicted_is_the_likeliest_of_each_scale_given_the_truth():
    made = system()
    _, canvas, _, _, own = first(made)
    head = made.model.heads["token"]
    assert own.value["token"].shape == canvas.value["token"].shape
    assert bool((own.value["token"] != canvas.value["token"]).any())
    plan, encoded = made.model.factorization.packed(canvas), made.model.encode(made.condition(batch()["label"], 4))
    with torch.no_grad():
        logits = head.dist(made.model.hidden(plan, canvas, None, encoded), plan.reads, canvas).logits
    assert torch.equal(own.value["token"], logits.argmax(-1))


def test_the_second_forward_is_fed_the_predictions_a_scale_ahead():
    made = system()
    plan, _, encoded, _, own = first(made)
    with torch.no_grad():
        x = made.model.embed(own, plan, None, encoded.prefix if hasattr(encoded, "prefix") else None)
        told = made.model.embed.feed(
            made.model.embed.quantizer, own.value["token"][:, :5], ((1, 1), (2, 2), (3, 3)), 1, 2
        )
        place = made.model.embed.places(made.model.embed.position, ((1, 1), (2, 2), (3, 3)), 1, 2)
        want = made.model.embed.project(torch.cat(told, 1)) + place
    torch.testing.assert_close(x[:, 1:14], want)


def test_nothing_is_learned_through_the_targets_and_the_second_forward_learns():
    made = system(last_only=False).train()
    canvas, condition = made.canvas(batch())
    one, two = made.two_forwards(canvas, made.model.encode(condition))
    g1 = torch.autograd.grad(two.sum(), made.model.embed.start, retain_graph=True)[0]
    plan, _, encoded, _, own = first(made)
    fixed = sar.student_losses(made.model, plan, own, made.model.encode(condition), own)
    g2 = torch.autograd.grad(fixed.sum(), made.model.embed.start)[0]
    torch.testing.assert_close(g1, g2)
    assert bool(g1.any()) and torch.equal(two.detach(), fixed.detach()) and not bool(two[:, 0].any())
    assert torch.equal(one.detach(), made.model.losses(canvas, condition).detach())


def test_without_the_second_forward_it_is_flexvars_training_step_for_step():
    one, other = system(sigma=0.0).train(), system(flexvar.FlexVAR).train()
    for seed in range(4):
        a, b = (m.losses(batch(), Generator(seed), 0.1) for m in (one, other))
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_the_released_form_is_the_last_stagger_without_what_lies_between():
    """Its losses are those of the general form where the last scale sees the first and itself, and differ with more."""
    made = system()
    plan, canvas, encoded, _, own = first(made)
    short = sar.student_plan(plan, True)
    assert short.size == 1 + 16
    mask = short.views["all"].mask()[0]
    assert bool(mask[1:].all()) and mask[0].tolist() == [True] + [False] * 16
    with torch.no_grad():
        alone = sar.student_losses(made.model, short, own, encoded, own)
        general = sar.student_losses(made.model, plan, own, encoded, own)
        model = made.model
        x = model.embed(own, plan)
        x_short = model.embed(own, short)
    assert torch.equal(x_short[:, 1:], x[:, -16:]), "the last scale is fed otherwise"
    assert not bool(alone[:, :-16].any()) and bool(alone[:, -16:].all())
    assert not torch.allclose(alone[:, -16:], general[:, -16:])


@pytest.mark.parametrize("scales", [(1, 4), (1, 2, 4), (1, 2, 3, 4), (1,)], ids=str)
@pytest.mark.parametrize("last_only", [True, False])
def test_any_schedule_is_trained(scales, last_only):
    made = system(last_only=last_only)
    canvas, condition = made.canvas(batch(), scales)
    one, two = made.two_forwards(canvas, made.model.encode(condition))
    assert one.shape == two.shape == (4, layout_of(scales).size) and bool(torch.isfinite(two).all())


def test_losses_are_means_of_what_each_forward_reads():
    for last_only in (True, False):
        made = system(scales=(1, 2, 4), sigma=0.5, last_only=last_only).train()  # three scales are left as they are
        total, count = made.losses(batch(), Generator(0), 0.0)
        canvas, condition = made.canvas(batch())
        one, two = made.two_forwards(canvas, made.model.encode(condition))
        read = two[:, -16:] if last_only else two[:, 1:]
        torch.testing.assert_close(total / count, one.mean() + 0.5 * read.mean())
        again, _ = made.losses(batch(), Generator(0), 0.0)
        assert torch.equal(total, again)


def test_the_truth_is_the_target_where_that_is_asked_for():
    made = system(last_only=False, truth=True)
    plan, canvas, encoded, _, own = first(made)
    _, two = made.two_forwards(canvas, encoded)
    assert torch.equal(two.detach(), sar.student_losses(made.model, plan, own, encoded, canvas).detach())


def test_it_begins_as_flexvar_and_draws_as_it_does():
    base = system(flexvar.FlexVAR)
    made = sar.SAR(sar.Config(**sar.SAR.inherited(base, {})), base.tokenizer).eval()
    made.take_over(base)
    assert torch.equal(made.draw(torch.arange(2), seed=3).images, base.draw(torch.arange(2), seed=3).images)


def test_the_claims_measure():
    made = system()
    data = SimpleNamespace(test=Examples())
    figures = exposure_gap(SimpleNamespace(system=made, data=data))
    plan, canvas, encoded, _, own = first(made)
    with torch.no_grad():
        true = float(made.model.losses(canvas, encoded)[:, 1:].mean())
        mine = float(sar.student_losses(made.model, plan, own, encoded, canvas)[:, 1:].mean())
    assert figures["loss_true"] == pytest.approx(true, rel=1e-5)
    assert figures["gap"] == pytest.approx(mine - true, rel=1e-3, abs=1e-5) and figures["gap"] != 0


class Examples:
    def __len__(self):
        return 4

    def take(self, index):
        return {k: v[index] for k, v in batch().items()}


def test_impossible_weights_are_refused():
    with pytest.raises(ValueError, match="not negative"):
        sar.Config(sigma=-1.0)
