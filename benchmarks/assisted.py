"""Drafting beside Hugging Face's: its assisted generation and prompt lookup against ours, the same models and prompts.

    python benchmarks/assisted.py [--prompts 8] [--new-tokens 64] [--runs 3] [--out results/assisted.json]

Two pairs: SmolLM2-135M (`benchmarks/get_smollm2.py`) by lookup of what stood in the prompt, and zoo:text-base with
zoo:text-draft as its small model, both exported to Hugging Face's format under SERIATIM_HOME/bench. Prompts are
stretches of held-out files of the standard library, greedy, in bfloat16. Every arm is a process of its own that reads
the same folders; they take turns in random order, and wait without using a processor meanwhile. A prompt's seconds are
the median over runs; outputs that repeat themselves (by Hugging Face's plain output) are averaged apart.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
from pathlib import Path
from typing import Any

from decode import THREADS, Arm, answering

from seriatim.home import HOME

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

LOOPING = 0.3  # of distinct tokens, below which an output repeats itself
PAIRS: dict[str, dict[str, str]] = {  # arms: whose, and by which decoder; {draft}: the small model's folder
    "smollm2": {
        "hugging face": "ancestral", "hugging face prompt lookup": "lookup", "ours": "ancestral",
        "ours prompt-lookup": "prompt-lookup", "ours token-recycling": "token-recycling", "ours auto": "auto",
    },
    "text-base": {
        "hugging face": "ancestral", "hugging face assisted": "{draft}", "hugging face prompt lookup": "lookup",
        "ours": "ancestral", "ours assisted": "spec-sampling:{draft}", "ours tree": "tree-verify:{draft}",
        "ours prompt-lookup": "prompt-lookup",
    },
}  # fmt: skip


def places(pair: str) -> tuple[Path, Path | None]:
    """The folders of a model and its draft, exported once."""
    if pair == "smollm2":
        place = HOME / "models" / "smollm2-135m-instruct"
        if not (place / "config.json").is_file():
            raise SystemExit(f"there is no {place}; run benchmarks/get_smollm2.py first")
        return place, None
    import torch

    from seriatim.verbs.export import export

    made = []
    for name in ("text-base", "text-draft"):
        out = HOME / "bench" / name
        if not (out / "config.json").is_file():
            export(f"zoo:{name}", out, dtype=torch.bfloat16)
        made.append(out)
    return made[0], made[1]


# ---- an arm, in a process of its own ---------------------------------------------------------------------------------


def worker(arm: str, place: str, decoder: str) -> None:
    """Answer requests on standard input, one JSON object a line, until it ends."""
    answering((_hugging_face if arm.startswith("hugging face") else _ours)(place, decoder))


def _ours(place: str, decoder: str):
    import torch

    import seriatim

    torch.set_num_threads(THREADS)
    model = seriatim.load(place, dtype=torch.bfloat16, weights="packed")
    return lambda rows, new: [g.ids for g in model.generate(rows, decoder, temperature=0, max_new_tokens=new, stop=())]


def _hugging_face(place: str, decoder: str):
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(THREADS)

    def loaded(folder: str) -> Any:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        model.generation_config.eos_token_id = None
        return model

    model, more = loaded(place), {}
    if decoder == "lookup":
        more["prompt_lookup_num_tokens"] = 10
    elif decoder != "ancestral":
        more["assistant_model"] = loaded(decoder)

    def answer(rows: list[list[int]], new: int) -> list[list[int]]:
        ids = torch.tensor(rows)
        settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0, **more}
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        return out[:, ids.shape[1] :].tolist()

    return answer


# ---- measuring -------------------------------------------------------------------------------------------------------


def measure(pair: str, count: int, new: int, runs: int) -> dict[str, Any]:
    """Tokens a second of each arm, and their ratios to the same of Hugging Face's."""
    import seriatim
    from seriatim.systems.trials import held_out

    place, draft = places(pair)
    prompts = held_out(seriatim.load(place), count)
    arms = {n: Arm(n, place, decoder=d.format(draft=draft), file=__file__) for n, d in PAIRS[pair].items()}
    seconds: dict[str, list[list[float]]] = {name: [[] for _ in prompts] for name in arms}
    texts: dict[str, list[list[int]]] = {name: [[] for _ in prompts] for name in arms}
    order = random.Random(0)
    try:
        for arm in arms.values():
            arm.ask([prompts[0]], new)
        for _ in range(runs):
            for n, prompt in enumerate(prompts):
                for name in order.sample(list(arms), len(arms)):
                    answer = arms[name].ask([prompt], new)
                    seconds[name][n].append(answer["seconds"])
                    texts[name][n] = answer["ids"][0]
    finally:
        for arm in arms.values():
            arm.close()
    plain = texts["hugging face"]
    loops = [len(set(ids)) / len(ids) < LOOPING for ids in plain]
    out: dict[str, Any] = {"prompts": count, "looping": sum(loops), "arms": {}}
    for name, own in seconds.items():
        figures: dict[str, Any] = {"same texts": sum(a == b for a, b in zip(texts[name], plain, strict=True))}
        for which, wanted in (("varied", False), ("repeating", True)):
            some = [statistics.median(s) for s, looping in zip(own, loops, strict=True) if looping == wanted]
            if some:
                figures[f"{which} tokens/s"] = round(new * len(some) / sum(some), 1)
        out["arms"][name] = figures
    return out


def show(pair: str, result: dict[str, Any]) -> None:
    print(f"\n{pair}: {result['prompts']} prompts, of which {result['looping']} are continued by repetition")
    theirs = result["arms"]["hugging face"]
    for name, figures in result["arms"].items():
        parts = [
            f"{k} {v}" + (f" ({v / theirs[k]:.2f})" if k in theirs and k != "same texts" else "")
            for k, v in figures.items()
        ]
        print(f"  {name:28} {'  '.join(parts)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", nargs="*", default=list(PAIRS), help=f"of {', '.join(PAIRS)}")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(*options.worker)
        return 0
    print(f"load {os.getloadavg()[0]:.2f}")
    results: dict[str, Any] = {"threads": THREADS, "new tokens": options.new_tokens, "runs": options.runs}
    for pair in options.pairs:
        results[pair] = measure(pair, options.prompts, options.new_tokens, options.runs)
        show(pair, results[pair])
        if options.out:
            options.out.write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
