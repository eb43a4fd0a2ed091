"""Figures of a training for TensorBoard, beside metrics.jsonl (extra `tensorboard`)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Board:
    """A `Tick` that writes events to FOLDER/tensorboard. Steps that a resumed training takes again replace the first.

    Raises ImportError where TensorBoard is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ImportError("TensorBoard is not installed: pip install 'seriatim[tensorboard]'") from None
        self.folder, self.make = Path(folder) / "tensorboard", SummaryWriter
        self.writer: Any = None

    def __call__(self, step: int, steps: int, figures: Mapping[str, float]) -> None:
        if self.writer is None:
            self.writer = self.make(self.folder, purge_step=step)
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
