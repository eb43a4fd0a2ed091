"""`seriatim forecast`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rich.console import Console

from seriatim.cli.options import data_options
from seriatim.cli.progress import Bar
from seriatim.cli.training import settings_of
from seriatim.verbs.forecast import forecast


def run_forecast(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Forecast, and say where the table and the plot are."""
    console = Console()
    made = forecast(
        options.source, options.data, options.horizon, level=options.level, out=options.out,
        settings=settings_of(rest), bar=lambda name: Bar(name, console),
        said=lambda text: console.print(text, highlight=False), **data_options(options),
    )  # fmt: skip
    for note in made.notes:
        console.print(f"[yellow]note:[/] {note}", highlight=False)
    for name, value in made.figures.items():
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        console.print(f"{name:>20}  {text}", highlight=False, markup=False)
    first, last = (str(t.astype("datetime64[s]")).replace("T", " ") for t in made.times[[0, -1]])
    console.print(
        f"\n{len(made.times)} steps, {first} to {last}; errors are of the test part, on the scale of "
        "the training rows.", highlight=False,
    )  # fmt: skip
    console.print(f"[bold]Look at[/] {', '.join(map(str, made.files))}", highlight=False)
    return 0
