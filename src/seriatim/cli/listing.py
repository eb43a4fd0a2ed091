"""`seriatim list`: what there is, read without loading torch."""

from __future__ import annotations

import json
from dataclasses import asdict

from seriatim.systems.meta import catalogue


def show_list(as_json: bool) -> int:
    """Print the systems as a table or a JSON array."""
    cards = [meta for meta, _ in catalogue().values()]
    if as_json:
        print(json.dumps([asdict(c) for c in cards], indent=2, ensure_ascii=False))
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("key", "family", "likelihood", "what it is"):
        table.add_column(column, overflow="fold")
    for c in cards:
        table.add_row(c.key, c.family, c.likelihood, c.summary)
    Console().print(table)
    return 0
