"""Speculative sampling: a small model drafts a few tokens, the large one reads them all in one forward.

New: each drafted token is accepted with probability min(1, p / q), and the first that is not is replaced by a draw from
what is left of p, norm(max(0, p - q)); so the law is that of the large model alone, whatever the small one says
(Leviathan et al. 2023; Chen et al. 2023). Temperature and filters are part of both laws before they are compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from seriatim.decoding.draft import DraftModel
from seriatim.decoding.verify import Chain, GreedyMatch, Verifier
from seriatim.laws.decoders import DecoderCase
from seriatim.laws.drafts import near
from seriatim.systems.claim import Claim, Trial
from seriatim.systems.decoders import Ask, Decoding
from seriatim.systems.meta import Meta
from seriatim.systems.trials import tokens_per_forward

META = Meta(
    key="spec-sampling",
    title="Speculative sampling",
    family="decoder",
    modality="text",
    paper="Fast Inference from Transformers via Speculative Decoding (2023), arXiv 2211.17192",
    likelihood="lossless",
    summary="A small model drafts a chain of tokens; the large one verifies it in one forward, by the ratio p / q.",
)
EXAMPLE = "spec-sampling:zoo:text-draft"


@dataclass(frozen=True)
class Options:
    """draft_length: tokens of a draft; translate: a draft model of another tokenizer exchanges ids whose texts
    agree."""

    draft_length: int = 4
    translate: bool = False


def decoder(ask: Ask) -> Decoding:
    """The small model is the source: `spec-sampling:SMALL`."""
    return between(ask, ask.draft_model(ask.options.translate))


def between(ask: Ask, small: Any, verifier: type[Verifier] = Chain) -> Decoding:
    """The model that is asked and a small one. At temperature 0 nothing is drawn: a token stands if it is the
    likeliest."""
    length = ask.fits("draft_length", ask.options.draft_length)
    if ask.sampling.temperature == 0:
        return Decoding(GreedyMatch(ask.stop), DraftModel(small.target(None, ask.sampling.unfiltered), length, "top"))
    draft = small.target(None, ask.sampling)
    return Decoding(verifier(ask.stop), DraftModel(draft, length))


CLAIM = Claim(
    text="With a small draft model at least two tokens come from one forward of the large one.",
    paper="2 to 3 times faster on T5-XXL with unchanged outputs; here by tokens a forward, which no machine changes",
    metric="tokens_per_forward",
    arms={
        "draft_length 4": Trial("zoo:text-base", tokens_per_forward("spec-sampling:zoo:text-draft")),
        "draft_length 2": Trial("zoo:text-base", tokens_per_forward("spec-sampling:zoo:text-draft+draft_length=2")),
        "draft_length 6": Trial("zoo:text-base", tokens_per_forward("spec-sampling:zoo:text-draft+draft_length=6")),
        "ancestral": Trial("zoo:text-base", tokens_per_forward("ancestral")),
    },
    ours="draft_length 4",
    baseline="ancestral",
    better="higher",
    margin=2.0,
)


def case() -> DecoderCase:
    """For the laws: drafted by a model of other weights."""
    return DecoderCase(lambda ask: between(ask, near(ask.system)), Options(draft_length=2), coupled=False)


class FromTarget(Chain):
    """Wrong on purpose: after a rejection a token of the target, not of what is left of it."""

    def rest(self, p, q):
        return p


def mutant() -> DecoderCase:
    """The case with that."""
    return DecoderCase(lambda ask: between(ask, near(ask.system), FromTarget), Options(draft_length=2), coupled=False)
