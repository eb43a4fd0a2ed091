"""How fast language models generate: this library's engine beside Hugging Face's `generate`, in each number format.

    python benchmarks/decode.py [SIZE...] [--new-tokens 64] [--runs 5] [--out results/decode_speed.json]

Sizes: 6m, 30m, 110m, 1b (random weights, made once under SERIATIM_HOME/bench), smollm2 (`benchmarks/get_smollm2.py`).
Every arm is a process of its own that reads the same folder; they take turns, in random order in every run, and wait
without using a processor meanwhile. Greedy; the figure is the median over runs, a ratio that of two medians. Compiling
is timed apart. The share of bandwidth is what the weights that a token needs take, over what was read in its time, as
part of the rate at which this machine sums up a large tensor. `--llama PYTHON` adds llama-cpp-python from another
environment, on SmolLM2's own GGUF file and on the same in Q8_0.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from seriatim.home import HOME

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

THREADS, PROMPT, LONG, ROWS = 2, 32, 512, 8
TEXT, LETTERS = Path(__file__).parents[1] / "README.md", 3000  # whose perplexity is shown
SIZES = {
    "6m": {"width": 256, "depth": 8, "heads": 4, "kv": 4, "hidden": 640, "vocab": 4096},
    "30m": {"width": 512, "depth": 8, "heads": 8, "kv": 8, "hidden": 1408, "vocab": 8192},
    "110m": {"width": 768, "depth": 12, "heads": 12, "kv": 12, "hidden": 2048, "vocab": 32000},
    "1b": {"width": 2048, "depth": 16, "heads": 32, "kv": 8, "hidden": 8192, "vocab": 128256},
}
ARMS = ("hugging face", "eager", "compiled", "packed", "int8", "int8 compiled", "int4", "int4 compiled")
# times Hugging Face's bf16: the best of our bf16, and of our int8
GATES = {
    "bf16": {"6m": 2.7, "30m": 2.0, "110m": 1.4, "smollm2": 1.4, "1b": 1.05},
    "int8": {"30m": 3.5, "110m": 2.4, "smollm2": 2.4, "1b": 2.2},
    "batch": {"30m": 1.3},
}


def folder_of(size: str) -> Path:
    """The published folder of a size, made once."""
    if size == "smollm2":
        place = HOME / "models" / "smollm2-135m-instruct"
        if not (place / "config.json").is_file():
            raise SystemExit(f"there is no {place}; run benchmarks/get_smollm2.py first")
        return place
    place, s = HOME / "bench" / size, SIZES[size]
    if not (place / "config.json").is_file():
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=s["vocab"], hidden_size=s["width"], intermediate_size=s["hidden"], num_hidden_layers=s["depth"],
            num_attention_heads=s["heads"], num_key_value_heads=s["kv"], max_position_embeddings=2048,
            tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=None,
        )  # fmt: skip
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.dim() > 1:  # so that texts do not fall into a loop at once
                    p.normal_(0, 1.0 if "embed" in name else 1.5 / p.shape[1] ** 0.5)
        model.save_pretrained(place)
    return place


# ---- an arm, in a process of its own ---------------------------------------------------------------------------------


def worker(arm: str, place: str) -> None:
    """Answer requests on standard input, one JSON object a line, until it ends."""
    answering((_hugging_face if arm == "hugging face" else _llama if arm.startswith("llama") else _ours)(arm, place))


def answering(answer: Any) -> None:
    """Say that the model is there, then answer until nothing more is asked. answer: from rows of ids and how many
    tokens to write (0: the perplexity of a text) to what was written."""
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        if task["new"] == 0:
            print(json.dumps({"perplexity": answer(task["rows"], 0)}), flush=True)
            continue
        start = time.perf_counter()
        ids = answer(task["rows"], task["new"])
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "ids": ids, "peak": peak_memory()}), flush=True)


def peak_memory() -> int:
    """MiB that were resident at most, of this process alone (Linux; a child's `ru_maxrss` begins at its parent's)."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) // 2**10


def _ours(arm: str, place: str):
    import torch

    import seriatim

    torch.set_num_threads(THREADS)
    weights = arm.split()[0] if arm.startswith(("int", "packed")) else None
    model = seriatim.load(place, dtype=torch.bfloat16, weights=weights)
    if arm.endswith("compiled"):
        model.model.compile_decoding()

    def answer(rows: Any, new: int) -> Any:
        if new == 0:
            ids = torch.tensor([model.prompt_ids(rows)])
            return math.exp(-float(model.log_prob(ids)) / (ids.shape[1] - 1))
        return [g.ids for g in model.generate(rows, temperature=0, max_new_tokens=new, stop=())]

    return answer


def _hugging_face(arm: str, place: str):
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(THREADS)
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = None

    def answer(rows: list[list[int]], new: int) -> list[list[int]]:
        ids = torch.tensor(rows)
        settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        return out[:, ids.shape[1] :].tolist()

    return answer


def _llama(arm: str, place: str):
    from itertools import islice

    from llama_cpp import Llama

    model = Llama(place, n_ctx=2048, n_threads=THREADS, n_threads_batch=THREADS, verbose=False)

    def answer(rows: list[list[int]], new: int) -> list[list[int]]:
        model.reset()
        return [list(islice(model.generate(row, temp=0.0, reset=True), new)) for row in rows]

    return answer


class Arm:
    """The parent's end of a worker, which has loaded its model when this is made: one loads after the other."""

    def __init__(self, name: str, place: Path, python: str = sys.executable, file: str = __file__, decoder: str = ""):
        command = [python, file, "--worker", name, str(place), *([decoder] if decoder else [])]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._read()

    def ask(self, rows: Any, new: int) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"rows": rows, "new": new}) + "\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"an arm ended: {' '.join(map(str, self.process.args))}")
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


# ---- measuring -------------------------------------------------------------------------------------------------------


def bandwidth() -> float:
    """Bytes a second that this machine reads, at best."""
    import torch

    torch.set_num_threads(THREADS)
    x = torch.ones(2**27)  # half a gigabyte
    best = 1e9
    for _ in range(7):
        start = time.perf_counter()
        x.sum()
        best = min(best, time.perf_counter() - start)
    return x.nbytes / best


def bytes_a_token(place: Path, arm: str) -> float:
    """Of the weights that one token needs."""
    from safetensors import safe_open

    total = 0.0
    config = json.loads((place / "config.json").read_text())
    for file in place.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (no mapping)
                size = 1
                for n in tensors.get_slice(name).get_shape():
                    size *= n
                head = "lm_head" in name or ("embed" in name and config.get("tie_word_embeddings"))
                if "embed" in name and not head:
                    continue
                four = arm.startswith("int4") and not head and "norm" not in name
                total += size * (0.625 if four else 1 if arm.startswith("int") and "norm" not in name else 2)
    return total


def measure(size: str, runs: int, new: int, arms: dict[str, Arm]) -> dict[str, dict[str, Any]]:
    """Seconds of each arm and task."""
    place, order = folder_of(size), random.Random(0)
    vocab = json.loads((place / "config.json").read_text())["vocab_size"]
    prompt = [order.randrange(vocab) for _ in range(LONG + ROWS)]
    tasks = {"decode": ([prompt[:PROMPT]], new), "prefill": ([prompt[:LONG]], 1)}
    if size in GATES["batch"]:
        tasks["batch"] = ([prompt[i : i + PROMPT] for i in range(ROWS)], new)
    out: dict[str, dict[str, Any]] = {name: {} for name in arms}
    for name, arm in arms.items():  # one at a time, so that compiling is not timed with the rest
        first = arm.ask(*tasks["decode"])
        out[name]["peak MiB"], out[name]["first seconds"] = first["peak"], round(first["seconds"], 2)
        for task in tasks.values():
            arm.ask(*task)
        if size == "smollm2" and name in ARMS[1:]:
            out[name]["perplexity"] = round(arm.ask(TEXT.read_text(encoding="utf-8")[:LETTERS], 0)["perplexity"], 3)
    times: dict[tuple[str, str], list[float]] = {}
    for _ in range(runs):
        for task, request in tasks.items():
            for name in order.sample(list(arms), len(arms)):
                if task == "batch" and name.startswith("llama"):
                    continue
                answer = arms[name].ask(*request)
                times.setdefault((task, name), []).append(answer["seconds"])
                if task == "decode":
                    ids = answer["ids"][0]
                    out[name]["ids"], out[name]["distinct"] = ids, round(len(set(ids)) / len(ids), 2)
    for (task, name), seconds in times.items():
        count = {"decode": new, "prefill": LONG, "batch": new * ROWS}[task]
        out[name][f"{task} tokens/s"] = round(count / statistics.median(seconds), 1)
    return out


def compared(size: str, figures: dict[str, dict[str, Any]], rate: float) -> None:
    """Ratios to Hugging Face, shares of the bandwidth, and where texts part."""
    theirs = figures["hugging face"]
    reference = theirs["ids"]
    for name, f in figures.items():
        for task in ("decode", "prefill", "batch"):
            key = f"{task} tokens/s"
            if key in f and key in theirs:
                f[f"{task} ratio"] = round(f[key] / theirs[key], 2)
        if not name.startswith("llama"):
            f["share of bandwidth"] = round(bytes_a_token(folder_of(size), name) * f["decode tokens/s"] / rate, 2)
        pairs = zip(f.pop("ids"), reference, strict=True)
        f["same text until"] = next((i for i, (a, b) in enumerate(pairs) if a != b), len(reference))


def gates(size: str, figures: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Each gate: what was measured, what is demanded, whether it holds."""

    def best(key: str, *names: str) -> float:
        return max(figures[n][key] for n in names if n in figures)

    out: dict[str, dict[str, Any]] = {}
    for kind, names in (("bf16", ("eager", "compiled", "packed")), ("int8", ("int8", "int8 compiled"))):
        if size in GATES[kind]:
            out[kind] = {"is": best("decode ratio", *names), "least": GATES[kind][size]}
    if size in GATES["batch"]:
        out["batch of 8"] = {"is": best("batch ratio", "eager", "compiled", "packed"), "least": GATES["batch"][size]}
    if size in GATES["int8"]:
        four, eight = best("decode ratio", "int4", "int4 compiled"), best("decode ratio", "int8", "int8 compiled")
        out["int4 over int8"] = {"is": round(four / eight, 2), "least": 1.0}
    out["prefill"] = {"is": best("prefill ratio", "eager", "compiled"), "least": 1.0}
    out["peak memory"] = {"is": figures["eager"]["peak MiB"], "most": figures["hugging face"]["peak MiB"]}
    for gate in out.values():
        gate["holds"] = gate["is"] >= gate["least"] if "least" in gate else gate["is"] <= gate["most"]
    return out


def show(size: str, figures: dict[str, dict[str, Any]], held: dict[str, dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(key for f in figures.values() for key in f))
    print(f"\n{size}")
    print("  ".join(f"{c:>18}" for c in ["", *columns]))
    for name, f in figures.items():
        print(_row(name, f, columns))
    for name, gate in held.items():
        bound = f"at least {gate['least']}" if "least" in gate else f"at most {gate['most']}"
        print(f"  {'holds' if gate['holds'] else 'FAILS'}  {name}: {gate['is']} ({bound})")


def _row(name: str, figures: dict[str, Any], columns: list[str]) -> str:
    return "  ".join([f"{name:>18}", *(f"{'' if figures.get(c) is None else figures[c]!s:>18}" for c in columns)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", default=["6m", "30m", "110m", "smollm2"])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--arms", default=",".join(ARMS), help="which, between commas")
    parser.add_argument("--llama", metavar="PYTHON", help="a Python with llama-cpp-python, to put it beside on smollm2")
    parser.add_argument("--gguf", nargs="*", type=Path, default=[], help="files for it")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(*options.worker)
        return 0
    rate, results = bandwidth(), {}
    print(f"read bandwidth {rate / 1e9:.1f} GB/s; load {os.getloadavg()[0]:.2f}")
    for size in options.sizes:
        place = folder_of(size)
        arms = {name: Arm(name, place) for name in options.arms.split(",")}
        if options.llama and size == "smollm2":
            arms |= {f"llama.cpp {p.stem.rsplit('.')[-1]}": Arm("llama", p, options.llama) for p in options.gguf}
        try:
            figures = measure(size, options.runs, options.new_tokens, arms)
        finally:
            for arm in arms.values():
                arm.close()
        compared(size, figures, rate)
        held = gates(size, figures) if set(ARMS) <= set(figures) else {}
        show(size, figures, held)
        results[size] = {"arms": figures, "gates": held}
        if options.out:
            about = {"threads": THREADS, "prompt": PROMPT, "new tokens": options.new_tokens, "runs": options.runs}
            options.out.write_text(json.dumps({"bandwidth GB/s": round(rate / 1e9, 1), **about, **results}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
