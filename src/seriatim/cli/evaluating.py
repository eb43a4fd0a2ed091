"""`seriatim evaluate`."""

from __future__ import annotations

import argparse
import json

from seriatim.cli.options import data_options
from seriatim.verbs.evaluate import evaluate


def run_evaluate(options: argparse.Namespace) -> int:
    """Print the figures."""
    figures = evaluate(
        options.source, options.data, samples=options.samples, seed=options.seed, horizon=options.horizon,
        **data_options(options),
    )  # fmt: skip
    if options.json:
        print(json.dumps(figures, ensure_ascii=False))
        return 0
    for name, value in figures.items():
        print(f"{name:>20}  {value:.4g}" if isinstance(value, float) else f"{name:>20}  {value}")
    return 0
