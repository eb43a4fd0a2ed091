"""Seconds an image of VAR at its published size (d16, 256x256, guidance 1.5; random weights), against the plain way.

Arms, interleaved: float32 and bfloat16 through `decode` with the cache, picture decoder included; and the plain way,
which computes all earlier scales again at each. `--official PATH` adds the official class from a clone of its
repository.
Run: `python benchmarks/var_sampling.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seriatim.decoding.filters import Warper
from seriatim.decoding.guidance import Guidance
from seriatim.decoding.loop import generate
from seriatim.decoding.sample import SampleAll
from seriatim.decoding.target import Target
from seriatim.evaluation.cost import peak_memory
from seriatim.random import Generator
from seriatim.systems.image.var import VAR, Config
from seriatim.tokenizers.multiscale import MultiScaleConfig, MultiScaleTokenizer

GATES = {"official, fp32": {"fp32": 1.0, "bf16": 2.3}, "plain, fp32": {"bf16": 2.0}}  # times the baseline


def ours(system: VAR, kind: torch.dtype, cached: bool = True) -> Callable[[int], Tensor]:
    """One image: tokens, then pixels."""

    def draw(seed: int) -> Tensor:
        label = torch.tensor([seed % system.config.classes])
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=False):
            target = Target(
                system.model, {"class": label}, Guidance(1.5, "linear"), Warper(top_k=900, top_p=0.96), cached=cached
            )
            canvas = generate(target, system.model.blank(1), SampleAll(), random=Generator(seed))
            quantizer, decoder = system.tokenizer.quantizer, system.tokenizer.decoder
            latent = quantizer.decode_latent(canvas.value["token"])
            latent = latent.to(kind).contiguous(memory_format=torch.channels_last)
            return decoder(latent).float().clamp(-1, 1)

    return draw


def build(kind: torch.dtype) -> VAR:
    """The published shape with random weights."""
    torch.manual_seed(0)
    tokenizer = MultiScaleTokenizer(MultiScaleConfig.for_pictures(256, 3)).eval().requires_grad_(False)
    config = Config(tokenizer.config, classes=1000, **VAR.sizes["d16"])
    system = VAR(config, tokenizer).eval().requires_grad_(False)
    system.to(kind)
    tokenizer.decoder.to(kind, memory_format=torch.channels_last)
    return system


def official(path: Path) -> Callable[[int], Tensor]:
    """The official class, from a clone of its repository."""
    sys.path.insert(0, str(path))
    from models import build_vae_var  # type: ignore[import-not-found]

    vae, var = build_vae_var(
        V=4096, Cvae=32, ch=160, share_quant_resi=4, device="cpu", patch_nums=(1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
        num_classes=1000, depth=16, shared_aln=False,
    )  # fmt: skip
    var.eval()
    with torch.no_grad():  # it leaves the tokenizer's weights unset, to be loaded
        for p in vae.parameters():
            p.normal_(0, 0.02)

    def draw(seed: int) -> Tensor:
        with torch.inference_mode():
            return var.autoregressive_infer_cfg(
                B=1, label_B=torch.tensor([seed % 1000]), cfg=1.5, top_k=900, top_p=0.96, g_seed=seed
            )

    return draw


def peak(arm: str, official: Path | None) -> float:
    """Peak resident memory in GiB of a fresh process that draws one image."""
    asked = [sys.executable, "-P", __file__, "--only", arm, *(["--official", str(official)] if official else [])]
    return float(subprocess.run(asked, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--official", type=Path, help="a clone of the official repository")
    parser.add_argument("--only", help="draw one image by this arm, and print the peak memory in GiB")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    make: dict[str, Callable[[], Callable[[int], Tensor]]] = {
        "fp32": lambda: ours(build(torch.float32), torch.float32),
        "bf16": lambda: ours(build(torch.bfloat16), torch.bfloat16),
        "plain, fp32": lambda: ours(build(torch.float32), torch.float32, cached=False),
    }
    if options.official:
        make["official, fp32"] = lambda: official(options.official)
    if options.only:
        make[options.only]()(0)
        print(peak_memory() / 2**30)
        return 0
    arms = {name: build_arm() for name, build_arm in make.items()}
    took: dict[str, list[float]] = {name: [] for name in arms}
    for run in range(options.runs + 1):
        for name, draw in arms.items():
            start = time.perf_counter()
            image = draw(run)
            if run:  # the first warms up
                took[name].append(time.perf_counter() - start)
            assert image.shape == (1, 3, 256, 256) and bool(image.isfinite().all())
    figures: dict[str, Any] = {name: round(statistics.median(t), 2) for name, t in took.items()}
    base = "official, fp32" if options.official else "plain, fp32"
    for name, seconds in figures.items():
        most = peak(name, options.official)
        ratio = f"{figures[base] / seconds:.2f} times {base}"
        print(f"{name:16s} {seconds:7.2f} s an image, {ratio}; peak memory {most:.1f} GiB")
    held = all(figures[base] / figures[name] >= gate for name, gate in GATES[base].items())
    print(f"load average {os.getloadavg()[0]:.2f}; {'holds' if held else 'FAILS'}")
    if options.out:
        options.out.write_text(json.dumps(figures, indent=2) + "\n")
    return 0 if held else 1


if __name__ == "__main__":
    raise SystemExit(main())
