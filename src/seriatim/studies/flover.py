"""Flover: in-flight batching beside batches that nobody joins (Yao et al. 2023, arXiv 2305.13484).

Texts of random lengths are asked for at random times. In-flight, all of them are one batch that each joins when it
comes and leaves when it ends (`serving.engine`); beside it the same engine writes them one by one, in batches of fixed
size, and in those that come together within a window of time, each of which runs until its longest text ends. Whatever
the way, what a request gets is the same text.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from seriatim.evaluation.timelines import figures_of
from seriatim.serving.engine import Engine
from seriatim.serving.request import Request
from seriatim.serving.workload import Gathering, Story, poisson, serve
from seriatim.systems.claim import Claim, Trial
from seriatim.systems.meta import Meta
from seriatim.systems.system import Sampling

META = Meta(
    key="flover",
    title="Flover: in-flight batching",
    family="study",
    modality="text",
    paper="Flover: A Temporal Fusion Framework for Efficient Autoregressive Model Parallel Inference (2023), "
    "arXiv 2305.13484",
    likelihood="none",
    summary="Texts that come at random times, written as one batch that any may join at any step.",
)

MODEL, COUNT, ROWS = "zoo:text-base", 48, 16
PROMPTS, TEXTS = (32, 256), (32, 256)  # tokens, least and most
RATE = 1.5  # requests a second: about as many as are written one by one, fewer than in flight
WAYS: Mapping[str, Gathering] = {
    "in flight": Gathering(ROWS),
    "one by one": Gathering(1, 0.0),
    "batches of 16": Gathering(ROWS, float("inf")),
    "batches within 2 s": Gathering(ROWS, 2.0),
}


def requests_of(system: Any, count: int, seed: int, vocab: int | None = None) -> list[Request]:
    """Prompts from held-out documents (random ids where `vocab` is given), each with a length of its own."""
    rng, out = random.Random(seed), []
    ids: Sequence[int] = ()
    if vocab is None:
        from seriatim.data.base import load_data

        documents: Any = load_data("stdlib", "text").test
        ids = system.tokenizer.encode("\n".join(documents.documents[:200]))
    for i in range(count):
        length = rng.randint(*PROMPTS)
        start = rng.randrange(max(len(ids) - length, 1))
        prompt = [rng.randrange(vocab) for _ in range(length)] if vocab else ids[start : start + length]
        out.append(Request(tuple(prompt), rng.randint(*TEXTS), Sampling(temperature=0.7), seed=1000 * seed + i))
    return out


def told(system: Any, way: str, seed: int, rate: float = RATE, count: int = COUNT) -> list[Story]:
    """What became of the requests of a seed."""
    gathering, rows = WAYS[way], WAYS[way].most
    arrivals = poisson(requests_of(system, count, seed), rate, seed)
    return serve(lambda sink: Engine(system, ("ancestral",), sink, rows=rows), arrivals, gathering)


def timed(way: str) -> Callable[[Any, int], Mapping[str, Any]]:
    """A trial: the figures of one way, behind a request that warms up."""

    def measure(system: Any, seed: int) -> Mapping[str, Any]:
        warm = requests_of(system, 1, seed)
        serve(lambda sink: Engine(system, ("ancestral",), sink), poisson(warm, float("inf")), Gathering())
        return {**figures_of(told(system, way, seed)), "threads": torch.get_num_threads()}

    return measure


CLAIM = Claim(
    text="Texts of 32 to 256 tokens that are asked for at random times, 1.5 a second, are written at a smaller mean "
    "latency in flight than in batches of those that come within two seconds: at most two thirds of it.",
    paper="over 11 times (GPT-J) and 16 times (LLaMA) the throughput of FasterTransformer",
    metric="latency",
    arms={name: Trial(MODEL, timed(name)) for name in WAYS},
    ours="in flight",
    baseline="batches within 2 s",
    margin=1.5,
    seeds=(0, 1, 2),
    spread_seeds=(0, 1, 2),
    other_seeds=(0,),
)
