"""The survey of diffusion language models: trains the grid, measures its claim, writes one page.

    python benchmarks/dlm_survey.py [--out results]

The same queue as `seriatim claim dlm-survey`: arms that are finished are not run again, and one that was cut off goes
on. Writes dlm-survey.json and dlm-survey.html. About 25 minutes of training and as many of writing on one core.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from seriatim.studies.dlm_survey import META, report
from seriatim.verbs.claim import measure


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = measure(META.key, options.out, said=lambda text: print(text, flush=True))
    page = report(result, options.out / f"{META.key}.html")
    print(f"{result['verdict']}: {result['rule']}\n{page}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
