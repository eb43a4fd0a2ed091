"""Beam search: keep the likeliest few beginnings, extend all of them, keep the likeliest again.

Looks for the likeliest text instead of drawing one, so it samples no law: at width 1 it is greedy decoding.
"""

from __future__ import annotations

from dataclasses import dataclass

from seriatim.decoding.beam import Beam
from seriatim.laws.decoders import DecoderCase, credulous
from seriatim.systems.decoders import Ask, Decoding
from seriatim.systems.meta import Meta

META = Meta(
    key="beam",
    title="Beam search",
    family="decoder",
    modality="text",
    paper="Sequence to Sequence Learning with Neural Networks (2014), arXiv 1409.3215",
    likelihood="relaxed",
    summary="Keeps the likeliest few beginnings of a text at every step.",
)


@dataclass(frozen=True)
class Options:
    """width: beginnings that are kept; penalty: the power of the length by which a text's log-probability is
    divided."""

    width: int = 4
    penalty: float = 0.0


def decoder(ask: Ask) -> Decoding:
    """The best texts, the likeliest first."""
    ask.no_source()
    return Decoding(Beam(ask.options.width, ask.stop, penalty=ask.options.penalty))


def case() -> DecoderCase:
    """For the laws: one beam is greedy decoding."""
    return DecoderCase(decoder, Options(width=1), greedy=True)


def mutant() -> DecoderCase:
    """Accepts whatever is drafted."""
    return DecoderCase(credulous, Options(), greedy=True)
