"""`claim`: a system's claim measured here and now, arm by arm, seed by seed; what is finished is not done again."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from seriatim.evaluation.claim_chart import save_claim
from seriatim.home import HOME
from seriatim.systems.claim import Arm, Claim, Trial
from seriatim.systems.meta import everything
from seriatim.systems.meta import load as load_module
from seriatim.training.checkpoint import save_json
from seriatim.verbs.evaluate import evaluate
from seriatim.verbs.generate import sampling_of
from seriatim.verbs.load import load, where
from seriatim.verbs.train import Bar, Trained, train


def claim_of(key: str) -> Claim:
    """What a system claims. Raises ValueError where it claims nothing that is measured here."""
    found = getattr(load_module(key), "CLAIM", None)
    if not isinstance(found, Claim):
        raise ValueError(f"{key} states no claim that can be measured here yet")
    return found


def pending(key: str) -> list[tuple[str, int]]:
    """Arms and seeds that are still to be run."""
    claim = claim_of(key)
    return [(arm, seed) for arm, seed in claim.queue() if not _figures_file(key, claim, arm, seed).is_file()]


def measure(
    key: str, results: str | Path = "results", bar: Bar | None = None, said: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Work off the queue of a claim and write RESULTS/KEY.json, and a chart of its arms; what the first holds.

    Runs stand under SERIATIM_HOME/claims and are resumed where they were cut off; an arm that several claims have in
    common is run once. Raises FileNotFoundError before anything is run where a model that an arm needs is missing.
    """
    claim = claim_of(key)
    left = pending(key)
    for name, _ in left:
        _has_what_it_needs(key, claim.arms[name])
    for n, (name, seed) in enumerate(left):
        said(f"{key}: arm {name}, seed {seed} ({n + 1} of {len(left)})")
        _run(key, claim, name, seed, bar)
    measured: dict[str, dict[int, dict[str, Any]]] = {}
    for name, seed in claim.queue():
        file = _figures_file(key, claim, name, seed)
        measured.setdefault(name, {})[seed] = json.loads(file.read_text(encoding="utf-8"))
    ours = [figures[claim.metric] for figures in measured[claim.ours].values()]
    theirs = [figures[claim.metric] for figures in measured[claim.baseline].values()]
    mine, other = statistics.fmean(ours), statistics.fmean(theirs)
    result = {
        "key": key, "claim": claim.text, "paper": claim.paper, "metric": claim.metric,
        "arms": {name: list(runs.values()) for name, runs in measured.items()}, "ours": mine, "baseline": other,
        "ratio": mine / other if other else None, "verdict": claim.verdict(ours, theirs), "rule": claim.rule,
        "difference_95": claim.interval(ours, theirs),
        "seeds": sorted({seed for _, seed in claim.queue()}),
        "train_seconds": round(sum(f["train_seconds"] for runs in measured.values() for f in runs.values()), 1),
        "machine": machine(), "command": f"seriatim claim {key}", "commit": commit(),
    }  # fmt: skip
    save_json(result, Path(results) / f"{key}.json")
    save_claim(result, Path(results) / "charts" / f"{key}.png")
    return result


def _has_what_it_needs(key: str, arm: Arm | Trial) -> None:
    """Raises FileNotFoundError that says how to make the model that an arm begins with, or its tokenizer."""
    needed = [arm.model] if isinstance(arm, Trial) else [arm.base, arm.tokenizer]
    for source in [x for x in needed if x is not None and x.startswith(("zoo:", "home:"))]:
        try:
            where(source)
        except FileNotFoundError as error:
            how = f"; `python benchmarks/zoo.py {source[4:]}` trains it" if source.startswith("zoo:") else ""
            raise FileNotFoundError(f"the claim of {key} needs {source}: {error}{how}") from None


def _run(key: str, claim: Claim, name: str, seed: int, bar: Bar | None) -> None:
    """One arm with one seed: train or go on, judge, note."""
    arm = claim.arms[name]
    folder = _figures_file(key, claim, name, seed).parent
    if isinstance(arm, Trial):
        folder.mkdir(parents=True, exist_ok=True)
        measured = dict(arm.measure(None if arm.model is None else load(arm.model), seed))
        save_json({"seed": seed, "train_seconds": 0.0, **measured}, folder / "figures.json")
        return
    settings = {**arm.settings, "seed": seed} | ({} if arm.steps is None else {"steps": arm.steps})
    trained: Trained = train(
        arm.system, claim.data, from_=arm.base, out=folder / "run", size=arm.size, tokenizer=arm.tokenizer,
        minutes=arm.minutes, resume=True, settings=settings, bar=bar, **arm.options,
    )  # fmt: skip
    figures = dict(arm.measure(trained)) if arm.measure else _judged(trained, arm, seed)
    seconds = sum(h.get("seconds", 0.0) for h in trained.history)
    save_json({"seed": seed, **figures, "train_seconds": round(seconds, 1)}, folder / "figures.json")


def _judged(trained: Trained, arm: Arm, seed: int) -> dict[str, Any]:
    sampling = sampling_of(trained.system, **arm.sampling) if arm.sampling else None
    return evaluate(trained.system, trained.data, seed=seed, sampling=sampling)


def _figures_file(key: str, claim: Claim, name: str, seed: int) -> Path:
    """Where the figures of an arm stand: of a training that is judged by the usual figures, where every claim with the
    same arm finds them; else with the claim."""
    arm, place = claim.arms[name], HOME / "claims"
    if isinstance(arm, Trial) or arm.measure is not None:
        return place / key / f"{name}-{seed}" / "figures.json"
    said = {f.name: getattr(arm, f.name) for f in fields(arm)} | {"data": claim.data}
    digest = hashlib.sha256(json.dumps(said, sort_keys=True, default=dict).encode()).hexdigest()[:12]
    return place / "arms" / f"{arm.system}-{digest}-{seed}" / "figures.json"


def claimed(results: str | Path = "results") -> Iterator[dict[str, Any]]:
    """What is known of every claim: its last result, or that there is none."""
    for key, (meta, _) in everything().items():
        file = Path(results) / f"{key}.json"
        if file.is_file():
            yield json.loads(file.read_text(encoding="utf-8"))
        elif meta.family != "tokenizer":
            yield {"key": key, "verdict": "not measured"}


def machine() -> str:
    """Processors and system, as results carry it."""
    return f"{os.cpu_count()} x {platform.processor() or platform.machine()}, {platform.system()} {platform.release()}"


def commit() -> str:
    """The commit of the source, where it stands in a repository; else the version."""
    import seriatim

    where = Path(seriatim.__file__).parent
    asked = subprocess.run(["git", "-C", str(where), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return asked.stdout.strip() or seriatim.__version__
