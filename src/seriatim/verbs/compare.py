"""`compare`: systems trained on the same data for the same time, side by side in one HTML file."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import seriatim
from seriatim.data.base import load_data
from seriatim.evaluation.cost import fresh_process, load_average, parameters
from seriatim.evaluation.report import Result, write_report
from seriatim.systems.image_system import ImageSystem
from seriatim.systems.text_system import TextSystem
from seriatim.verbs.compare_series import compare_series
from seriatim.verbs.evaluate import picture_figures, text_figures
from seriatim.verbs.load import load, plain, system_class
from seriatim.verbs.show import show
from seriatim.verbs.train import Bar, Trained, modality_of, train


def compare(
    keys: Sequence[str],
    data: str | Path | None = None,
    *,
    minutes: float | None = None,
    size: str | None = None,
    out: str | Path = "runs/compare",
    samples: int = 500,
    seed: int = 0,
    bar: Bar | None = None,
    said: Callable[[str], None] = lambda text: None,
    **data_options: Any,
) -> Path:
    """Train each system for `minutes` (None: 5, or as the recipes of series say) on the same data, judge all alike,
    write OUT/report.html.

    keys: of systems, with a tokenizer where one is trained already, as in "var:zoo:image-msvq". A run that is there
    already is gone on with, so an interrupted comparison resumes. Raises ValueError where the systems take different
    data.
    """
    named = [(key, tokenizer or None) for key, _, tokenizer in (asked.partition(":") for asked in keys)]
    tokenizers = dict(named)
    if len(tokenizers) < len(keys):
        raise ValueError(f"each system is named once, got {', '.join(keys)}")
    kinds = {key: modality_of(system_class(key)) for key in tokenizers}
    if len(set(kinds.values())) > 1:
        raise ValueError(
            "only systems of one modality compare: " + ", ".join(f"{k} is of {m}" for k, m in kinds.items())
        )
    first = named[0][0]
    if kinds[first] == "series":
        if any(tokenizers.values()):
            raise ValueError("systems of series read numbers: name them without tokenizers")
        return compare_series(
            list(tokenizers), data, minutes=minutes, size=size, out=out, seed=seed, bar=bar, said=said, **data_options
        )
    minutes = 5.0 if minutes is None else minutes
    loaded = load_data(data or system_class(first).source, kinds[first], **data_options)
    command = f"seriatim compare {shlex.join(keys)} --data {shlex.quote(loaded.name)} --minutes {minutes:g}"
    results = []
    for key, tokenizer in tokenizers.items():
        folder = Path(out) / key
        trained = train(
            key, loaded, out=folder, size=size, tokenizer=tokenizer, minutes=minutes, resume=True,
            settings={"seed": seed}, bar=bar,
        )  # fmt: skip
        said(f"judging {key}")
        results.append(judged(trained, samples, seed, command))
    notes = [
        f"{loaded.name}: {len(loaded.train):,} samples for training, {len(loaded.test):,} held out.",
        f"{minutes:g} minutes of training each, one seed: small differences mean nothing.",
        *loaded.notes,
        f"Made by {command} (version {seriatim.__version__}).",
    ]
    return write_report(Path(out) / "report.html", f"{' · '.join(tokenizers)} on {loaded.name}", results, notes, "FD-s")


def judged(trained: Trained, samples: int, seed: int, command: str) -> Result:
    """A row of the report: figures, pictures or text, and what they cost."""
    system, folder, data = trained.system, trained.folder, trained.data
    show(trained, seed=seed)
    figures: dict[str, Any] = {"parameters": parameters(system.model), "training_seconds": seconds_of(trained)}
    texts: list[str] = []
    if isinstance(system, TextSystem):
        figures |= text_figures(system, data, seed)
        texts = [(folder / "continuation.txt").read_text(encoding="utf-8")]
    else:
        assert isinstance(system, ImageSystem)
        figures |= picture_figures(system, data, samples, seed)[0]
    peak = fresh_process("seriatim.verbs.compare:generate_once", {"folder": str(folder)})
    figures["memory"] = peak.peak
    return Result(
        system.meta.key, system.meta.title,
        {k: v for k, v in figures.items() if isinstance(v, int | float)},
        losses={"training": [(h["step"], h["loss"]) for h in trained.history]},
        grid=_there(folder / "samples.png"), film=_there(folder / "film.gif"), texts=texts,
        settings=plain(system.config), command=command,
        notes=[f"likelihood: {system.meta.likelihood}", *(str(figures[k]) for k in ("feature_model",) if k in figures)],
    )  # fmt: skip


def generate_once(folder: str) -> float:
    """One sample in a fresh process, for its peak memory; the load average."""
    system = load(folder)
    if isinstance(system, TextSystem):
        system.write("", min(64, system.model.layout.size))
    else:
        assert isinstance(system, ImageSystem)
        system.draw(count=1)
    return load_average()


def seconds_of(trained: Trained) -> float:
    """Seconds that the steps took together."""
    return sum(h.get("seconds", 0.0) for h in trained.history)


def _there(path: Path) -> Path | None:
    return path if path.is_file() else None
