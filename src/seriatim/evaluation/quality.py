"""All figures of a set of generated pictures at once, beside what real pictures score on the same yardstick."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from seriatim.evaluation.features import FeatureModel, even
from seriatim.evaluation.metrics import frechet_distance, nearest_examples, spread, support

if TYPE_CHECKING:
    from seriatim.data.base import Data, Examples


def picture_quality(
    images: Float[Tensor, "n c h w"],
    labels: Int[Tensor, " n"] | None,
    data: Data,
    model: FeatureModel,
    most: int = 5_000,
) -> dict[str, Any]:
    """FD-s, precision, recall, density, coverage, class accuracy, spread and nearest training picture.

    The reference are at most `most` held-out pictures. Each `..._real` is what as many real training pictures score
    (nearest: held-out pictures), the best that can be hoped for at this number of samples. labels: what was asked for,
    None for unconditional samples. `samples`, `reference` and `feature_model` must be reported with the rest.
    """
    test, train = _all(data.test, most), _all(data.train, len(images))
    features = {name: model.features(x["image"]) for name, x in (("test", test), ("train", train))}
    generated = model.features(images)
    figures: dict[str, Any] = {
        "fd_s": frechet_distance(generated, features["test"]),
        "fd_s_real": frechet_distance(features["train"], features["test"]),
        **asdict(support(generated, features["test"])),
        **{f"{k}_real": v for k, v in asdict(support(features["train"], features["test"])).items()},
    }
    if labels is not None and model.card.kind == "classifier":
        figures["accuracy"] = model.accuracy(images, labels)
        figures["accuracy_real"] = model.accuracy(test["image"], test["label"])
    for name, x, y in (("spread", images, labels), ("spread_real", test["image"], test.get("label"))):
        figures[name] = spread(x, torch.zeros(len(x), dtype=torch.long) if y is None or labels is None else y)
    figures["nearest"] = float(nearest_examples(images, data.train)[0].mean())
    held_out = test["image"][even(len(test["image"]), len(images))]
    figures["nearest_real"] = float(nearest_examples(held_out, data.train)[0].mean())
    return figures | {"samples": len(images), "reference": len(test["image"]), "feature_model": str(model.card)}


def _all(examples: Examples, most: int) -> dict[str, Tensor]:
    return examples.take(even(len(examples), most))
