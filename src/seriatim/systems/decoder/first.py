"""FiRST: the prompt decides which layers its continuation does without.

New: a small router in front of each layer looks at the prompt; what it says, averaged over the prompt, holds for the
whole generation. So layers are skipped as the input allows, and yet the cache has no holes: a skipped layer has no
entries at all, and takes no room. Routers are trained on a frozen model, then an adapter on the model with its hard
skips (Jain et al. 2024):

    seriatim train first --base MODEL --data TEXTS --out runs/first
    seriatim train next-token --from MODEL --data TEXTS --lora 8 --decoder first:runs/first --out runs/adapter
    seriatim generate runs/adapter --decoder first:runs/first

The paper's training formula, as printed in the review copy, gives routers no gradient; see `posttraining.routers`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from seriatim.laws.decoders import DecoderCase
from seriatim.posttraining.drafting import Base
from seriatim.posttraining.routers import ROUTING, RouterConfig, Routers
from seriatim.systems.claim import Claim, Trial
from seriatim.systems.decoders import Ask, Decoding, with_layers
from seriatim.systems.draft_parts import draft_part
from seriatim.systems.layer_trials import fixed
from seriatim.systems.layer_trials import routed as by_routers
from seriatim.systems.meta import Meta

META = Meta(
    key="first",
    title="FiRST",
    family="decoder",
    modality="text",
    paper="FiRST: Finetuning Router-Selective Transformers for Input-Adaptive Latency Reduction (2024), "
    "arXiv 2410.12513",
    likelihood="relaxed",
    summary="Routers look at the prompt and leave out layers for the whole generation.",
)
EXAMPLE = "first:runs/first"
Part, Config, RECIPE = Routers, RouterConfig, ROUTING


@dataclass(frozen=True)
class Options:
    """threshold: below which mean of its router a layer is skipped; prompt: whether the prompt "skips" it too, or
    "runs" through all layers; together: one decision for a batch, by the mean over its prompts; draft: another decoder
    that drafts, such as prompt-lookup. Neutral: a threshold of 0."""

    threshold: float = 0.5
    prompt: str = "skips"
    together: bool = False
    draft: str | None = None


def decoder(ask: Ask) -> Decoding:
    """Trained routers."""
    return routed(ask, draft_part(ask, Routers)[0])


def routed(ask: Ask, routers: Routers) -> Decoding:
    """By these routers."""
    o = ask.options
    return with_layers(ask, routers.plan(o.threshold, o.prompt, o.together), o.draft)


def untrained(ask: Ask) -> Decoding:
    """For the laws: routers of arbitrary weights."""
    routers, g = Routers(RouterConfig(), Base(ask.system)), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in routers.parameters():
            p.copy_(torch.randn(p.shape, generator=g))
    return routed(ask, routers)


def case() -> DecoderCase:
    """For the laws: routers of arbitrary weights over four layers."""
    return DecoderCase(untrained, Options(), neutral=Options(threshold=0.0), depth=4)


def mutant() -> DecoderCase:
    """Skips what its routers want."""

    def wrong(ask: Ask) -> Decoding:
        return untrained(replace(ask, options=replace(ask.options, threshold=1 - ask.options.threshold)))

    return replace(case(), decoder=wrong)


CLAIM = Claim(
    text="with a quarter of the layers left out, less is lost where routers choose them for each prompt than where the "
    "same ones, the best for the text as a whole, are left out of every prompt; any layers are a third arm",
    paper="latency 10 to 20 % down at 15 to 25 % of the layers, with quality near the base's",
    metric="over_plain",
    arms={
        "routers": Trial("zoo:text-base", by_routers(0.75, penalty=0.3)),
        "fixed best": Trial("zoo:text-base", fixed(0.75, best=True)),
        "fixed any": Trial("zoo:text-base", fixed(0.75, best=False)),
    },
    ours="routers",
    baseline="fixed best",
)
