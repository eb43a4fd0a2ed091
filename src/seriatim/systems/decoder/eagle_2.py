"""EAGLE-2: one small layer goes on in the model's states, and its draft tree takes the shape of its confidence.

New in EAGLE (Li et al. 2024): the draft is autoregressive in states, not in tokens. A decoder layer reads the state
behind the last token but one and the token that was drawn from it, estimates the next state, and the model's own matrix
reads the next tokens out. New in EAGLE-2: how likely a path is by the draft is close to how likely it is accepted, so
at each step the likeliest paths make the tree: deep where the text is easy, broad where it is not.

`static` drafts EAGLE's tree of fixed shape instead. Tokens are drawn and matched, so it is exact at every temperature.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from seriatim.decoding.feature_draft import FeatureDraft
from seriatim.decoding.growth import Dynamic, Static, Tree
from seriatim.decoding.templates import EAGLE, standard
from seriatim.decoding.verify import Walk
from seriatim.laws.case import Limit
from seriatim.laws.decoders import DecoderCase, alike
from seriatim.laws.drafts import WrongBonus, untrained
from seriatim.posttraining import drafting
from seriatim.posttraining.eagle import Eagle, EagleConfig
from seriatim.systems.claim import Arm, Claim
from seriatim.systems.decoders import Ask, Decoding
from seriatim.systems.draft_parts import draft_part, drafted_lengths
from seriatim.systems.meta import Meta
from seriatim.systems.trials import tokens_per_forward

META = Meta(
    key="eagle-2",
    title="EAGLE-2",
    family="decoder",
    modality="text",
    paper="EAGLE-2: Faster Inference of Language Models with Dynamic Draft Trees (2024), arXiv 2406.16858",
    likelihood="lossless",
    summary="A layer drafts in the model's states; the likeliest paths make the tree, whatever its shape.",
)
EXAMPLE = "eagle-2:zoo"
Part, Config = Eagle, EagleConfig
RECIPE = replace(drafting.RECIPE, learning_rate=3e-3)


@dataclass(frozen=True)
class Options:
    """nodes: of the tree; depth: how far it reaches at most; width: nodes of a depth that get children, and how many;
    static: a tree of fixed shape (25 nodes: EAGLE's as released); pickled: read a published .bin file too."""

    nodes: int = 12
    depth: int = 5
    width: int = 4
    static: bool = False
    pickled: bool = False


def decoder(ask: Ask) -> Decoding:
    """A trained layer, sampled and matched."""
    return drafted(ask, draft_part(ask, Eagle, ask.options.pickled)[0])


def drafted(ask: Ask, part: Eagle) -> Decoding:
    """By this layer."""
    o = ask.options
    tree: Tree = Dynamic(o.nodes, ask.fits("depth", o.depth), o.width)
    if o.static:
        tree = Static((EAGLE if o.nodes == EAGLE.size else standard(o.nodes)).cut(o.depth))
    return Decoding(Walk(ask.stop), FeatureDraft(part, tree))


# ---- the claim -------------------------------------------------------------------------------------------------------

STEPS = 400  # some two minutes on two cores; all arms read the same states


def _both_trees(trained: Any) -> dict[str, Any]:
    """As other parts are judged, and by a tree of fixed shape: EAGLE."""
    static = tokens_per_forward(f"eagle-2:{trained.folder}+static=true")(trained.system, 0)
    return {**drafted_lengths(trained), "static_tokens_per_forward": static["tokens_per_forward"]}


def _arm(key: str, **settings: Any) -> Arm:
    measure = _both_trees if key == "eagle-2" else drafted_lengths
    return Arm(key, settings, steps=STEPS, base="zoo:text-base", measure=measure)


CLAIM = Claim(
    text="With as many parameters, the same training and a tree of 12 nodes, a layer that drafts in states, with a "
    "tree whose shape follows its confidence (EAGLE-2), gives at least 1.1 times as many tokens a forward as heads "
    "that look ahead (Medusa).",
    paper="3.05 to 4.26 times as fast as plain decoding and 20 to 40% faster than EAGLE; Spec-Bench on one A100: 4.34 "
    "tokens a round against 3.58 of EAGLE and 2.31 of Medusa (Vicuna-7B)",
    metric="tokens_per_forward",
    arms={
        "eagle-2": _arm("eagle-2", hidden=512),
        "medusa": _arm("medusa", layers=3),  # as many parameters
        "1024 tokens": _arm("eagle-2", hidden=512, draft_vocab=1024),
        "own matrix": _arm("eagle-2", hidden=512, own_output=True),
    },
    ours="eagle-2",
    baseline="medusa",
    better="higher",
    margin=1.1,
    seeds=(0, 1, 2),
    other_seeds=(0,),
    data="stdlib",
)


# ---- for the laws ----------------------------------------------------------------------------------------------------


def _case(**options: Any) -> DecoderCase:
    """A layer of arbitrary weights."""
    return DecoderCase(lambda ask: drafted(ask, untrained(Eagle, EagleConfig(), ask.system)[0]), Options(**options))


def _one_node() -> Limit:
    """A tree of one node is the likeliest token, whatever grew it."""
    return alike("one node", _case(nodes=1, depth=1, width=1), _case(nodes=1, depth=1, static=True))


def case() -> DecoderCase:
    """For the laws."""
    return replace(_case(nodes=4, depth=3, width=2), limits=(_one_node,))


def mutant() -> DecoderCase:
    """The token behind a path is drawn before temperature and filters, as copies of the released code do. (The tree is
    of fixed shape: a wrong text must not depend on the rows beside it, or its law could not be enumerated.)"""
    right = _case(nodes=4, depth=3, static=True)

    def wrong(ask: Ask) -> Decoding:
        return Decoding(WrongBonus(ask.stop, lambda rows: rows.said), right.decoder(ask).proposer)

    return replace(right, decoder=wrong)
