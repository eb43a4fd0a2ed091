"""`seriatim list` and `seriatim show`: what there is, read without loading torch."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from itertools import groupby
from operator import itemgetter
from typing import Any

from rich.console import Console
from rich.markup import escape

from seriatim.systems.meta import card_of, everything, status_of

COLUMNS: tuple[str, ...] = ("key", "modality", "likelihood")
MARKS = {True: "[green]✓[/]", False: "[dim]–[/]"}


def show_list(options: argparse.Namespace) -> int:
    """Print the systems and studies as a table or a JSON array.

    L: the laws hold; E: trained and generated from end to end; C: its claim was measured; W: published weights load.
    """
    rows = [{**asdict(meta), **status_of(key)} for key, (meta, _) in everything().items()]
    if options.json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return 0
    console = Console()
    wide = {column: max(len(column), *(len(r[column]) for r in rows)) + 2 for column in COLUMNS}
    columns, marked = COLUMNS, len("  L  E  C  W  ")
    while len(columns) > 1 and console.width < marked + sum(wide[column] for column in columns):
        columns = columns[:-1]  # a narrow terminal
    room = console.width - sum(wide[column] for column in columns) - marked
    told = "summary" if room > 60 else "title"
    head = "".join(f"{column:{wide[column]}}" for column in columns)
    console.print(f"[bold]  {head}L  E  C  W  {'what it is'[:room]}[/]", highlight=False, soft_wrap=True)
    for family, own in groupby(sorted(rows, key=itemgetter("family")), itemgetter("family")):
        console.print(f"[bold cyan]{family}[/]")
        for r in own:
            words = "".join(f"{r[column]:{wide[column]}}" for column in columns)
            marks = "  ".join(MARKS[r[letter]] for letter in "LECW")
            text = r[told] if len(r[told]) <= room else f"{r[told][: max(room - 1, 0)]}…"
            console.print(f"  {words}{marks}  {escape(text)}", highlight=False, soft_wrap=True)
    console.print(
        "[dim]L the laws hold · E runs from end to end · C its claim was measured · W published weights load[/]",
        highlight=False,
    )
    return 0


def show_system(options: argparse.Namespace) -> int:
    """Print what a system is, its settings and sizes, its claim and the last result."""
    meta, text, details, result = card_of(options.key)
    console = Console()
    console.print(f"[bold]{meta.title}[/] ({meta.key}; {meta.family})\n{meta.paper}\n", highlight=False)
    console.print(text.strip() + "\n", highlight=False, markup=False)
    marks = status_of(options.key)
    names = {"L": "laws hold", "E": "runs from end to end", "C": "claim measured", "W": "published weights load"}
    console.print("  ".join(f"{MARKS[marks[k]]} {name}" for k, name in names.items()), highlight=False)
    console.print(f"likelihood: {meta.likelihood}", highlight=False)
    for name, values in details.items():
        console.print(f"{name}: {values}", highlight=False, markup=False)
    if result:
        _print_result(console, result)
    return 0


def _print_result(console: Console, result: dict[str, Any]) -> None:
    console.print(
        f"claim: {result['claim']}\nlast result: {result['metric']} {result['ours']:.4g} against "
        f"{result['baseline']:.4g}: [bold]{result['verdict']}[/] (rule: {result['rule']})",
        highlight=False,
    )
