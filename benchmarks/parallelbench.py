"""ParallelBench of a trained model: accuracy against tokens a step, beside what is possible, task by task.

    python benchmarks/parallelbench.py MODEL [--tasks lists] [--lengths 3,4,5,6] [--problems 100] [--out results]

MODEL is a run of a system that was trained on `list-tasks`, or zoo:NAME. Writes parallelbench_NAME.json, a picture of
the same name, and prints the accuracy of each task with one token at a time and with all at once, beside the ceilings.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from seriatim.data.list_tasks import GROUPS
from seriatim.evaluation.parallel_chart import save_parallel
from seriatim.studies.parallelbench import ADAPTIVE, FIXED, measure
from seriatim.training.checkpoint import save_json
from seriatim.verbs.claim import commit, machine
from seriatim.verbs.load import load


def table(result: dict[str, Any]) -> str:
    """A line a task and length: accuracies and ceilings at random places, entropies."""
    lines = [f"{'task':16s} {'n':>2s}  tokens a step: accuracy (ceiling), entropy of answers (of the data)"]
    for task, by_length in result["tasks"].items():
        for length, shape in by_length.items():
            cells = []
            for run in shape["runs"]:
                if run["decoder"] in ("random", "left-to-right") and str(run["setting"]) in shape["entropy"]:
                    if run["decoder"] == "left-to-right" and len(shape["entropy"]) > 2:
                        continue
                    top = run["ceiling"] if run["ceiling"] is not None else run["ideal"]
                    spread = shape["entropy"][str(run["setting"])]
                    limit = "-" if top is None else f"{top:.3f}"
                    cells.append(f"{run['setting']}: {run['accuracy']:.3f} ({limit}), {spread:.2f}")
            lines.append(f"{task:16s} {length:>2s}  {'   '.join(cells)}  ({shape['entropy']['data']:.2f})")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tasks", default="lists", help=f"{', '.join(GROUPS)}, or keys by commas (default: lists)")
    parser.add_argument("--lengths", default="3,4,5,6")
    parser.add_argument("--decoders", default=",".join((*FIXED, *ADAPTIVE)))
    parser.add_argument("--problems", type=int, default=100, help="of each task and length (default: 100)")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    system: Any = load(options.model)
    tasks = GROUPS.get(options.tasks) or tuple(options.tasks.split(","))
    result = measure(
        system, tasks, [int(n) for n in options.lengths.split(",")], options.decoders.split(","), options.problems,
        temperature=options.temperature, seed=options.seed, said=lambda text: print(text, flush=True),
    )  # fmt: skip
    name = f"parallelbench_{Path(options.model.removeprefix('zoo:')).name}".replace("-", "_")
    result |= {"model": options.model, "machine": machine(), "commit": commit()}
    save_json(result, options.out / f"{name}.json")
    save_parallel(result, options.out / f"{name}.png")
    print(table(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
