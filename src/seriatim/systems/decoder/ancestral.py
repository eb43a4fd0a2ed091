"""Ancestral decoding: one token a forward, each drawn from the model's own law. What every other decoder is measured
against."""

from __future__ import annotations

from dataclasses import dataclass

from seriatim.decoding.sample import SampleAll
from seriatim.laws.decoders import DecoderCase, credulous
from seriatim.systems.decoders import Ask, Decoding
from seriatim.systems.meta import Meta

META = Meta(
    key="ancestral",
    title="Ancestral decoding",
    family="decoder",
    modality="text",
    paper="Language Models are Unsupervised Multitask Learners (2019)",
    likelihood="lossless",
    summary="One token a forward, each drawn from the model's law.",
)


@dataclass(frozen=True)
class Options:
    """There are none."""


def decoder(ask: Ask) -> Decoding:
    """Sample what is read."""
    ask.no_source()
    return Decoding(SampleAll(ask.stop))


def case() -> DecoderCase:
    """For the laws."""
    return DecoderCase(decoder, Options())


def mutant() -> DecoderCase:
    """Accepts what it guesses, whatever the model says."""
    return DecoderCase(credulous, Options())
