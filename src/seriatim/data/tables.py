"""Texts from tables (CSV, TSV, JSON lines, Parquet), through the `datasets` library: a row is a document.

The side of a row is a hash of its text: equal texts are on one side, and stay there as rows come and go. Tables are
mapped from disk, not held in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from seriatim.data.base import TABLES, Data, Texts, check_held_out, share, suffix, visible_files

if TYPE_CHECKING:
    from datasets import Dataset

USUAL = ("text", "content", "document", "body", "sentence")  # names of the column that holds the text
LEAST = 2  # rows
BATCH = 1000  # rows read at once


@dataclass(frozen=True)
class Rows(Sequence[str]):
    """Some rows of a table's only column."""

    table: Dataset
    column: str
    rows: Sequence[int]

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return self.table[self.rows[index]][self.column]
        return self.table[self.rows[index]][self.column]

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), BATCH):
            yield from self[start : start + BATCH]


def text_table(path: Path, column: str | None = None, held_out: float = 0.05) -> Data:
    """The texts of a table or of a folder of tables. column: the one to read, by default the only one that holds text,
    or the first called text, content, document, body or sentence.

    Raises ValueError without the `datasets` library, where the table cannot be read, the column is not clear, or there
    are too few rows.
    """
    check_held_out(held_out)
    root = Path(path).expanduser()
    table = _read(root)
    column = _column(root, table, column)
    table = table.select_columns([column])
    sides: dict[bool, list[int]] = {True: [], False: []}
    left_out = 0
    for start in range(0, len(table), BATCH):
        for row, text in enumerate(table[start : start + BATCH][column], start):
            if text:
                sides[share(text) >= held_out].append(row)
            else:
                left_out += 1
    count = len(table) - left_out
    if count < LEAST:
        raise ValueError(f"{root} holds {count} texts in column {column!r}, at least {LEAST} are needed")
    for side in (True, False):
        if not sides[side]:  # few rows: the last one changes sides
            sides[side].append(sides[not side].pop())
    notes = (f"{left_out:,} of {len(table):,} rows have no text",) if left_out else ()
    train, test = (Texts(Rows(table, column, tuple(sides[side]))) for side in (True, False))
    return Data(root.name, "text", train, test, notes=notes)


def _read(root: Path) -> Dataset:
    """A table, or all tables of a folder that have the kind of the first."""
    try:
        import datasets
    except ImportError:
        raise ValueError(f"reading {root} needs an extra: pip install 'seriatim[datasets]'") from None
    files = [root] if root.is_file() else [root / name for name in visible_files(root)]
    kinds = {TABLES[suffix(file.name)] for file in files}
    if len(kinds) > 1:
        raise ValueError(f"{root} holds tables of different kinds ({', '.join(sorted(kinds))}): give one kind")
    (kind,) = kinds
    options: dict[str, Any] = {}
    if kind == "csv":
        options = {"sep": "\t" if suffix(files[0].name) == ".tsv" else ",", "keep_default_na": False}
    try:
        return datasets.load_dataset(kind, data_files=[str(file) for file in files], split="train", **options)
    except PermissionError:
        raise
    except Exception as error:  # the library raises what its readers raise, of any kind
        reason = str(error.__cause__ or error).strip().splitlines()
        raise ValueError(f"{root} cannot be read as {kind}: {reason[0] if reason else type(error).__name__}") from error


def _column(root: Path, table: Dataset, asked: str | None) -> str:
    """The column that holds the text."""
    text = [name for name, kind in table.features.items() if getattr(kind, "dtype", "") in ("string", "large_string")]
    if asked is not None:
        if asked not in table.column_names:
            raise ValueError(f"{root} has no column {asked!r}; it has {', '.join(table.column_names)}")
        if asked not in text:
            raise ValueError(f"column {asked!r} of {root} holds no text; columns that do: {', '.join(text) or 'none'}")
        return asked
    usual = [name for name in USUAL if name in text]
    if len(text) != 1 and not usual:
        which = f"several columns hold text ({', '.join(text)})" if text else "no column holds text"
        raise ValueError(f"{root}: {which}; name one with column=")
    return usual[0] if usual else text[0]
