"""Jacobi decoding: the model drafts for itself in a window that slides over the text.

Every forward reads a whole window; what it says of the tokens behind the first wrong one is the next draft (Santilli et
al. 2023). Here tokens are drawn and matched, so the law is exact at every temperature; `sjd` accepts by the ratio of
old and new rows instead.
"""

from __future__ import annotations

from dataclasses import dataclass

from seriatim.decoding.jacobi import Window
from seriatim.decoding.verify import Walk
from seriatim.laws.decoders import DecoderCase, credulous
from seriatim.systems.decoders import Ask, Decoding
from seriatim.systems.meta import Meta

META = Meta(
    key="jacobi",
    title="Jacobi decoding",
    family="decoder",
    modality="text",
    paper="Accelerating Transformer Inference for Translation via Parallel Decoding (2023), arXiv 2305.10427",
    likelihood="lossless",
    summary="The model drafts for itself: the rows behind the first wrong token are the next draft.",
)


@dataclass(frozen=True)
class Options:
    """window: tokens that are drafted at once."""

    window: int = 8


def decoder(ask: Ask) -> Decoding:
    """A window, sampled and matched."""
    ask.no_source()
    return Decoding(Walk(ask.stop), Window(ask.options.window))


def case() -> DecoderCase:
    """For the laws."""
    return DecoderCase(decoder, Options(window=2))


def mutant() -> DecoderCase:
    """Accepts whatever is drafted."""
    return DecoderCase(credulous, Options())
