"""Prompt lookup: draft what followed the last n tokens where they stood before.

No model is asked for the draft: an index of n-grams over prompt and output finds the most recent place where the text
ran as it runs now, and what came next there is verified in one forward (Saxena 2023). Pays where text is copied:
summaries, edits, tables. The draft is a point mass, so it is exact under every sampling.
"""

from __future__ import annotations

from dataclasses import dataclass

from seriatim.decoding.draft import NGram
from seriatim.decoding.verify import Walk
from seriatim.laws.decoders import DecoderCase, credulous
from seriatim.systems.decoders import Ask, Decoding
from seriatim.systems.meta import Meta

META = Meta(
    key="prompt-lookup",
    title="Prompt-lookup decoding",
    family="decoder",
    modality="text",
    paper="Prompt Lookup Decoding (2023), https://github.com/apoorvumang/prompt-lookup-decoding",
    likelihood="lossless",
    summary="Drafts what followed the last tokens where they stood before; nothing is trained.",
)


@dataclass(frozen=True)
class Options:
    """draft_length: most tokens of a draft; longest: of the n-grams that are looked up, down to 1; earliest, whole: of
    several places the first, and only where all tokens followed, as the Spec-Bench implementation chooses."""

    draft_length: int = 10
    longest: int = 3
    earliest: bool = False
    whole: bool = False


def decoder(ask: Ask) -> Decoding:
    """Look up, then sample and match."""
    ask.no_source()
    o = ask.options
    return Decoding(Walk(ask.stop), NGram(o.draft_length, range(o.longest, 0, -1), o.earliest, o.whole))


def case() -> DecoderCase:
    """For the laws: short n-grams, so that tiny texts repeat."""
    return DecoderCase(decoder, Options(draft_length=3, longest=2))


def mutant() -> DecoderCase:
    """Accepts whatever is drafted."""
    return DecoderCase(credulous, Options())
