"""When each of some texts is asked for, begun and ended: in flight, one by one, and in batches. A picture.

    python benchmarks/flover.py [--count 24] [--rate 5] [--out docs/images/serve-timelines.png]

The requests are those of `seriatim claim flover`, coming faster than one by one can be written; for a quiet machine.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

from seriatim.evaluation.timelines import figures_of, save_timelines
from seriatim.studies.flover import MODEL, WAYS, told
from seriatim.verbs.load import load


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--rate", type=float, default=5.0, help="requests a second")
    parser.add_argument("--out", type=Path, default=Path("timelines.png"))
    options = parser.parse_args()
    system: Any = load(MODEL)
    told(system, "in flight", 1, float("inf"), 1)  # warms up
    ways = {way: told(system, way, 0, options.rate, options.count) for way in WAYS}
    for way, stories in ways.items():
        figures = figures_of(stories)
        print(f"{way:20s} {figures['latency']:6.2f} s in the mean, {figures['tokens_per_second']:7.1f} tokens/s")
    print(save_timelines(ways, options.out))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
