"""Whether a decoder writes what plain decoding of the same model writes, and how that is known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from seriatim.backbones.quantize import is_rounded
from seriatim.canvas import Canvas
from seriatim.decoding.guess import Guess
from seriatim.decoding.loop import Step, decode
from seriatim.decoding.sample import SampleAll
from seriatim.evaluation.bench import Prompt, Runs
from seriatim.evaluation.lossless import DEPTH, ERROR, STEPS, Outcome, allowed, divergences, two_samples
from seriatim.model import Rows
from seriatim.random import Random
from seriatim.systems.decoders import is_relaxed
from seriatim.systems.encoder_decoder import EncoderDecoder
from seriatim.systems.language_model import LanguageModel
from seriatim.systems.system import Sampling, evenly

PROMPTS = 4  # over which draws are spread
ROWS = 256  # that are drawn together


@dataclass(frozen=True)
class Sampled:
    """First tokens of texts, each behind the number of its prompt; drafted: tokens that were suggested for them."""

    outcomes: tuple[Outcome, ...]
    drafted: int


def lossless(
    system: LanguageModel, name: str, given: Sequence[Prompt], ours: Runs, plain: Runs, new: int, temperature: float,
    drawn: tuple[Sampled, Sampled] | None,
) -> dict[str, Any]:  # fmt: skip
    """The verdict on one decoder (holds, fails, not tested, not claimed), the rule, and what was found. new: tokens
    that were asked for; drawn: first tokens by this decoder and by plain decoding, if they were drawn."""
    if is_relaxed(name):
        return {"verdict": "not claimed", "rule": "it is relaxed on purpose: look at the quality of what it writes"}
    a, b = ([runs[0].ids for runs in side] for side in (ours, plain))
    if temperature == 0:
        return _greedy(system, given, a, b, new)
    equal = sum(x == y for x, y in zip(a, b, strict=True))
    found = {"equal_texts": equal, "texts": len(a)}
    if drawn:
        return {**_by_draws(*drawn), **found}
    if equal == len(a):
        return {"verdict": "holds", "rule": "equal texts by the same noise", **found}
    return {"verdict": "not tested", "rule": "texts differ: a test of two samples decides, by --draws 10000", **found}


def _greedy(
    system: LanguageModel, given: Sequence[Prompt], ours: Sequence[Sequence[int]], plain: Sequence[Sequence[int]],
    new: int,
) -> dict[str, Any]:  # fmt: skip
    dtype = dtype_of(system)
    integers = is_rounded(system.model)
    again = (lambda n, said: _in_one_pass(system, given[n], said)) if integers else None
    found = divergences(ours, plain, lambda n, said: plain_row(system, given[n], len(said), new), dtype, again)
    rule = "equal texts"
    if torch.finfo(dtype).bits == 16:
        rule += f", or the two tokens' logits differ by less than {STEPS} steps of {str(dtype).removeprefix('torch.')}"
        rule += ", or than single steps and one pass of the model itself do" if integers else ""
    finite = [d.steps for d in found if d.steps < math.inf]
    return {
        "verdict": "holds" if allowed(found, dtype) else "fails",
        "rule": rule,
        "equal_texts": len(ours) - len(found),
        "texts": len(ours),
        "divergences_per_1000_tokens": 1000 * len(found) / sum(map(len, plain)),
        "largest_steps": max(finite, default=0.0),
        "divergences": [
            {"prompt": d.prompt, "at": d.at, "steps": d.steps if d.steps < math.inf else None, "noise": d.noise}
            for d in found
        ],
    }


def dtype_of(system: LanguageModel) -> torch.dtype:
    """The number format a model computes in."""
    return next(p.dtype for p in system.model.parameters() if p.is_floating_point())


class _Kept(SampleAll):
    """Plain decoding that keeps the row it has read last."""

    def decide(self, canvas: Canvas, guess: Guess | None, rows: Rows, random: Random) -> Step:
        self.row = rows.dist.logits[0, -1]
        return super().decide(canvas, guess, rows, random)


def plain_row(system: LanguageModel, prompt: Prompt, at: int, new: int) -> Float[Tensor, " v"]:
    """The logits from which plain greedy decoding takes token number `at`, met as it met them: more rows in the same
    forward would round them otherwise."""
    bound, ids = system, list(prompt.ids)
    if isinstance(system, EncoderDecoder):
        bound, ids = system.answering(torch.tensor([ids])), [system.start]
    decider, target = _Kept(), bound.target(None, Sampling(temperature=0.0))
    with torch.inference_mode():
        canvas = bound._begun([ids], new)
        target.prefill(canvas)
        for _ in zip(range(at + 1), decode(target, canvas, decider), strict=False):
            pass
    return decider.row


def _in_one_pass(system: LanguageModel, prompt: Prompt, said: Sequence[int]) -> Float[Tensor, " v"]:
    """The logits of what follows, by one forward over the whole text."""
    bound, ids = system, list(prompt.ids)
    if isinstance(system, EncoderDecoder):
        bound, ids = system.answering(torch.tensor([ids])), [system.start]
    return bound.logits(torch.tensor([[*ids, *said]]))[0, -1]


def sampled(
    system: LanguageModel, name: str, given: Sequence[Prompt], draws: int, temperature: float, seed: int
) -> Sampled:
    """The first tokens of `draws` texts, spread over a few prompts. seed: of the first rows; others take those behind
    it, fewer than `draws`."""
    chosen = evenly(len(given), PROMPTS).tolist()
    outcomes: list[Outcome] = []
    drafted = 0
    for i, n in enumerate(chosen):
        left = draws // len(chosen) + (i < draws % len(chosen))
        while left:
            rows = min(left, ROWS)
            made = system.generate(
                [list(given[n].ids)], name, n=rows, max_new_tokens=DEPTH, temperature=temperature,
                seed=seed + len(outcomes),
            )  # fmt: skip
            assert isinstance(made, list)
            outcomes += [(n, *g.ids) for g in made]
            drafted += sum(int(g.drafted) for g in made)
            left -= rows
    return Sampled(tuple(outcomes), drafted)


def _by_draws(ours: Sampled, plain: Sampled) -> dict[str, Any]:
    rule = f"two samples of {len(ours.outcomes):,} texts, first {DEPTH} tokens, error rate {ERROR}"
    if not ours.drafted:
        return {"verdict": "not tested", "rule": rule + ": nothing was drafted, so the test says nothing"}
    p = two_samples(ours.outcomes, plain.outcomes)
    return {"verdict": "holds" if p >= ERROR else "fails", "rule": rule, "p_value": p, "drafted": ours.drafted}
