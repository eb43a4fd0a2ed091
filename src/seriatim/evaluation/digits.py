"""How good are generated digits: an independently trained classifier, spread within a class, distance to training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache

from jaxtyping import Float, Int
from torch import Tensor

from seriatim.data.digits import load_digits, shift_sideways
from seriatim.evaluation.judge import Judge, train_judge
from seriatim.evaluation.metrics import nearest_distances, spread


@lru_cache(maxsize=2)
def digit_judge(seed: int = 0, progress: Callable[[int, int, Mapping[str, float]], None] | None = None) -> Judge:
    """A classifier that has seen real training digits only."""
    train = load_digits().train
    return train_judge(train.images, train.labels, seed=seed, augment=shift_sideways, progress=progress)


def judge_digits(images: Float[Tensor, "n 1 8 8"], labels: Int[Tensor, " n"], judge: Judge) -> dict[str, float]:
    """Accuracy, spread and nearest distance to the training set, of samples and of held-out real digits."""
    digits = load_digits()
    return {
        "accuracy_real": judge.accuracy(digits.test.images, digits.test.labels),
        "accuracy_generated": judge.accuracy(images, labels),
        "spread_real": spread(digits.test.images, digits.test.labels),
        "spread_generated": spread(images, labels),
        "nearest_real": float(nearest_distances(digits.test.images, digits.train.images).mean()),
        "nearest_generated": float(nearest_distances(images, digits.train.images).mean()),
    }
