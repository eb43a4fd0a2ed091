"""AdaBlock-dLLM: blocks that end where the text pauses.

Blocks of one length make a model wait with tokens that it is sure of behind the end, and hurry with those before it.
New: at each block's first forward the surest pause (a line's end) among the next tokens becomes the end of the block,
if the model is sure enough of it; else the block is as long as usual. All else is Fast-dLLM's: a threshold, and a cache
around the block (Lu et al. 2025).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch

from seriatim.decoding.blocks import Delimited, InBlocks
from seriatim.decoding.policy import OutsideBlock
from seriatim.decoding.sample import Select
from seriatim.laws.case import Limit
from seriatim.laws.unmasking import SAMPLINGS, UnmaskingCase, careless
from seriatim.systems.claim import Claim, Trial
from seriatim.systems.decoders import Ask, Decoding
from seriatim.systems.meta import Meta
from seriatim.systems.unmasking import fast_dllm
from seriatim.systems.unmasking.unmask import commit_of
from seriatim.systems.unmasking_trials import answers_of

META = Meta(
    key="adablock-dllm",
    title="AdaBlock-dLLM",
    family="unmasking",
    modality="text",
    paper="AdaBlock-dLLM: Semantic-Aware Diffusion LLM Inference via Adaptive Block Size (2025), arXiv 2509.26432",
    likelihood="relaxed",
    summary="Blocks end with the surest line end that the model expects among the next tokens.",
)


@dataclass(frozen=True)
class Options:
    """delimiters: letters at which blocks may end, in whatever token they stand; sure: how likely such a token must be
    (the paper: 0.3 for LLaDA, 0.5 for Dream; 2: never, and blocks are equal); block: tokens of a block otherwise;
    window: the share of all tokens among which ends are looked for; cache, threshold, rule: as of fast-dllm, without a
    threshold one token at a time. Neutral: one block as long as the text, no cache, no threshold."""

    delimiters: str = "\n"
    sure: float = 0.3
    block: int = 32
    window: float = 0.25
    cache: str = "dual"
    threshold: float | None = 0.9
    rule: str = "confidence"


def decoder(ask: Ask) -> Decoding:
    """Blocks found on the way."""
    ask.no_source()
    return delimited(ask, tokens_with(ask.system.tokenizer, ask.options.delimiters))


def delimited(ask: Ask, ids: tuple[int, ...]) -> Decoding:
    """The same with these tokens as ends."""
    o, size = ask.options, ask.system.model.layout.size
    if ask.own_blocks:
        raise ValueError(
            f"{ask.system.meta.key} decides blocks of {ask.own_blocks} tokens: there is no end to be found"
        )
    if o.cache not in ("none", "prefix", "dual"):
        raise ValueError(f"cache is none, prefix or dual, got {o.cache!r}")
    way = InBlocks(Select(o.rule, size, commit=commit_of(o)), Delimited(ids, o.sure, o.block, o.window), ask.stop)
    cache = {} if o.cache == "none" else {"policy": OutsideBlock(o.cache == "dual")}
    return Decoding(way, target=cache, block=size)


@lru_cache(maxsize=8)
def tokens_with(tokenizer: Any, letters: str) -> tuple[int, ...]:
    """The tokens that hold one of these letters."""
    known = range(tokenizer.vocab)
    return tuple(i for i in known if set(letters) & set(tokenizer.decode([i])))


# ---- what it claims --------------------------------------------------------------------------------------------------


def _arm(spec: str) -> Trial:
    return Trial("zoo:text-mdlm", answers_of("lines", spec))


CLAIM = Claim(
    text="On lists that are written out line by line, with a dual cache and the same threshold, blocks that end with "
    "lines give more right answers than blocks of 16 tokens; blocks of 4, 8 and 32 are further arms, and the forwards "
    "of each are told.",
    paper="up to 5.3 points of accuracy at equal throughput, the most with a dual cache (LLaDA, Dream)",
    metric="accuracy",
    arms={
        "adaptive": _arm("adablock-dllm+block=16+window=0.5"),
        **{f"blocks of {n}": _arm(f"fast-dllm+block={n}") for n in (4, 8, 16, 32)},
    },
    ours="adaptive",
    baseline="blocks of 16",
    better="higher",
    other_seeds=(0,),
)


# ---- laws ------------------------------------------------------------------------------------------------------------


def _with_ends(ask: Ask) -> Decoding:
    """One of the three tokens is an end."""
    return delimited(ask, (2,))


def _equal_blocks(cache: str) -> Limit:
    """Where nothing is sure enough to end a block: Fast-dLLM."""
    case = UnmaskingCase(_with_ends, Options(sure=2.0, block=4, cache=cache, threshold=0.4), blocks=False)
    (system,), texts = case.systems, []
    plain = replace(case, decoder=fast_dllm.decoder, options=fast_dllm.Options(cache, 4, 0.4))
    for one in (case, plain):
        told = []
        for sampling in SAMPLINGS:
            canvas, steps = one.write(system, sampling, one.decoding(system, sampling))
            told += [*canvas.value["token"][0].tolist(), *(step.slots for step in steps)]
        texts.append(torch.tensor(told))
    return Limit(f"ends never sure enough, {cache} cache: Fast-dLLM", texts[0], texts[1])


def case() -> UnmaskingCase:
    """For the laws."""
    neutral = Options(block=13, sure=2.0, cache="none", threshold=None)
    limits = tuple(partial(_equal_blocks, cache) for cache in ("none", "prefix", "dual"))
    options = Options(block=4, window=0.5, threshold=0.4)
    return UnmaskingCase(_with_ends, options, neutral=neutral, blocks=False, limits=limits)


def mutant() -> UnmaskingCase:
    """Decides whatever, at random."""
    return UnmaskingCase(careless, Options(), neutral=Options(block=13), blocks=False)
