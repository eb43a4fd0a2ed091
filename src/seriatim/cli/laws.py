"""`seriatim laws`: runs the suite and prints a table."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context

from rich.console import Console
from rich.table import Table

from seriatim.laws.laws import LAWS
from seriatim.laws.suite import Finding, all_keys, law_mutant_finding, mutant_finding, system_findings
from seriatim.systems.meta import load

MARK = {"holds": "[green]holds[/]", "broken": "[bold red]BROKEN[/]", "n/a": "[dim]–[/]"}


def run_laws(options: argparse.Namespace) -> int:
    """Hold systems to the laws, and each law to its mutant; exit code 1 when anything is broken."""
    import torch

    keys, as_json, verbose = options.keys, options.json, options.verbose
    torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other
    for key in keys:
        load(key)
    console = Console()
    subjects = list(keys) or all_keys()
    findings: dict[str, list[Finding]] = {}
    caught: list[Finding] = []
    with console.status("") as status:
        for key, found in zip(subjects, _each(subjects, options.workers), strict=True):
            status.update(f"laws of {key}")
            findings[key] = found[:-1]
            caught.append(found[-1])
        status.update("mutants of the laws")
        laws = [law_mutant_finding(n) for n in LAWS]
    everything = [f for fs in findings.values() for f in fs] + caught + laws
    if as_json:
        for f in everything:
            print(json.dumps(asdict(f), ensure_ascii=False))
    else:
        _print(console, findings, caught, laws, verbose)
    return 1 if any(f.status == "broken" for f in everything) else 0


def _each(keys: Sequence[str], workers: int) -> Iterator[list[Finding]]:
    """What is found of each system, and last of its mutant, in so many processes."""
    if workers == 1 or len(keys) == 1:
        yield from map(_of, keys)
        return
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        yield from pool.map(_of, keys)


def _of(key: str) -> list[Finding]:
    import torch

    torch.set_num_threads(1)  # in a process of its own, too
    return [*system_findings(key), mutant_finding(key)]


def _print(
    console: Console, findings: dict[str, list[Finding]], caught: list[Finding], laws: list[Finding], verbose: bool
) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("law")
    for key in findings:
        table.add_column(key, justify="center")
    table.add_column("its mutant", justify="center")
    for i, number in enumerate(LAWS):
        row = [MARK[fs[i].status] for fs in findings.values()]
        table.add_row(f"{number:2} {LAWS[number][0]}", *row, _caught(laws[i]))
    table.add_row("   the system's mutant", *[_caught(f) for f in caught], "")
    table.add_row("   seconds", *[f"{sum(f.seconds for f in fs):.1f}" for fs in findings.values()], "", style="dim")
    console.print(table)
    for fs in findings.values():
        for f in fs:
            if f.status == "n/a" or f.status == "broken" or verbose:
                word = {"n/a": "not applicable, because", "broken": "[red]BROKEN:[/]", "holds": "holds:"}[f.status]
                console.print(f"[bold]{f.subject}[/], law {f.law}: {word} {f.note}", highlight=False)
    for f in [*caught, *laws]:
        if f.status == "broken" or verbose:
            name = f.subject if f.subject.startswith("mutant") else f"mutant of law {f.law}"
            console.print(f"[bold]{name}[/]: {f.note}", highlight=False)


def _caught(f: Finding) -> str:
    return "[green]caught[/]" if f.status == "holds" else "[bold red]NOT CAUGHT[/]"
