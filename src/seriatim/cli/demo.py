"""`seriatim demo`: VAR on the digits, in minutes, with something to look at."""

from __future__ import annotations

import argparse
import shutil
import time

from rich.console import Console

from seriatim.cli.progress import Bar
from seriatim.systems.meta import catalogue
from seriatim.verbs.show import show
from seriatim.verbs.train import train


def run_demo(options: argparse.Namespace) -> int:
    """Train, draw and judge samples; exit code 1 when they are not digits (accuracy below 0.5)."""
    console, out = Console(), options.out
    meta, _ = catalogue()["var"]
    console.print(f"[bold]{meta.title}[/] on 1,397 handwritten digits of 8x8 pixels: {meta.summary}", highlight=False)
    start = time.monotonic()
    if any((place / "run.json").exists() for place in (out, out / "tokenizer")):
        shutil.rmtree(out)  # of an earlier demo, perhaps cut off, which this one replaces
    steps = {} if options.steps is None else {"steps": options.steps, "tokenizer_steps": options.steps}
    settings = {"seed": options.seed, **steps}
    trained = train("var", "digits", out=out, settings=settings, bar=lambda name: Bar(name, console))
    with console.status("drawing and judging 200 digits"):
        figures = show(trained, samples=200, seed=options.seed)
    real, generated = figures["accuracy_real"], figures["accuracy"]
    minutes, seconds = divmod(round(time.monotonic() - start), 60)
    console.print(
        f"\nA classifier that has seen only real digits recognises\n"
        f"  {real:6.1%} of 400 real digits kept apart,\n"
        f"  {generated:6.1%} of 200 generated ones ({generated / real:.2f} of real).\n"
        f"Spread within a class: generated {figures['spread']:.3f}, real {figures['spread_real']:.3f}. "
        f"Distance to the nearest training digit: generated {figures['nearest']:.2f}, "
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
        f"  seriatim generate {out} --label 7 --count 20\n"
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
