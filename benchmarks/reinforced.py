"""Reinforcement of a masked generator on sudokus, estimate by estimate: the claim of `systems/reinforced_trials.py`.

    python benchmarks/reinforced.py [--out results/cj-grpo.json]

Arms that are finished are not run again; one that was cut off goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from seriatim.home import HOME
from seriatim.systems.reinforced_trials import CLAIM
from seriatim.training.checkpoint import save_json
from seriatim.verbs.claim import commit, machine


def main() -> None:
    """Work off the queue, print a line an arm, write what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="results/cj-grpo.json")
    out = Path(parser.parse_args().out)
    found: dict[str, list[dict]] = {}
    for name, seed in CLAIM.queue():
        file = HOME / "claims" / "cj-grpo" / f"{name}-{seed}" / "figures.json"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            save_json({"seed": seed, **CLAIM.arms[name].measure(None, seed)}, file)
        found.setdefault(name, []).append(json.loads(file.read_text(encoding="utf-8")))
        print(f"{name}, seed {seed}: {found[name][-1][CLAIM.metric]:.3f}", flush=True)
    each = {name: [run[CLAIM.metric] for run in runs] for name, runs in found.items()}
    for name, values in each.items():
        print(f"{name}: {statistics.fmean(values):.3f} ({min(values):.3f} to {max(values):.3f})")
    verdict = CLAIM.verdict(each[CLAIM.ours], each[CLAIM.baseline])
    print(f"{CLAIM.text}\n{verdict}: {CLAIM.rule}")
    result = {
        "key": "cj-grpo", "claim": CLAIM.text, "paper": CLAIM.paper, "metric": CLAIM.metric, "arms": found,
        "ours": statistics.fmean(each[CLAIM.ours]), "baseline": statistics.fmean(each[CLAIM.baseline]),
        "verdict": verdict, "rule": CLAIM.rule, "machine": machine(), "commit": commit(),
        "command": "python benchmarks/reinforced.py",
    }  # fmt: skip
    save_json(result, out)


if __name__ == "__main__":
    main()
