"""A training in a folder: what it is (run.json), how it went (metrics.jsonl), where it stands (state.safetensors).

Every file is written beside and renamed, or appended to line by line; a folder belongs to one training at a time.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from seriatim.training.checkpoint import save_json

WEIGHTS = "model.safetensors"


class RunFolder:
    """Where one training writes."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)

    state = property(lambda self: self.path / "state.safetensors")
    weights = property(lambda self: self.path / WEIGHTS)
    metrics = property(lambda self: self.path / "metrics.jsonl")
    card = property(lambda self: self.path / "run.json")

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """The folder, for this process alone. Raises ValueError where another training holds it, OSError where nothing
        can be written."""
        import fcntl

        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = open(self.path / ".lock", "w")  # noqa: SIM115 (held until the end)
        except OSError as error:
            raise OSError(f"nothing can be written to {self.path} ({error.strerror}); choose another --out") from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ValueError(
                    f"another training writes to {self.path}; wait for it, or choose another --out"
                ) from None
            yield

    def begin(
        self, card: Mapping[str, Any], resume: bool, defaults: Mapping[str, Mapping[str, Any]] | None = None
    ) -> None:
        """Start anew, or go on with what is there. `defaults`: of parts of the card; a run that is older than a setting
        has its default. Raises ValueError where something is in the way or does not fit."""
        self.refuse(resume)
        if not self.card.exists():
            save_json(card, self.card)
            return
        there = {"read": {}, **self.read_card()}
        for name, known in json.loads(json.dumps(dict(defaults or {}))).items():
            there[name] = {k: v for k, v in known.items() if k in card[name]} | there.get(name, {})
        for name, value in json.loads(json.dumps(card)).items():
            told = name in there or name != "series"  # which older runs do not tell
            if name != "version" and told and there.get(name) != value:
                differs = _difference(name, there.get(name), value)
                raise ValueError(
                    f"{self.path} was started with other settings ({differs}); resume with the same, or start another "
                    "run with --out"
                )

    def refuse(self, resume: bool) -> None:
        """Raises ValueError where a training is in the way; asked before anything is written beside it."""
        if not resume and (self.card.exists() or self.state.exists()):
            raise ValueError(f"{self.path} holds a training already; go on with --resume, or choose another --out")

    def read_card(self) -> dict[str, Any]:
        """What the run is. Raises ValueError where the folder holds no run."""
        if not self.card.is_file():
            raise ValueError(f"{self.path} holds no training (there is no run.json in it)")
        try:
            return json.loads(self.card.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{self.card} cannot be read ({error}); it may have been cut short") from None

    def trained_on(self) -> tuple[str, dict[str, Any]]:
        """The data of the run, and how they were read. Raises ValueError where it does not tell."""
        card = self.read_card()
        if "data" not in card:
            raise ValueError(f"{self.card} does not tell what the run was trained on: say --data")
        return card["data"], card.get("read", {})

    def forget_after(self, step: int) -> list[dict[str, Any]]:
        """Drop what was noted after a step, and half-written lines; what is left."""
        kept = []
        for entry in read_lines(self.metrics):
            if entry.get("step", 0) <= step:
                kept.append(entry)
        part = self.metrics.with_name("metrics.jsonl.part")
        part.write_text("".join(json.dumps(e) + "\n" for e in kept), encoding="utf-8")
        os.replace(part, self.metrics)
        return kept


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSONL file; none where there is no file."""
    lines = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict)]


def _difference(name: str, there: Any, asked: Any) -> str:
    if isinstance(there, dict) and isinstance(asked, dict):
        differs = [k for k in {**there, **asked} if there.get(k) != asked.get(k)]
        return ", ".join(f"{name}.{k} {there.get(k)!r}, now {asked.get(k)!r}" for k in differs[:3])
    return f"{name} {there!r}, now {asked!r}"
