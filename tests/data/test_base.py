"""Every built-in set keeps the interface, and what is asked for by a wrong name, modality or option is refused."""

import hashlib
from pathlib import Path

import pytest
import torch

from seriatim.data.base import BUILT_IN, Data, load_data, naming, share, split_paths, visible_files

PICTURES = [name for name, modality in BUILT_IN.items() if modality == "image"]


@pytest.fixture(params=PICTURES)
def data(request) -> Data:
    return load_data(request.param, "image")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_batches_are_pictures_in_range_with_labels_where_there_are_classes(data):
    for side in (data.train, data.test):
        index = torch.tensor([len(side) - 1, 0, 3])
        for batch in (side.take(index), side.take(index, generator())):
            images = batch["image"]
            assert images.shape[0] == 3 and images.shape[1] in (1, 3) and images.dtype == torch.float32
            assert -1 <= float(images.min()) < float(images.max()) <= 1
            assert ("label" in batch) == bool(data.classes)
            if data.classes:
                assert batch["label"].dtype == torch.int64
                assert 0 <= int(batch["label"].min()) <= int(batch["label"].max()) < len(data.classes)


def test_a_batch_follows_from_numbers_and_generator_alone(data):
    index = torch.arange(8)
    first, again, other = (data.train.take(index, generator(seed))["image"] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(data.train.take(index)["image"], data.train.take(index)["image"])


def test_a_sample_is_the_same_in_any_company(data):
    together = data.test.take(torch.tensor([4, 1, 4]))["image"]
    assert torch.equal(together[1], data.test.take(torch.tensor([1]))["image"][0])
    assert torch.equal(together[0], together[2])


def test_no_batch_of_nothing_and_no_sample_beyond_the_last(data):
    assert len(data.train.take(torch.empty(0, dtype=torch.long))["image"]) == 0
    with pytest.raises(IndexError):
        data.train.take(torch.tensor([len(data.train)]))


def test_loaded_again_it_is_the_same(data):
    again = load_data(data.name, "image")
    assert torch.equal(again.train.take(torch.arange(5))["image"], data.train.take(torch.arange(5))["image"])


def test_nothing_named_is_the_default_of_the_modality():
    assert load_data(None, "image").name == "glyphs"
    assert load_data(None, "text").name == "stdlib"


# ---- mistakes --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("wrong", "meant"), [("digit", "digits"), ("glyph", "glyphs"), ("stlib", "stdlib")])
def test_an_unknown_name_is_refused_with_near_ones(wrong, meant):
    with pytest.raises(FileNotFoundError, match=f"no such file or folder. Did you mean '{meant}'"):
        load_data(wrong, "image")


def test_a_missing_path_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_data(tmp_path / "nowhere", "image")


def test_a_path_object_is_never_a_built_in_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no data at 'digits'"):
        load_data(Path("digits"), "image")


def test_a_built_in_set_of_another_modality_is_refused():
    with pytest.raises(ValueError, match="'stdlib' is text data, and image data is needed: a path, or one of digits"):
        load_data("stdlib", "image")


def test_an_unknown_modality_is_refused():
    with pytest.raises(ValueError, match="image, text"):
        load_data("digits", "smell")


def test_an_option_that_the_loader_does_not_have_is_refused():
    with pytest.raises(TypeError, match="data 'photos' takes no size; it takes image_size"):
        load_data("photos", "image", size=32)


@pytest.mark.parametrize("held_out", [0, 1, -0.5, 3])
@pytest.mark.parametrize("name", ["glyphs", "lines", "stdlib"])
def test_a_held_out_share_is_between_0_and_1(name, held_out):
    with pytest.raises(ValueError, match="held_out"):
        load_data(name, BUILT_IN[name], held_out=held_out)


# ---- sides -----------------------------------------------------------------------------------------------------------
def test_shares_are_the_same_on_every_machine_and_even():
    sha256 = hashlib.sha256(b"a/b.png").hexdigest()
    assert share("a/b.png") == share(b"a/b.png") == int(sha256[:8], 16) / 16**8
    assert sum(share(str(i)) < 0.1 for i in range(10_000)) == pytest.approx(1000, abs=100)  # 3.3 standard deviations


def test_a_file_keeps_its_side_as_others_come():
    few, more = [f"{i}.png" for i in range(100)], [f"{i}.png" for i in range(300)]
    train, test = split_paths(few, 0.1)
    later_train, later_test = split_paths(more, 0.1)
    assert set(train) <= set(later_train) and set(test) <= set(later_test)
    assert not set(later_train) & set(later_test) and len(later_train) + len(later_test) == 300


@pytest.mark.parametrize("held_out", [0.001, 0.999])
def test_neither_side_is_empty(held_out):
    train, test = split_paths(["a", "b", "c"], held_out)
    assert train and test and sorted(train + test) == ["a", "b", "c"]


def test_folders_called_train_and_test_are_the_sides():
    train, test = split_paths(["train/a", "train/b", "val/a"], 0.1)
    assert (train, test) == (["train/a", "train/b"], ["val/a"])
    together = split_paths(["train/a", "val/a", "cats/a"], 0.1)
    assert sorted(together[0] + together[1]) == ["cats/a", "train/a", "val/a"]


def test_hidden_files_are_left_out_links_are_followed_and_circles_end(tmp_path):
    for name in ("b/x.txt", ".hidden/y.txt", "a.txt", ".z.txt", "__MACOSX/a.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.mkdir()
    (outside / "far.txt").touch()
    (tmp_path / "link").symlink_to(outside)
    (tmp_path / "b" / "circle").symlink_to(tmp_path)
    assert visible_files(tmp_path) == ["a.txt", "b/x.txt", "link/far.txt"]


def test_a_folder_that_may_not_be_read_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)  # tests may run as root, who may do anything
    with pytest.raises(PermissionError, match="no permission to read"):
        load_data(tmp_path, "image")


def test_notes_name_a_few_and_count_the_rest():
    assert naming(["a", "b"]) == "a, b"
    assert naming([str(i) for i in range(9)], 2) == "0, 1 and 7 more"
    assert naming(["b\udcff.png"]) == "b?.png"
