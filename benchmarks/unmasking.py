"""Decoders of tokens in any order, side by side: quality against forwards on held-out code.

    python benchmarks/unmasking.py [--models zoo:text-block zoo:text-mdlm] [--lines 500] [--prompts 24]
        [--arms A,B] [--judge zoo:text-base] [--out results/unmasking.json]

Each arm writes the same held-out lines greedily (those written as they stand in the file count, paired with one token
at a time) and the same continuations at temperature 1, which a next-token model of the same ids judges; distinct
trigrams and entropy stand beside. Forwards do not depend on the machine. Beside the figures a picture: the quality of
each arm over its tokens a forward. Said of each model: the arm with the fewest forwards that loses at most 2% of the
lines and of the nats, with trigrams and entropy within 5%, against one token at a time. Arms that the file has already,
of the same lines and prompts, are not run again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from seriatim.evaluation.pictures import INK, write_beside
from seriatim.systems.masked_trials import continuations, lines_of, next_lines, paired
from seriatim.training.checkpoint import save_json
from seriatim.verbs.claim import commit, machine
from seriatim.verbs.load import load

PLAIN = "unmask"  # one token a forward, the surest first
ARMS = (
    PLAIN, "unmask+rule=random", "unmask+rule=margin", "unmask+rule=entropy",
    *(f"unmask+threshold={t}" for t in (0.9, 0.8, 0.7, 0.5, 0.3, 0.2)),
    *(f"unmask+factor={f}" for f in (0.25, 0.5, 1.0, 1.5)),
    *(f"unmask+rule=entropy+budget={b}" for b in (0.1, 0.35, 1.0)),
    "unmask+schedule=powers", "fast-dllm+cache=prefix", "fast-dllm+cache=dual", "fast-dllm+cache=dual+threshold=none",
)  # fmt: skip


def measure(
    model: str, arms: tuple[str, ...], lines: int, prompts: int, judge: Any, out: dict[str, Any],
    keep: Callable[[], None],
) -> None:  # fmt: skip
    """Figures of each arm that the model takes, into `out`, but for those that it has; `keep` is called after each."""
    system = load(model)
    asked = lines_of(system, lines)
    for spec in arms:
        if spec in out or (spec.startswith("fast-dllm") and getattr(system.model.factorization, "size", None)):
            continue  # a prefix cache of blocks is exact and in use already
        start = time.perf_counter()
        row = {"lines": next_lines(system, spec, asked), "text": continuations(system, spec, judge, prompts)}
        row["lines"]["right"] = [i for i, right in enumerate(row["lines"]["right"]) if right]  # few: by their numbers
        out[spec] = row
        if PLAIN in out:
            ours, plain = ([int(i in out[s]["lines"]["right"]) for i in range(lines)] for s in (spec, PLAIN))
            row["lines"]["against_plain"] = paired(ours, plain)
        keep()
        line, text, seconds = row["lines"], row["text"], time.perf_counter() - start
        print(
            f"{model} {spec:42s} lines {line['matches']:.3f} ({line['leading']:.3f}) at "
            f"{line['tokens_per_forward']:.2f} a forward   text {text['nats_per_token']:.3f} nats, distinct "
            f"{text['distinct_3']:.3f}, entropy {text['entropy']:.2f} at {text['tokens_per_forward']:.2f}   "
            f"{seconds:.0f} s",
            flush=True,
        )


def named(model: str) -> str:
    """A folder by its own name, which says nothing of where it stands."""
    return Path(model).name if Path(model).is_dir() else model


def as_good(row: dict[str, Any], plain: dict[str, Any]) -> bool:
    """Whether an arm loses at most 2% of the lines and of the nats, with trigrams and entropy within 5%."""
    text, usual = row["text"], plain["text"]
    return (
        row["lines"]["matches"] >= 0.98 * plain["lines"]["matches"]
        and text["nats_per_token"] <= 1.02 * usual["nats_per_token"]
        and all(abs(text[k] / usual[k] - 1) <= 0.05 for k in ("distinct_3", "entropy"))
    )


def best(rows: dict[str, Any]) -> dict[str, Any]:
    """The arm of fewest forwards that is as good as one token at a time, by lines and by continuations."""
    if PLAIN not in rows:
        return {}
    good = {spec: row for spec, row in rows.items() if as_good(row, rows[PLAIN])}
    found = {}
    for part in ("lines", "text"):
        spec = max(good, key=lambda spec: good[spec][part]["tokens_per_forward"])
        fewer = good[spec][part]["tokens_per_forward"] / rows[PLAIN][part]["tokens_per_forward"]
        found[part] = {"arm": spec, "times_fewer_forwards": fewer}
    return found


def draw(found: dict[str, Any], judge: str, path: Path) -> None:
    """Lines that are right, and nats of continuations, over tokens a forward; a row a model."""
    figure = Figure(figsize=(9.5, 3.4 * len(found)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(found), 2, squeeze=False)
    for row, (model, arms) in zip(axes, found.items(), strict=True):
        for ax, part, metric, label in (
            (row[0], "lines", "leading", "letters of held-out lines, from the front"),
            (row[1], "text", "nats_per_token", f"nats a token under {judge}"),
        ):
            kinds: dict[str, list[tuple[float, float]]] = {}
            for spec, figures in arms.items():
                kind = spec.split("=")[0] if "=" in spec else spec
                kinds.setdefault(kind, []).append((figures[part]["tokens_per_forward"], figures[part][metric]))
            for i, (kind, points) in enumerate(kinds.items()):
                points.sort()
                ax.plot(*zip(*points, strict=True), marker="os^Dv<>P*X"[i % 10], label=kind, linewidth=1, markersize=5)
            ax.set(xscale="log", xlabel="tokens a forward", ylabel=label, title=model)
            ax.xaxis.set_major_formatter("{x:g}")
            ax.xaxis.set_minor_formatter("{x:g}")
            ax.grid(alpha=0.25)
            for spine in ("top", "right"):
                ax.spines[spine].set_visible(False)
        row[1].legend(fontsize=7, labelcolor=INK, frameon=False)
    write_beside(path, lambda file: figure.savefig(file, format="png", dpi=130))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["zoo:text-block", "zoo:text-mdlm"])
    parser.add_argument("--lines", type=int, default=500)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--judge", default="zoo:text-base")
    parser.add_argument("--out", type=Path, default=Path("results/unmasking.json"))
    options = parser.parse_args()
    same = {"lines": options.lines, "prompts": options.prompts, "judge": named(options.judge), "temperature": 1.0}
    before = json.loads(options.out.read_text()) if options.out.exists() else {}
    found: dict[str, Any] = before["models"] if all(before.get(k) == v for k, v in same.items()) else {}

    def keep() -> None:
        said = {
            "models": found, **same, "best": {model: best(rows) for model, rows in found.items()},
            "threads": torch.get_num_threads(), "machine": machine(), "commit": commit(),
            "command": f"python benchmarks/unmasking.py --models {' '.join(found)} --lines {options.lines} "
            f"--prompts {options.prompts}",
        }  # fmt: skip
        save_json(said, options.out)

    judge = load(options.judge)
    for model in options.models:
        rows = found.setdefault(named(model), {})
        measure(model, tuple(options.arms.split(",")), options.lines, options.prompts, judge, rows, keep)
    draw(found, named(options.judge), options.out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
