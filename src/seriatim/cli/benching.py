"""`seriatim bench`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from rich.console import Console
from rich.table import Table

from seriatim.cli.progress import Bar
from seriatim.evaluation.report import bytes_text, count_text, seconds_text
from seriatim.verbs.bench import bench

COLOUR = {"holds": "green", "fails": "red", "not tested": "yellow"}


def run_bench(options: argparse.Namespace) -> int:
    """Measure, and print tables or one JSON object."""
    progress = Console(stderr=True)
    decoders = [name.strip() for name in options.decoders.split(",") if name.strip()]
    result = bench(
        options.source, decoders, options.prompts, count=options.count,
        new_tokens=options.new_tokens, temperature=options.temperature, weights=options.weights,
        dtype=options.dtype, compile=options.compile,
        runs=options.runs, draws=options.draws, memory=not options.no_memory, seed=options.seed, out=options.out,
        bar=lambda name: Bar(name, progress),
    )  # fmt: skip
    if options.json:
        print(json.dumps(result, ensure_ascii=False))
        return 0
    console = Console()
    console.print(_heading(result), highlight=False, markup=False, soft_wrap=True)
    console.print(figures_table(result))
    if len(result["prompts"]["groups"]) > 1:
        console.print(groups_table(result))
    for name, own in result["decoders"].items():
        console.print(f"{name}: {_losslessness(own['lossless'])}", highlight=False, soft_wrap=True)
        if own["drafted"] and own["decode_ratio"] is not None:
            console.print(f"{name}: {_expected(own)}", highlight=False, soft_wrap=True)
    for note in result["notes"]:
        console.print("note:", note, highlight=False, markup=False, soft_wrap=True)
    if options.out is not None:
        console.print(f"[bold]Look at[/] bench.png, bench.json in {options.out}", highlight=False, soft_wrap=True)
    return 0


def _heading(result: dict[str, Any]) -> str:
    kind = " ".join(filter(None, (result["dtype"], result["weights"], "compiled" if result["compiled"] else "")))
    said = "greedy" if result["temperature"] == 0 else f"temperature {result['temperature']:g}"
    prompts, disturbed = result["prompts"], {True: "true", False: "false", None: "not known"}[result["disturbed"]]
    parts = (
        f"{result['model']}: {count_text(result['parameters'])} parameters, {kind}",
        f"{prompts['count']} prompts ({prompts['source']})",
        f"{result['new_tokens']} new tokens, {said}",
        f"{result['runs']} runs, {result['threads']} threads, load average {result['load_average']:.1f}",
        f"disturbed: {disturbed}",
    )
    return "; ".join(parts)


def figures_table(result: dict[str, Any]) -> Table:
    """A row a decoder, and another where some of the outputs loop."""
    table = _table()
    titles = ("tokens/s", "ratio", "tokens/\nforward", "forwards", "first\ntoken", "distinct\ntokens", "peak\nmemory")
    table.add_column("decoder", overflow="fold")  # which may name a folder: it alone gives way
    table.add_column("outputs", no_wrap=True)
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    for name, own in result["decoders"].items():
        memory = "–" if own["peak_memory"] is None else bytes_text(own["peak_memory"])
        table.add_row(name, *_cells(own["outputs"], own), memory)
        if own["outputs"] == "varied" and own["looping"]:
            table.add_row("", *_cells("looping", own["looping"]))
    return table


def _cells(kind: str, part: dict[str, Any]) -> list[str]:
    return [
        kind, f"{part['tokens_per_second']:.1f}", f"{part['ratio']:.2f}", f"{part['mean_accepted_length']:.2f}",
        f"{part['forwards']:,}", seconds_text(part["first_token_seconds"]), f"{part['distinct_share']:.0%}",
    ]  # fmt: skip


def _table() -> Table:
    return Table(box=None, pad_edge=False, collapse_padding=True, header_style="bold")


def groups_table(result: dict[str, Any]) -> Table:
    """A row a kind of prompt: ratio and tokens per forward of each decoder but the plain one."""
    names = list(result["decoders"])[1:] or list(result["decoders"])
    table = _table()
    table.add_column("ratio (tokens/forward)")
    for name in names:
        table.add_column(name, justify="right", overflow="fold")
    for group in result["decoders"][names[0]]["groups"]:
        parts = [result["decoders"][name]["groups"][group] for name in names]
        table.add_row(group, *(f"{p['ratio']:.2f} ({p['mean_accepted_length']:.2f})" for p in parts))
    return table


def _expected(own: dict[str, Any]) -> str:
    """What drafts were worth behind the first token, beside what the cost of a forward lets expect."""
    return (
        f"behind the first token {own['decode_ratio']:.2f} times as fast as plain decoding, "
        f"{own['predicted_ratio']:.2f} by the cost of forwards ({own['mean_accepted_length']:.2f} tokens of "
        f"{own['mean_rows']:.1f} rows, {seconds_text(own['draft_seconds'])} for a draft)"
    )


def _losslessness(said: dict[str, Any]) -> str:
    """Verdict, rule and what was found, in a line."""
    parts = [f"[{COLOUR.get(said['verdict'], 'dim')}]{said['verdict']}[/]: {said['rule']}"]
    if "equal_texts" in said:
        parts.append(f"{said['equal_texts']} of {said['texts']} texts equal")
    if said.get("divergences"):
        lengths = any(d["steps"] is None for d in said["divergences"])
        parts.append(f"{said['divergences_per_1000_tokens']:.2f} divergences per 1,000 tokens")
        parts.append(f"the largest of {said['largest_steps']:.2f} steps")
        parts += ["some of other length"] * lengths
    if "p_value" in said:
        parts.append(f"p = {said['p_value']:.3g}")
    return "; ".join(parts)
