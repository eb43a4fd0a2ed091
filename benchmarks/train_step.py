"""How fast a training step is, against a Hugging Face Llama of the same shape.

Both train the same 7 M parameters on the same batches with bf16 autocast and fused AdamW, interleaved, eager and
compiled. Run: `python benchmarks/train_step.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from seriatim.random import Generator
from seriatim.systems.text.next_token import Config, NextToken
from seriatim.training.recipe import Recipe
from seriatim.training.trainer import adamw, compile_layers

SIZE = {"vocab": 4096, "width": 256, "depth": 8, "heads": 4, "hidden": 640, "tied": True}
GATES = {"eager": 1.2, "compiled": 1.0}


def ours(length: int, compiled: bool) -> Callable[[Tensor], None]:
    """A step of this library's."""
    system = NextToken(Config(length=length, **SIZE))
    system.train()
    if compiled:
        compile_layers(system)
    optimizer, random = adamw(system, Recipe(1)), Generator()

    def step(ids: Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            total, count = system({"token": ids}, random, 0, 1)
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(system.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def hugging_face(length: int, compiled: bool) -> Callable[[Tensor], None]:
    """A step of the same shape and settings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=SIZE["vocab"], hidden_size=256, intermediate_size=640, num_hidden_layers=8,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=length, tie_word_embeddings=True,
        )
    )  # fmt: skip
    model.train()
    run = torch.compile(model) if compiled else model
    optimizer = adamw(model, Recipe(1))

    def step(ids: Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = run(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--eager-only", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ids = torch.randint(SIZE["vocab"], (options.batch, options.length), generator=torch.Generator().manual_seed(0))
    arms = {}
    for mode in ("eager",) if options.eager_only else ("eager", "compiled"):
        arms[f"seriatim, {mode}"] = ours(options.length, mode == "compiled")
        arms[f"hugging face, {mode}"] = hugging_face(options.length, mode == "compiled")
    took: dict[str, list[float]] = {name: [] for name in arms}
    for run in range(options.runs + 2):
        for name, step in arms.items():
            start = time.perf_counter()
            step(ids)
            if run >= 2:  # the first compile and warm up
                took[name].append(time.perf_counter() - start)
    speed = {name: ids.numel() / statistics.median(t) for name, t in took.items()}
    for name, tokens in speed.items():
        print(f"{name:24s} {tokens:8.0f} tokens/s  (median step {statistics.median(took[name]):.3f} s)")
    held = True
    for mode, gate in GATES.items():
        if f"seriatim, {mode}" in speed:
            ratio = speed[f"seriatim, {mode}"] / speed[f"hugging face, {mode}"]
            held &= ratio >= gate
            print(
                f"  {'holds' if ratio >= gate else 'FAILS'}: {mode}, {ratio:.2f} times Hugging Face (at least {gate})"
            )
    print(f"load average {os.getloadavg()[0]:.2f}")
    if options.out:
        options.out.write_text(json.dumps(speed, indent=2) + "\n")
    return 0 if held else 1


if __name__ == "__main__":
    raise SystemExit(main())
