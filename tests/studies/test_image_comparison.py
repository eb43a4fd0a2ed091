"""Equal training: who comes when, how large each is, and that a queue that was cut off goes on."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from seriatim.data.base import Data
from seriatim.studies import image_comparison as study
from seriatim.systems.image_taxonomy import class_of, toy_tokenizer
from seriatim.tokenizers.files import make_tokenizer


class Greys:
    """Pictures of two classes, each of one grey, a little off."""

    def __init__(self, count, seed):
        g = torch.Generator().manual_seed(seed)
        self.label = torch.arange(count) % 2
        self.image = (self.label[:, None, None, None] - 0.5 + 0.2 * torch.randn(count, 1, 8, 8, generator=g)).clamp(
            -1, 1
        )

    def __len__(self):
        return len(self.label)

    def take(self, index, generator=None):
        return {"image": self.image[index], "label": self.label[index]}


DATA = Data("greys", "image", Greys(24, 0), Greys(12, 1), ("dark", "light"))


def test_all_take_part_once_in_an_order_that_the_seed_draws():
    keys = study.everybody()
    first, same, other = (study.shuffled(k, s) for k, s in ((keys, 0), (keys[::-1], 0), (keys, 1)))
    assert sorted(first) == sorted(keys) and first == same and first not in (other, sorted(keys))


@pytest.mark.parametrize("wrong", [{"minutes": 0.0}, {"samples": 1}, {"parameters": 0}])
def test_a_budget_of_nothing_is_refused(wrong):
    with pytest.raises(ValueError, match="minutes and parameters are positive"):
        study.Budget(**wrong)


def test_budgets_have_folders_of_their_own():
    budgets = [study.Budget(), study.Budget(minutes=1), study.Budget(seed=1), study.Budget(tokenizer_steps=3)]
    assert len({b.folder for b in budgets}) == 4


@pytest.mark.parametrize("key", ["raster-ar", "mar", "axial-transformer"])
@pytest.mark.parametrize("wanted", [600_000, 2_000_000])
def test_no_width_is_nearer_to_the_common_number(key, wanted):
    cls = class_of(key)
    tokenizer = (
        make_tokenizer("patches", {"side": 8, "channels": 1, "patch": 2}) if key == "mar" else toy_tokenizer(cls, 32)
    )
    budget = study.Budget(size="tiny", parameters=wanted)
    change, count = study.fitted(key, tokenizer, DATA, budget)
    assert abs(count / wanted - 1) < 0.2
    config = study.config_from(cls, change, "tiny", **cls.known(tokenizer, DATA))
    assert config.width % (4 * config.heads) == 0
    for width in (config.width - 4 * config.heads, config.width + 4 * config.heads):
        if width > 0:
            near = study.config_from(cls, {"width": width}, "tiny", **cls.known(tokenizer, DATA))
            other = study.parameters(cls(near, tokenizer).model)
            assert abs(other - wanted) >= 0.9 * abs(count - wanted)


def test_widths_that_a_system_cannot_have_are_left_out():
    """Its states have heads of 64 numbers."""
    tokenizer = toy_tokenizer(class_of("m-var"), 32)
    for wanted in (400_000, 700_000, 2_000_000):
        change, count = study.fitted("m-var", tokenizer, DATA, study.Budget(size="tiny", parameters=wanted))
        assert change.get("width", 96) % 32 == 0 and 0.6 < count / wanted < 1.6


def test_a_size_that_fits_stays_as_it_is():
    tokenizer = toy_tokenizer(class_of("raster-ar"), 32)
    _, count = study.fitted("raster-ar", tokenizer, DATA, study.Budget(size="tiny", parameters=1))
    change, same = study.fitted("raster-ar", tokenizer, DATA, study.Budget(size="tiny", parameters=745_000))
    assert change == {} and same > count


def test_pictures_of_many_elements_are_learned_in_small_batches():
    tokenizers = {side: make_tokenizer("pixels", {"side": side, "channels": 1}) for side in (8, 32)}
    batches = {side: study.batch_of("raster-ar", tokenizer, DATA, "small") for side, tokenizer in tokenizers.items()}
    assert batches == {8: 64, 32: study.ELEMENTS // 1024}


def test_a_curve_is_thinned_by_means():
    assert study.thinned([(float(i), 1.0 + i % 2) for i in range(240)], 60)[0] == [1.5, 1.5]
    assert len(study.thinned([(float(i), 0.0) for i in range(241)], 60)) <= 60 and study.thinned([]) == []


@pytest.fixture
def in_small(monkeypatch, tmp_path):
    """The comparison with the slow parts replaced: what is trained, judged, and measured in a process of its own."""
    monkeypatch.setattr(study, "HOME", tmp_path / "home")
    monkeypatch.setattr(study, "load_data", lambda *a, **k: DATA)
    monkeypatch.setattr(study, "taxonomy", lambda keys: [])
    monkeypatch.setattr(study, "watched", lambda key: None)
    monkeypatch.setattr(study, "animated", lambda order: "<svg></svg>")
    monkeypatch.setattr(study, "references", lambda data, budget: {})
    run = []

    def figures(key, data, budget, said):
        file = budget.folder / key / "figures.json"
        if not file.is_file():
            run.append(key)
            if run == ["nar", "var"] or run == ["var"]:
                raise KeyboardInterrupt
            study.save_json({"key": key, "fd_s": 1.0}, file)
        return json.loads(file.read_text())

    monkeypatch.setattr(study, "figures_of", figures)
    return SimpleNamespace(path=tmp_path, run=run)


def test_a_queue_that_was_cut_off_goes_on_system_by_system(in_small):
    budget, keys = study.Budget(samples=4), ["var", "nar", "mar"]
    with pytest.raises(KeyboardInterrupt):
        study.compare_images(keys, budget, in_small.path, said=lambda text: None)
    done = list(in_small.run)
    result = study.compare_images(keys, budget, in_small.path, said=lambda text: None)
    assert in_small.run[len(done) :] == study.shuffled(keys, 0)[len(done) - 1 :], "what is finished is not done again"
    assert list(result["systems"]) == result["order"] == study.shuffled(keys, 0)
    assert json.loads((in_small.path / "image_comparison.json").read_text()) == result


def test_what_cannot_be_is_said_before_anything_is_trained(in_small):
    with pytest.raises(KeyError, match="no image system is called image-vq"):
        study.compare_images(["var", "image-vq"], study.Budget(), in_small.path)
    with pytest.raises(ValueError, match="has 2 classes, and each is drawn at least twice"):
        study.compare_images(["var"], study.Budget(samples=3), in_small.path)
    assert not in_small.run


def test_copies_and_means_stand_beside_the_systems():
    pictures = study._reference_pictures(DATA, study.Budget(samples=6))
    means, labels = pictures["mean of the class"]
    assert all(
        torch.allclose(m, DATA.train.image[DATA.train.label == k].mean(0)) for m, k in zip(means, labels, strict=True)
    )
    copies, of = pictures["nearest training picture to held-out ones"]
    assert all((DATA.train.image == c).flatten(1).all(1).any() for c in copies) and len(of) == 6
    assert pictures["held-out pictures, drawn anew"][0].shape == (6, 1, 8, 8)


@pytest.mark.slow
def test_systems_are_trained_judged_and_shown(tmp_path, monkeypatch):
    """From end to end, on digits, for seconds."""
    monkeypatch.setattr(study, "HOME", tmp_path / "home")
    budget = study.Budget("digits", 0.005, "tiny", 200_000, 20, 0)
    result = study.compare_images(["raster-ar", "nar"], budget, tmp_path, said=lambda text: None)
    for key in ("raster-ar", "nar"):
        found = result["systems"][key]
        assert found["fd_s"] > 0 and found["steps"] >= 1 and found["parameters"] < 300_000 and found["memory"] > 1e7
    from seriatim.studies.ar_vision_survey import report

    page, chart = report(result, tmp_path)
    assert page.stat().st_size < 600_000 and chart.stat().st_size < 200_000
