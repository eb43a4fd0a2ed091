"""Is `auto` ever slower than plain decoding? Twenty prompts, random tokens and temperature 1 among them.

    python benchmarks/auto.py [MODEL] [--weights int8] [--dtype float32] [--new-tokens 128] [--out results/auto.json]

Five prompts are random tokens, which nothing foresees, ten are the bench's own, the others held-out files; they are
continued at temperature 0, 0.7 and 1 in turn. What a forward over n rows costs is measured before, as at a
user's first call. Plain decoding and `auto` take turns; all tokens over all seconds count, and `auto` may be at most 3%
slower in total. Figures are marked where the machine was busy with something else.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch

from seriatim.evaluation.bench import Prompt, Runs, figures, take_turns
from seriatim.evaluation.cost import DISTURBED, Others, load_average
from seriatim.evaluation.questions import builtin_questions
from seriatim.systems.decoders import forget
from seriatim.systems.language_model import LanguageModel
from seriatim.systems.trials import held_out
from seriatim.training.checkpoint import save_json
from seriatim.verbs.bench import PLAIN, Way, arm, made_ready, opened
from seriatim.verbs.bench_prompts import asked
from seriatim.verbs.claim import commit, machine

PROMPTS, LEAST = 20, 0.97
TEMPERATURES = (0.0, 0.7, 1.0)
LENGTH = 100  # tokens of a prompt that is cut from a longer text
ARMS = (PLAIN, "auto")


def prompts_of(system: LanguageModel, new_tokens: int, seed: int) -> list[Prompt]:
    """Twenty prompts: a quarter is random tokens; the others are the bench's own and held-out files."""
    random = torch.Generator().manual_seed(seed)
    few = PROMPTS // 4
    nonsense = torch.randint(system.config.vocab, (few, LENGTH), generator=random).tolist()
    own, _ = asked(system, builtin_questions(False)[: 2 * few], new_tokens, True, nullcontext(lambda done, total: None))
    texts = held_out(system, PROMPTS - few - len(own), LENGTH)
    return [
        *(Prompt(tuple(ids), "random tokens") for ids in nonsense),
        *own,
        *(Prompt(tuple(ids), "held-out files") for ids in texts),
    ]


def measured(system: LanguageModel, prompts: Sequence[Prompt], way: Way, runs: int) -> dict[str, Runs]:
    """What both arms wrote, prompt by prompt, each at its temperature."""
    written: dict[str, Runs] = {name: [] for name in ARMS}
    for n, prompt in enumerate(prompts):
        at = Way(way.new_tokens, TEMPERATURES[n % 3], way.seed + n, way.weights, way.dtype, way.compile)
        arms = {name: arm(system, name, at) for name in ARMS}
        for name, made in take_turns(arms, [prompt], runs, way.seed + n, lambda done, total: None).items():
            written[name] += made
        print(f"\r{n + 1} of {len(prompts)} prompts", end="", flush=True)
    print()
    return written


def told(written: dict[str, Runs], prompts: Sequence[Prompt]) -> dict[str, Any]:
    """The ratio in total, by kind of prompt and by temperature."""

    def of(chosen: list[int]) -> float:
        return float(figures([written["auto"][n] for n in chosen], [written[PLAIN][n] for n in chosen])["ratio"])

    kinds = sorted({p.group for p in prompts})
    return {
        "total": of(list(range(len(prompts)))),
        **{kind: of([n for n, p in enumerate(prompts) if p.group == kind]) for kind in kinds},
        **{f"temperature {t:g}": of(list(range(i, len(prompts), 3))) for i, t in enumerate(TEMPERATURES)},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="zoo:text-base")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--dtype")
    parser.add_argument("--weights", choices=("packed", "int8", "int4"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/auto.json"))
    o = parser.parse_args()
    torch.set_num_threads(o.threads)
    way = Way(o.new_tokens, 0.0, o.seed, o.weights, o.dtype, False)
    system = opened(o.model, way)
    made_ready(system, way)
    forget(system)
    prompts = prompts_of(system, o.new_tokens, o.seed)
    for name in ARMS:  # the first call measures what forwards cost
        arm(system, name, way)(prompts[0])
    others = Others()
    ratios = told(measured(system, prompts, way, o.runs), prompts)
    used = others.share()
    result = {
        "model": Path(o.model).name, "weights": o.weights, "dtype": str(next(system.model.parameters()).dtype)[6:],
        "prompts": len(prompts), "new_tokens": o.new_tokens, "ratio": ratios, "holds": ratios["total"] >= LEAST,
        "others": used, "disturbed": used is None or used > DISTURBED, "load_average": load_average(),
        "threads": o.threads, "torch": torch.__version__, "machine": machine(), "commit": commit(),
    }  # fmt: skip
    for name, ratio in ratios.items():
        print(f"{name:>20} {ratio:6.3f}")
    print(
        "DISTURBED: not kept" if result["disturbed"] else f"{'holds' if result['holds'] else 'FAILS'}: at least {LEAST}"
    )
    if not result["disturbed"]:
        save_json(result, o.out)
    return 0 if result["holds"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
