"""Hidden transfer: the model drafts inside its own forward, from states that a trained map moves ahead.

New: in front of a middle layer, linear maps make of a token's state guesses of the states of the tokens behind it;
these run through the remaining layers as slots of their own, see the text, and come out better than a head on the last
layer could make them (Wu et al. 2024). Every node of the verified tree moves its state ahead, so whichever node the
text ends at, the next draft is there. A tree of N nodes takes N + 1 slots below the maps and (N + 1)(1 + k) above them.

The model is frozen, and its own slots never see a pseudo state, whose keys and values are forgotten at once; `seriatim
train hidden-transfer --base MODEL` trains the maps. Tokens are drawn and matched, so it is exact at every temperature.
Where the paper leaves it open, states are made evenly from half the layers to three quarters of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from seriatim.decoding.heads import shaped
from seriatim.decoding.transfer import TransferredStates
from seriatim.decoding.verify import Walk
from seriatim.factorization.line import Line, LineShape
from seriatim.laws.decoders import DecoderCase
from seriatim.laws.drafts import untrained
from seriatim.posttraining import drafting
from seriatim.posttraining.drafting import Base
from seriatim.posttraining.transfer import HiddenTransfer, TransferConfig
from seriatim.systems.claim import Arm, Claim
from seriatim.systems.decoders import Ask, Decoding
from seriatim.systems.draft_parts import draft_part, drafted_lengths
from seriatim.systems.meta import Meta

META = Meta(
    key="hidden-transfer",
    title="Hidden transfer",
    family="decoder",
    modality="text",
    paper="Parallel Decoding via Hidden Transfer for Lossless LLM Acceleration (2024), arXiv 2404.12022",
    likelihood="lossless",
    summary="States of the next tokens are guessed in a middle layer, and finished by the layers above it.",
)
EXAMPLE = "hidden-transfer:zoo"
Part, Config = HiddenTransfer, TransferConfig
RECIPE = replace(drafting.RECIPE, learning_rate=1e-2)  # at a tenth of it the maps are still far off when it ends


@dataclass(frozen=True)
class Options:
    """nodes: of the draft tree; each costs one slot below the maps and 1 + k above, so that few pay on a processor."""

    nodes: int = 3


def decoder(ask: Ask) -> Decoding:
    """Trained maps, sampled and matched."""
    return drafted(ask, *draft_part(ask, HiddenTransfer))


def drafted(ask: Ask, part: Any, base: Base) -> Decoding:
    """By these maps."""
    return Decoding(Walk(ask.stop), TransferredStates(part, base, shaped(part, ask.options.nodes)))


# ---- the claim -------------------------------------------------------------------------------------------------------

STEPS = 300  # under five minutes on two cores


def _arm(key: str, **settings: Any) -> Arm:
    measure = partial(drafted_lengths, options="+nodes=12")
    return Arm(key, {"heads": 3, **settings}, steps=STEPS, base="zoo:text-base", measure=measure)


CLAIM = Claim(
    text="With as many parameters, as many steps of training and a tree of 12 nodes, states that are moved ahead "
    "inside the model give at least 1.05 times as many tokens a forward as heads behind it (Medusa).",
    paper="faster than all methods of one model then, Medusa among them; FIRP, which follows it: 1.9 to 3 times",
    metric="tokens_per_forward",
    arms={
        "hidden-transfer": _arm("hidden-transfer"),
        "medusa": _arm("medusa"),
        "from the middle": _arm("hidden-transfer", at=(4, 4, 4)),
        "from three quarters": _arm("hidden-transfer", at=(6, 6, 6)),
    },
    ours="hidden-transfer",
    baseline="medusa",
    better="higher",
    margin=1.05,
    seeds=(0, 1, 2),
    other_seeds=(0,),
    data="stdlib",
)


# ---- for the laws ----------------------------------------------------------------------------------------------------


def case() -> DecoderCase:
    """For the laws: arbitrary maps in two of four layers."""
    config = TransferConfig(heads=2, at=(1, 3))
    return DecoderCase(
        lambda ask: drafted(ask, *untrained(HiddenTransfer, config, ask.system)), Options(nodes=4), depth=4
    )


class _Open(LineShape):
    """Wrong on purpose: the model's own slots see the guesses that stand behind them."""

    def tail(self, base, device):
        return torch.ones_like(super().tail(base, device))


class _Seen(Line):
    def step(self, canvas, guess, cached):
        plan = super().step(canvas, guess, cached)
        if plan is not None and plan.spawns and plan.run is not None:
            plan.shape.__class__ = _Open  # type: ignore[attr-defined]
        return plan


def mutant() -> DecoderCase:
    """The case with that."""

    def wrong(ask: Ask) -> Decoding:
        ask.system.model.factorization = _Seen(1)
        return case().decoder(ask)

    return replace(case(), decoder=wrong)
