"""Drafts that pay, chosen while decoding: which drafter and how large a tree.

Every drafter loses somewhere: lookup on prose, trees where the text is random, all of them where a forward over many
rows is dear. Here the curve of what a forward costs on this machine is measured once, and at each step the draft is
verified that promises most tokens a second, or none. How often drafts stand is learned from the text itself, also of
drafts that were not verified, so that trying out costs nothing; where nothing pays, decoding is plain.
"""

from __future__ import annotations

from dataclasses import dataclass

from seriatim.decoding.auto import Auto
from seriatim.decoding.verify import Walk
from seriatim.evaluation.forward_cost import forward_cost
from seriatim.laws.decoders import DecoderCase, credulous
from seriatim.systems.decoders import Ask, Decoding, decoder_of
from seriatim.systems.meta import Meta

META = Meta(
    key="auto",
    title="Drafts that pay",
    family="decoder",
    modality="text",
    paper="Sequoia: Scalable, Robust, and Hardware-aware Speculative Decoding (2024), arXiv 2402.12374",
    likelihood="lossless",
    summary="At each step the drafter and the tree that promise most tokens a second here, or plain decoding.",
)


@dataclass(frozen=True)
class Options:
    """nodes: of a draft at most; drafters: which of them without a source, between spaces; a source (auto:SPEC) adds
    one more, such as trained heads (auto:hydra:DIR)."""

    nodes: int = 16
    drafters: str = "prompt-lookup token-recycling+nodes=16"


def decoder(ask: Ask) -> Decoding:
    """What the drafters offer, chosen by the curve of this model on this machine."""
    cost = forward_cost(ask.system)
    return Decoding(Walk(ask.stop), Auto(_proposers(ask), cost.at, ask.options.nodes))


def _proposers(ask: Ask) -> list:
    specs = ask.options.drafters.split() + ([ask.source] if ask.source else [])
    ways = [decoder_of(ask.system, spec, ask.sampling, ask.stop) for spec in specs]
    for spec, way in zip(specs, ways, strict=True):
        if not isinstance(way.decider, Walk) or way.proposer is None or way.target:
            raise ValueError(
                f"{spec} draws its drafts, or changes the model: name drafters that are sampled and matched"
            )
    return [way.proposer for way in ways]


def case() -> DecoderCase:
    """For the laws: forwards that cost little more with more rows."""
    return DecoderCase(lambda ask: Decoding(Walk(ask.stop), Auto(_proposers(ask), lambda n: 10 + 0.1 * n)), Options())


def mutant() -> DecoderCase:
    """Accepts whatever is drafted."""
    return DecoderCase(credulous, Options())
