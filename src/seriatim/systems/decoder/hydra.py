"""Hydra: Medusa's heads that also see the tokens that were drafted before theirs.

New: a Medusa head guesses the third token without knowing the second; a Hydra head reads the state and the vectors of
all tokens in between, so its candidates differ from branch to branch and fit what they follow (Ankner et al. 2024). The
tree is filled depth by depth, each depth by one product; nothing of the large model runs.

Hydra++ (`--size plus`) has heads of four layers, which learn what the model says in place of the text, and reads states
through a decoder layer over all of them, run once a round, with a cache of its own. Tokens are drawn and matched, so
all of it is exact at every temperature.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from seriatim.decoding.heads import HydraHeads, PrefixedHydraHeads, shaped
from seriatim.decoding.templates import MEDUSA
from seriatim.decoding.typical import Typical
from seriatim.decoding.verify import Walk
from seriatim.laws.decoders import DecoderCase
from seriatim.laws.drafts import untrained
from seriatim.posttraining.drafting import Base
from seriatim.posttraining.heads import Hydra, HydraConfig
from seriatim.systems.claim import Arm, Claim
from seriatim.systems.decoders import Ask, Decoding
from seriatim.systems.draft_parts import draft_part, drafted_lengths
from seriatim.systems.meta import Meta

META = Meta(
    key="hydra",
    title="Hydra",
    family="decoder",
    modality="text",
    paper="Hydra: Sequentially-Dependent Draft Heads for Medusa Decoding (2024), arXiv 2402.05109",
    likelihood="lossless",
    summary="Medusa's heads that also see the tokens drafted before theirs; a tree filled depth by depth.",
)
EXAMPLE = "hydra:zoo"
Part, Config = Hydra, HydraConfig
SIZES = MappingProxyType({"plain": {}, "plus": {"layers": 4, "prefix": True, "distill": True}})


@dataclass(frozen=True)
class Options:
    """nodes: of the tree (63: the released template); pickled: read a published .pt file too."""

    nodes: int = 12
    pickled: bool = False


def decoder(ask: Ask) -> Decoding:
    """Trained heads, sampled and matched."""
    return drafted(ask, *draft_part(ask, Hydra, ask.options.pickled))


def drafted(ask: Ask, part: Any, base: Base) -> Decoding:
    """By these heads."""
    nodes = ask.options.nodes
    proposer = HydraHeads if part.prefix is None else PrefixedHydraHeads
    return Decoding(Walk(ask.stop), proposer(part, base, MEDUSA if nodes == MEDUSA.size else shaped(part, nodes)))


# ---- the claim -------------------------------------------------------------------------------------------------------

STEPS = 400  # under two minutes on two cores; all arms read the same states


def _arm(key: str, size: str | None = None, **settings: Any) -> Arm:
    return Arm(key, settings, size=size, steps=STEPS, base="zoo:text-base", measure=drafted_lengths)


CLAIM = Claim(
    text="With as many parameters, the same training and a tree of 12 nodes, heads that see what was drafted before "
    "them (Hydra) give at least 1.1 times as many tokens a forward as heads that do not (Medusa).",
    paper="Hydra++ is 2.71 times as fast as plain decoding and 1.31 times as fast as Medusa; Spec-Bench on one A100: "
    "3.26 tokens a round against 2.31 of Medusa (Vicuna-7B)",
    metric="tokens_per_forward",
    arms={
        "hydra": _arm("hydra"),
        "medusa": _arm("medusa", layers=7),  # as many parameters
        "hydra++": _arm("hydra", "plus"),
        "1024 tokens": _arm("hydra", draft_vocab=1024),
        "own matrices": _arm("hydra", own_output=True),
    },
    ours="hydra",
    baseline="medusa",
    better="higher",
    margin=1.1,
    seeds=(0, 1, 2),
    other_seeds=(0,),
    data="stdlib",
)


# ---- for the laws ----------------------------------------------------------------------------------------------------


def case() -> DecoderCase:
    """For the laws: heads of arbitrary weights, as in Hydra++."""
    config = HydraConfig(heads=2, layers=2, prefix=True)
    return DecoderCase(lambda ask: drafted(ask, *untrained(Hydra, config, ask.system)), Options(nodes=5))


def mutant() -> DecoderCase:
    """What is plausible is taken for a sample (typical acceptance)."""

    def wrong(ask: Ask) -> Decoding:
        way = drafted(ask, *untrained(Hydra, HydraConfig(heads=2), ask.system))
        return Decoding(Typical(ask.stop), way.proposer)

    return DecoderCase(wrong, Options(nodes=5))
