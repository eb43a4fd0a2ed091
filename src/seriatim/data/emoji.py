"""Emoji of two vendors, 64x64, RGB: an optional built-in, made once from two npm packages by `seriatim data emoji`.

The packages `emoji-datasource-google` and `emoji-datasource-twitter` (github.com/iamcal/emoji-data, MIT) hold a table
of all emoji, with names and categories, and a picture of each. Those of skin tones are left out: they are their base
in another colour. What is kept is one file below SERIATIM_HOME; nothing is ever downloaded but by that command.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int, UInt8
from torch import Tensor

from seriatim.data.base import Data, check_held_out, share
from seriatim.data.npm import archives, contents
from seriatim.home import HOME

VENDORS = {"google": "emoji-datasource-google", "twitter": "emoji-datasource-twitter"}
VERSION = "16.0.0"
LICENCES = {
    "google": "Noto Emoji, Google LLC, Apache License 2.0",
    "twitter": "Twemoji, Twitter Inc. and other contributors, CC BY 4.0 (name them where you show pictures)",
}
SIDE = 64
SIDES = (16, 32, 64)
LEFT_OUT = ("Component",)  # five skin tones
SHIFT = 2  # pixels, in training
ALIKE = {"1F468": "1F9D1", "1F469": "1F9D1"}  # man, woman: person
MARKS = {"FE0F", "2640", "2642", "27A1"}  # variation, woman, man, facing right


@dataclass(frozen=True)
class Emoji:
    """One side of the split; row i of the tensors is the same picture, on white. `vendors` names the styles; `names`
    the emoji, by their numbers in `emoji`."""

    pixels: UInt8[Tensor, "n 3 h w"]
    labels: Int[Tensor, " n"]
    style: Int[Tensor, " n"]
    emoji: Int[Tensor, " n"]
    vendors: tuple[str, ...]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Int[Tensor, " n"], generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """ "image" (n, 3, h, w), "label" (n,) into the categories, "style" (n,) into `vendors`, "emoji" (n,) into
        `names`. With a generator, pictures are shifted by up to two pixels of 64."""
        images = self.pixels[index].float() / 127.5 - 1
        if generator is not None:
            images = shifted(images, generator, SHIFT * images.shape[-1] // SIDE)
        return {"image": images, "label": self.labels[index], "style": self.style[index], "emoji": self.emoji[index]}


def shifted(images: Tensor, generator: torch.Generator, most: int) -> Tensor:
    """Each picture moved by up to so many pixels both ways; white comes in."""
    n, _, height, width = images.shape
    down, right = torch.randint(0, 2 * most + 1, (2, n), generator=generator)
    wide = F.pad(images, (most,) * 4, value=1.0)
    y, x = down[:, None] + torch.arange(height), right[:, None] + torch.arange(width)
    return wide[torch.arange(n)[:, None, None], :, y[:, :, None], x[:, None]].permute(0, 3, 1, 2).contiguous()


def emoji(image_size: int = SIDE, held_out: float = 0.1, vendors: str | Sequence[str] = tuple(VENDORS)) -> Data:
    """Emoji on white; the category is the class, the vendor the style.

    image_size: 64, or means of its pixels (32, 16); held_out: the share of the emoji kept for testing, of all vendors
    together with their other sexes and directions; vendors: which ones. Raises FileNotFoundError where they have not
    been made yet, ValueError for other sizes and vendors, and for a file that is not whole.
    """
    check_held_out(held_out)
    wanted = tuple(vendors.split(",")) if isinstance(vendors, str) else tuple(vendors)
    if image_size not in SIDES or not wanted or set(wanted) - set(VENDORS):
        raise ValueError(
            f"emoji have {', '.join(map(str, SIDES))} pixels a side, and vendors {', '.join(VENDORS)}; "
            f"got {image_size} and {', '.join(wanted) or 'no vendor'}"
        )
    about, tensors = _read(kept_at())
    pixels = tensors["pixels"]
    if image_size != SIDE:
        small = [F.avg_pool2d(part.float(), SIDE // image_size).round().byte() for part in pixels.split(256)]
        pixels = torch.cat(small)
    mine = torch.isin(tensors["style"], torch.tensor([about["vendors"].index(v) for v in wanted]))
    test = torch.tensor([share(kin(code)) < held_out for code in about["codes"]])[tensors["emoji"]]

    def side(rows: Tensor) -> Emoji:
        style = tensors["style"][rows]
        number = torch.tensor([wanted.index(v) if v in wanted else -1 for v in about["vendors"]])[style]
        parts = pixels[rows], tensors["label"][rows], number, tensors["emoji"][rows]
        return Emoji(*parts, wanted, tuple(about["names"]))

    notes = tuple(f"pictures: {about['licences'][v]}" for v in wanted)
    return Data("emoji", "image", side(mine & ~test), side(mine & test), tuple(about["categories"]), notes)


def kin(code: str) -> str:
    """What an emoji shares with its other sexes and directions, which are nearly the same picture: these stay on one
    side. `code`: its code points, as in 1F3C3-200D-2640-FE0F."""
    parts = [ALIKE.get(part, part) for part in code.split("-") if part not in MARKS]
    while parts and parts[-1] == "200D":
        parts.pop()
    return "-".join(parts)


def kept_at() -> Path:
    """Where the pictures are, or will be."""
    return HOME / "data" / "emoji.safetensors"


# ---- reading ---------------------------------------------------------------------------------------------------------


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What is said of the pictures, and they themselves."""
    if not path.is_file():
        raise FileNotFoundError(
            "the emoji are not here yet: `seriatim data emoji` gets them once (by npm, 136 MB, of which 47 MB stay)"
        )
    return _read_once(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=1)
def _read_once(path: Path, changed: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
            return json.loads(file.metadata()["about"]), tensors
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not whole ({error}): delete it, and make it again by `seriatim data emoji`"
        ) from None


# ---- making ----------------------------------------------------------------------------------------------------------


def make_emoji(source: str | Path | None = None, tell: Callable[[str], None] = lambda line: None) -> Path:
    """Make the pictures from the packages: those in the folder `source`, or got by npm. Returns where they are.

    tell: hears of each step. Raises FileNotFoundError without npm, with the way by hand; OSError where npm fails or the
    disk is full, and ValueError for archives that are not whole or hold something else. A failure leaves what was there
    before.
    """
    path = kept_at()
    folder = path.parent / "emoji.download"
    files = archives(VENDORS, VERSION, folder if source is None else Path(source).expanduser(), source is None, tell)
    table: list[dict[str, Any]] | None = None
    rows: dict[str, dict[int, Tensor]] = {}
    for vendor, file in files.items():
        inside = contents(file, ("package/emoji.json", f"package/img/{vendor}/{SIDE}/"))
        own = _table(file, inside)
        if table is not None and own != table:
            raise ValueError(f"{file} is of another version than the archive before it: take both of one")
        table = own
        rows[vendor] = _pictures(file, vendor, inside, table)
        tell(f"{vendor}: {len(rows[vendor]):,} pictures ({LICENCES[vendor]})")
    assert table is not None
    _write(path, table, rows)
    if source is None:
        for file in files.values():
            file.unlink()
        folder.rmdir()
    _read_once.cache_clear()
    return path


def _table(file: Path, inside: Mapping[str, bytes]) -> list[dict[str, Any]]:
    """All emoji but those left out, in the order of keyboards."""
    try:
        rows = json.loads(inside["package/emoji.json"])
        found = [row for row in rows if row["category"] not in LEFT_OUT]
        return sorted(found, key=lambda row: (row["category"], row["sort_order"], row["unified"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} holds no table of emoji as emoji-datasource has it ({error!r})") from None


def _pictures(file: Path, vendor: str, inside: Mapping[str, bytes], table: Sequence[Any]) -> dict[int, Tensor]:
    """The pictures of a vendor by the numbers of their emoji in the table."""
    rows, missing = {}, []
    for number, row in enumerate(table):
        if not row.get(f"has_img_{vendor}"):
            continue
        name = f"package/img/{vendor}/{SIDE}/{row['image']}"
        if name in inside:
            rows[number] = _on_white(file, name, inside[name])
        else:
            missing.append(row["image"])
    if missing or not rows:
        raise ValueError(f"{file} lacks {len(missing) or 'all'} of its pictures, such as {', '.join(missing[:3])}")
    return rows


def _on_white(file: Path, name: str, content: bytes) -> UInt8[Tensor, "3 64 64"]:
    from io import BytesIO

    import numpy as np
    from PIL import Image

    try:
        with Image.open(BytesIO(content), formats=("PNG",)) as opened:
            picture = opened.convert("RGBA")
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{name} in {file} is no whole picture ({error})") from None
    if picture.size != (SIDE, SIDE):
        raise ValueError(f"{name} in {file} has {picture.width} x {picture.height} pixels, not {SIDE} x {SIDE}")
    white = Image.new("RGBA", picture.size, "white")
    return torch.from_numpy(np.array(Image.alpha_composite(white, picture).convert("RGB"))).permute(2, 0, 1)


def _write(path: Path, table: Sequence[Any], rows: Mapping[str, Mapping[int, Tensor]]) -> None:
    """All pictures, emoji by emoji, as one file; beside its place first, then renamed."""
    from safetensors.torch import save_file

    categories = sorted({row["category"] for row in table})
    each = [(n, v) for n in range(len(table)) for v, vendor in enumerate(VENDORS) if n in rows.get(vendor, {})]
    names = list(VENDORS)
    tensors = {
        "pixels": torch.stack([rows[names[v]][n] for n, v in each]),
        "label": torch.tensor([categories.index(table[n]["category"]) for n, _ in each]),
        "style": torch.tensor([v for _, v in each]),
        "emoji": torch.tensor([n for n, _ in each]),
    }
    about = {
        "categories": categories, "vendors": names, "licences": LICENCES, "version": VERSION,
        "names": [str(row.get("name") or row["short_name"]).lower() for row in table],
        "codes": [row["unified"] for row in table], "subcategories": [row.get("subcategory") for row in table],
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        save_file(tensors, part, {"about": json.dumps(about)})
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
