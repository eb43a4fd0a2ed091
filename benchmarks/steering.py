"""Steering by a classifier: how often the wanted class is met, at which price.

    python benchmarks/steering.py [--model runs/ctrldiff] [--judge zoo:text-base] [--texts 16] [--new 64]

Without --model that of ctrldiff's claim, which is trained where there is none yet.
"""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.table import Table

from seriatim.systems.steering_trials import sweep
from seriatim.systems.text.ctrldiff import trained
from seriatim.verbs.load import load


def main() -> None:
    """Sweep the weights and print a table, and two texts of each class."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--judge", default="zoo:text-base")
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--new", type=int, default=64)
    options = parser.parse_args()
    system = load(options.model) if options.model else trained()
    rows = sweep(system, load(options.judge), texts=options.texts, new=options.new)
    names = ("class", "weight", "exact", "rate", "nats_per_token", "entropy", "seconds")
    table = Table(*names, box=None)
    for row in rows:
        table.add_row(*(f"{row[n]:.3g}" if isinstance(row[n], float) else str(row[n]) for n in names))
    console = Console()
    console.print(table)
    for row in rows:
        if not row["exact"] and row["weight"] == max(r["weight"] for r in rows):
            console.rule(f"{row['class']}, weight {row['weight']:g}")
            console.print(*row["texts"], sep="\n---\n", markup=False, highlight=False)


if __name__ == "__main__":
    main()
