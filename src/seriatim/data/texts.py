"""One's own text files as a data set: a file, split by a contiguous tail, or a folder, split by a hash of each path."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import overload

from seriatim.data.base import Data, Texts, check_held_out, naming, split_paths, visible_files

LEAST = 100  # characters


@dataclass(frozen=True)
class Files(Sequence[str]):
    """Text files as documents, read when asked for."""

    root: Path
    paths: tuple[str, ...]
    encoding: str

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        return read_text(self.root / self.paths[index], self.encoding)


def text_files(path: Path, encoding: str = "utf-8", pattern: str = "*", held_out: float = 0.05) -> Data:
    """A text file, or all files below a folder whose names match `pattern` ("*.txt"), a document each.

    Of a single file, the last lines are held out. All files are read once, to find one that is not in `encoding` now
    and not in the middle of a training. Raises ValueError with the file and the byte where that is so, or where there
    is too little text.
    """
    check_held_out(held_out)
    try:
        codecs.lookup(encoding)
    except LookupError:
        raise ValueError(f"no encoding is called {encoding!r}; try utf-8, utf-16, latin-1 or cp1252") from None
    root = Path(path).expanduser()
    if root.is_file():
        return _one_file(root, root.name, encoding, held_out)
    names = [name for name in visible_files(root) if fnmatch(name.rsplit("/", 1)[-1], pattern)]
    if not names:
        raise ValueError(f"no files in {root}" + (f" match {pattern!r}" if pattern != "*" else ": it is empty"))
    length = {name: len(read_text(root / name, encoding)) for name in names}
    empty = [name for name in names if not length[name]]
    full = [name for name in names if length[name]]
    notes = (f"{len(empty):,} of {len(names):,} files are empty: {naming(empty)}",) if empty else ()
    if len(full) == 1:
        return _one_file(root / full[0], root.name, encoding, held_out, notes)
    _check_length(root, sum(length.values()))
    train, test = (Texts(Files(root, tuple(side), encoding)) for side in split_paths(full, held_out))
    return Data(root.name, "text", train, test, notes=notes)


def _one_file(path: Path, name: str, encoding: str, held_out: float, notes: tuple[str, ...] = ()) -> Data:
    """The beginning and the tail of one file; the cut stands behind a line's end where there is one near."""
    text = read_text(path, encoding)
    _check_length(path, len(text))
    cut = round(len(text) * (1 - held_out))
    line = text.rfind("\n", cut // 2, cut) + 1
    cut = min(max(line or cut, 1), len(text) - 1)
    return Data(name, "text", Texts((text[:cut],)), Texts((text[cut:],)), notes=notes)


def _check_length(path: Path, length: int) -> None:
    if length < LEAST:
        raise ValueError(f"{path} holds {length} characters of text, at least {LEAST} are needed")


def read_text(path: Path, encoding: str = "utf-8") -> str:
    """A whole file, without a byte order mark. Raises ValueError that names the file and the first wrong byte."""
    content = path.read_bytes()
    try:
        return content.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        guess = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "latin-1"
        raise ValueError(
            f"{path} is not {encoding.upper()}: byte {error.start} is 0x{content[error.start]:02x} ({error.reason}). "
            f"Save it as UTF-8, name its encoding (encoding={guess!r}), or leave it out (pattern='*.txt')"
        ) from None
