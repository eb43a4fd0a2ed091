"""SkipDecode: the further a text has come, the fewer layers a token goes through.

New: how many is fixed by the token's place, so all rows of a batch agree, and layers are left out at the bottom, behind
a first one that warms up. Places ahead never go through more layers than those behind them, so every token finds all
the entries that it looks for, and nothing is computed twice; leaving early, at the top, lacks them (Del Corro et al.
2023). Here tokens are counted from each row's own prompt: rows need no padding on the left to stand in one column, and
a drafted token goes through the layers of its place.

The model is meant to be trained on under the same schedule: `seriatim train next-token --from MODEL --decoder
skipdecode+least=4`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from seriatim.decoding.layers import Staircase
from seriatim.evaluation.skipping import TopExit
from seriatim.laws.decoders import DecoderCase
from seriatim.systems.claim import Claim, Trial
from seriatim.systems.decoders import Ask, Decoding, with_layers
from seriatim.systems.layer_trials import after_training
from seriatim.systems.meta import Meta

META = Meta(
    key="skipdecode",
    title="SkipDecode",
    family="decoder",
    modality="text",
    paper="SkipDecode: Autoregressive Skip Decoding with Batching and Caching for Efficient LLM Inference (2023), "
    "arXiv 2307.02628",
    likelihood="relaxed",
    summary="The further a text has come, the fewer layers a token goes through; the lower ones are skipped.",
)


@dataclass(frozen=True)
class Options:
    """most: layers of the prompt (0: all); least: layers of the token number `length` behind it and of all that follow
    (0: half of `most`); length: that a text is expected to have; warmup: first layers that are never skipped; draft:
    another decoder that drafts, such as prompt-lookup. Neutral: `least` is all layers."""

    most: int = 0
    least: int = 0
    length: int = 128
    warmup: int = 1
    draft: str | None = None


def decoder(ask: Ask) -> Decoding:
    """A staircase from most to least layers."""
    ask.no_source()
    o = ask.options
    most = o.most or ask.system.model.backbone.config.depth
    if min(o.most, o.least) < 0 or (o.least or 1) > most:
        raise ValueError(
            f"layers become fewer: least is at most {most} and neither is below 0, got {o.least}, {o.most}"
        )
    return with_layers(ask, Staircase.linear(most, o.least or -(-most // 2), o.length, o.warmup), o.draft)


def case() -> DecoderCase:
    """For the laws: four layers, of which two are left at the third token."""
    return DecoderCase(decoder, Options(least=2, length=3), neutral=Options(least=4, length=3), depth=4)


class Counted(Staircase):
    """Wrong on purpose: the layers that warm up are counted twice."""

    def stair(self, count: int, depth: int) -> list[bool]:
        return super().stair(count - self.warmup, depth)


def mutant() -> DecoderCase:
    """Skips a layer more than the schedule says."""
    return replace(case(), decoder=lambda ask: with_layers(ask, Counted((ask.options.least,)), None))


HALF = Staircase.linear(8, 4, 128)
CLAIM = Claim(
    text="trained on under the same schedule, a model that skips at the bottom predicts text better than one that "
    "leaves at the top",
    paper="2 to 5 times faster with negligible loss on E2E, Reddit-TLDR and CNN/DM (OPT 1.3B and 6.7B)",
    metric="loss",
    arms={
        "bottom": Trial("zoo:text-base", after_training(HALF)),
        "top": Trial("zoo:text-base", after_training(TopExit(HALF.counts))),
    },
    ours="bottom",
    baseline="top",
)
