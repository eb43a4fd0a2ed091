"""What compressed keys and values cost and save: quality, bytes and the time of a step, against the exact cache.

    python benchmarks/gear.py [MODEL...] [--context 1024] [--texts 8] [--bits 4 3 2] [--out results/gear_cache.json]

MODEL is whatever `seriatim.load` reads (default: zoo:text-base). Texts are files of the standard library that were held
out of `stdlib`, and this repository's own documentation, half of each; they are read teacher-forced, a buffer at a time
(`evaluation/compression.py`), by the exact cache and by each number of bits alone, with outliers (+S), with a low-rank
correction (+L), and with both. Bytes count exact numbers at 16 bits; on a CPU this library holds them in float32.
Beside the JSON stand a plot of quality over bits, and for each model a heat-map of its keys, whose loud channels are
why keys are rounded along tokens.

    python benchmarks/gear.py MODEL --time 1024 8192

times a step over so many random entries instead: no quality, and quality no time. On a CPU compression saves memory
and no time: that is what this says.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import seriatim
from seriatim.backbones.compressed import Codec
from seriatim.data.base import load_data
from seriatim.evaluation.compression import contexts, costs, new_cache
from seriatim.evaluation.cost import load_average, time_interleaved
from seriatim.evaluation.pictures import ACCENT, INK, write_beside
from seriatim.factorization.line import LinePlan, LineShape
from seriatim.layout import line
from seriatim.training.checkpoint import save_json
from seriatim.verbs.claim import commit, machine

ROOT = Path(__file__).parents[1]
KINDS = {"": (0.0, 0), "+S": (0.02, 0), "+L": (0.0, 2), "+S+L": (0.02, 2)}  # share of outliers, rank
COLOURS = {"": "#6b6b6b", "+S": "#e0a030", "+L": "#5b8e7d", "+S+L": ACCENT}


def codecs(bits: Sequence[int], buffer: int) -> dict[str, Codec | None]:
    """The arms by name; "exact" is none."""
    arms = itertools.product(bits, KINDS.items())
    return {"exact": None} | {f"{b} bits{kind}": Codec(b, None, s, r, buffer) for b, (kind, (s, r)) in arms}


def texts(system: Any, length: int, count: int) -> list[list[int]]:
    """Held-out files of the library, and pages of ours: half of each, as far as there are any."""
    pages = [p.read_text(encoding="utf-8") for p in sorted(ROOT.glob("docs/*.md"))]
    own = contexts(system, pages, length, count // 2)
    return contexts(system, list(load_data("stdlib", "text").test.documents), length, count - len(own)) + own


# ---- quality and bytes -----------------------------------------------------------------------------------------------


def quality(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of a model, arm by arm."""
    system = seriatim.load(name)
    chosen = texts(system, options.context + 1 - system._prefix, options.texts)  # so many slots are cached
    if not chosen:
        raise SystemExit(f"no text has {options.context} tokens; ask for a shorter --context")
    arms = codecs(options.bits, options.buffer)
    measured = costs(system, chosen, arms, options.buffer)
    out = {arm: {**cost.figures(), "parts": cost.parts} for arm, cost in measured.items()}
    print(f"\n{name}: {len(chosen)} texts of {options.context} tokens")
    print(f"{'':14s}{'perplexity':>11s}{'x exact':>9s}{'KL':>9s}{'agree':>8s}{'bits':>7s}{'MiB':>8s}{'peak':>8s}")
    for arm, f in out.items():
        print(
            f"{arm:14s}{f['perplexity']:11.3f}{f['times exact']:9.4f}{f['divergence']:9.4f}"
            f"{f['greedy agreement']:8.3f}{f['bits a number']:7.2f}"
            f"{f['cache bytes'] / 2**20:8.2f}{f['peak bytes'] / 2**20:8.2f}"
        )
    short = Path(name).name.split(":")[-1]
    heat_map(system, chosen[0][:512], options.out.with_name(f"{options.out.stem}_keys_{short}.png"))
    return {"texts": len(chosen), "dtype": str(next(system.parameters()).dtype), "arms": out}


def heat_map(system: Any, ids: list[int], path: Path) -> Path:
    """|K| of a text, as it is cached (behind rotary embedding), in three layers: channels from left to right."""
    cache, model = new_cache(system.model, None, len(ids)), system.model
    canvas = model.canvas({"token": torch.tensor([ids])}, len(ids), layout=line(len(ids)))
    with torch.inference_mode():
        plan = model.factorization.fill(canvas, 0, len(ids))
        model.hidden(plan, canvas, cache, system._encoded())
        cache.commit(plan.size, plan)
    keys = cache.buffer[:, 0, 0, :, : cache.columns].float().abs()  # (layers, heads, tokens, channels)
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    layers = (0, len(keys) // 2, len(keys) - 1)
    for axes, layer in zip(figure.subplots(1, 3), layers, strict=True):
        picture = keys[layer].transpose(0, 1).flatten(1)
        most = float(picture.quantile(0.999))
        image = axes.imshow(picture, aspect="auto", cmap="magma", vmin=0, vmax=most, interpolation="nearest")
        for head in range(1, keys.shape[1]):
            axes.axvline(head * keys.shape[3] - 0.5, color="white", linewidth=0.4)
        axes.set(title=f"layer {layer}", xlabel="channel, head by head")
        figure.colorbar(image, ax=axes, fraction=0.05)
    figure.axes[0].set_ylabel("token")
    figure.suptitle("|K| as cached", fontsize=11)
    return write_beside(path, lambda file: figure.savefig(file, format="png", dpi=130))


def plot(models: Mapping[str, Any], path: Path) -> Path:
    """Divergence from the exact law over bits a number; and over them the share of tokens on which both agree."""
    figure = Figure(figsize=(11, 3.6 * len(models)), layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subplots(len(models), 2, squeeze=False)
    for row, (name, model) in zip(rows, models.items(), strict=True):
        for axes, key, label in zip(
            row, ("divergence", "greedy agreement"), ("KL(exact, ours), nats", "greedy agreement"), strict=True
        ):
            for kind, colour in COLOURS.items():
                arms = [f for arm, f in model["arms"].items() if arm.partition("bits")[2] == kind and arm != "exact"]
                x, y = [f["bits a number"] for f in arms], [f[key] for f in arms]
                axes.plot(x, y, "o-", color=colour, label=f"rounded{kind}", markersize=5)
            axes.set(xlabel="bits a cached number, all included (exact: 16)", ylabel=label, title=Path(name).name)
            axes.spines[["top", "right"]].set_visible(False)
        row[0].set_yscale("log")
        row[1].axhline(1.0, color=INK, linewidth=0.8, linestyle=":")
        row[0].legend(frameon=False, fontsize=8)
    return write_beside(path, lambda file: figure.savefig(file, format="png", dpi=130))


# ---- time ------------------------------------------------------------------------------------------------------------


def step_times(name: str, columns: int, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of one step of one row over so many random entries, the arms in turns."""
    system = seriatim.load(name)
    arms = {
        "exact": None,
        **{k: v for k, v in codecs(options.bits, options.buffer).items() if k.endswith(("bits", "L"))},
    }
    canvas = system.model.canvas(
        {"token": torch.zeros(1, columns + 2, dtype=torch.long)}, columns + 1, layout=line(columns + 2)
    )
    order = system.model.factorization

    def step(cache: Any) -> None:
        plan = LinePlan(LineShape(1, 0, None), cache.length, order.prefix, columns + 2)
        with torch.inference_mode():
            system.model.hidden(plan, canvas, cache, system._encoded())

    caches = {arm: filled(system.model, codec, columns) for arm, codec in arms.items()}
    times = time_interleaved({arm: lambda c=cache: step(c) for arm, cache in caches.items()}, options.rounds)
    exact, out = times["exact"].median, {}
    for arm, timing in times.items():
        held = caches[arm].nbytes()
        out[arm] = {"ms": 1000 * timing.median, "times exact": timing.median / exact, "cache bytes": held}
        print(f"{columns:6d}  {arm:14s}{1000 * timing.median:9.2f} ms{timing.median / exact:7.2f} times exact")
    return {"arms": out, "load": load_average(), "disturbed": times["exact"].disturbed}


def filled(model: Any, codec: Codec | None, columns: int) -> Any:
    """A cache of random entries, in whole buffers."""
    cache, generator = new_cache(model, codec, columns + 1), torch.Generator().manual_seed(0)
    layers, _, _, heads, _, channels = (cache if codec is None else cache.latest).buffer.shape
    while cache.length < columns:
        size = min(512, columns - cache.length)
        plan = LinePlan(LineShape(size, 0, None), cache.length, model.factorization.prefix, columns)
        new = torch.randn(layers, 2, 1, heads, size, channels, generator=generator).to(cache.dtype)
        with torch.inference_mode():
            cache.begin(plan)
            for layer, (k, v) in enumerate(new):
                cache.append(layer, k, v)
            cache.commit(size, plan)
    return cache


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["zoo:text-base"])
    parser.add_argument("--context", type=int, default=1024, help="tokens of a text")
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--buffer", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--time", type=int, nargs="+", metavar="ENTRIES", help="time a step over so many instead")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("results/gear_cache.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    about = {
        "command": "python " + " ".join(["benchmarks/gear.py", *sys.argv[1:]]),
        "machine": machine(),
        "commit": commit(),
    }
    if options.time:
        models = {m: {str(n): step_times(m, n, options) for n in options.time} for m in options.models}
        save_json(
            {**about, "threads": options.threads, "models": models}, options.out.with_stem(options.out.stem + "_time")
        )
        return 0
    models = {m: quality(m, options) for m in options.models}
    save_json({**about, "context": options.context, "buffer": options.buffer, "models": models}, options.out)
    print(plot(models, options.out.with_suffix(".png")))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
