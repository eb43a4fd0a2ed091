"""`seriatim compare`."""

from __future__ import annotations

import argparse

from rich.console import Console

from seriatim.cli.options import data_options
from seriatim.cli.progress import Bar
from seriatim.systems.meta import catalogue
from seriatim.verbs.compare import compare


def run_compare(options: argparse.Namespace) -> int:
    """Train, judge, and say where the report is."""
    console = Console()
    cards = catalogue()
    series = any(key in cards and cards[key][0].modality == "series" for key in options.keys)
    more = {"horizon": options.horizon, "lookback": options.lookback, "windows": options.classical} if series else {}
    path = compare(
        options.keys, options.data, minutes=options.minutes, size=options.size, out=options.out,
        samples=options.samples, seed=options.seed, bar=lambda name: Bar(name, console),
        said=lambda text: console.print(text, highlight=False), **data_options(options), **more,
    )  # fmt: skip
    console.print(f"[bold]Look at[/] {path}", highlight=False)
    return 0
