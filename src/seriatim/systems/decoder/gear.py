"""GEAR: remember keys and values in a few bits each, near-losslessly.

Cheap rounding of the cache to 2 or 4 bits loses what a few large numbers and a few directions carry. GEAR keeps both
beside the rounded rest: the largest and smallest numbers of each vector as they are, and a low-rank correction of the
rounding error (Kang et al. 2024). The latest tokens stay exact until they are a whole block. Every token is drawn from
the model's law, given what it remembers; a draft adds nothing to the error, since blocks are compressed when they are
committed and no draft reaches past the end of one (`Target`, argument `codec`).

Tokens read what their own forward computes as it is, so a prompt is compressed behind its forwards, not within them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from seriatim.backbones.compressed import Codec
from seriatim.decoding.sample import SampleAll
from seriatim.laws.decoders import DecoderCase
from seriatim.systems.claim import Claim, Trial
from seriatim.systems.decoders import Ask, Decoding
from seriatim.systems.meta import Meta

META = Meta(
    key="gear",
    title="GEAR",
    family="decoder",
    modality="text",
    paper="GEAR: An Efficient KV Cache Compression Recipe for Near-Lossless Generative Inference of LLM (2024), "
    "arXiv 2403.05527",
    likelihood="relaxed",
    summary="Remembers keys and values in a few bits each, beside their outliers and a low-rank correction.",
)


@dataclass(frozen=True)
class Options:
    """bits: of each number; group: numbers that share bounds (None: all of a vector); outliers: share of numbers that
    are kept as they are; rank: of the correction, for each head and block; buffer: tokens that stay exact until they
    are a block. Neutral: a buffer as long as the text."""

    bits: int = 4
    group: int | None = None
    outliers: float = 0.02
    rank: int = 2
    buffer: int = 64


def decoder(ask: Ask) -> Decoding:
    """Sample what is read, and remember it compressed."""
    ask.no_source()
    return Decoding(SampleAll(ask.stop), target={"codec": codec_of(ask.options)})


def codec_of(o: Options) -> Codec:
    """How keys and values are kept."""
    return Codec(o.bits, o.group, o.outliers, o.rank, o.buffer)


SMALL = Options(bits=2, outliers=0.0, rank=1, buffer=2)  # so that tiny texts are compressed


def case() -> DecoderCase:
    """For the laws."""
    return DecoderCase(decoder, SMALL, neutral=replace(SMALL, buffer=1024))


def mutant() -> DecoderCase:
    """Compresses what ought to stay exact."""

    def hasty(ask: Ask) -> Decoding:
        return decoder(replace(ask, options=replace(ask.options, buffer=SMALL.buffer)))

    return DecoderCase(hasty, SMALL, neutral=replace(SMALL, buffer=1024))


def divergence(options: Options) -> Callable[[Any, int], Mapping[str, float]]:
    """Measures how far the law of the next token is from that of the exact cache, on held-out texts drawn by a seed."""

    def measure(system: Any, seed: int) -> Mapping[str, float]:
        from seriatim.data.base import load_data
        from seriatim.evaluation.compression import contexts, costs

        documents = load_data("stdlib", "text").test.documents
        texts = contexts(system, documents, length=768, count=8, seed=seed)
        return costs(system, texts, {"": codec_of(options)}, options.buffer)[""].figures()

    return measure


CLAIM = Claim(
    text="Outliers and a low-rank correction bring a cache of 2 bits nearer to the exact law of the next token "
    "(divergence in nats) than rounding alone; they take 4.25 against 2.5 bits a number, all included.",
    paper="near-lossless at 4 bits and at 2, where rounding alone is not; 2.29 times less memory at the peak",
    metric="divergence",
    arms={
        "gear": Trial("zoo:text-base", divergence(Options(bits=2))),
        "rounding": Trial("zoo:text-base", divergence(Options(bits=2, outliers=0.0, rank=0))),
    },
    ours="gear",
    baseline="rounding",
)
