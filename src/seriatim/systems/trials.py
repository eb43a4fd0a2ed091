"""Trials of decoders, as claims state them: tokens a forward on held-out texts, by a loaded model.

Accepted lengths do not depend on the machine, nor on what else it does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from seriatim.canvas import Set
from seriatim.data.base import load_data
from seriatim.decoding.loop import Step, decode
from seriatim.evaluation.metrics import LOOPING, token_entropy
from seriatim.posttraining.parallel import begun
from seriatim.random import Keyed
from seriatim.systems.decoders import decoder_of, forget
from seriatim.systems.system import Sampling

TEMPERATURE = 0.7


def held_out(system: Any, count: int = 16, length: int = 200) -> list[list[int]]:
    """Stretches of so many tokens from held-out files of the standard library: one of each file, behind its first
    lines, which are alike; then another of each, ... Raises ValueError where there are not so many."""
    encode = getattr(system, "prompt_ids", system.tokenizer.encode)
    files = [encode(text) for text in load_data("stdlib", "text").test.documents]
    found: list[list[int]] = []
    start = length
    while len(found) < count:
        some = [ids[start : start + length] for ids in files if len(ids) >= start + length]
        if not some:
            raise ValueError(f"the held-out files have {len(found)} stretches of {length} tokens, not {count}")
        found += some
        start += 2 * length
    return found[:count]


@dataclass(frozen=True)
class Continued:
    """What stands behind prompts, the steps that it took, and seconds."""

    ids: list[list[int]]
    steps: list[Step]
    seconds: float

    @property
    def active(self) -> list[int]:
        """Of each step, how many rows it decides something of."""
        rows = len(self.ids)
        sets = ([e for e in step.edits if isinstance(e, Set)] for step in self.steps)
        return [sum(rows if e.element is None else int((e.element >= 0).any(1).sum()) for e in edits) for edits in sets]


def continued(
    system: Any, prompts: Sequence[Sequence[int]], length: int, decoder: str, sampling: Sampling, seed: int = 0
) -> Continued:
    """So many tokens behind prompts of equal lengths, side by side, by a model that decides tokens in any order;
    nothing ends a text earlier."""
    way = decoder_of(system, decoder, sampling, ())
    canvas = begun(system, torch.tensor(prompts), length, way.block)
    target, start = system.target(None, sampling, **way.target), time.perf_counter()
    with torch.inference_mode():
        steps = list(decode(target, canvas, way.decider, way.proposer, Keyed(seed)))
    ids = canvas.value["token"][:, len(prompts[0]) :].tolist()
    return Continued(ids, steps, time.perf_counter() - start)


def quality(
    prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]], judge: Any = "zoo:text-base"
) -> tuple[float, float]:
    """Nats a token that a next-token model of the same ids finds in texts behind their prompts, and the entropy in bits
    of all their tokens: the one alone rewards dull texts."""
    from seriatim.verbs.load import load

    said: Any = load(judge) if isinstance(judge, str) else judge
    scores = [said.scores([*before, *text], len(text)) for before, text in zip(prompts, texts, strict=True)]
    return -sum(map(sum, scores)) / sum(map(len, scores)), token_entropy(texts)


def tokens_per_forward(
    decoder: str, prompts: int = 16, new_tokens: int = 128, length: int = 200
) -> Callable[[Any, int], Mapping[str, Any]]:
    """How many tokens a decoder writes by one forward, on prompts of `length` tokens that it sees one after another and
    each once; a decoder that learns begins with nothing. Outputs that repeat themselves are easy to draft, and counted
    apart."""

    def measure(system: Any, seed: int) -> Mapping[str, Any]:
        forget(system)
        counts = {False: [0, 0], True: [0, 0]}
        for n, prompt in enumerate(held_out(system, prompts, length)):
            made = system.generate(
                prompt, decoder, max_new_tokens=new_tokens, temperature=TEMPERATURE, seed=1000 * seed + n
            )
            own = counts[_loops(made.ids)]
            own[0], own[1] = own[0] + len(made.ids), own[1] + made.forwards
        (tokens, forwards), (looping, looping_forwards) = counts[False], counts[True]
        return {
            "tokens_per_forward": tokens / max(forwards, 1), "tokens": tokens, "forwards": forwards,
            "looping_tokens_per_forward": looping / looping_forwards if looping_forwards else None,
            "looping_tokens": looping,
        }  # fmt: skip

    return measure


def _loops(ids: Sequence[int]) -> bool:
    return len(set(ids)) / len(ids) < LOOPING
