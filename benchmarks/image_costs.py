"""What orders of pictures cost: pairs of attention, numbers kept and forwards, counted; seconds and bytes, measured.

    python benchmarks/image_costs.py [RUN ...] [--rows 8] [--runs 5] [--threads 2] [--out results]

RUN is a run of a pyramid that draws a scale in one forward; without any, VAR, HMAR and M-VAR at the size of their
claims with random weights, whose costs are the same. Beside them: attention over all tokens of 256 and 512 pixels, one
layer of d16, where scales see all coarser ones or themselves alone; VARiant's fewer layers, by their number; and the
orders of ids one by one, by windows, by diagonals, by scales and by detail, a picture each. Our scan (M-VAR) is plain
PyTorch: its seconds say nothing of a fused kernel's. Writes image_costs.json and scales.png.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seriatim.backbones.mamba import MambaConfig
from seriatim.evaluation.cost import Others, load_average, time_interleaved
from seriatim.evaluation.scale_costs import SCHEDULES, Measured, counted, measured, save_scale_costs
from seriatim.layout import shapes_of
from seriatim.systems.image import hmar, m_var, var, variant
from seriatim.systems.image_orders import system_of, watched
from seriatim.tokenizers.multiscale import MultiScaleConfig
from seriatim.verbs.claim import commit, machine
from seriatim.verbs.load import load

WIDTH, HEADS = 1024, 16  # of d16
ORDERS = ("raster-ar", "token-shuffle", "nar", "var", "detailflow")


def pyramids() -> dict[str, Any]:
    """The three, about equal in parameters."""
    tokenizer = MultiScaleConfig.for_pictures(32, 1)
    parts = {"var": (var, var.VAR), "hmar": (hmar, hmar.HMAR), "m-var": (m_var, m_var.MVAR)}
    return {key: m.build(m.Config(tokenizer, 62, **made.sizes["small"])).eval() for key, (m, made) in parts.items()}


def told(found: dict[str, Measured], models: dict[str, Any]) -> dict[str, Any]:
    """Seconds of a batch, bytes held at most, and parameters."""
    return {
        name: {
            "seconds": sum(of.seconds), "held": max(of.held), "by_scale": of.seconds,
            "parameters": sum(p.numel() for p in models[name].parameters()),
        }
        for name, of in found.items()
    }  # fmt: skip


# ---- attention -------------------------------------------------------------------------------------------------------
def attention(sides: tuple[int, ...], runs: int) -> dict[str, Any]:
    """Seconds of attention over all tokens of a pyramid, one picture, one layer: by one call under a mask, by a call a
    scale over it and all coarser ones, and by a call a scale over itself; and the pairs of the latter two."""
    sizes = [side * side for side in sides]
    ends = list(accumulate(sizes))
    q, k, v = torch.randn(3, 1, HEADS, ends[-1], WIDTH // HEADS)
    scale = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    seen = scale[:, None] >= scale[None]

    def by_scale(first: Callable[[int], int]) -> Tensor:
        parts = [(slice(end - n, end), slice(first(end - n), end)) for n, end in zip(sizes, ends, strict=True)]
        return torch.cat([F.scaled_dot_product_attention(q[:, :, a], k[:, :, b], v[:, :, b]) for a, b in parts], 2)

    arms: dict[str, Callable[[], object]] = {
        "masked": lambda: F.scaled_dot_product_attention(q, k, v, seen),
        "every": lambda: by_scale(lambda start: 0),
        "own": lambda: by_scale(lambda start: start),
    }
    torch.testing.assert_close(arms["masked"](), arms["every"]())
    took = {name: timing.median for name, timing in time_interleaved(arms, 4 * runs).items()}
    c = counted(sides, WIDTH, MambaConfig(WIDTH, 1, state=64))
    return {
        "tokens": ends[-1], "seconds": took, "own over every": took["own"] / took["every"],
        "own over masked": took["own"] / took["masked"], "pairs, own over every": c.own / c.every,
        "pairs, own over all": c.own / ends[-1] ** 2,
    }  # fmt: skip


# ---- fewer layers ----------------------------------------------------------------------------------------------------
def depths(rows: int, runs: int) -> dict[str, Any]:
    """VARiant of eight layers with 8, 4 and 2 of them at fine scales: seconds and bytes held, and how much of all of
    them is held by count."""
    tokenizer = MultiScaleConfig.for_pictures(32, 1)
    sizes = [side * side for side in tokenizer.scales]
    configs = {d: variant.Config(tokenizer, 62, width=256, depth=8, heads=8, depths=(d,)) for d in (8, 4, 2)}
    models = {f"{d} layers": variant.build(c).eval() for d, c in configs.items()}
    out = told(measured(models, rows, runs), models)
    whole = out["8 layers"]
    for d, config in configs.items():
        layers = config.by_scale(d)
        kept = sum(n * m for n, m in zip(sizes[:-1], layers, strict=False)) / (8 * sum(sizes[:-1]))
        mine = out[f"{d} layers"]
        mine |= {"seconds, of all": mine["seconds"] / whole["seconds"], "held, of all": mine["held"] / whole["held"]}
        mine["held by count"] = kept
    return out


# ---- orders ----------------------------------------------------------------------------------------------------------
def orders(runs: int) -> dict[str, Any]:
    """One picture at the default size of each: elements, forwards, and seconds without its tokenizer."""
    systems = {key: system_of(key) for key in ORDERS}
    seen = {key: watched(key, system) for key, system in systems.items()}
    arms: dict[str, Callable[[], object]] = {key: lambda k=key: watched(k, systems[k]) for key in ORDERS}  # type: ignore[misc]
    took = time_interleaved(arms, runs)
    return {
        key: {
            "elements": len(order.turn), "forwards": order.forwards, "groups": order.groups, "held": order.held,
            "seconds": took[key].median, "parameters": sum(p.numel() for p in systems[key].model.parameters()),
        }
        for key, order in seen.items()
    }  # fmt: skip


def show(title: str, found: dict[str, Any]) -> None:
    """Figures of each as a table."""
    names = [n for n, x in next(iter(found.values())).items() if isinstance(x, int | float)]
    print(f"\n{title:16s}" + "".join(f"{name:>18s}" for name in names))
    for key, of in found.items():
        cells = (f"{of[n]:18,d}" if isinstance(of[n], int) else f"{of[n]:18.4f}" for n in names)
        print(f"{key:16s}" + "".join(cells))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="*", type=Path)
    parser.add_argument("--out", type=Path, default=Path("."), help="folder of image_costs.json and scales.png")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    others = Others()
    models = {run.name: load(run).model for run in options.run} or pyramids()  # type: ignore[union-attr]
    sides = [rows for rows, _ in shapes_of(next(iter(models.values())).layout)]
    found = measured(models, options.rows, options.runs)
    mixer = MambaConfig(WIDTH, 1, state=64)
    with torch.inference_mode():
        result: dict[str, Any] = {
            "pyramids": told(found, models),
            "counted": {str(pixels): vars(counted(s, WIDTH, mixer)) for pixels, s in SCHEDULES.items()},
            "attention": {str(pixels): attention(SCHEDULES[pixels], options.runs) for pixels in (256, 512)},
            "depths": depths(options.rows, options.runs),
            "orders": orders(options.runs),
        }
    for name, part in result.items():
        show(name, part)
    used = others.share()
    result |= {"rows": options.rows, "threads": options.threads, "others": used, "load_average": load_average()}
    result |= {"machine": machine(), "commit": commit()}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "image_costs.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    picture = save_scale_costs(found, sides, options.out / "scales.png", f"{options.rows} pictures at once")
    print(f"\n{options.out / 'image_costs.json'}, {picture}; others used {used or 0:.2f} of a processor")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
