"""Draft trees: a small model drafts several continuations at once, and one forward of the large one reads all of them.

New: every drafted token sees its own path only, so branches cost rows and no forwards (SpecInfer, Miao et al. 2023).
Trees without randomness, the likeliest paths by the small model, are verified by a walk: the large model's token is
drawn once at each node, and the walk goes on where a child carries it. Siblings that were drawn, with or without
replacement, are tried one after another against what the earlier ones left of p (Sequoia, Chen et al. 2024). Both are
exact at every temperature; the walk writes the very string of plain decoding under the same noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from seriatim.decoding.draft import SIBLINGS, DraftModel, DraftTree
from seriatim.decoding.growth import Dynamic
from seriatim.decoding.templates import likeliest
from seriatim.decoding.verify import GreedyMatch, Recursive, Round, Walk
from seriatim.laws.case import Limit
from seriatim.laws.decoders import DecoderCase, alike
from seriatim.laws.drafts import near
from seriatim.random import COIN, Random, numbered
from seriatim.systems.claim import Claim, Trial
from seriatim.systems.decoders import Ask, Decoding
from seriatim.systems.meta import Meta
from seriatim.systems.trials import tokens_per_forward

META = Meta(
    key="tree-verify",
    title="Draft trees",
    family="decoder",
    modality="text",
    paper="SpecInfer: Accelerating Large Language Model Serving with Tree-based Speculative Inference and Verification "
    "(2023), arXiv 2305.09781",
    likelihood="lossless",
    summary="A small model drafts a tree of continuations, verified in one forward at any temperature.",
)
EXAMPLE = "tree-verify:zoo:text-draft"
ACCEPTED = 0.6  # how often a drawn token stands that is tried: the shape of a tree whose siblings are drawn is for that


@dataclass(frozen=True)
class Options:
    """nodes: drafted tokens of a tree; depth: how far it looks ahead; width: most children of a node; siblings: "top",
    the likeliest paths, or drawn "independent"ly, or "distinct" (without replacement); translate: a draft model of
    another tokenizer exchanges ids whose texts agree."""

    nodes: int = 12
    depth: int = 4
    width: int = 4
    siblings: str = "top"
    translate: bool = False


def decoder(ask: Ask) -> Decoding:
    """The small model is the source: `tree-verify:SMALL`."""
    return between(ask, ask.draft_model(ask.options.translate))


def between(ask: Ask, small: Any, walk: type[Walk] = Walk) -> Decoding:
    """The model that is asked and a small one. Where nothing is drawn the tree is of the likeliest paths."""
    o, s = ask.options, ask.sampling
    depth = ask.fits("depth", o.depth)
    if o.siblings not in SIBLINGS:
        raise ValueError(f"siblings are {', '.join(SIBLINGS)}, not {o.siblings!r}")
    tree = Dynamic(o.nodes, depth, o.width)
    if s.temperature == 0:
        return Decoding(GreedyMatch(ask.stop), DraftTree(small.target(None, s.unfiltered), tree))
    draft = small.target(None, s)
    if o.siblings == "top":
        return Decoding(walk(ask.stop), DraftTree(draft, tree))
    return Decoding(Recursive(ask.stop), DraftModel(draft, shape(o.nodes, depth, o.width), o.siblings))


def shape(nodes: int, depth: int, width: int) -> tuple[int, ...]:
    """The tree that accepts most where each token that is tried stands with probability `ACCEPTED`: child i is tried
    if the elder ones were rejected. Smaller where depth and width leave no room for so many nodes."""
    chance = [ACCEPTED * (1 - ACCEPTED) ** i for i in range(width)]
    room = sum(width**d for d in range(1, depth + 1))
    return likeliest([chance] * depth, min(nodes, room)).parent


def _nodes(nodes: int, more: str = "") -> Trial:
    return Trial("zoo:text-base", tokens_per_forward(f"tree-verify:zoo:text-draft+nodes={nodes}{more}"))


CLAIM = Claim(
    text="A tree of 12 nodes gives more tokens a forward than a chain of 12, and more nodes give more.",
    paper="trees beat chains of equal cost where the draft is unsure (SpecInfer, Medusa, Sequoia, EAGLE)",
    metric="tokens_per_forward",
    arms={
        "tree of 12": _nodes(12), "chain of 12": _nodes(12, "+depth=12+width=1"),
        **{f"tree of {nodes}": _nodes(nodes, "+depth=6") for nodes in (1, 4, 8, 16, 32)},
        "distinct siblings": _nodes(12, "+siblings=distinct"),
        "independent siblings": _nodes(12, "+siblings=independent"),
    },
    ours="tree of 12",
    baseline="chain of 12",
    better="higher",
)  # fmt: skip


def _width_of_one() -> Limit:
    """A tree of width 1 is a chain of the draft's likeliest tokens."""

    def chain(ask: Ask) -> Decoding:
        return Decoding(
            Walk(ask.stop), DraftModel(near(ask.system).target(None, ask.sampling), ask.options.depth, "top")
        )

    options = Options(nodes=3, depth=3, width=1)
    name = "of width 1, a chain of the likeliest tokens"
    return alike(name, DecoderCase(_tried, options), DecoderCase(chain, options))


def _tried(ask: Ask) -> Decoding:
    return between(ask, near(ask.system))


def case() -> DecoderCase:
    """For the laws: drafted by a model of other weights."""
    options = Options(nodes=5, depth=2, width=3)
    return DecoderCase(_tried, options, limits=(_width_of_one,))


class _Afresh(Walk):
    """Wrong on purpose: draws to test the children, and when none carries the token, draws anew."""

    def verify(self, turn: Round, random: Random) -> None:
        for r in turn.alive:
            going = True
            while going:
                law = turn.at([r])
                token = int(law.sample(random, turn.key([r])))
                child = turn.child(r, token)
                if child < 0:
                    token = int(law.sample(random, turn.key([r], numbered(COIN, 9))))
                going = turn.emit(r, token, child)


def mutant() -> DecoderCase:
    """The case with that."""
    return DecoderCase(lambda ask: between(ask, near(ask.system), _Afresh), Options(nodes=5, depth=2, width=3))
