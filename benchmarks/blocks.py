"""Does deciding several tokens at once pay in seconds? Block diffusion beside plain next-token decoding of one size.

    python benchmarks/blocks.py [--block zoo:text-block] [--plain zoo:text-base] [--dtype bfloat16] [--weights packed]
        [--prompts 12] [--new-tokens 128] [--temperature 0] [--out results/blocks.json]

Both models were trained on the same text, have the same shape and run in the same engine and number format. Prompts are
held-out code, and the bench's English; the arms take turns, and outputs that repeat themselves are averaged apart.
Beside tokens a second stand tokens a forward, and what a forward over a block costs beside one over a single row,
measured in the same run: their ratio is what the arm can gain at most, and says why where it does not.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch

from seriatim.evaluation.bench import Arm, Prompt, Runs, Written, apart, take_turns
from seriatim.evaluation.cost import DISTURBED, Others, load_average
from seriatim.evaluation.forward_cost import ForwardCost, measured
from seriatim.evaluation.questions import builtin_questions
from seriatim.systems.trials import continued, held_out
from seriatim.training.checkpoint import save_json
from seriatim.verbs.bench import PLAIN, Way, arm, made_ready, opened
from seriatim.verbs.claim import commit, machine
from seriatim.verbs.load import load

LENGTH = 160  # tokens of a prompt
DECODERS = ("unmask", *(f"unmask+threshold={t}" for t in (0.9, 0.7, 0.5, 0.3)), "unmask+factor=1.0")


def prompts_of(system: Any, count: int) -> list[Prompt]:
    """Stretches of held-out code, then the bench's English: documentation, and texts of the project."""
    code = [Prompt(tuple(ids), "code") for ids in held_out(system, count, LENGTH)]
    texts = [q.turns[0] for q in builtin_questions(False) if "English" in q.group]
    return code + [Prompt(tuple(system.prompt_ids(t)[-LENGTH:]), "prose") for t in texts]


def in_blocks(system: Any, decoder: str, way: Way) -> Arm:
    """A decoder of the block model as it is measured."""
    sampling = replace(system.sampling, temperature=way.temperature, top_p=None)

    def write(prompt: Prompt) -> Written:
        made = continued(system, [prompt.ids], way.new_tokens, decoder, sampling, way.seed)
        rows = tuple(step.slots for step in made.steps)
        return Written(tuple(made.ids[0]), sum(s.forwards for s in made.steps), 0, 0, made.seconds, 0.0, rows)

    return write


def told(written: dict[str, Runs], prompts: list[Prompt], cost: ForwardCost, size: int) -> dict[str, Any]:
    """Figures of each arm, by kind of text; with what a forward over its block costs."""
    out = {}
    for name, runs in written.items():
        own = apart(runs, written[PLAIN], prompts)
        dear = 1.0 if name == PLAIN else cost.at(size) / cost.at(1)
        out[name] = {**own, "forward_cost": dear, "at_most": own["mean_accepted_length"] / dear}
    return out


def tell(done: int, total: int) -> None:
    print(f"\r{done} of {total} texts", end="", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--block", default="zoo:text-block")
    parser.add_argument("--plain", default="zoo:text-base")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--weights", choices=("packed", "int8", "int4"))
    parser.add_argument("--prompts", type=int, default=12, help="of code")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("results/blocks.json"))
    o = parser.parse_args()
    torch.set_num_threads(o.threads)
    way = Way(o.new_tokens, o.temperature, 0, o.weights, o.dtype, False)
    plain, block = opened(o.plain, way), load(o.block, o.dtype)
    for system in (plain, block):
        made_ready(system, way)
    prompts = prompts_of(plain, o.prompts)
    arms = {PLAIN: arm(plain, PLAIN, way), **{name: in_blocks(block, name, way) for name in DECODERS}}
    for write in arms.values():
        write(prompts[0])
    others = Others()
    written = take_turns(
        arms, prompts, o.runs, 0, lambda done, total: print(f"\r{done} of {total}", end="", flush=True)
    )
    used = others.share()
    cost = measured(plain, LENGTH + o.new_tokens // 2)
    result = {
        "plain": o.plain, "block": o.block, "dtype": o.dtype, "weights": o.weights, "temperature": o.temperature,
        "new_tokens": o.new_tokens, "arms": told(written, prompts, cost, block.config.block), "others": used,
        "disturbed": used is None or used > DISTURBED, "load_average": load_average(), "threads": o.threads,
        "torch": torch.__version__, "machine": machine(), "commit": commit(),
    }  # fmt: skip
    print(
        f"\n{'':>24} {'tokens/s':>9} {'ratio':>6} {'code':>6} {'prose':>6} {'a forward':>10} {'cost':>6} {'at most':>8}"
    )
    for name, own in result["arms"].items():
        kinds = [f"{own['groups'][g]['ratio']:6.2f}" if g in own["groups"] else " " * 6 for g in ("code", "prose")]
        print(
            f"{name:>24} {own['tokens_per_second']:9.1f} {own['ratio']:6.2f} {' '.join(kinds)} "
            f"{own['mean_accepted_length']:10.2f} {own['forward_cost']:6.2f} {own['at_most']:8.2f}"
        )
    print("DISTURBED: not kept" if result["disturbed"] else "")
    if not result["disturbed"]:
        save_json(result, o.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
