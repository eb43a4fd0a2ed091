"""What approximate caches of masked models change: nats by which the law of a token moves, beside what they save.

    python benchmarks/cache_drift.py [--models zoo:text-mdlm zoo:text-block] [--prompts 4] [--new 128]
        [--out results/cache_drift.json]

While a text is written with a cache every step is computed again without any, on the same canvas, and the two laws of
every token that could be decided are compared. Exact caches (those of models of blocks) stand beside, and are at 0 but
for rounding. With a picture: divergence over the share of slots that are computed.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from seriatim.evaluation.pictures import INK, write_beside
from seriatim.systems.cache_trials import drift
from seriatim.systems.trials import held_out
from seriatim.training.checkpoint import save_json
from seriatim.verbs.claim import commit, machine
from seriatim.verbs.load import load

ARMS = {
    "mdlm": (
        "unmask", *(f"fast-dllm+cache=prefix+block={n}" for n in (8, 16, 32, 64)),
        *(f"fast-dllm+cache=dual+block={n}" for n in (8, 16, 32, 64)),
        *(f"freecache-guided+block={n}" for n in (8, 32)),
        *(f"freecache-guided+rewrite=True+block={n}" for n in (8, 32)),
    ),
    "block": ("unmask", "fast-dllm+cache=prefix", "fast-dllm+cache=dual+block=2", "fast-dllm+cache=dual+block=4"),
}  # fmt: skip


def draw(found: dict[str, dict[str, Any]], path: Path) -> None:
    """A point an arm, its sizes of blocks joined."""
    figure = Figure(figsize=(4.8 * len(found), 4), layout="constrained")
    FigureCanvasAgg(figure)
    for ax, (model, arms) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        kinds: dict[str, list[tuple[float, float]]] = {}
        for spec, row in arms.items():
            kind = spec.split("+block")[0]
            kinds.setdefault(kind, []).append((row["slots_share"], row["divergence"]))
        for i, (kind, points) in enumerate(kinds.items()):
            ax.plot(*zip(*sorted(points), strict=True), marker="os^Dv<>P"[i % 8], label=kind, linewidth=1)
        ax.set(xlabel="slots computed, share of all", ylabel="divergence from no cache, nats a token", title=model)
        ax.set(xlim=(0, 1.05), ylim=(0, 0.1))
        ax.set_yscale("symlog", linthresh=1e-4)
        ax.grid(alpha=0.25)
        ax.legend(fontsize=7, labelcolor=INK, frameon=False)
        for spine in ("top", "right"):
            ax.spines[spine].set_visible(False)
    write_beside(path, lambda file: figure.savefig(file, format="png", dpi=130))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["zoo:text-mdlm", "zoo:text-block"])
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path("results/cache_drift.json"))
    options = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    for model in options.models:
        system: Any = load(model)
        kind = "block" if getattr(system.model.factorization, "size", None) else "mdlm"
        prompts = held_out(system, options.prompts, 64)
        for spec in ARMS[kind]:
            row = found.setdefault(model, {})[spec] = drift(system, spec, prompts, options.new)
            print(
                f"{model} {spec:42s} divergence {row['divergence']:.2g} nats, at worst {row['worst']:.2g}, likeliest "
                f"kept {row['agreed']:.3f}, slots {row['slots_share']:.2f}",
                flush=True,
            )
    said = {
        "models": found, "prompts": options.prompts, "new": options.new, "temperature": 0.0, "machine": machine(),
        "commit": commit(), "command": "python benchmarks/cache_drift.py",
    }  # fmt: skip
    save_json(said, options.out)
    draw(found, options.out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
