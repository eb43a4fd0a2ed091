"""What a data set is, whatever it holds: two sides, samples by number; `load_data` finds one by its name or path.

Nothing here knows models or tokenizers. A sample is the same whenever it is asked for; augmentation is drawn from the
generator that is passed in, so that a batch follows from (numbers, generator) alone.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import inspect
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import torch
from jaxtyping import Int
from torch import Tensor

from seriatim.home import HOME


class Examples(Protocol):
    """One side (train or test) of a data set of pictures."""

    def __len__(self) -> int: ...

    def take(self, index: Int[Tensor, " n"], generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """These samples as a batch, augmented if a generator is given.

        "image": Float[n c h w] in [-1, 1]; where there are classes, "label": Int[n]. A set may add more ("style").
        Raises IndexError for a number that no sample has.
        """
        ...


@dataclass(frozen=True)
class Texts:
    """One side of a text data set: documents that are independent of each other, read when asked for."""

    documents: Sequence[str]

    def __len__(self) -> int:
        return len(self.documents)


@dataclass(frozen=True)
class Pairs:
    """One side of a set of prompts, each with its answer: what is learned is the answers. words: where each of their
    words is to be one token, all that there are. fill: how long an answer is, is part of what is to be found; who has
    to know lengths before sees all answers filled up with ends of text."""

    pairs: Sequence[tuple[str, str]]
    words: tuple[str, ...] = ()
    fill: bool = False

    def __len__(self) -> int:
        return len(self.pairs)


@dataclass(frozen=True)
class Data:
    """A data set. `modality` is "image", "text" or "series"; `notes` are sentences that a user should hear."""

    name: str
    modality: str
    train: Any  # Examples of pictures, Texts, Pairs, Conversations, or a Part of a series
    test: Any
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


# Name -> modality; the loader is the function of that name in the module of that name ("_" for "-"), imported when it
# is asked for.
BUILT_IN = {
    "digits": "image", "glyphs": "image", "photos": "image", "lines": "image", "stdlib": "text", "questions": "text",
    "list-tasks": "text", "stars": "text", "co2": "series", "elnino": "series", "sunspots": "series", "nile": "series",
    "macrodata": "series",
}  # fmt: skip
OPTIONAL = {"emoji": "image"}  # the same, but made once from downloads by `seriatim data`
DEFAULT = {"image": "glyphs", "text": "stdlib", "series": "co2"}
INK = ("digits", "glyphs", "lines")  # pictures of ink on paper: 1 is black


def load_data(source: str | Path | None, modality: str, **options: Any) -> Data:
    """A built-in data set by its name, or one's own by its path; None stands for the modality's default.

    A path is a folder of pictures for "image"; a text file, a folder of them, tables (CSV, JSONL, Parquet), or
    conversations (JSONL) for "text"; a table of numbers over time for "series", which goes by its bare name where it
    stands in SERIATIM_HOME/data (`ETTh1` for ETTh1.csv), or several, with commas, to train on together. Options go to
    the loader. Raises FileNotFoundError where there is nothing of that name, ValueError where it is of another modality
    or holds too little, TypeError for an option that the loader does not have.
    """
    if modality not in DEFAULT:
        raise ValueError(f"modality is one of {', '.join(DEFAULT)}, got {modality!r}")
    if source is None:
        source = DEFAULT[modality]
    named = {**BUILT_IN, **OPTIONAL}
    if isinstance(source, str) and source in named:
        if named[source] != modality:
            fitting = ", ".join(name for name, own in named.items() if own == modality)
            raise ValueError(
                f"{source!r} is {named[source]} data, and {modality} data is needed: a path, or one of {fitting}"
            )
        if modality == "series":
            return _call(source, _loader("series", "built_in_series"), {**options, "name": source}, ("name",))
        name = source.replace("-", "_")
        return _call(source, _loader(name, name), options)
    path = Path(source).expanduser()
    if modality == "series" and "," in str(source) and not path.exists():
        return importlib.import_module("seriatim.data.series_mixture").mixture(str(source).split(","), **options)
    if modality == "series" and not path.exists():
        files = (HOME / "data" / f"{source}{end}" for end in (".csv", ".tsv", ".parquet"))
        path = next((p for p in files if p.is_file()), path)
    if not path.exists():
        kept = f"; tables of numbers over time go by their names in {HOME / 'data'}" if modality == "series" else ""
        raise FileNotFoundError(_unknown(source) + kept)
    if modality == "series":
        loader = _loader("series", "series_table")
    elif modality == "image":
        loader = _loader("folders", "image_folder")
    elif _loader("conversations", "holds_conversations")(path):
        loader = _loader("conversations", "conversations")
    elif _is_table(path):
        loader = _loader("tables", "text_table")
    else:
        loader = _loader("texts", "text_files")
    return _call(str(source), loader, {"path": path, **options})


def _loader(module: str, function: str) -> Callable[..., Data]:
    return getattr(importlib.import_module(f"seriatim.data.{module}"), function)


def _call(source: str, loader: Callable[..., Data], options: dict[str, Any], ours: tuple[str, ...] = ("path",)) -> Data:
    """Call a loader after a look at the names of its options; `ours` are not the user's."""
    takes = [name for name in inspect.signature(loader).parameters if name not in ours]
    wrong = [name for name in options if name not in takes and name not in ours]
    if wrong:
        raise TypeError(f"data {source!r} takes no {', '.join(wrong)}; it takes {', '.join(takes) or 'no options'}")
    return loader(**options)


def _unknown(source: str | Path) -> str:
    near = (
        difflib.get_close_matches(str(source), [*BUILT_IN, *OPTIONAL], n=2, cutoff=0.5)
        if isinstance(source, str)
        else []
    )
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    names = ", ".join([*BUILT_IN, *OPTIONAL])
    return f"no data at {str(source)!r}: there is no such file or folder.{hint} Built in: {names}"


# ---- tables and sides ------------------------------------------------------------------------------------------------
TABLES = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".jsonl": "json", ".ndjson": "json"}


def _is_table(path: Path) -> bool:
    """A table, or a folder in which there are tables and nothing else."""
    names = [path.name] if path.is_file() else visible_files(path)
    return bool(names) and all(suffix(name) in TABLES for name in names)


def suffix(name: str) -> str:
    """The ending of a file's name in lower case, with its dot."""
    return os.path.splitext(name)[1].lower()


def visible_files(root: Path) -> list[str]:
    """Paths of the files below a folder, relative to it, sorted; hidden ones are left out, links are followed.

    Raises PermissionError where the folder may not be read.
    """
    if not os.access(root, os.R_OK | os.X_OK):
        raise PermissionError(f"no permission to read the folder {root}")
    found, seen = [], set()
    for folder, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        folders[:] = [] if real in seen else [f for f in folders if not f.startswith((".", "__MACOSX"))]
        if real not in seen:
            found += [os.path.relpath(os.path.join(folder, n), root) for n in names if not n.startswith(".")]
        seen.add(real)
    return sorted(name.replace(os.sep, "/") for name in found)


def naming(names: Sequence[str], most: int = 5) -> str:
    """A few names for a note: "a.png, b.png and 3 more"."""
    shown = ", ".join(name.encode("utf-8", "replace").decode() for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


def share(key: str | bytes) -> float:
    """A number in [0, 1) that looks random and follows from the key alone, on every machine (SHA-256)."""
    content = key.encode("utf-8", "surrogateescape") if isinstance(key, str) else key
    return int.from_bytes(hashlib.sha256(content).digest()[:4], "big") / 2**32


def check_held_out(held_out: float) -> None:
    """Raises ValueError unless this is a share between 0 and 1."""
    if not 0 < held_out < 1:
        raise ValueError(f"held_out is the share of samples kept for testing, between 0 and 1; got {held_out}")


# Folders that are sides already: nobody wants classes called train and test.
TRAIN_FOLDERS = {"train", "training"}
TEST_FOLDERS = {"test", "val", "valid", "validation"}


def split_paths(relative: Iterable[str], held_out: float) -> tuple[list[str], list[str]]:
    """Train and test side of relative paths, each by a hash of itself, so that a file keeps its side as others come.

    Where all lie in folders such as train/ and test/, these are the sides. Neither side is empty if there are two
    paths: the path of the smallest or largest hash changes sides.
    """
    check_held_out(held_out)
    paths = list(relative)
    tops = {p: PurePosixPath(p).parts[0].lower() if "/" in p else "" for p in paths}
    if has_sides(set(tops.values())):
        return [p for p in paths if tops[p] in TRAIN_FOLDERS], [p for p in paths if tops[p] in TEST_FOLDERS]
    shares = {p: share(p) for p in paths}
    test = {p for p in paths if shares[p] < held_out}
    if len(paths) > 1 and not test:
        test = {min(paths, key=shares.__getitem__)}
    elif len(paths) > 1 and len(test) == len(paths):
        test.remove(max(paths, key=shares.__getitem__))
    return [p for p in paths if p not in test], [p for p in paths if p in test]


def has_sides(folders: set[str]) -> bool:
    """Whether these top folders (lower case) are a train side and a test side, and nothing else."""
    return bool(folders & TRAIN_FOLDERS) and bool(folders & TEST_FOLDERS) and folders <= TRAIN_FOLDERS | TEST_FOLDERS
