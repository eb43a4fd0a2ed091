"""The judge, and the figures that must stand beside its accuracy."""

from __future__ import annotations

import math

import pytest
import torch

from seriatim.data import load_digits, shift_sideways
from seriatim.evaluation import Judge, JudgeRecipe, nearest_distances, psnr, spread, train_judge


def test_a_short_training_beats_chance_by_far_and_follows_from_its_seed() -> None:
    digits = load_digits()
    train, test = digits.train, digits.test
    state = torch.get_rng_state()
    judges = [train_judge(train.images, train.labels, JudgeRecipe(epochs=1), seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(state, torch.get_rng_state()), "the global random state was touched"
    assert judges[0].accuracy(test.images, test.labels) > 0.8
    features = [judge.features(test.images) for judge in judges]
    assert torch.equal(features[0], features[1]) and not torch.equal(features[0], features[2])
    assert features[0].shape == (400, 64) and features[0].isfinite().all()


def test_a_judge_refuses_to_judge_in_training_mode_and_uneven_rows() -> None:
    judge = Judge()
    with pytest.raises(ValueError, match=r"eval\(\)"):
        judge.accuracy(torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="want"):
        judge.eval().accuracy(torch.zeros(2, 1, 8, 8), torch.zeros(3, dtype=torch.long))


def test_spread_is_the_standard_deviation_within_classes() -> None:
    labels = torch.tensor([0, 0, 1, 1, 2])
    images = torch.tensor([0.0, 1.0, 0.5, 0.5, 0.9]).view(5, 1, 1, 1).expand(5, 1, 4, 4)
    assert spread(images, labels) == pytest.approx((math.sqrt(0.5) + 0) / 2)
    with pytest.raises(ValueError, match="two pictures"):
        spread(images[1:3], labels[1:3])


def test_spread_of_the_real_digits() -> None:
    test = load_digits().test
    assert spread(test.images, test.labels) == pytest.approx(0.332, abs=0.005)


def test_nearest_distances_find_copies() -> None:
    digits = load_digits()
    train, test = digits.train.images, digits.test.images
    assert nearest_distances(train[7:9], train).tolist() == pytest.approx([0, 0], abs=1e-3)
    by_hand = (test[:5].unsqueeze(1) - train).square().flatten(2).sum(dim=2).sqrt().amin(dim=1)
    torch.testing.assert_close(nearest_distances(test[:5], train, chunk=2), by_hand, rtol=1e-3, atol=1e-3)


def test_psnr_counts_from_a_peak_of_two() -> None:
    images = torch.zeros(2, 1, 4, 4)
    assert psnr(images + 0.2, images) == pytest.approx(20, abs=1e-4)
    assert psnr(images, images) == math.inf
    with pytest.raises(ValueError, match="differ in shape"):
        psnr(images, images[:1])


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_the_judge_knows_held_out_digits() -> None:
    """Measured over seeds 0, 1, 2: .9975, .9975, 1.0."""
    digits = load_digits()
    judge = train_judge(digits.train.images, digits.train.labels, augment=shift_sideways)
    assert judge.accuracy(digits.test.images, digits.test.labels) >= 0.985
