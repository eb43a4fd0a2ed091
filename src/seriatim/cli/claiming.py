"""`seriatim claim` and `seriatim claims`."""

from __future__ import annotations

import argparse
import time

from rich.console import Console
from rich.table import Table

from seriatim.cli.progress import Bar
from seriatim.verbs.claim import claim_of, claimed, measure, pending

COLOUR = {"holds": "green", "fails": "red", "within noise": "yellow"}


def run_claim(options: argparse.Namespace) -> int:
    """Measure one claim; exit code 1 where it fails."""
    console = Console()
    claim = claim_of(options.key)
    console.print(f"[bold]{options.key}[/]: {claim.text}\nRule: {claim.rule}.", highlight=False)
    result = measure(options.key, options.results, lambda name: Bar(name, console), console.print)
    verdict, ends = result["verdict"], result["difference_95"]
    between = "" if ends is None else f", the difference between {ends[0]:.4g} and {ends[1]:.4g} (95%)"
    console.print(
        f"{claim.metric}: {claim.ours} {result['ours']:.4g}, {claim.baseline} {result['baseline']:.4g}{between}: "
        f"[{COLOUR.get(verdict, 'dim')}]{verdict}[/] ({options.results}/{options.key}.json, "
        f"charts/{options.key}.png)",
        highlight=False,
    )
    return 1 if verdict == "fails" else 0


def run_claims(options: argparse.Namespace) -> int:
    """All claims as a table; with --run, first work off what is not measured."""
    console = Console()
    if options.work:
        _work(options, console)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("key", "metric", "ours", "baseline", "verdict", "paper"):
        table.add_column(column, justify="right" if column in ("ours", "baseline") else "left", overflow="fold")
    for r in claimed(options.results):
        if options.keys and r["key"] not in options.keys:
            continue
        numbers = [f"{r[k]:.4g}" if k in r else "" for k in ("ours", "baseline")]
        verdict = f"[{COLOUR.get(r['verdict'], 'dim')}]{r['verdict']}[/]"
        table.add_row(r["key"], r.get("metric", ""), *numbers, verdict, r.get("paper", ""))
    console.print(table)
    return 0


def _work(options: argparse.Namespace, console: Console) -> None:
    """One claim after another, with a guess of the time left."""
    keys = options.keys or [r["key"] for r in claimed(options.results) if _can(r["key"])]
    runs = sum(len(pending(key)) for key in keys)
    start, done = time.monotonic(), 0

    def said(text: str) -> None:
        nonlocal done
        left = f", about {(time.monotonic() - start) / done * (runs - done) / 60:.0f} min left" if done else ""
        console.print(f"{text}{left}", highlight=False)
        done += 1

    for key in keys:
        measure(key, options.results, lambda name: Bar(name, console), said)


def _can(key: str) -> bool:
    try:
        claim_of(key)
    except ValueError:
        return False
    return True
