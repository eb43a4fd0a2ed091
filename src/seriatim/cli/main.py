"""The command line: `seriatim COMMAND`. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence

import seriatim
from seriatim.cli.options import add_commands


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = argparse.ArgumentParser(
        prog="seriatim",
        description="Autoregressive generation in all its forms: the order of generation is data.",
    )
    top.add_argument("--version", action="version", version=f"seriatim {seriatim.__version__}")
    add_commands(top.add_subparsers(dest="command", metavar="COMMAND", required=True))
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 where what was asked for did not hold, 2 for the user's errors."""
    top = parser()
    options, settings = top.parse_known_args(arguments)
    if settings and not getattr(options, "free", False):
        top.error(f"unrecognized arguments: {' '.join(settings)}")
    # Threads that wait for work spin a little, as between two small operations, then sleep: without a bound a step
    # takes a hundred times as long beside another program, without spinning twice as long where there is none.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    warnings.formatwarning = lambda message, *rest: f"seriatim: note: {message}\n"
    try:
        return options.run(options, settings) if getattr(options, "free", False) else options.run(options)
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (KeyError, ValueError, TypeError, OSError, FloatingPointError, ImportError) as error:
        if os.environ.get("SERIATIM_DEBUG"):
            raise
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"seriatim: {text}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
