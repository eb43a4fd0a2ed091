"""SpecTr: a small model drafts several chains independently, and a rule near the best possible chooses among them.

New: to accept one of k candidates as often as possible is a problem of optimal transport. Its linear programme grows as
the vocabulary to the power of k; K-SEQ takes time linear in it and accepts at least 1 - 1/e as often as the optimum
(Sun et al. 2023): candidates are tried one after another against p / (g q), with the smallest g that leaves a
distribution for the case that all fail. Drafts that agree with the accepted token go on together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from seriatim.decoding.draft import DraftModel
from seriatim.decoding.guess import branching
from seriatim.decoding.verify import GreedyMatch, KSeq
from seriatim.laws.case import Limit
from seriatim.laws.decoders import DecoderCase, alike
from seriatim.laws.drafts import near
from seriatim.systems.claim import Claim, Trial
from seriatim.systems.decoder.spec_sampling import Options as ChainOptions
from seriatim.systems.decoder.spec_sampling import between as chain_between
from seriatim.systems.decoders import Ask, Decoding
from seriatim.systems.meta import Meta
from seriatim.systems.trials import tokens_per_forward

META = Meta(
    key="spectr",
    title="SpecTr",
    family="decoder",
    modality="text",
    paper="SpecTr: Fast Speculative Decoding via Optimal Transport (2023), arXiv 2310.15141",
    likelihood="lossless",
    summary="A small model drafts several chains; K-SEQ, a near-optimal transport, chooses among them.",
)
EXAMPLE = "spectr:zoo:text-draft"


@dataclass(frozen=True)
class Options:
    """drafts: chains that are drawn; draft_length: tokens of each (a forward of the large model reads all of them and
    one more); translate: a draft model of another tokenizer exchanges ids whose texts agree."""

    drafts: int = 2
    draft_length: int = 4
    translate: bool = False


def decoder(ask: Ask) -> Decoding:
    """The small model is the source: `spectr:SMALL`."""
    return between(ask, ask.draft_model(ask.options.translate))


def between(ask: Ask, small: Any, verifier: type[KSeq] = KSeq) -> Decoding:
    """The model that is asked and a small one. At temperature 0 all drafts are the same, and one is enough."""
    o = ask.options
    length = ask.fits("draft_length", o.draft_length)
    if o.drafts < 1:
        raise ValueError(f"at least 1 draft is drawn, got {o.drafts}")
    if ask.sampling.temperature == 0:
        return Decoding(GreedyMatch(ask.stop), DraftModel(small.target(None, ask.sampling.unfiltered), length, "top"))
    draft = small.target(None, ask.sampling)
    return Decoding(verifier(ask.stop), DraftModel(draft, branching((o.drafts, *[1] * (length - 1)))))


def _drafts(count: int) -> Trial:
    return Trial("zoo:text-base", tokens_per_forward(f"spectr:zoo:text-draft+drafts={count}", prompts=48))


CLAIM = Claim(
    text="Two drafts of four tokens, chosen by K-SEQ, give at least 3% more tokens a forward than one.",
    paper="1.37 times as fast as speculative sampling with 8 drafts of 8 tokens (PaLM-2 on LM1B)",
    metric="tokens_per_forward",
    arms={"one draft": _drafts(1), "two drafts": _drafts(2), "four drafts": _drafts(4)},
    ours="two drafts",
    baseline="one draft",
    better="higher",
    margin=1.03,
)


def _tried(ask: Ask) -> Decoding:
    return between(ask, near(ask.system))


def _one_draft() -> Limit:
    """One draft is speculative sampling, draw for draw."""
    chain = DecoderCase(lambda ask: chain_between(ask, near(ask.system)), ChainOptions(draft_length=3))
    return alike("one draft, speculative sampling", DecoderCase(_tried, Options(1, 3)), chain)


def case() -> DecoderCase:
    """For the laws: drafted by a model of other weights."""
    return DecoderCase(_tried, Options(2, 2), coupled=False, limits=(_one_draft,), short=3)


class _Unscaled(KSeq):
    """Wrong on purpose: tries several drafts as if there were one."""

    def choose(self, turn, guess, level, random):
        q = guess.laws(level.rows, [n[0] if n else 0 for n in level.nodes], level.p)
        for i in range(level.tries):
            self.attempt(turn, guess, level, i, None, random)
        none = [j for j, n in enumerate(level.nodes) if n and level.accepted[j] < 0]
        if none:
            level.p[none] = self.rest(level.p[none], q[none])


def mutant() -> DecoderCase:
    """The case with that."""
    return DecoderCase(lambda ask: between(ask, near(ask.system), _Unscaled), Options(2, 1), coupled=False, short=2)
