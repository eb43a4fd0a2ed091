"""Seconds and cache bytes of every scale of VAR, HMAR and M-VAR, and what grows with the size of pictures.

    python benchmarks/scales.py [RUN ...] [--out scales.png] [--rows 8] [--runs 5] [--threads 2]

RUN is a run of a pyramid that draws a scale in one forward; without any, all three at the size of their claims with
random weights, whose costs are the same. Writes a bar chart, and prints for the pyramids of 256, 512 and 1,024 pixels
at the width of d16 the pairs of attention and the numbers that a layer keeps. Our scan is plain PyTorch: its seconds
say nothing of a fused kernel's.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch

from seriatim.backbones.mamba import MambaConfig
from seriatim.evaluation.scale_costs import SCHEDULES, counted, measured, save_scale_costs
from seriatim.layout import shapes_of
from seriatim.systems.image import hmar, m_var, var
from seriatim.tokenizers.multiscale import MultiScaleConfig
from seriatim.verbs.load import load


def fresh() -> dict[str, Any]:
    """The three, about equal in parameters."""
    tokenizer = MultiScaleConfig.for_pictures(32, 1)
    parts = {"var": (var, var.VAR), "hmar": (hmar, hmar.HMAR), "m-var": (m_var, m_var.MVAR)}
    return {key: m.build(m.Config(tokenizer, 62, **made.sizes["small"])).eval() for key, (m, made) in parts.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="*", type=Path)
    parser.add_argument("--out", type=Path, default=Path("scales.png"))
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    models = {run.name: load(run).model for run in options.run} or fresh()  # type: ignore[union-attr]
    sides = [rows for rows, _ in shapes_of(next(iter(models.values())).layout)]
    found = measured(models, options.rows, options.runs)
    for name, of in found.items():
        seconds, held = sum(of.seconds), max(of.held)
        parameters = sum(p.numel() for p in models[name].parameters())
        print(f"{name:12s} {seconds:7.3f} s, at most {held / 1024:8.1f} KiB kept, {parameters / 1e6:.2f} M parameters")
    print(save_scale_costs(found, sides, options.out, f"{options.rows} pictures at once"))
    print(f"{'pixels':>8s}{'pairs, all':>14s}{'pairs, own':>14s}{'keys, values':>14s}{'state':>10s}{'times':>8s}")
    for pixels, scales in SCHEDULES.items():
        c = counted(scales, 1024, MambaConfig(1024, 1, state=64))
        print(f"{pixels:8d}{c.every:14,d}{c.own:14,d}{c.keys:14,d}{c.state:10,d}{c.keys / c.state:8.1f}")
    print(f"load average {os.getloadavg()[0]:.2f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
