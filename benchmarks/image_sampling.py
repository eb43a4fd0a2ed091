"""Seconds and memory of one picture of 256 x 256 by published generators, random weights, beside their official code.

    python benchmarks/image_sampling.py [--models var llamagen mar] [--var CLONE] [--llamagen CLONE]
        [--mar CLONE] [--runs 3] [--dtypes float32 bfloat16] [--out results/image_sampling.json]

VAR-d16 (guidance 1.5, top-k 900, top-p 0.96), LlamaGen-B (guidance 2) and MAR-B (64 steps of 100 denoising steps,
guidance 2.9; a picture takes two minutes and more: `--runs 1`), from a class to pixels, the decoder of the tokenizer
included. CLONE is a clone of FoundationVision/VAR, FoundationVision/LlamaGen or LTH14/mar (which needs timm); without
one our arms run alone, and models that are in --out already and not asked for stay there. Both sides run in the same
number format: official code in bfloat16 by autocast, ours with weights in it. Every arm is a process of its own; they
take turns, and wait without using a processor meanwhile. Beside the ratios stands what arithmetic alone would take at
the speed of this machine's large products, and reading all weights for every forward at its bandwidth: no code is
faster than the larger of both.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from decode import THREADS, Arm, answering, bandwidth

os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# Arms keep the memory that they give back between pictures: on a virtual machine taking it anew costs up to seconds,
# by what ran in between. Both sides alike.
os.environ.setdefault("MALLOC_MMAP_MAX_", "0")
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**32))

GATES = {  # model -> (ours, official) -> how many times as fast
    "var": {("float32", "float32"): 1.0, ("bfloat16", "bfloat16"): 1.2, ("bfloat16", "float32"): 2.3},
    "llamagen": {("float32", "float32"): 1.0, ("bfloat16", "bfloat16"): 1.3},
    "mar": {("float32", "float32"): 1.0, ("bfloat16", "bfloat16"): 1.15},
}  # fmt: skip
Draw = Callable[[int], Any]


# ---- ours ------------------------------------------------------------------------------------------------------------


def build(model: str) -> Any:
    """The published shape with random weights, tokenizer beside it."""
    import torch

    torch.manual_seed(0)
    system = {"var": _var, "llamagen": _llamagen, "mar": _mar}[model]()
    return system.eval().requires_grad_(False)


def _var() -> Any:
    from seriatim.systems.image.var import VAR, Config
    from seriatim.systems.system import Sampling
    from seriatim.tokenizers.multiscale import MultiScaleConfig, MultiScaleTokenizer

    pixels: Any = MultiScaleTokenizer(MultiScaleConfig.for_pictures(256, 3))
    system = VAR(Config(pixels.config, classes=1000, **VAR.sizes["d16"]), pixels)
    system.sampling = Sampling(top_k=900, top_p=0.96, guidance=1.5)  # type: ignore[misc]
    return system


def _llamagen() -> Any:
    from seriatim.systems.image.raster_ar import Config, RasterAR
    from seriatim.systems.system import Sampling
    from seriatim.tokenizers.vq import VQConfig, VQTokenizer

    pixels: Any = VQTokenizer(VQConfig.for_pictures(256, 3))
    system = RasterAR(Config(16, 16384, 1000, 768, 12, 12, form="llama", hidden=2048), pixels)
    system.sampling = Sampling(top_p=None, guidance=1.0)  # type: ignore[misc]
    return system


def _mar() -> Any:
    from seriatim.systems.image.mar import MAR, Config
    from seriatim.systems.system import Sampling
    from seriatim.tokenizers.kl import KLConfig, KLTokenizer

    pixels: Any = KLTokenizer(
        KLConfig(side=256, channels=3, dim=16, body="residual", width=128, halvings=4, attends="encoder")
    )
    shape = Config(
        side=16, dim=16, classes=1000, width=768, depth=12, heads=12, dropout=0.0, head_width=1024, head_depth=6,
        head_steps=100, head_clip=None, buffer=64,
    )  # fmt: skip
    system = MAR(shape, pixels)
    system.sampling = Sampling(guidance=1.9, steps=64)  # type: ignore[misc]
    return system


def ours(model: str, dtype: str) -> Draw:
    """From a class to pixels by the system's own way."""
    import torch

    system, kind = build(model), getattr(torch, dtype)
    system.model.to(kind)
    system.tokenizer.to(kind).decoder.to(memory_format=torch.channels_last)
    return lambda seed: system.draw(torch.tensor([seed % 1000]), seed=seed).images


# ---- the official code -----------------------------------------------------------------------------------------------


def official(model: str, dtype: str, clone: str) -> Draw:
    """The same by the released code."""
    import torch

    sys.path.insert(0, clone)
    draw = {"var": _official_var, "llamagen": _official_llamagen, "mar": _official_mar}[model]()

    def autocast(seed: int) -> Any:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            return draw(seed)

    return autocast


def _official_var() -> Draw:
    import torch
    from models import build_vae_var  # type: ignore[import-not-found]

    vae, var = build_vae_var(
        V=4096, Cvae=32, ch=160, share_quant_resi=4, device="cpu", patch_nums=(1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
        num_classes=1000, depth=16, shared_aln=False,
    )  # fmt: skip
    var.eval()
    with torch.no_grad():  # it leaves the tokenizer's weights unset, to be loaded
        for p in vae.parameters():
            p.normal_(0, 0.02)
    return lambda seed: var.autoregressive_infer_cfg(
        B=1, label_B=torch.tensor([seed % 1000]), cfg=1.5, top_k=900, top_p=0.96, g_seed=seed
    )


def _official_llamagen() -> Draw:
    import torch
    from autoregressive.models.generate import generate  # type: ignore[import-not-found]
    from autoregressive.models.gpt import GPT_B  # type: ignore[import-not-found]
    from tokenizer.tokenizer_image.vq_model import ModelArgs, VQModel  # type: ignore[import-not-found]

    model, pixels = GPT_B(block_size=256, num_classes=1000, vocab_size=16384).eval(), VQModel(ModelArgs()).eval()
    with torch.no_grad():  # its last matrix begins at zero
        model.output.weight.normal_(0, 0.02)

    def draw(seed: int) -> Any:
        torch.manual_seed(seed)
        ids = generate(model, torch.tensor([seed % 1000]), 256, cfg_scale=2.0, top_k=0, top_p=1.0)
        return pixels.decode_code(ids, [1, 8, 16, 16])

    return draw


def _official_mar() -> Draw:
    import torch
    from models.mar import mar_base  # type: ignore[import-not-found]
    from models.vae import AutoencoderKL  # type: ignore[import-not-found]

    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[assignment]  # it asks for nothing else
    model = mar_base(diffloss_d=6, diffloss_w=1024, num_sampling_steps="100").eval()
    pixels = AutoencoderKL(16, (1, 1, 2, 2, 4)).eval()
    with torch.no_grad():  # what begins at zero says nothing
        for p in model.diffloss.parameters():
            p.normal_(0, 0.02)

    def draw(seed: int) -> Any:
        torch.manual_seed(seed)
        latents = model.sample_tokens(1, 64, 2.9, "linear", torch.tensor([seed % 1000]), 1.0)
        return pixels.decode(latents / 0.2325)

    return draw


def worker(name: str, place: str) -> None:
    """Draw as many pictures as are asked for. name: side, model, number format."""
    import torch

    torch.set_num_threads(THREADS)
    side, model, dtype = name.split()
    with redirect_stdout(sys.stderr):  # what official code prints is no answer
        draw = ours(model, dtype) if side == "ours" else official(model, dtype, place)

    def answer(rows: Any, new: int) -> Any:
        with redirect_stdout(sys.stderr):
            image = draw(int(rows[0]))
        assert tuple(image.shape) == (1, 3, 256, 256) and bool(image.isfinite().all())
        return []

    answering(answer)


# ---- measuring -------------------------------------------------------------------------------------------------------


def multiplications(model: str) -> tuple[float, float]:
    """Of one picture: floating-point operations, and numbers of weights that its forwards read (both branches of
    guidance go together)."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    system = build(model)
    with FlopCounterMode(display=False) as counter:
        images = system.draw(torch.tensor([0]), seed=0)
    weights = sum(p.numel() for name, p in system.model.named_parameters() if "embed" not in name)
    return float(counter.get_total_flops()), float(weights * images.forwards)


def speed() -> float:
    """Floating-point operations a second of a large product in float32."""
    import torch

    torch.set_num_threads(THREADS)
    a, best = torch.randn(2048, 2048), 1e9
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * 2048**3 / best


def measure(model: str, clone: Path | None, dtypes: list[str], runs: int) -> dict[str, Any]:
    """Medians of seconds and peaks of memory in MiB of all arms, and the ratios that gates are about."""
    names = [f"{side} {model} {dtype}" for dtype in dtypes for side in ("ours", *(["official"] if clone else []))]
    arms = {name: Arm(name, clone or Path("-"), file=__file__) for name in names}
    took: dict[str, list[float]] = {name: [] for name in names}
    peak: dict[str, int] = {}
    try:
        for run in range(runs + 1):
            for name, arm in arms.items():
                answer = arm.ask([run], 1)
                peak[name] = answer["peak"]
                if run:  # the first warms up
                    took[name].append(answer["seconds"])
    finally:
        for arm in arms.values():
            arm.close()
    out: dict[str, Any] = {
        name: {"seconds": statistics.median(t), "runs": t, "peak MiB": peak[name]} for name, t in took.items()
    }
    operations, numbers = multiplications(model)
    bound = {"arithmetic": operations / speed(), "reading": 4 * numbers / bandwidth()}
    ratios = {}
    for (mine, theirs), gate in GATES[model].items():
        if (a := out.get(f"ours {model} {mine}")) and (b := out.get(f"official {model} {theirs}")):
            ratio = b["seconds"] / a["seconds"]
            ratios[f"ours {mine} over official {theirs}"] = {"ratio": ratio, "gate": gate, "holds": ratio >= gate}
    return {"arms": out, "seconds in float32 at least": bound, "TFLOP": operations / 1e12, "ratios": ratios}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(GATES), default=list(GATES))
    for model in GATES:
        parser.add_argument(f"--{model}", type=Path, help="a clone of its official repository")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32"])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(*options.worker)
        return 0
    from seriatim.evaluation.cost import DISTURBED, Others, load_average
    from seriatim.verbs.claim import commit, machine

    others, found = Others(), {}
    for model in options.models:
        found[model] = measure(model, getattr(options, model), options.dtypes, options.runs)
        for name, figures in found[model]["arms"].items():
            print(f"{name:28s} {figures['seconds']:7.2f} s a picture   peak {figures['peak MiB']} MiB")
        for kind, seconds in found[model]["seconds in float32 at least"].items():
            print(f"{'at least by ' + kind:28s} {seconds:7.2f} s")
        for name, ratio in found[model]["ratios"].items():
            print(f"{name}: {ratio['ratio']:.2f} (at least {ratio['gate']}): {'holds' if ratio['holds'] else 'FAILS'}")
    used = others.share()
    result = {
        "models": found, "threads": THREADS, "others": used, "disturbed": used is None or used > DISTURBED,
        "load_average": load_average(), "machine": machine(), "commit": commit(),
    }  # fmt: skip
    print("DISTURBED: the seconds mean nothing" if result["disturbed"] else "")
    if options.out:
        if options.out.is_file():
            result["models"] = json.loads(options.out.read_text())["models"] | found
        options.out.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
