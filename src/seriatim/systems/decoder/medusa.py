"""Medusa: heads beside the model's own guess the tokens behind the next one, all from one state.

New: no draft model. Head i reads token t + 1 + i out of the state that the model's head reads token t + 1 out of, so a
draft costs a few small products and no forward; the heads' best candidates make a tree, verified in one forward (Cai et
al. 2024). The model is frozen; `seriatim train medusa --base MODEL` trains the heads.

Here tokens are drawn and matched, so it is exact at every temperature. The paper's typical acceptance, which keeps what
the model finds plausible, is an option and is not lossless. The tree has the 12 nodes that stood most often in held-out
text, where it was measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from seriatim.decoding.heads import MedusaHeads, shaped
from seriatim.decoding.templates import MEDUSA
from seriatim.decoding.typical import Typical
from seriatim.decoding.verify import Round, Walk
from seriatim.laws.decoders import DecoderCase
from seriatim.laws.drafts import untrained
from seriatim.posttraining.drafting import Base, DraftPart
from seriatim.posttraining.heads import Medusa, MedusaConfig
from seriatim.random import COIN, Random, numbered
from seriatim.systems.claim import Arm, Claim, Trial
from seriatim.systems.decoders import Ask, Decoding
from seriatim.systems.draft_parts import draft_part, drafted_lengths
from seriatim.systems.meta import Meta
from seriatim.systems.trials import tokens_per_forward

META = Meta(
    key="medusa",
    title="Medusa",
    family="decoder",
    modality="text",
    paper="Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads (2024), arXiv 2401.10774",
    likelihood="lossless",
    summary="Trained heads guess several tokens ahead from one state; their candidates are verified as a tree.",
)
EXAMPLE = "medusa:zoo"
Part, Config = Medusa, MedusaConfig


@dataclass(frozen=True)
class Options:
    """nodes: of the tree (63: the released template); typical: keep what is plausible, by `epsilon` and `alpha`, which
    is not lossless; pickled: read a published .pt file too."""

    nodes: int = 12
    typical: bool = False
    epsilon: float = 0.09
    alpha: float = 0.3
    pickled: bool = False

    @property
    def relaxed(self) -> bool:
        """Whether something else may be written than by plain decoding."""
        return self.typical


def decoder(ask: Ask) -> Decoding:
    """Trained heads, sampled and matched."""
    return drafted(ask, *draft_part(ask, Medusa, ask.options.pickled))


def drafted(ask: Ask, part: DraftPart, base: Base) -> Decoding:
    """By these heads."""
    o = ask.options
    template = MEDUSA if o.nodes == MEDUSA.size else shaped(part, o.nodes)
    decider = Typical(ask.stop, o.epsilon, o.alpha) if o.typical else Walk(ask.stop)
    return Decoding(decider, MedusaHeads(part, base, template))


# ---- the claim -------------------------------------------------------------------------------------------------------


def _arm(**settings: Any) -> Arm:
    return Arm("medusa", settings, steps=400, base="zoo:text-base", measure=drafted_lengths)


CLAIM = Claim(
    text="Heads beside a frozen model, trained for two minutes, give at least 1.7 tokens a forward with a tree of 12 "
    "nodes, where plain decoding gives 1.",
    paper="2.2 times as fast with a frozen Vicuna-7B (Medusa-1), 63 nodes",
    metric="tokens_per_forward",
    arms={
        "medusa": _arm(),
        "plain": Trial("zoo:text-base", tokens_per_forward("ancestral")),
        "1024 tokens": _arm(draft_vocab=1024),
        "own matrices": _arm(own_output=True),
    },
    ours="medusa",
    baseline="plain",
    better="higher",
    margin=1.7,
    seeds=(0, 1, 2),
    other_seeds=(0,),
    data="stdlib",
)


# ---- for the laws ----------------------------------------------------------------------------------------------------


def case() -> DecoderCase:
    """For the laws: heads of arbitrary weights."""
    return DecoderCase(
        lambda ask: drafted(ask, *untrained(Medusa, MedusaConfig(heads=2), ask.system)), Options(nodes=5)
    )


class _PathByPath(Walk):
    """Wrong on purpose: every path of the tree is sampled by itself and the longest is kept, so that what paths share
    gets several tries."""

    def verify(self, turn: Round, random: Random) -> None:
        for r in turn.alive:
            for n, node in enumerate(turn.drafted(r, -1)):
                token = int(turn.at([r]).sample(random, turn.key([r], numbered(COIN, n))))
                if token == turn.value[r][node]:
                    if turn.emit(r, token, node):
                        turn.emit(r, int(turn.at([r]).sample(random, turn.key([r]))))
                    break
            else:
                turn.emit(r, int(turn.at([r]).sample(random, turn.key([r]))))


def mutant() -> DecoderCase:
    """The case with that, on trees of depth 1."""

    def wrong(ask: Ask) -> Decoding:
        way = drafted(ask, *untrained(Medusa, MedusaConfig(heads=1), ask.system))
        return Decoding(_PathByPath(ask.stop), way.proposer)

    return DecoderCase(wrong, Options(nodes=2))
