"""The published figures of iTransformer on the ETT sets, cell by cell: lookback 96, four horizons, three seeds.

    python benchmarks/series_table.py ETTh1.csv ETTh2.csv

Every cell (set, horizon, seed) is a training that is resumed where it was cut off, under SERIATIM_HOME/series; a cell
that is finished is not done again. Beside it stand DLinear of the same lookback, a ridge regression, and the last day.
`--official FOLDER` (a clone of thuml/iTransformer) times an epoch of ours and of the official code, in turns, in place
of the table. Writes results/series.json and prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from seriatim.data.base import load_data
from seriatim.data.series import SeriesData
from seriatim.evaluation.series import over
from seriatim.evaluation.series_baselines import ridge, seasonal_naive
from seriatim.home import HOME
from seriatim.training.checkpoint import save_json
from seriatim.verbs.claim import commit, machine
from seriatim.verbs.series import judged, method_of
from seriatim.verbs.train import train

LOOKBACK, HORIZONS, SEEDS = 96, (96, 192, 336, 720), (2021, 2022, 2023)
WINDOWS = {96: 2785, 192: 2689, 336: 2545, 720: 2161}
PUBLISHED = {
    "ETTh1": {96: (0.386, 0.405), 192: (0.441, 0.436), 336: (0.487, 0.458), 720: (0.503, 0.491)},
    "ETTh2": {96: (0.297, 0.349), 192: (0.380, 0.400), 336: (0.428, 0.432), 720: (0.427, 0.445)},
}
DLINEAR_RATE = {"ETTh1": 5e-3, "ETTh2": 5e-2}


def size_of(name: str, horizon: int) -> str:
    """The published widths: 128 on ETTh2; on ETTh1 256, and 512 from a horizon of 336 on."""
    return "narrow" if name == "ETTh2" else "wide" if horizon >= 336 else "tiny"


def cells(names: list[str], horizons: list[int], seeds: list[int]) -> Iterator[tuple[str, int, str, int]]:
    """Sets, horizons, systems and seeds: whole rows of the table first."""
    for name in names:
        for horizon in horizons:
            for system in ("itransformer", "dlinear"):
                for seed in seeds:
                    yield name, horizon, system, seed


def measured(path: Path, data: SeriesData, horizon: int, system: str, seed: int) -> dict[str, Any]:
    """One cell, trained or gone on with, or read where it is finished."""
    folder = HOME / "series" / f"{data.name}-{horizon}-{system}-{seed}"
    file = folder / "figures.json"
    if file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))
    settings: dict[str, Any] = {"lookback": LOOKBACK, "horizon": horizon, "seed": seed}
    if system == "dlinear":
        settings["learning_rate"] = DLINEAR_RATE.get(data.name, 5e-3)
    size = size_of(data.name, horizon) if system == "itransformer" else None
    trained: Any = train(system, path, out=folder / "run", size=size, resume=True, settings=settings)
    figures, _ = judged(data, method_of(trained.system), LOOKBACK, horizon)
    expected = WINDOWS[horizon]
    if figures["windows"] != expected:
        raise ValueError(f"{figures['windows']} windows were judged, and the field's protocol has {expected}")
    figures |= {"seconds": sum(h["seconds"] for h in trained.history), "steps": len(trained.history)}
    save_json(figures, file)
    return figures


def simple(data: SeriesData, horizon: int) -> dict[str, dict[str, float]]:
    """Ridge regression and the last day, which take seconds."""
    windows = data.test.windows(LOOKBACK, horizon)
    methods = {"ridge": ridge(data.train.windows(LOOKBACK, horizon)), "last day": seasonal_naive(24)}
    found = {name: over(data, method, windows)[0] for name, method in methods.items()}
    return {name: {"mse": errors.mse, "mae": errors.mae} for name, errors in found.items()}


def row_of(data: SeriesData, horizon: int, found: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """A row of the table: means over seeds, spread, and whether the published figure is met."""
    row: dict[str, Any] = {"data": data.name, "horizon": horizon, "lookback": LOOKBACK, **simple(data, horizon)}
    for system, runs in found.items():
        row[system] = {
            metric: statistics.fmean(run[metric] for run in runs) for metric in ("mse", "mae", "seconds")
        } | {"seeds": len(runs), "spread": statistics.stdev([r["mse"] for r in runs]) if len(runs) > 1 else None}
    published = PUBLISHED.get(data.name, {}).get(horizon)
    if published:
        allowed = 0.012 if horizon == 720 else 0.008
        ours = (row["itransformer"]["mse"], row["itransformer"]["mae"])
        row |= {"published": published, "met": all(a - b <= allowed for a, b in zip(ours, published, strict=True))}
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """MSE / MAE of every row, as Markdown."""
    methods = ("published", "itransformer", "dlinear", "ridge", "last day")
    lines = ["| lookback 96 | " + " | ".join(methods) + " | met |", "|---" * (len(methods) + 2) + "|"]
    for row in rows:
        shown = []
        for method in methods:
            found = row.get(method)
            pair = found if isinstance(found, tuple | list) else (found["mse"], found["mae"]) if found else None
            text = "–" if pair is None else f"{pair[0]:.3f} / {pair[1]:.3f}"
            if method == "itransformer" and found["spread"] is not None:
                text += f" ± {found['spread']:.3f}"
            shown.append(text)
        met = {True: "yes", False: "no"}.get(row.get("met"), "–")  # type: ignore[arg-type]
        lines.append(f"| {row['data']}, {row['horizon']} | " + " | ".join(shown) + f" | {met} |")
    return "\n".join(lines)


# ---- speed -----------------------------------------------------------------------------------------------------------
def timed(path: Path, official: Path, turns: int = 3) -> dict[str, Any]:
    """Seconds of an epoch (batch 32, horizon 96) of ours and of the official module, in turns, on equal batches."""
    from seriatim.random import Generator
    from seriatim.systems.series.itransformer import Config, ITransformer

    data: Any = load_data(path, "series")
    windows = data.train.windows(LOOKBACK, 96)
    ours = ITransformer(Config()).train()
    sys.path.insert(0, str(official))
    from model.iTransformer import Model  # type: ignore[import-not-found]

    c = SimpleNamespace(
        seq_len=LOOKBACK, pred_len=96, output_attention=False, use_norm=True, d_model=256, embed="timeF", freq="h",
        dropout=0.1, class_strategy="projection", factor=1, n_heads=8, d_ff=256, activation="gelu", e_layers=2,
    )  # fmt: skip
    theirs = Model(c).train()

    def our_loss(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        loss, count = ours(batch, Generator(0), 0, 1)
        return loss / count

    def their_loss(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return (theirs(batch["past"].clone(), batch["past_marks"], None, None) - batch["future"]).square().mean()

    losses = {"ours": our_loss, "official": their_loss}
    optimizers = {
        "ours": torch.optim.AdamW(ours.parameters(), 1e-4, weight_decay=0.0, fused=True),
        "official": torch.optim.Adam(theirs.parameters(), 1e-4),
    }
    seconds: dict[str, list[float]] = {name: [] for name in losses}
    for turn in range(turns + 1):
        order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(turn)).split(32)[:-1]
        for name, loss_of in losses.items():
            start = time.perf_counter()
            for index in order[:20] if turn == 0 else order:  # the first turn warms up
                optimizers[name].zero_grad(set_to_none=True)
                loss_of(windows.take(index)).backward()
                optimizers[name].step()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {"seconds": seconds, "ratio": medians["official"] / medians["ours"], "threads": torch.get_num_threads()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", type=Path, help="ETTh1.csv, ETTh2.csv")
    parser.add_argument("--horizons", nargs="+", type=int, default=list(HORIZONS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--official", type=Path, help="a clone of thuml/iTransformer: time an epoch of both")
    parser.add_argument("--out", type=Path, default=Path("results/series.json"))
    options = parser.parse_args()
    if options.official:
        print(json.dumps(timed(options.data[0], options.official), indent=2))
        return
    sets: dict[str, tuple[Path, Any]] = {path.stem: (path, load_data(path, "series")) for path in options.data}
    rows, found = [], dict[str, list[dict[str, Any]]]()
    for name, horizon, system, seed in cells(list(sets), options.horizons, options.seeds):
        path, data = sets[name]
        figures = measured(path, data, horizon, system, seed)
        print(f"{name} {horizon} {system} seed {seed}: {figures['mse']:.4f} / {figures['mae']:.4f}", flush=True)
        found.setdefault(system, []).append(figures)
        if (system, seed) == ("dlinear", options.seeds[-1]):
            rows.append(row_of(data, horizon, found))
            found = {}
            told = {"rows": rows, "seeds": options.seeds, "machine": machine(), "commit": commit()}
            command = f"python benchmarks/series_table.py {' '.join(path.name for path in options.data)}"
            save_json({**told, "command": command}, options.out)
    print(table(rows))


if __name__ == "__main__":
    main()
