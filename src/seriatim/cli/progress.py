"""Progress on the terminal: bar, step, last loss, time left. Where the output is no terminal, a line now and then."""

from __future__ import annotations

import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

UNTOLD = ("learning_rate", "gradient_norm", "seconds")  # they stand in metrics.jsonl


class Bar:
    """One phase of a run."""

    def __init__(self, name: str, console: Console | None = None):
        self.name, self.console = name, console or Console()
        self.live: Progress | None = None
        self.start = self.said = time.monotonic()
        self.first: int | None = None  # a resumed run begins further on
        if self.console.is_terminal:
            columns = (
                TextColumn(f"{name:>10}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"),
                TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
            )  # fmt: skip
            self.live = Progress(*columns, console=self.console)
            self.live.start()
            self.task = self.live.add_task(name, total=None, figures="")

    def update(self, step: int, steps: int, metrics: Mapping[str, float]) -> None:
        """After each step."""
        told = [k for k in metrics if k not in UNTOLD][:4]
        figures = "  ".join(f"{k} {metrics[k]:.3g}" for k in told)
        self.first = step if self.first is None else self.first
        if self.live:
            self.live.update(self.task, completed=step, total=steps, figures=figures)
        elif time.monotonic() - self.said > 10 or step == steps:
            self.said = time.monotonic()
            spent = self.said - self.start
            left = spent / (step - self.first + 1) * (steps - step)
            self.console.print(
                f"{self.name:>10} {step}/{steps}  {figures}  {spent:.0f} s, {left:.0f} s left",
                highlight=False,
                soft_wrap=True,
            )

    def close(self) -> None:
        if self.live:
            self.live.stop()
