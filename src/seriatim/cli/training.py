"""`seriatim train` and `seriatim demo`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Console

from seriatim.cli.progress import Bar
from seriatim.systems.meta import catalogue, load
from seriatim.training.run import Run


def run_training(key: str, out: Path | None, steps: int | None, seed: int) -> int:
    """Train a system on its built-in data and print its figures."""
    module = load(key)
    console = Console()
    summary = _train(module, Path(out or f"runs/{key}"), steps, seed, console)
    for name, value in summary.items():
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        console.print(f"{name:>20}  {text}", highlight=False)
    return 0


def run_demo(out: Path, steps: int | None, seed: int) -> int:
    """Train VAR on the digits, draw and judge samples; exit code 1 when they are not digits (accuracy below 0.5)."""
    console = Console()
    meta, _ = catalogue()["var"]
    console.print(f"[bold]{meta.title}[/] on 1,397 handwritten digits of 8x8 pixels: {meta.summary}", highlight=False)
    start = time.monotonic()
    figures = _train(load("var"), out, steps, seed, console)
    real, generated = figures["accuracy_real"], figures["accuracy_generated"]
    minutes, seconds = divmod(round(time.monotonic() - start), 60)
    console.print(
        f"\nA classifier that has seen only real digits recognises\n"
        f"  {real:6.1%} of 400 real digits kept apart,\n"
        f"  {generated:6.1%} of 200 generated ones ({generated / real:.2f} of real).\n"
        f"Spread within a class: generated {figures['spread_generated']:.3f}, real {figures['spread_real']:.3f}. "
        f"Distance to the nearest training digit: generated {figures['nearest_generated']:.2f}, "
        f"real {figures['nearest_real']:.2f}.\n"
        f"Each picture took {figures['forwards']} forwards. {minutes} min {seconds} s in all.",
        highlight=False,
    )
    console.print(
        f"\n[bold]Look at them:[/]\n"
        f"  {out}/samples.png   ten samples of each digit\n"
        f"  {out}/film.gif      the same samples, coarse to fine, as they are generated\n"
        f"  {out}/loss.png      how the loss fell\n"
        f"\n[bold]Try next:[/]\n"
        f"  seriatim train raster-ar     the same digits pixel by pixel: 64 forwards instead of {figures['forwards']}\n"
        f"  seriatim train next-token    a language model of Python's standard library\n"
        f"  seriatim laws                what every system is held to\n"
        f"(`seriatim` is .venv/bin/seriatim after `make demo`.)",
        highlight=False,
    )
    if generated < 0.5:
        console.print("[red]The samples are not recognisable: something is wrong.[/]")
        return 1
    return 0


def _train(module: Any, out: Path, steps: int | None, seed: int, console: Console) -> dict[str, Any]:
    (out / "metrics.jsonl").unlink(missing_ok=True)
    return module.train(Run(out, seed, steps, lambda name: Bar(name, console)))
