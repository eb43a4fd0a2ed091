"""The command line: `seriatim COMMAND`. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import seriatim


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = argparse.ArgumentParser(
        prog="seriatim",
        description="Autoregressive generation in all its forms: the order of generation is data.",
    )
    top.add_argument("--version", action="version", version=f"seriatim {seriatim.__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    laws = commands.add_parser("laws", help="hold systems to the laws, and the laws to their mutants")
    laws.add_argument("keys", nargs="*", metavar="KEY", help="systems (default: all)")
    laws.add_argument("--json", action="store_true", help="print findings as JSON lines")
    laws.add_argument("--verbose", "-v", action="store_true", help="also print what each law found")

    listing = commands.add_parser("list", help="the systems there are")
    listing.add_argument("--json", action="store_true", help="print a JSON array")

    demo = commands.add_parser("demo", help="train VAR on handwritten digits and draw samples, in minutes")
    _run_options(demo, "runs/demo")

    train = commands.add_parser("train", help="train a system on its built-in data")
    train.add_argument("key", metavar="KEY", help="the system, as `seriatim list` names it")
    _run_options(train, None)
    return top


def _run_options(command: argparse.ArgumentParser, out: str | None) -> None:
    command.add_argument("--out", type=Path, default=out, help=f"folder for the results (default: {out or 'runs/KEY'})")
    command.add_argument("--steps", type=_positive, help="training steps (default: the system's own)")
    command.add_argument("--seed", type=int, default=0, help="seed of everything random (default: 0)")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = parser().parse_args(arguments)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads hurt beside other programs
    try:
        if options.command == "list":
            from seriatim.cli.listing import show_list

            return show_list(options.json)
        if options.command == "laws":
            from seriatim.cli.laws import run_laws

            return run_laws(options.keys, options.json, options.verbose)
        from seriatim.cli.training import run_demo, run_training

        if options.command == "demo":
            return run_demo(Path(options.out), options.steps, options.seed)
        return run_training(options.key, options.out, options.steps, options.seed)
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130
    except (KeyError, ValueError, OSError) as error:
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"seriatim: {text}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
