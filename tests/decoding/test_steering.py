"""Classifier guidance of masked models: to first order, exactly, and what it must not touch."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from seriatim.decoding.loop import generate
from seriatim.decoding.sample import Select
from seriatim.decoding.steering import Steering
from seriatim.decoding.target import Target
from seriatim.laws.case import randomise
from seriatim.laws.enumeration import enumerate_rows
from seriatim.posttraining.classifier import Classifying, Labelled, MaskedClassifier
from seriatim.random import Keyed
from seriatim.systems.text import ctrldiff, mdlm, next_token
from seriatim.training.recipe import Recipe
from seriatim.training.run import RunFolder
from seriatim.training.trainer import train

N, V = 4, 3


def model(seed=0):
    return randomise(mdlm.build(mdlm.Config(length=N, vocab=V, width=16, depth=2, heads=2)), seed)


class Linear:
    """Scores that are linear in one-hot inputs, and not normalised."""

    def __init__(self, n=N, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.table = torch.eye(V + 1, dtype=torch.float64)[:V]
        self.mask = torch.eye(V + 1, dtype=torch.float64)[V]
        self.weight = torch.randn(2, n, V + 1, generator=g, dtype=torch.float64)

    def vectors(self, ids, known):
        return torch.where(known[..., None], self.table[ids], self.mask)

    def log_prob(self, x):
        return torch.einsum("bnd,cnd->bc", x, self.weight)


class Curved(Linear):
    """The same through a softmax, whose logits are `scale` times as large."""

    def __init__(self, scale, seed=0):
        super().__init__(seed=seed)
        self.scale = scale

    def log_prob(self, x):
        return (self.scale * super().log_prob(x)).log_softmax(1)


def canvas_of(one, known):
    x = torch.randint(V, (len(known), N), generator=torch.Generator().manual_seed(3))
    return one.canvas({"token": x}, torch.tensor(known).bool())


KNOWN = [[0, 0, 0, 0], [1, 0, 0, 1], [0, 1, 0, 0]]


def gains(steering, one=None, known=KNOWN):
    """What is added to each read logit; places that a row does not read are left out."""
    one = one or model()
    canvas = canvas_of(one, known)
    plain, steered = Target(one, cached=False), Target(one, cached=False, steer=steering)
    with torch.inference_mode():
        rows = [t.forward(t.plan(canvas), canvas) for t in (plain, steered)]
    return (rows[1].dist.logits - rows[0].dist.logits)[rows[0].element >= 0]


def test_of_a_classifier_that_is_linear_in_its_inputs_the_gradient_tells_all():
    steering = Steering(Linear(), 1, 1.7)
    rough, exact = gains(steering), gains(replace(steering, exact=True, at_once=5))
    assert float(exact.abs().max()) > 0.5
    torch.testing.assert_close(rough, exact, rtol=0, atol=1e-9)


def test_of_another_the_error_shrinks_faster_than_what_is_added():
    errors = []
    for scale in (0.2, 0.1, 0.05, 0.025):
        steering = Steering(Curved(scale), torch.tensor([0, 1, 1]))
        rough, exact = gains(steering), gains(replace(steering, exact=True))
        errors.append(float((rough - exact).abs().max() / exact.abs().max()))
    assert all(b < 0.6 * a for a, b in itertools.pairwise(errors)) and errors[0] > 1e-3


def test_exact_guidance_is_bayes_rule_in_each_place():
    """Of one unknown element: p(x | y) is p(x) p(y | x)^w, by enumeration of its values."""
    one, classifier, w = model(), Curved(3.0), 0.7
    canvas = canvas_of(one, [[1, 1, 0, 1]])
    target = Target(one, cached=False, steer=Steering(classifier, 1, w, exact=True))
    with torch.inference_mode():
        rows = target.forward(target.plan(canvas), canvas)
    column = rows.element[0].tolist().index(2)
    plain = Target(one, cached=False)
    prior = plain.forward(plain.plan(canvas), canvas).dist.log_probs()[0, column]
    texts = canvas.value["token"].repeat(V, 1)
    texts[:, 2] = torch.arange(V)
    said = classifier.log_prob(classifier.vectors(texts, torch.ones(V, N).bool()))[:, 1]
    torch.testing.assert_close(rows.dist.log_probs()[0, column], (prior + w * said).log_softmax(0), rtol=0, atol=1e-9)


@pytest.mark.parametrize("exact", [False, True])
def test_a_weight_of_zero_changes_nothing_and_others_do(exact):
    assert float(gains(Steering(Curved(3.0), 1, 0.0, exact)).abs().max()) == 0
    assert float(gains(Steering(Curved(3.0), 1, 2.0, exact)).abs().max()) > 0.1


@pytest.mark.parametrize("exact", [False, True])
def test_known_places_stay_and_rows_are_steered_each_to_its_own(exact):
    one = model()
    classifier = Curved(50.0)
    start = torch.randint(V, (64, N), generator=torch.Generator().manual_seed(0))
    label = torch.arange(64) % 2
    shares = {}
    for weight in (0.0, 1.0):
        canvas = one.canvas({"token": start}, 1)
        target = Target(one, steer=Steering(classifier, label, weight, exact))
        generate(target, canvas, Select("confidence", 3), random=Keyed(0))
        x = canvas.value["token"]
        assert torch.equal(x[:, 0], start[:, 0])
        said = classifier.log_prob(classifier.vectors(x, torch.ones_like(x).bool()))
        shares[weight] = float((said.argmax(1) == label).double().mean())
    assert shares[1.0] > shares[0.0] + 0.15


def test_where_places_are_independent_the_steered_decoder_samples_the_posterior():
    """p(x) and p(y | x) are products over places then, and guidance place by place is exact, by enumeration."""
    one, linear = model(), Linear()
    with torch.no_grad():
        for name, p in one.named_parameters():
            if name.endswith(".out"):  # of attention: what is known elsewhere is not heard
                p.zero_()

    def law(steering):
        def run(random, rows):
            canvas = one.blank(rows)
            generate(Target(one, steer=steering), canvas, Select("random", 2), random=random)
            return [tuple(x) for x in canvas.value["token"].tolist()]

        return enumerate_rows(run)

    prior, steered = law(None), law(Steering(linear, 1))
    x = torch.tensor(list(steered))
    gain = linear.log_prob(linear.vectors(x, torch.ones_like(x).bool()))[:, 1]
    weight = torch.tensor([prior[k] for k in steered], dtype=torch.float64) * gain.exp()
    got = torch.tensor(list(steered.values()), dtype=torch.float64)
    torch.testing.assert_close(got, weight / weight.sum(), rtol=0, atol=1e-9)


def test_blocks_of_any_length_are_steered_as_well():
    one = ctrldiff.tiny(3, length=6, vocab=V)
    steering, shares = {}, {}
    for weight in (0.0, 3.0):
        steering[weight] = Steering(Linear(6), 0, weight)
        canvas = one.blank(64)
        generate(Target(one, steer=steering[weight]), canvas, Select("confidence", 2), random=Keyed(0))
        x = canvas.value["token"]
        classifier = steering[weight].classifier
        said = classifier.log_prob(classifier.vectors(x, torch.ones_like(x).bool()))
        shares[weight] = float(said[:, 0].mean())
    assert shares[3.0] > shares[0.0] + 1


def test_what_is_no_choice_among_values_in_places_is_refused():
    text = randomise(next_token.build(next_token.Config(length=4, vocab=V, width=16, depth=1, heads=2)))
    target = Target(text, steer=Steering(Linear(), 0))
    canvas = text.canvas({"token": torch.zeros(1, 4, dtype=torch.long)}, 1)
    with pytest.raises(TypeError, match="read in any order"):
        target.forward(target.plan(canvas), canvas)
    with pytest.raises(TypeError, match="read in any order"):
        Steering(Linear(), 0)(SimpleNamespace(), torch.zeros(1, 1, dtype=torch.long), canvas)


# ---- a classifier that is trained ------------------------------------------------------------------------------------


def examples(count=400, n=12, seed=0):
    """Class 1 has more of the higher half of 6 tokens."""
    g = torch.Generator().manual_seed(seed)
    label = torch.randint(2, (count,), generator=g)
    ids = torch.randint(3, (count, n), generator=g)
    high = torch.rand(count, n, generator=g) < torch.where(label == 1, 0.8, 0.2)[:, None]
    return Labelled(ids + 3 * high, label)


def test_a_classifier_learns_under_noise_and_is_the_same_when_its_training_is_resumed(tmp_path):
    def learner():
        torch.manual_seed(0)
        return Classifying(MaskedClassifier(6, 2, width=16, depth=1, heads=2))

    recipe = Recipe(60, batch=32, learning_rate=1e-2)
    whole = learner()
    history = train(whole, examples(), recipe, RunFolder(tmp_path / "whole"), {}, examples(seed=1))
    assert history[-1]["held_out_accuracy_whole"] > 0.9 > history[-1]["held_out_accuracy"] > 0.6

    def tick(step, steps, figures):
        if step == 30:
            raise KeyboardInterrupt

    part = learner()
    with pytest.raises(KeyboardInterrupt):
        train(part, examples(), recipe, RunFolder(tmp_path / "cut"), {}, tick=tick)
    again = learner()
    train(again, examples(), recipe, RunFolder(tmp_path / "cut"), {}, resume=True)
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_trained_classifier_steers_by_its_gradient():
    torch.manual_seed(0)
    classifier = MaskedClassifier(V, 2, width=16, depth=1, heads=2).double().eval().requires_grad_(False)
    rough = Steering(classifier, 1)
    a, b = gains(rough), gains(replace(rough, exact=True))
    direction = torch.cosine_similarity(a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True), -1)
    assert float(direction.mean()) > 0.9
