"""Chimera: a draft layer that sees all known tokens through the model's states, and the newest through trigrams.

New: what drafts alone lack, the context, is there already: the model's states. A small network without context turns
the last three tokens into a vector, one decoder layer over the states makes of it an estimate of the next state, and
heads read it beside the last true one; what they draft comes back as a trigram, for the next depth (Zeng et al. 2024).

The paper and the released code draw their heads differently; here, as in the code, the layer runs anew at each depth,
with a head for each or (`--shared`) one for all. Tokens are drawn and matched, so it is exact at every temperature; the
released generation takes the likeliest token behind an accepted draft, and is not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from seriatim.decoding.feature_draft import FeatureDraft
from seriatim.decoding.growth import Static
from seriatim.decoding.heads import shaped
from seriatim.decoding.templates import EAGLE
from seriatim.decoding.verify import Walk
from seriatim.heads.dist import Greedy
from seriatim.laws.decoders import DecoderCase
from seriatim.laws.drafts import WrongBonus, untrained
from seriatim.posttraining import drafting
from seriatim.posttraining.chimera import Chimera, ChimeraConfig
from seriatim.systems.claim import Arm, Claim
from seriatim.systems.decoders import Ask, Decoding
from seriatim.systems.draft_parts import draft_part, drafted_lengths
from seriatim.systems.meta import Meta

META = Meta(
    key="chimera",
    title="Chimera",
    family="decoder",
    modality="text",
    paper="Chimera: A Lossless Decoding Method for Accelerating Large Language Models Inference by Fusing all Tokens "
    "(2024), arXiv 2402.15758",
    likelihood="lossless",
    summary="A draft layer over the model's states and trigrams of the newest tokens, with a head for each depth.",
)
EXAMPLE = "chimera:zoo"
Part, Config = Chimera, ChimeraConfig
RECIPE = replace(drafting.RECIPE, learning_rate=3e-3)


@dataclass(frozen=True)
class Options:
    """nodes: of the tree (25: the released template); pickled: read published .pt files too."""

    nodes: int = 12
    pickled: bool = False


def decoder(ask: Ask) -> Decoding:
    """A trained layer, sampled and matched."""
    return drafted(ask, draft_part(ask, Chimera, ask.options.pickled)[0])


def drafted(ask: Ask, part: Chimera) -> Decoding:
    """By this layer."""
    nodes = ask.options.nodes
    template = EAGLE.cut(part.ahead) if nodes == EAGLE.size else shaped(part, nodes)
    return Decoding(Walk(ask.stop), FeatureDraft(part, Static(template)))


# ---- the claim -------------------------------------------------------------------------------------------------------

STEPS = 300  # some four minutes on two cores, as the layer runs anew for each head; all arms read the same states


def _arm(key: str, **settings: Any) -> Arm:
    settings = {"heads": 3, "batch": 4, **settings}
    return Arm(key, settings, steps=STEPS, base="zoo:text-base", measure=drafted_lengths)


CLAIM = Claim(
    text="With as many parameters, the same training and a tree of 12 nodes, a layer over states and trigrams "
    "(Chimera) gives at least 1.1 times as many tokens a forward as heads that look ahead (Medusa).",
    paper="2.7 times as fast as plain decoding on average (Vicuna and LLaMA-2)",
    metric="tokens_per_forward",
    arms={
        "chimera": _arm("chimera"),
        "medusa": _arm("medusa", layers=10),  # as many parameters
        "no trigrams": _arm("chimera", gram=1),
        "estimates alone": _arm("chimera", fused=False),
    },
    ours="chimera",
    baseline="medusa",
    better="higher",
    margin=1.1,
    seeds=(0, 1, 2),
    other_seeds=(0,),
    data="stdlib",
)


# ---- for the laws ----------------------------------------------------------------------------------------------------


def case() -> DecoderCase:
    """For the laws: a layer of arbitrary weights."""
    return DecoderCase(
        lambda ask: drafted(ask, untrained(Chimera, ChimeraConfig(heads=2), ask.system)[0]), Options(nodes=5)
    )


def mutant() -> DecoderCase:
    """The likeliest token stands behind a path, as in the released generation."""
    right = case()

    def wrong(ask: Ask) -> Decoding:
        decider = WrongBonus(ask.stop, lambda rows: Greedy(rows.dist.logits))
        return Decoding(decider, right.decoder(ask).proposer)

    return DecoderCase(wrong, right.options)
