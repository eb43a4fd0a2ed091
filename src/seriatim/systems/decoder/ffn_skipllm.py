"""FFN-SkipLLM: leave out feed-forward networks where they change little, and never attention.

New: whole layers that are left out leave holes in the cache, and copies to fill them are what spoils texts; so
attention always runs, and of each layer the feed-forward network alone, two thirds of its weights, may be left out.
Which, each token finds on its way: where a network has hardly turned the vector that came in (their cosine is above a
threshold), those of the next layers are skipped. The first and last layers, the prompt and the first tokens behind it
are computed in full (Jaiswal et al. 2024). Nothing is trained.

The cosine is that of what enters and what leaves, the residual included; that of the branch alone is near 0 everywhere.
`posttraining.skipping.fitted` finds the threshold for a share of networks; that of the paper is not known.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from seriatim.decoding.layers import Saturation
from seriatim.laws.decoders import DecoderCase
from seriatim.systems.claim import Claim, Trial
from seriatim.systems.decoders import Ask, Decoding, with_layers
from seriatim.systems.layer_trials import by_chance, networks
from seriatim.systems.meta import Meta

META = Meta(
    key="ffn-skipllm",
    title="FFN-SkipLLM",
    family="decoder",
    modality="text",
    paper="FFN-SkipLLM: A Hidden Gem for Autoregressive Decoding with Adaptive Feed Forward Skipping (2024), "
    "arXiv 2404.03865",
    likelihood="relaxed",
    summary="Leaves out feed-forward networks behind one that hardly changed what it was given.",
)


@dataclass(frozen=True)
class Options:
    """threshold: the cosine from which networks are skipped; run: how many of the next layers at once; bottom, top:
    first and last layers that never skip; warmup: tokens behind the prompt that never do; draft: another decoder that
    drafts, such as prompt-lookup. Neutral: a threshold above 1."""

    threshold: float = 0.98
    run: int = 2
    bottom: int = 1
    top: int = 1
    warmup: int = 16
    draft: str | None = None


def decoder(ask: Ask) -> Decoding:
    """Skip greedily."""
    ask.no_source()
    o = ask.options
    return with_layers(ask, Saturation(o.threshold, o.run, o.bottom, o.top, o.warmup), o.draft)


SMALL = Options(threshold=0.5, run=1, warmup=1)  # so that tiny models skip


def case() -> DecoderCase:
    """For the laws."""
    return DecoderCase(decoder, SMALL, neutral=replace(SMALL, threshold=2.0), depth=4)


def mutant() -> DecoderCase:
    """Takes a distance for the cosine, so that it skips most where most is changed."""

    def wrong(ask: Ask) -> Decoding:
        return decoder(replace(ask, options=replace(ask.options, threshold=1 - ask.options.threshold)))

    return replace(case(), decoder=wrong)


DEEP = "home:smollm2-135m-instruct"  # 30 layers
CLAIM = Claim(
    text="with a quarter of the feed-forward networks left out, less is lost by leaving them out behind those that "
    "changed little than at random; whole layers left out at random, with as many weights, are a third arm",
    paper="25 to 30 % of the networks with under 1 point lost (LLaMA-2, Factoid-QA 79.0 to 78.1 at 25 %), where "
    "leaving out layers collapses at 10 to 15 %",
    metric="over_plain",
    arms={
        "adaptive": Trial(DEEP, networks(0.75)),
        "random": Trial(DEEP, by_chance(0.75, "feedforward")),
        "layers": Trial(DEEP, by_chance(0.75, "layer")),
    },
    ours="adaptive",
    baseline="random",
)
