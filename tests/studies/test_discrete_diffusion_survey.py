"""The survey of discrete diffusion: its map leads somewhere, and what it measures is measured right."""

from __future__ import annotations

import importlib

import pytest
import torch

from seriatim.laws.case import randomise
from seriatim.random import Generator
from seriatim.studies.discrete_diffusion_survey import CLAIM, TECHNIQUES, bound, gradient_variance, plain, views
from seriatim.systems.masked_trials import Line, next_lines
from seriatim.systems.meta import everything, studies
from seriatim.systems.text import mdlm
from seriatim.systems.text.mdlm import MDLM, Config

TINY = {"length": 12, "vocab": 5, "width": 16, "depth": 2, "heads": 2}


def tiny():
    return randomise(mdlm.build(Config(**TINY)), std=0.3)


def test_every_technique_is_somewhere():
    for places in TECHNIQUES.values():
        for place in places.values():
            if place.startswith("seriatim."):
                module, _, name = place.partition(":")
                assert not name or hasattr(importlib.import_module(module), name)
            else:
                assert place in everything()
    assert "discrete-diffusion-survey" in studies()


def test_complementary_views_hide_each_token_once_and_others_as_often():
    model = tiny()
    canvas = model.canvas({"token": torch.zeros(64, 12, dtype=torch.long)}, 2)
    pair, apart = (views(canvas, complementary, Generator(0)) for complementary in (True, False))
    assert torch.equal(pair.hidden.sum(0), canvas.open.long())
    assert set(apart.hidden.sum(0)[:, 2:].unique().tolist()) == {0, 1, 2}
    assert not bool(apart.hidden[..., :2].any())
    torch.testing.assert_close(pair.time.sum(0), torch.ones(64))
    for drawn in (pair, apart):  # each token is hidden once on the mean
        assert float(drawn.hidden[..., 2:].double().sum(0).mean()) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("complementary", [True, False])
def test_both_pairs_of_views_have_the_bound_as_their_mean(complementary):
    """The weighed loss is the bound, whichever way the second view is drawn: that of `by_count`."""
    model = tiny()
    x = torch.randint(5, (1, 12), generator=torch.Generator().manual_seed(0))
    canvas = model.canvas({"token": x.expand(256, -1)})
    found = []
    with torch.no_grad():
        want = model.losses(canvas, random=Generator(5)).sum(1) / 12
        for seed in range(4):
            drawn = views(canvas, complementary, Generator(seed))
            losses = torch.stack([model.hidden_losses(canvas, hidden) for hidden in drawn.hidden])
            found.append(float(bound(losses, drawn)))
    assert sum(found) / 4 == pytest.approx(float(want.mean()), rel=0.1)


def test_the_variance_of_a_gradient_is_that_of_its_draws():
    model = tiny()
    canvas = model.canvas({"token": torch.randint(5, (2, 12), generator=torch.Generator().manual_seed(0))})
    weights, random, drawn = list(model.parameters()), Generator(3), []
    for _ in range(6):
        some = views(canvas, False, random)
        loss = plain(torch.stack([model.hidden_losses(canvas, h) for h in some.hidden]), some)
        grads = torch.autograd.grad(loss, weights, allow_unused=True)
        whole = [torch.zeros_like(w) if g is None else g for w, g in zip(weights, grads, strict=True)]
        drawn.append(torch.cat([g.flatten() for g in whole]))
    rows = torch.stack(drawn)
    variance, norm = gradient_variance(model, canvas, False, plain, draws=6, seed=3)
    assert variance == pytest.approx(float(rows.var(0).sum()), rel=1e-6)
    assert norm == pytest.approx(float(rows.mean(0).square().sum()) - variance / 6, rel=1e-6)


def test_a_claim_compares_views_by_as_many_forwards():
    assert CLAIM.ours == "complementary" and CLAIM.better == "lower"
    assert [name for name, _ in CLAIM.queue()].count("apart") == 3
    assert {"random", "confidence", "margin"} < set(CLAIM.arms)


def test_steps_say_how_many_tokens_a_forward_decides():
    torch.manual_seed(0)
    system = MDLM(Config(length=48, width=16, depth=1, heads=2, block=32)).eval()
    lines = [Line(tuple(system.tokenizer.encode("a = 1")), "b = 2")]
    for steps, tokens in ((None, 1.0), (8, 4.0)):
        assert next_lines(system, "unmask+rule=random", lines, steps)["tokens_per_forward"] == tokens
