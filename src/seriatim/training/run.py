"""A training run in a folder: progress with time left, metrics as JSON lines, weights and settings written safely."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

from torch import nn

from seriatim.training.checkpoint import save_json, save_weights

Tick = Callable[[int, int, Mapping[str, float]], None]


@dataclass
class Run:
    """Where a run writes and how it reports.

    steps: overrides a system's own number of steps; bar: a factory of progress displays (None: silent).
    """

    path: Path
    seed: int = 0
    steps: int | None = None
    bar: Callable[[str], Any] | None = None
    summary: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def track(self, name: str) -> Iterator[Tick]:
        """A callback (step, steps, metrics) that moves a progress bar and appends to metrics.jsonl."""
        self.path.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        display = self.bar(name) if self.bar else None
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as log:

            def tick(step: int, steps: int, metrics: Mapping[str, float]) -> None:
                numbers = {k: float(v) for k, v in metrics.items()}
                log.write(json.dumps({"phase": name, "step": step, **numbers}) + "\n")
                if display:
                    display.update(step, steps, numbers)

            try:
                yield tick
            finally:
                if display:
                    display.close()
        self.summary[f"{name}_seconds"] = round(time.perf_counter() - start, 1)

    def save(self, name: str, module: nn.Module, config: Any) -> None:
        """Weights as NAME.safetensors, settings as NAME.json."""
        save_weights(module, self.path / f"{name}.safetensors")
        save_json(
            asdict(config) if is_dataclass(config) and not isinstance(config, type) else config,
            self.path / f"{name}.json",
        )

    def finish(self, **figures: Any) -> dict[str, Any]:
        """Write the figures of the run to summary.json and return them."""
        self.summary.update(figures)
        save_json(self.summary, self.path / "summary.json")
        return self.summary
