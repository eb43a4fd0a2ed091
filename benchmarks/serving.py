"""Many texts at once: in flight beside one by one and beside Hugging Face's batches, and how long clients wait.

    python benchmarks/serving.py FOLDER [--streams 32] [--count 96] [--dtype bfloat16] [--arms ...] [--open 0.7]
        [--least 6] [--out results/serving.json]

FOLDER is a language model in Hugging Face's format (`seriatim export zoo:text-base FOLDER` writes one). A closed loop:
so many clients, each of which asks for the next text when it has its last one; prompts of 32 to 512 tokens, texts of 32
to 256. Tokens a second are counted from when each client has had a text until the last text is asked for. Hugging Face
writes padded batches of up to 16 with `generate`, each until its longest text ends (what is written beyond a text is
not counted), and by its own continuous batching, where this version has it. Every arm is a process of its own.

Then an open loop: requests come at random times, at a share (`--open`) of the tokens a second of the closed one; how
long the first token takes, beside reading such a prompt alone, and how long the next, beside a step of one row.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from collections import deque
from pathlib import Path
from typing import Any

from decode import THREADS, Arm, answering

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

ARMS = ("one by one", "in flight", "hugging face, batches", "hugging face, continuous")
PROMPTS, TEXTS, MOST = (32, 512), (32, 256), 16
GATES = {"hugging face, batches": 1.5, "hugging face, continuous": 1.5}


def asked(count: int, vocab: int, seed: int) -> list[tuple[list[int], int]]:
    """Prompts of random ids, and how many tokens are to follow."""
    rng = random.Random(seed)
    return [
        ([rng.randrange(vocab) for _ in range(rng.randint(*PROMPTS))], rng.randint(*TEXTS)) for _ in range(count)
    ]  # fmt: skip


# ---- arms ------------------------------------------------------------------------------------------------------------


def ours(place: str, dtype: str, rows: int) -> Any:
    """An answer by the engine; what is asked for says how."""
    import torch

    import seriatim
    from seriatim.evaluation.timelines import figures_of
    from seriatim.serving.engine import Engine
    from seriatim.serving.request import Request
    from seriatim.serving.workload import Arrival, Gathering, closed, poisson, serve, steady
    from seriatim.systems.system import Sampling

    system: Any = seriatim.load(place, dtype=dtype)
    type(system).stop = property(lambda self: ())  # every text is as long as was asked for
    vocab = system.model.heads["token"].vocab

    def made(sink: Any) -> Engine:
        return Engine(system, ("ancestral",), sink, rows=rows)

    def answer(task: Any, new: int) -> Any:
        texts = asked(task["count"], vocab, task["seed"])
        requests = [Request(tuple(p), n, Sampling(temperature=0.0)) for p, n in texts]
        with torch.inference_mode():
            if "rate" in task:
                return figures_of(serve(made, poisson(requests, task["rate"], task["seed"]), Gathering(rows)))
            if task.get("alone"):
                stories = [serve(made, [Arrival(0.0, r)], Gathering(1))[0] for r in requests]
                gaps = [g for s in stories for g in s.gaps]
                return {"first": statistics.median(s.first for s in stories), "step": statistics.median(gaps)}
            return {"tokens_per_second": steady(closed(made, requests, task["streams"]), task["streams"])}

    return answer


def hugging_face(place: str, dtype: str, continuous: bool) -> Any:
    """The same by `generate`, or by continuous batching."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(place, dtype=getattr(torch, dtype)).eval()
    if continuous and not hasattr(model, "generate_batch"):
        raise RuntimeError("this version of transformers has no continuous batching")
    vocab = model.config.vocab_size

    def batches(task: Any) -> float:
        waiting, total, start = deque(asked(task["count"], vocab, task["seed"])), 0, 0.0
        first = True
        while waiting:
            batch = [waiting.popleft() for _ in range(min(MOST, len(waiting)))]
            longest = max(len(p) for p, _ in batch)
            ids = torch.tensor([[0] * (longest - len(p)) + p for p, _ in batch])
            mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p, _ in batch])
            new = max(n for _, n in batch)
            if not first and start == 0.0:
                start = time.perf_counter()
            model.generate(
                ids, attention_mask=mask, do_sample=False, max_new_tokens=new, min_new_tokens=new, pad_token_id=0
            )
            total += 0 if first else sum(n for _, n in batch)
            first = False
        return total / (time.perf_counter() - start)

    def flowing(task: Any) -> float:
        texts = asked(task["count"], vocab, task["seed"])
        longest = max(n for _, n in texts)
        how = GenerationConfig(max_new_tokens=longest, do_sample=False, eos_token_id=-1, pad_token_id=0)
        start = time.perf_counter()
        made = model.generate_batch([p for p, _ in texts], generation_config=how)
        total = sum(min(len(o.generated_tokens), longest) for o in made.values())
        if total == 0:
            raise RuntimeError("its continuous batching wrote nothing")
        return total / (time.perf_counter() - start)

    def answer(task: Any, new: int) -> Any:
        with torch.no_grad():  # its continuous batching runs in a thread of its own, which inference mode would break
            return {"tokens_per_second": (flowing if continuous else batches)(task)}

    return answer


def worker(name: str, place: str, dtype: str) -> None:
    """Answer as an arm."""
    import torch

    torch.set_num_threads(THREADS)
    if name.startswith("hugging face"):
        answering(hugging_face(place, dtype, name.endswith("continuous")))
    else:
        answering(ours(place, dtype, 1 if name == "one by one" else 32))


# ---- measuring -------------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--count", type=int, default=96, help="texts of the closed loop")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--arms", default=";".join(ARMS), help="with semicolons between")
    parser.add_argument("--least", type=float, default=6.0, help="times one by one that are asked for")
    parser.add_argument("--open", type=float, default=0.7, help="share of the closed loop's tokens a second; 0: none")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(*options.worker)
        return 0
    if options.folder is None:
        parser.error("name the folder of a model")
    from seriatim.evaluation.cost import DISTURBED, Others, load_average
    from seriatim.verbs.claim import commit, machine

    others, speeds, peaks = Others(), dict[str, float](), dict[str, int]()
    waits: dict[str, Any] = {}
    result: dict[str, Any] = {"disturbed": False}
    for name in options.arms.split(";"):
        try:
            arm = Arm(name, options.folder, file=__file__, decoder=options.dtype)
        except RuntimeError as error:
            print(f"{name:26s} cannot be run: {error}")
            continue
        few = max(options.count // 8, 4) if name == "one by one" else options.count
        streams = 1 if name == "one by one" else options.streams
        answer = arm.ask({"count": few, "seed": 0, "streams": streams}, 1)
        speeds[name], peaks[name] = answer["ids"]["tokens_per_second"], answer["peak"]
        print(f"{name:26s} {speeds[name]:8.1f} tokens/s   peak {peaks[name]} MiB", flush=True)
        if name == "in flight" and options.open:
            waits = open_loop(arm, options.open * speeds[name] / statistics.fmean(TEXTS), options.count // 2)
        arm.close()
        used = others.share()
        result = {
            "model": options.folder.name, "dtype": options.dtype, "streams": options.streams,
            "tokens_per_second": speeds, "peak MiB": peaks, "ratios": found_ratios(speeds, options.least),
            "open loop": waits, "threads": THREADS, "others": used, "disturbed": used is None or used > DISTURBED,
            "load_average": load_average(), "machine": machine(), "commit": commit(),
        }  # fmt: skip
        if options.out:  # after every arm: a slow one may be cut off
            options.out.write_text(json.dumps(result, indent=2) + "\n")
    for name, ratio in found_ratios(speeds, options.least).items():
        said = "holds" if ratio["holds"] else "FAILS"
        print(f"in flight over {name}: {ratio['ratio']:.2f} (at least {ratio['gate']}): {said}")
    print("DISTURBED: the seconds mean nothing" if result["disturbed"] else "")
    return 0


def open_loop(arm: Arm, rate: float, count: int) -> dict[str, Any]:
    """How long clients wait who come at random times, `rate` of them a second."""
    alone = arm.ask({"count": 5, "seed": 1, "alone": True}, 1)["ids"]
    found = arm.ask({"count": count, "seed": 2, "rate": rate}, 1)["ids"]
    first, gap = found["first"] / alone["first"], found["gap_99"] / alone["step"]
    print(
        f"open loop, {rate:.2f} requests/s: first token {found['first']:.2f} s in the median, {first:.1f} times that "
        f"of a prompt alone (at most 3); 99 of 100 gaps up to {found['gap_99'] * 1e3:.0f} ms, {gap:.1f} steps of one "
        "row (at most 4)"
    )
    return {"rate": rate, "alone": alone, **found, "first over alone": first, "gap_99 over a step": gap}


def found_ratios(speeds: dict[str, float], least: float) -> dict[str, dict[str, Any]]:
    """How many times as fast all in flight are as each other arm that was run."""
    out = {}
    for name, gate in {"one by one": least, **GATES}.items():
        if name in speeds and "in flight" in speeds:
            ratio = speeds["in flight"] / speeds[name]
            out[name] = {"ratio": ratio, "gate": gate, "holds": ratio >= gate}
    return out


if __name__ == "__main__":
    raise SystemExit(main())
