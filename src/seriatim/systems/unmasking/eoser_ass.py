"""EOSER and ASS: ends of text wait, and each step decides twice as many tokens as the one before.

A masked model that was taught answers filled up with ends of text is sure of these first; decided early, they cut the
answer short. New: the confidence in an end counts less at first (EOS early rejection), so that no blocks are needed;
and steps of 1, 2, 4, 8, ... tokens, as what is known grows, take log2 of the length in all (ascending steps). In
several blocks each of the largest steps is a block, and the first block holds the others (Yang et al. 2025).

The paper's reinforcement learning on the very steps that were taken is `posttraining.policy`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import get_args

import torch

from seriatim.decoding.ending import LateEnds
from seriatim.decoding.sample import Schedule, schedule
from seriatim.decoding.unmask import Unmask
from seriatim.laws.case import Limit
from seriatim.laws.unmasking import SAMPLINGS, UnmaskingCase, careless
from seriatim.systems.claim import Claim, Trial
from seriatim.systems.decoders import Ask, Decoding
from seriatim.systems.meta import Meta
from seriatim.systems.unmasking import unmask
from seriatim.systems.unmasking.unmask import selected
from seriatim.systems.unmasking_trials import answers_of

META = Meta(
    key="eoser-ass",
    title="EOSER and ASS",
    family="unmasking",
    modality="text",
    paper="Taming Masked Diffusion Language Models via Consistency Trajectory Reinforcement Learning with Fewer "
    "Decoding Step (2025), arXiv 2509.23924",
    likelihood="relaxed",
    summary="Ends of text wait; steps of 1, 2, 4, 8, ... tokens.",
)


@dataclass(frozen=True)
class Options:
    """schedule: "powers" (ascending steps), or "linear", "cosine" or "quadratic" in the steps that are asked for;
    blocks: how many, of a model that has none of its own; least: the factor on the confidence in an end at the first
    step (1: ends do not wait; None: 0.01 under powers, else 0.4, as published). Neutral: linear, one block, a least of
    1."""

    schedule: str = "powers"
    blocks: int = 1
    least: float | None = None


def decoder(ask: Ask) -> Decoding:
    """Ends are what ends a row."""
    ask.no_source()
    return waiting(ask, ask.stop)


def waiting(ask: Ask, ids: tuple[int, ...]) -> Decoding:
    """These tokens wait."""
    o = ask.options
    if o.schedule not in get_args(Schedule):
        raise ValueError(f"schedule is {', '.join(get_args(Schedule))}, got {o.schedule!r}")
    if o.blocks < 1:
        raise ValueError(f"there is at least 1 block, got {o.blocks}")
    select = selected(ask, "confidence", None, o.schedule)
    least = (0.01 if o.schedule == "powers" else 0.4) if o.least is None else o.least
    late = replace(select, scorer=LateEnds(ids, least, select.steps, select.schedule))
    block = None if ask.own_blocks else partial(parted, blocks=o.blocks, kind=o.schedule)
    return Decoding(Unmask(late, ask.stop), block=block)


def parted(length: int, blocks: int, kind: Schedule) -> tuple[int, ...]:
    """The lengths of so many blocks. Under powers the last ones are a step each, the first holds all other steps: 128
    tokens in 4 blocks are 15, 16, 32 and 65. Else they are equal, as far as they can be. Raises ValueError for more
    blocks than there are steps, or tokens."""
    if kind == "powers":
        left = (length, *schedule(length, 1, kind))
        steps = [a - b for a, b in pairwise(left)]
    else:
        steps = [1] * length
    if blocks > len(steps):
        raise ValueError(f"{length} tokens are decided in {len(steps)} steps, and {blocks} blocks are asked for")
    if kind == "powers":
        first = len(steps) - blocks + 1
        return (sum(steps[:first]), *steps[first:])
    return tuple(length // blocks + (i < length % blocks) for i in range(blocks))


# ---- what it claims --------------------------------------------------------------------------------------------------


def _arm(spec: str, steps: int | None = None) -> Trial:
    return Trial("zoo:text-mdlm", answers_of("lists", spec, steps))


CLAIM = Claim(
    text="In ascending steps without blocks, a model that was taught lists of any length, filled up with ends of text, "
    "writes more of them right if ends wait than if they do not. Further arms: even steps, as many, with and without; "
    "blocks; one token at a time. The error of the length is told.",
    paper="full-canvas decoding comes up with decoding in blocks, in far fewer steps (LLaDA-8B: GSM8K, MATH, "
    "Countdown, sudoku)",
    metric="accuracy",
    arms={
        "ends wait": _arm("eoser-ass"),
        "ends do not wait": _arm("eoser-ass+least=1.0"),
        "even, ends wait": _arm("eoser-ass+schedule=linear", 4),
        "even, ends do not wait": _arm("eoser-ass+schedule=linear+least=1.0", 4),
        "blocks, ends wait": _arm("eoser-ass+blocks=4"),
        "blocks, ends do not wait": _arm("eoser-ass+blocks=4+least=1.0"),
        "one at a time": _arm("unmask"),
    },
    ours="ends wait",
    baseline="ends do not wait",
    better="higher",
    other_seeds=(0,),
)


# ---- laws ------------------------------------------------------------------------------------------------------------


def _waiting(ask: Ask) -> Decoding:
    """One of the three tokens is an end."""
    return waiting(ask, (2,))


def _ascending() -> Limit:
    """Where ends do not wait: plain unmasking in ascending steps."""
    case, texts = UnmaskingCase(_waiting, Options(least=1.0)), []
    plain = replace(case, decoder=unmask.decoder, options=unmask.Options(block=13, schedule="powers"), blocks=False)
    for one in (case, plain):
        told = []
        for sampling in SAMPLINGS:
            canvas, steps = one.write(case.systems[0], sampling, one.decoding(case.systems[0], sampling))
            told += [*canvas.value["token"][0].tolist(), len(steps)]
        texts.append(torch.tensor(told))
    return Limit("ends do not wait: ascending steps", texts[0], texts[1])


def case() -> UnmaskingCase:
    """For the laws: of the three tokens one is an end."""
    neutral = Options("linear", least=1.0)
    return UnmaskingCase(_waiting, Options(blocks=2), neutral=neutral, limits=(_ascending,))


def mutant() -> UnmaskingCase:
    """Decides whatever, at random."""
    return UnmaskingCase(careless, Options(), neutral=Options("linear", least=1.0))
