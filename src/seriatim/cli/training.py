"""`seriatim train`."""

from __future__ import annotations

import argparse
import ast
import os
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from seriatim.cli.options import data_options
from seriatim.cli.progress import Bar
from seriatim.verbs.drafting import is_draft_part, show_part
from seriatim.verbs.load import load
from seriatim.verbs.show import show
from seriatim.verbs.train import train


def run_train(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Train, show, and print the figures."""
    console = Console()
    out = Path(options.out or f"runs/{options.key}")
    trained = train(
        options.key, options.data, from_=options.base, lora=options.lora, out=out, size=options.size,
        tokenizer=options.tokenizer, minutes=options.minutes, resume=options.resume,
        tensorboard=options.tensorboard, settings=settings_of(rest), bar=lambda name: Bar(name, console),
        **data_options(options),
    )  # fmt: skip
    if int(os.environ.get("RANK", "0")):
        return 0  # of several processes the first one shows
    part = is_draft_part(options.key)
    if not part:
        trained = replace(trained, system=load(out))  # weights may be spread over processes
    for note in trained.data.notes:
        console.print(f"[yellow]note:[/] {note}", highlight=False)
    figures = show_part(options.key, trained.system, out, trained.history) if part else show(trained)
    for name, value in figures.items():
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        console.print(f"{name:>20}  {text}", highlight=False, markup=False)
    console.print(
        f"\n[bold]Look at[/] {', '.join(p.name for p in sorted(out.iterdir()) if p.suffix in SHOWN)} in {out}"
    )
    next_to_try = f"seriatim generate {out}" if trained.system.meta.family != "tokenizer" else "--tokenizer " + str(out)
    if trained.system.meta.modality == "series":
        place = (options.data or trained.data.name).partition(",")[0]
        read = [word for k, v in data_options(options).items() for word in (f"--{k}", v)]
        next_to_try = shlex.join(["seriatim", "forecast", str(out), "--data", place, *read])
    if part:
        next_to_try = f"seriatim generate {options.base} --decoder {options.key}:{out}"
    console.print(f"[bold]Try next:[/] {next_to_try}", highlight=False)
    return 0


SHOWN = {".png", ".gif", ".txt", ".html"}


def settings_of(rest: Sequence[str]) -> dict[str, Any]:
    """`--width 256 --betas 0.9,0.95 --bf16 --tied=false` as names and values. Raises ValueError for loose words."""
    settings: dict[str, Any] = {}
    words = list(rest)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise ValueError(f"{word!r} belongs to no option; settings are given as --name value")
        name, equals, value = word[2:].partition("=")
        if not equals:
            value = words.pop(0) if words and not words[0].startswith("--") else "true"
        settings[name.replace("-", "_")] = value_of(value)
    return settings


def value_of(text: str) -> Any:
    """A number, a truth value, none, a tuple by commas, or the text itself."""
    plain = {"true": True, "false": False, "none": None}
    if text.lower() in plain:
        return plain[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
