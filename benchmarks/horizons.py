"""One model, any horizon: how forecasts of trained runs grow worse with distance, on the same windows.

    python benchmarks/horizons.py ETTh1.csv RUN [NAME=RUN ...] [--most 200] [--out results/horizons.json]

Each run forecasts the longest horizon that it can, of four, from about `most` windows at one distance whose futures are
the same for all; its errors over the first steps are those at shorter horizons. A run that was trained for one horizon
ends there; one that rolls on has none. For each lookback among the runs a ridge regression of 720 steps stands beside
them, and the last day. Beside the figures a picture: the error by days ahead, and one window. Prints Markdown.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from seriatim.data.base import load_data
from seriatim.data.series import SeriesData
from seriatim.evaluation.pictures import INK, PALE, write_beside
from seriatim.evaluation.series import COLOURS, Method, steady
from seriatim.evaluation.series_baselines import ridge, seasonal_naive
from seriatim.training.checkpoint import save_json
from seriatim.verbs.claim import commit, machine
from seriatim.verbs.load import load
from seriatim.verbs.series import method_of

HORIZONS = (96, 192, 336, 720)
DAY = 24
BATCH = 50  # windows that are forecast at once


@torch.no_grad()
def forecasts(data: SeriesData, method: Method, lookback: int, steps: int, most: int) -> Float[Tensor, "n h c"]:
    """Of the first `steps` of windows of the longest horizon."""
    windows, method = data.test.windows(lookback, HORIZONS[-1]).strided(most), steady(data, method)
    parts = []
    for index in torch.arange(len(windows)).split(BATCH):
        batch = windows.take(index)
        parts.append(method({k: v[:, :steps] if k.startswith("future") else v for k, v in batch.items()}))
    return torch.cat(parts)


def row_of(made: Float[Tensor, "n h c"], truth: Float[Tensor, "n h c"]) -> dict[str, Any]:
    """Errors over the first steps, at each horizon that is reached, and day by day."""
    gap = made - truth[:, : made.shape[1]]
    by_step = gap.square().mean((0, 2))
    reached = [h for h in HORIZONS if h <= made.shape[1]]
    return {
        "mse": {h: float(by_step[:h].mean()) for h in reached},
        "mae": {h: float(gap[:, :h].abs().mean()) for h in reached},
        "mse_by_day": [round(float(day.mean()), 5) for day in by_step.split(DAY)],
    }


def measured(
    data: SeriesData, runs: dict[str, str], truth: Float[Tensor, "n h c"], most: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Rows by name, and the forecasts behind them."""
    rows: dict[str, Any] = {}
    made: dict[str, Tensor] = {}
    methods: dict[str, tuple[Method, dict[str, Any]]] = {}
    for name, source in runs.items():
        system: Any = load(source)
        c = system.config
        steps = HORIZONS[-1] if system.rolls else max((h for h in HORIZONS if h <= c.horizon), default=0)
        if not steps:
            raise ValueError(f"{source} forecasts {c.horizon} steps, and the shortest horizon is {HORIZONS[0]}")
        said = {"system": system.meta.key, "lookback": c.lookback, "trained for": None if system.rolls else c.horizon}
        methods[name] = method_of(system), said | {"steps": steps}
    for lookback in sorted({said["lookback"] for _, said in methods.values()}):
        fitted = ridge(data.train.windows(lookback, HORIZONS[-1]))
        methods[f"ridge, {lookback}"] = fitted, {"lookback": lookback, "steps": HORIZONS[-1]}
    methods["last day"] = seasonal_naive(data, DAY), {"lookback": DAY, "steps": HORIZONS[-1]}
    for name, (method, said) in methods.items():
        made[name] = forecasts(data, method, said["lookback"], said.pop("steps"), most)
        rows[name] = {**said, **row_of(made[name], truth)}
        print(f"{name}: " + ", ".join(f"{h} {e:.3f}" for h, e in rows[name]["mse"].items()), flush=True)
    return rows, made


def table(rows: dict[str, Any]) -> str:
    """MSE / MAE over the first steps, as Markdown."""
    lines = ["| forecaster | lookback | " + " | ".join(map(str, HORIZONS)) + " |", "|---" * (len(HORIZONS) + 2) + "|"]
    for name, row in rows.items():
        shown = [f"{row['mse'][h]:.3f} / {row['mae'][h]:.3f}" if h in row["mse"] else "–" for h in HORIZONS]
        lines.append(f"| {name} | {row['lookback']} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def picture(
    data: SeriesData,
    rows: dict[str, Any],
    made: dict[str, Tensor],
    batch: dict[str, Tensor],
    runs: list[str],
    path: Path,
) -> None:
    """The error by days ahead, and the last variate of the window in the middle."""
    figure = Figure(figsize=(9.0, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1)
    colours = {
        name: {"color": COLOURS[i % len(COLOURS)], "linestyle": "-" if i < len(COLOURS) else "--"}
        for i, name in enumerate(runs)
    }
    for name, row in rows.items():
        plain = name not in colours
        days = range(1, len(row["mse_by_day"]) + 1)
        style = {"color": "#9a9a9a", "linestyle": ":"} if plain else colours[name]
        if name != "last day":
            above.plot(days, row["mse_by_day"], label=name, linewidth=1.0 if plain else 1.6, **style)
    above.set_xlabel("days ahead")
    above.set_ylabel("MSE of the day")
    truth, known = batch["future"], 7 * DAY
    window = len(truth) // 2
    at = int(batch["at"][window])
    below.plot(range(-known, 0), data.scaled[at - known : at, -1], color=INK, linewidth=1.0)
    below.plot(truth[window, :, -1], color="#9a9a9a", linewidth=1.4, label="what came")
    for name, style in colours.items():
        below.plot(made[name][window, :, -1], linewidth=1.3, **style)
    below.set_xlabel("hours ahead")
    below.set_ylabel(f"{data.series.columns[-1]}, training scale")
    for axes in (above, below):
        axes.grid(color=PALE)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    figure.suptitle(f"{data.name}: {HORIZONS[-1]} steps, {len(truth)} windows", fontsize=11)
    write_beside(path, lambda file: figure.savefig(file, format="png", dpi=130))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="ETTh1.csv, or another table of hours")
    parser.add_argument("runs", nargs="+", metavar="[NAME=]RUN", help="folders of trained forecasters")
    parser.add_argument("--most", type=int, default=200, help="about so many windows")
    parser.add_argument("--out", type=Path, default=Path("results/horizons.json"))
    o = parser.parse_args()
    pairs = [m.groups() for text in o.runs if (m := re.fullmatch(r"(?:([^=/]+)=)?(.+)", text))]
    runs = {name or Path(source).name: source for name, source in pairs}
    try:
        data: Any = load_data(o.data, "series")
        windows = data.test.windows(1, HORIZONS[-1]).strided(o.most)
        batch = windows.take(torch.arange(len(windows)))
        rows, made = measured(data, runs, batch["future"], o.most)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    command = f"python benchmarks/horizons.py {o.data.name} RUN..."
    save_json(
        {"data": data.name, "windows": len(windows), "rows": rows, "machine": machine(), "commit": commit(),
         "command": command}, o.out,
    )  # fmt: skip
    picture(data, rows, made, batch, list(runs), o.out.with_suffix(".png"))
    print("", table(rows), sep="\n")


if __name__ == "__main__":
    main()
