"""A next-token model turned into one that decides block after block: the bound before, after minutes of training, and
that of a model of the same shape with fresh weights after as many minutes.

    python benchmarks/conversion.py MODEL [--mask TOKEN] [--minutes 15] [--length 256] [--batch 1]
        [--fresh width=576,depth=30,heads=9,hidden=1536] [--out results/conversion.json]

All are trained on the built-in standard library and judged on its held-out windows, in bits a byte, so tokenizers may
differ: the fresh one has that of the zoo. Runs are kept under SERIATIM_HOME and resumed.
"""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

import torch

from seriatim.cli.progress import Bar
from seriatim.home import HOME
from seriatim.training.checkpoint import save_json
from seriatim.training.run import read_lines
from seriatim.verbs.claim import commit, machine
from seriatim.verbs.show import show
from seriatim.verbs.train import train

ARMS = "before", "converted", "fresh"
UNTOUCHED = {"steps": 1, "learning_rate": 1e-12}  # judged as it stands: steps of no size


def settings_of(text: str) -> dict[str, int]:
    """width=576,depth=30 as a mapping."""
    return {name: int(value) for name, _, value in (part.partition("=") for part in text.split(","))}


def arm(name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Bits a byte of one arm, trained where it is not yet, with its steps and the seconds that they took."""
    summary = folder / name / "summary.json"
    if not summary.is_file():
        same: dict[str, Any] = {"data": "stdlib", "out": folder / name, "resume": (folder / name).exists()}
        settings: dict[str, Any] = {"length": options.length, "batch": options.batch}
        if name == "fresh":
            same["tokenizer"] = "zoo:text-bpe"
            settings |= settings_of(options.fresh)
        else:
            same["from_"] = options.model
            settings |= {"mask": options.mask} if options.mask else {}
        if name == "before":
            settings |= UNTOUCHED
        else:
            same["minutes"] = options.minutes
        show(train("sdar", **same, settings=settings, bar=Bar))
    said = json.loads(summary.read_text())
    history = read_lines(folder / name / "metrics.jsonl")
    seconds = sum(h["seconds"] for h in history)
    return {"bits_per_byte": said["bits_per_byte"], "steps": len(history), "seconds": seconds}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--mask")
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--fresh", default="width=576,depth=30,heads=9,hidden=1536")
    parser.add_argument("--out", type=Path, default=Path("results/conversion.json"))
    options = parser.parse_args()
    name = Path(options.model).name.replace(":", "-")
    figures = {}
    for each in ARMS:
        figures[each] = arm(each, HOME / "conversion" / f"{name}-{options.minutes:g}", options)
        print(f"{each:10s} {figures[each]['bits_per_byte']:.3f} bits a byte", flush=True)
    same = {"minutes": options.minutes, "length": options.length, "batch": options.batch, "fresh": options.fresh}
    words = [Path(options.model).name, *(("--mask", options.mask) if options.mask else ())]
    words += [f"--{k}={v:g}" if isinstance(v, float) else f"--{k}={v}" for k, v in same.items()]
    said = {
        "arms": figures, **same, "threads": torch.get_num_threads(), "machine": machine(), "commit": commit(),
        "command": f"python benchmarks/conversion.py {shlex.join(words)}",
    }  # fmt: skip
    save_json(said, options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
