"""The published figures of iTransformer on the ETT sets, cell by cell: lookback 96, four horizons, three seeds.

    python benchmarks/series_table.py ETTh1.csv ETTh2.csv
    python benchmarks/series_table.py ETTh1.csv ETTh2.csv --cells ETTh1-96-2021 ETTh2-720

A cell (set, horizon, seed) is a training of iTransformer and one of DLinear of the same lookback. Each is resumed where
it was cut off, under SERIATIM_HOME/series, and not done again where it is finished; the table is written anew after
each, from all cells that are there. A ridge regression and the last day stand beside them. Writes
results/series_table.json, prints Markdown.

    python benchmarks/series_table.py ETTh1.csv --official FOLDER

times an epoch of ours and of the official code (a clone of thuml/iTransformer, with what it needs), in turns:
results/series_epoch.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping
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

SYSTEMS = ("itransformer", "dlinear")
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


Cell = tuple[str, int, int]


def cells(names: list[str], asked: list[str] | None = None) -> list[Cell]:
    """Set, horizon and seed of each, or of those whose names (ETTh1-96-2021) begin as one that is asked for. Raises
    ValueError where none does."""
    found = [(name, horizon, seed) for name in names for horizon in HORIZONS for seed in SEEDS]
    if asked is None:
        return found
    begins = {text: [c for c in found if f"{name_of(c)}-".startswith(f"{text}-")] for text in asked}
    empty = [text for text, some in begins.items() if not some]
    if empty:
        raise ValueError(f"no cell is called {', '.join(empty)}; they are called {name_of(found[0])} and the like")
    wanted = {cell for some in begins.values() for cell in some}
    return [cell for cell in found if cell in wanted]


def name_of(cell: Cell) -> str:
    return "-".join(map(str, cell))


def folder_of(cell: Cell, system: str) -> Path:
    return HOME / "series" / name_of(cell) / system


def measured(path: Path, data: SeriesData, cell: Cell, system: str) -> dict[str, Any]:
    """One training of a cell, from its beginning or gone on with, or what is known of it where it is finished."""
    name, horizon, seed = cell
    folder = folder_of(cell, system)
    file = folder / "figures.json"
    if file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))
    settings: dict[str, Any] = {"lookback": LOOKBACK, "horizon": horizon, "seed": seed}
    if system == "dlinear":
        settings["learning_rate"] = DLINEAR_RATE.get(name, 5e-3)
    size = size_of(name, horizon) if system == "itransformer" else None
    trained: Any = train(system, path, out=folder / "run", size=size, resume=True, settings=settings)
    figures, _ = judged(data, method_of(trained.system), LOOKBACK, horizon)
    if figures["windows"] != WINDOWS[horizon]:
        raise ValueError(f"{figures['windows']} windows were judged, and the protocol has {WINDOWS[horizon]}")
    figures |= {"seed": seed, "seconds": sum(h["seconds"] for h in trained.history), "steps": len(trained.history)}
    save_json(figures, file)
    return figures


def known(cell: Cell, system: str) -> dict[str, Any] | None:
    """What is known of a training that is finished."""
    file = folder_of(cell, system) / "figures.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def simple(data: SeriesData, horizon: int) -> dict[str, dict[str, float]]:
    """Ridge regression and the last day, which take seconds, and are noted."""
    file = HOME / "series" / f"{data.name}-{horizon}.json"
    if file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))
    windows = data.test.windows(LOOKBACK, horizon)
    methods = {"ridge": ridge(data.train.windows(LOOKBACK, horizon)), "last day": seasonal_naive(data, 24)}
    found = {name: over(data, method, windows)[0] for name, method in methods.items()}
    figures = {name: {"mse": errors.mse, "mae": errors.mae} for name, errors in found.items()}
    save_json(figures, file)
    return figures


def rows_of(sets: Mapping[str, tuple[Path, Any]]) -> list[dict[str, Any]]:
    """The table with what is finished: means over seeds, spread, and, where all seeds are there, whether the published
    figure is met."""
    rows = []
    for name, (_, data) in sets.items():
        for horizon in HORIZONS:
            found = {
                system: [run for seed in SEEDS if (run := known((name, horizon, seed), system))] for system in SYSTEMS
            }
            rows.append(row_of(data, horizon, found))
    return rows


def row_of(data: SeriesData, horizon: int, found: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """One of them."""
    row: dict[str, Any] = {"data": data.name, "horizon": horizon, "lookback": LOOKBACK, "windows": WINDOWS[horizon]}
    row |= simple(data, horizon)
    for system, runs in found.items():
        if not runs:
            continue
        row[system] = {"runs": runs}
        for metric in ("mse", "mae"):
            values = [run[metric] for run in runs]
            row[system] |= {metric: statistics.fmean(values), f"{metric}_spread": max(values) - min(values)}
    published = PUBLISHED.get(data.name, {}).get(horizon)
    row["published"] = published
    if len(found["itransformer"]) == len(SEEDS) and published:
        allowed = 0.012 if horizon == 720 else 0.008
        row["apart"] = [row["itransformer"][m] - p for m, p in zip(("mse", "mae"), published, strict=True)]
        row["met"] = all(x <= allowed for x in row["apart"])
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """MSE / MAE of every row, as Markdown; behind ± the distance of the highest and the lowest seed."""
    methods = ("published", "itransformer", "dlinear", "ridge", "last day")
    lines = ["| horizon | " + " | ".join(methods) + " | met |", "|---" * (len(methods) + 2) + "|"]
    for row in rows:
        shown = []
        for method in methods:
            found = row.get(method)
            pair = found if isinstance(found, tuple | list) else (found["mse"], found["mae"]) if found else None
            text = "–" if pair is None else f"{pair[0]:.3f} / {pair[1]:.3f}"
            runs = found.get("runs", ()) if isinstance(found, dict) else ()
            text += f" ± {found['mse_spread']:.3f} ({len(runs)} seeds)" if len(runs) > 1 else ""
            shown.append(text)
        met = {True: "yes", False: "no", None: "–"}[row.get("met")]
        lines.append(f"| {row['data']}, {row['horizon']} | " + " | ".join(shown) + f" | {met} |")
    return "\n".join([f"Lookback {LOOKBACK}; MSE / MAE on all windows of the test part.", "", *lines])


# ---- speed -----------------------------------------------------------------------------------------------------------
def timed(path: Path, official: Path, turns: int = 3) -> dict[str, Any]:
    """Seconds of an epoch (batch 32, horizon 96) of ours and of the official module on equal batches, in turns of a few
    batches, so that what else the machine does is shared by both."""
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
        took = dict.fromkeys(losses, 0.0)
        for begin in range(0, 16 if turn == 0 else len(order), 8):  # the first turn warms up
            for name, loss_of in list(losses.items())[:: 1 if begin % 16 else -1]:
                start = time.perf_counter()
                for index in order[begin : begin + 8]:
                    optimizers[name].zero_grad(set_to_none=True)
                    loss_of(windows.take(index)).backward()
                    optimizers[name].step()
                took[name] += time.perf_counter() - start
        for name in losses if turn else ():
            seconds[name].append(took[name])
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {"seconds": seconds, "ratio": medians["official"] / medians["ours"], "threads": torch.get_num_threads()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", type=Path, help="ETTh1.csv, ETTh2.csv")
    parser.add_argument("--cells", nargs="+", metavar="ETTh1[-96[-2021]]", help="these alone (default: all)")
    parser.add_argument("--official", type=Path, help="a clone of thuml/iTransformer: time an epoch of both")
    parser.add_argument("--out", type=Path, default=Path("results/series_table.json"))
    options = parser.parse_args()
    if options.official:
        found = timed(options.data[0], options.official) | {"machine": machine(), "commit": commit()}
        save_json(found, options.out.with_name("series_epoch.json"))
        print(json.dumps(found, indent=2))
        return
    sets: dict[str, tuple[Path, Any]] = {path.stem: (path, load_data(path, "series")) for path in options.data}
    command = f"python benchmarks/series_table.py {' '.join(path.name for path in options.data)}"
    for cell in cells(list(sets), options.cells):
        path, data = sets[cell[0]]
        for system in SYSTEMS:
            figures = measured(path, data, cell, system)
            print(
                f"{name_of(cell)} {system}: {figures['mse']:.4f} / {figures['mae']:.4f}, {figures['seconds']:.0f} s, "
                f"{figures['steps']} steps", flush=True,
            )  # fmt: skip
        rows = rows_of(sets)
        save_json(
            {"rows": rows, "seeds": SEEDS, "machine": machine(), "commit": commit(), "command": command}, options.out
        )
    print(table(rows_of(sets)))


if __name__ == "__main__":
    main()
