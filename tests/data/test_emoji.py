"""Emoji: made from archives as npm gives them (tiny ones, made here), without a network."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from seriatim.cli.main import main
from seriatim.data import emoji as module
from seriatim.data.base import load_data
from seriatim.data.emoji import VENDORS, emoji, kin, make_emoji

ROWS = [  # code points, name, category, red, green, blue
    ("1F600", "GRINNING FACE", "Smileys & Emotion", (255, 200, 0)),
    ("1F3C3-200D-2640-FE0F", "WOMAN RUNNING", "People & Body", (200, 0, 0)),
    ("1F3C3-200D-2642-FE0F", "MAN RUNNING", "People & Body", (0, 0, 200)),
    ("1F34E", "RED APPLE", "Food & Drink", (220, 20, 20)),
    ("1F34F", "GREEN APPLE", "Food & Drink", (20, 220, 20)),
    ("1F3FB", "EMOJI MODIFIER", "Component", (90, 90, 90)),
]


def png(colour, side=64):
    """A square of a colour on nothing."""
    picture = Image.new("RGBA", (side, side))
    picture.paste((*colour, 255), (side // 4, side // 4, side // 2, side // 2))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def files_of(vendor, version=255):
    """What a package holds."""
    table = [
        {
            "unified": code, "name": name, "short_name": name.lower(), "category": category, "subcategory": "x",
            "sort_order": n, "image": f"{code.lower()}.png", "has_img_google": True, "has_img_twitter": n != 4,
        }
        for n, (code, name, category, _) in enumerate(ROWS)
    ]  # fmt: skip
    out = {"package/emoji.json": json.dumps(table).encode(), "package/README.md": b"more"}
    for n, (code, _, _, colour) in enumerate(ROWS):
        if vendor == "google" or n != 4:
            out[f"package/img/{vendor}/64/{code.lower()}.png"] = png(colour if vendor == "google" else colour[::-1])
    return out


def pack(folder: Path, vendor: str, files=None, version="16.0.0") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"{VENDORS[vendor]}-{version}.tgz"
    with tarfile.open(path, "w:gz") as archive:
        for name, content in (files or files_of(vendor)).items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "HOME", tmp_path / "home")
    return tmp_path / "home"


@pytest.fixture
def source(tmp_path, home):
    for vendor in VENDORS:
        pack(tmp_path / "archives", vendor)
    return tmp_path / "archives"


def test_emoji_of_both_vendors_come_with_categories_and_names(source):
    make_emoji(source)
    data = load_data("emoji", "image", held_out=0.3)
    assert data.classes == ("Food & Drink", "People & Body", "Smileys & Emotion")
    sides = data.train, data.test
    assert sum(len(side) for side in sides) == 5 + 4  # no skin tones; one apple of one vendor
    found = {}
    for side in sides:
        batch = side.take(torch.arange(len(side)))
        assert batch["image"].shape[1:] == (3, 64, 64)
        for image, label, style, number in zip(*(batch[k] for k in ("image", "label", "style", "emoji")), strict=True):
            assert bool((image[:, 0, 0] == 1).all())  # on white
            colour = ((image[:, 20, 20] + 1) * 127.5).round().int().tolist()
            found[side.names[int(number)], side.vendors[int(style)]] = (data.classes[int(label)], tuple(colour))
    for code, name, category, colour in ROWS[:5]:
        assert found[name.lower(), "google"] == (category, colour), code
    assert found["red apple", "twitter"] == ("Food & Drink", (20, 20, 220))
    assert ("green apple", "twitter") not in found
    assert "Noto" in data.notes[0] and "CC BY" in data.notes[1]


def test_all_pictures_of_an_emoji_and_of_its_other_sexes_are_on_one_side(source):
    make_emoji(source)
    for held_out in (0.1, 0.3, 0.5, 0.7, 0.9):
        data = emoji(held_out=held_out)
        train, test = ({side.names[int(n)] for n in side.emoji} for side in (data.train, data.test))
        assert not train & test
        assert {"woman running", "man running"} <= train or {"woman running", "man running"} <= test
    assert kin("1F3C3-200D-2640-FE0F-200D-27A1-FE0F") == kin("1F3C3") and kin("1F468-200D-1F33E") == "1F9D1-200D-1F33E"


def test_sizes_vendors_and_shifts(source):
    make_emoji(source)
    both, one = emoji(), emoji(image_size=16, vendors="twitter")
    assert set(one.train.style.tolist()) == {0} and one.train.vendors == ("twitter",)
    assert one.train.pixels.shape[1:] == (3, 16, 16) and len(one.train) + len(one.test) == 4
    index = torch.zeros(40, dtype=torch.long)
    plain = both.train.take(index)["image"]
    moved = both.train.take(index, torch.Generator().manual_seed(0))["image"]
    places = {tuple((m[0] != 1).nonzero()[0].tolist()) for m in moved if bool((m[0] != 1).any())} or {
        tuple((m[1] != 1).nonzero()[0].tolist()) for m in moved
    }
    assert len(places) > 5 and all(abs(a - 16) <= 2 and abs(b - 16) <= 2 for a, b in places)
    assert (moved != 1).sum() == (plain != 1).sum()  # nothing is cut off, white comes in
    for wrong in ({"image_size": 48}, {"vendors": "apple"}, {"vendors": ()}):
        with pytest.raises(ValueError, match="pixels a side"):
            emoji(**wrong)


def test_before_they_are_made_it_is_said_how(home):
    with pytest.raises(FileNotFoundError, match="seriatim data emoji"):
        load_data("emoji", "image")
    with pytest.raises(ValueError, match="is image data"):
        load_data("emoji", "text")
    with pytest.raises(FileNotFoundError, match="Did you mean 'emoji'"):
        load_data("emojis", "image")


@pytest.mark.parametrize("share", [0.3, 0.9, 0.999])
def test_an_archive_that_was_cut_short_is_named_and_leaves_what_was_there(source, share):
    path = make_emoji(source)
    before, archive = path.read_bytes(), source / f"{VENDORS['twitter']}-16.0.0.tgz"
    whole = archive.read_bytes()
    archive.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ValueError, match=r"twitter-16.0.0.tgz is no whole archive.*cut short"):
        make_emoji(source)
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


def test_archives_of_something_else_are_refused(source):
    for files, why in (
        ({"package/index.js": b"1"}, "no table of emoji"),
        ({**files_of("twitter"), "package/emoji.json": b"[]"}, "another version"),
        ({**files_of("twitter"), "package/emoji.json": b"[{]"}, "no table of emoji"),
        ({**files_of("twitter"), "package/img/twitter/64/1f600.png": b"GIF89a"}, "no whole picture"),
        ({**files_of("twitter"), "package/img/twitter/64/1f600.png": png((1, 2, 3), 32)}, "32 x 32 pixels"),
        ({"package/emoji.json": files_of("twitter")["package/emoji.json"]}, "lacks 4 of its pictures"),
    ):
        pack(source, "twitter", files)
        with pytest.raises(ValueError, match=why):
            make_emoji(source)
    (source / f"{VENDORS['twitter']}-16.0.0.tgz").write_bytes(b"<html>404</html>")
    with pytest.raises(ValueError, match="no whole archive"):
        make_emoji(source)


def test_a_stored_file_that_is_not_whole_is_named(source):
    path = make_emoji(source)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"not whole.*delete it"):
        emoji()


def stub(folder: Path, script: str) -> str:
    folder.mkdir(exist_ok=True)
    npm = folder / "npm"
    npm.write_text(f"#!/bin/sh\n{script}\n")
    npm.chmod(0o755)
    return f"{folder}{os.pathsep}/usr/bin{os.pathsep}/bin"


def test_npm_is_asked_for_each_package_once(source, home, tmp_path, monkeypatch):
    """What came stays until all is there, and goes when the pictures are made."""
    log = tmp_path / "log"
    copy = f'echo "$2" >> {log}; name=$(echo "$2" | tr @ -); cp {source}/$name.tgz "$5"/'
    monkeypatch.setenv(
        "PATH", stub(tmp_path / "bin", f'case "$2" in *twitter*) echo offline >&2; exit 1;; esac; {copy}')
    )
    with pytest.raises(
        OSError, match=r"npm could not get emoji-datasource-twitter 16.0.0: offline\. By hand: put https"
    ):
        make_emoji()
    assert not module.kept_at().exists() and len(os.listdir(home / "data" / "emoji.download")) == 1
    monkeypatch.setenv("PATH", stub(tmp_path / "bin", copy))
    assert make_emoji() == module.kept_at() and os.listdir(home / "data") == ["emoji.safetensors"]
    assert log.read_text().split() == [f"{VENDORS[v]}@16.0.0" for v in ("google", "twitter")]


def test_without_npm_the_way_by_hand_is_told(home, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"not installed.*registry\.npmjs\.org.*--from FOLDER"):
        make_emoji()
    with pytest.raises(FileNotFoundError, match=r"there is no emoji-datasource-google-16\.0\.0\.tgz in .*By hand"):
        make_emoji(tmp_path)


def test_another_version_by_hand_will_do(home, tmp_path):
    for vendor in VENDORS:
        pack(tmp_path / "archives", vendor, version="15.1.2")
    make_emoji(tmp_path / "archives")
    assert len(emoji().train) > 0


def test_the_command_makes_them_once_and_lists_data(source, capsys):
    assert main(["data"]) == 0 and "not made yet: seriatim data emoji" in capsys.readouterr().out
    assert main(["data", "emoji", "--from", str(source)]) == 0
    said = capsys.readouterr().out
    assert "google: 5 pictures (Noto Emoji" in said and "--data emoji" in said
    assert main(["data", "emoji", "--from", "/nowhere"]) == 0 and "is there already" in capsys.readouterr().out
    assert main(["data", "emoji", "--from", "/nowhere", "--again"]) == 2
    assert "there is no emoji-datasource-google" in capsys.readouterr().err
    for name, why in (("digits", "is built in"), ("emojy", "did you mean emoji"), ("words", "that is emoji")):
        assert main(["data", name]) == 2 and why in capsys.readouterr().err
