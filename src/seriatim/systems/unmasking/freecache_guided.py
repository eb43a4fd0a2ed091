"""FlashDLM: finished blocks are never computed again, and a small next-token model says how much of a draft to trust.

New: keys and values of finished text change little while the rest is written, so they are kept for good, where others
compute them anew for each block (FreeCache); and a masked model fills in all that is unknown at each forward, of which
the longest beginning is decided on which a small autoregressive model agrees (guided diffusion; Hu et al. 2025). The
guide is the source, and contributes no token: it says how many to trust. Without a guide tokens are decided as by
`unmask`. Of a model of blocks the cache is its own, and exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from seriatim.canvas import Canvas, Set
from seriatim.decoding.guess import Guess
from seriatim.decoding.guide import Agreement, Among, Chance, Equal, Guided, Likely
from seriatim.decoding.loop import Step
from seriatim.decoding.policy import FreeCache
from seriatim.decoding.sample import Select
from seriatim.decoding.unmask import Unmask
from seriatim.laws.case import Limit
from seriatim.laws.drafts import another
from seriatim.laws.unmasking import UnmaskingCase
from seriatim.model import Rows
from seriatim.random import Random
from seriatim.systems.claim import Claim, Trial
from seriatim.systems.decoders import Ask, Decoding
from seriatim.systems.meta import Meta
from seriatim.systems.system import Sampling
from seriatim.systems.trials import Continued, continued, held_out, quality
from seriatim.systems.unmasking.unmask import commit_of, selected

META = Meta(
    key="freecache-guided",
    title="FreeCache and guided diffusion",
    family="unmasking",
    modality="text",
    paper="Accelerating Diffusion Language Model Inference via Efficient KV Caching and Guided Diffusion (2025), arXiv "
    "2505.21467",
    likelihood="relaxed",
    summary="Finished blocks are kept as they are; a small next-token model says how much of a draft to trust.",
)
EXAMPLE = "freecache-guided:zoo:text-draft"


@dataclass(frozen=True)
class Options:
    """block: tokens that are kept together once all are decided (None: nothing is kept); rewrite: they are computed
    once more before, where they would else be kept as the forward left them that saw the last ones as masks. With a
    guide, agree: it would write the same ("equal"), gives it more than the probability `least` ("likely"), has it among
    its `k` likeliest ("among"), and gives it at least a `share` of the likeliest one's probability ("near"), or by
    chance, with the guide's own probability ("chance"); ahead: tokens of the draft that it reads at once; translate: a
    guide of another tokenizer exchanges ids whose texts agree. Without one: `rule` and `threshold` as of unmask.
    Neutral: no block, and no guide."""

    block: int | None = 32
    rewrite: bool = False
    agree: str = "equal"
    least: float = 0.1
    k: int = 5
    share: float = 0.5
    ahead: int = 32
    translate: bool = False
    rule: str = "confidence"
    threshold: float | None = None


def decoder(ask: Ask) -> Decoding:
    """The guide is the source: `freecache-guided:SMALL`."""
    agreement(ask.options)  # refuses what there is not, guide or none
    if ask.source is None:
        return unguided(ask)
    return guided(ask, ask.draft_model(ask.options.translate))


def unguided(ask: Ask) -> Decoding:
    """The cache alone."""
    o = ask.options
    way = Unmask(selected(ask, o.rule, commit_of(o)), ask.stop)
    return Decoding(way, target=_cache(ask), block=None if ask.own_blocks else o.block)


def guided(ask: Ask, guide: Any, decider: type[Guided] = Guided) -> Decoding:
    """Guided by this model, which is asked what it would write without temperature and filters."""
    o = ask.options
    small = guide.target(None, replace(ask.sampling.unfiltered, guidance=0.0, keep_tokens=()))
    return Decoding(decider(small, agreement(o), ask.stop, o.ahead), target=_cache(ask))


def _cache(ask: Ask) -> Mapping[str, Any]:
    o = ask.options
    return {} if o.block is None or ask.own_blocks else {"policy": FreeCache(o.block, o.rewrite)}


def agreement(options: Options) -> Agreement:
    """What counts as agreement, by these options. Raises ValueError for what there is not."""
    o = options
    if not 0 <= o.least <= 1:
        raise ValueError(f"least is a probability, from 0 to 1; got {o.least}")
    ways: dict[str, Agreement] = {
        "equal": Equal(), "likely": Likely(o.least), "among": Among(o.k), "near": Among(o.k, o.share),
        "chance": Chance(),
    }  # fmt: skip
    if o.agree not in ways:
        raise ValueError(f"agree is {', '.join(ways)}; got {o.agree!r}")
    return ways[o.agree]


# ---- what it claims --------------------------------------------------------------------------------------------------


PLAIN = "unmask+block=32"
WORSE, DULLER = 0.1, 0.9  # nats a token that quality may cost, and the share of the entropy that must be left


def trial(spec: str, prompts: int = 2, prompt: int = 64, new_tokens: int = 256) -> Callable[[Any, int], Any]:
    """Greedy continuations of held-out texts, by a decoder and token by token, in turns: how many times as fast
    (`kept`: while text-base finds no more than 0.1 nats a token more in them, and the tokens' entropy is at least 0.9
    of what it was; else at most 1), and what they have in common."""

    def measure(system: Any, seed: int) -> Mapping[str, Any]:
        given = held_out(system, prompts * (seed + 1), prompt)[-prompts:]
        own: list[Continued] = []
        plain: list[Continued] = []
        for ids in given:
            for found, one in ((plain, PLAIN), (own, spec)):
                found.append(continued(system, [ids], new_tokens, one, Sampling(temperature=0)))
        judged = [quality(given, [x.ids[0] for x in found]) for found in (own, plain)]
        (nats, entropy), (plain_nats, plain_entropy) = judged
        times = sum(x.seconds for x in plain) / sum(x.seconds for x in own)
        worse = nats > plain_nats + WORSE or entropy < DULLER * plain_entropy
        steps = [step for x in own for step in x.steps]
        same = [a == b for x, y in zip(own, plain, strict=True) for a, b in zip(x.ids[0], y.ids[0], strict=True)]
        return {
            "kept": min(times, 1.0) if worse else times, "times_as_fast": times, "nats_per_token": nats,
            "entropy": entropy, "plain_nats_per_token": plain_nats, "plain_entropy": plain_entropy,
            "tokens_per_forward": prompts * new_tokens / len(steps), "slots": sum(step.slots for step in steps),
            "same_tokens": sum(same) / len(same), "seconds": sum(x.seconds for x in own),
            "guide_seconds": sum(step.drafting for step in steps),
        }  # fmt: skip

    return measure


CLAIM = Claim(
    text="With finished blocks kept and a small next-token model as guide, a masked model writes texts of 256 tokens "
    "at least three times as fast as one token at a time, at no loss of quality.",
    paper="12.14 times as fast on average, up to 34 times in the first version, with negligible loss (Dream-7B guided "
    "by Qwen2.5-1.5B)",
    metric="kept",
    arms={
        "one token at a time": Trial("zoo:text-mdlm", trial(PLAIN)),
        "threshold": Trial("zoo:text-mdlm", trial(f"{PLAIN}+threshold=0.9")),
        "cache": Trial("zoo:text-mdlm", trial("freecache-guided")),
        "cache and guide": Trial("zoo:text-mdlm", trial(EXAMPLE)),
        "a guide that is easily content": Trial("zoo:text-mdlm", trial(f"{EXAMPLE}+agree=among")),
    },
    ours="cache and guide",
    baseline="one token at a time",
    better="higher",
    margin=3.0,
)


# ---- laws ------------------------------------------------------------------------------------------------------------


def _with_another(ask: Ask, decider: type[Guided] = Guided) -> Decoding:
    """Guided by a model of arbitrary weights, but where nothing is kept."""
    return unguided(ask) if ask.options.block is None else guided(ask, another(ask.vocab), decider)


def _case(decider: type[Guided] = Guided) -> UnmaskingCase:
    """With limits of the very decider."""

    def made(**options: Any) -> UnmaskingCase:
        return UnmaskingCase(lambda ask: _with_another(ask, decider), Options(**options))

    def text(case: UnmaskingCase, way: Decoding | None = None) -> torch.Tensor:
        system, greedy = case.systems[0], Sampling(temperature=0)
        return torch.tensor(case.text(system, greedy, way or case.decoding(system, greedy)))

    def never() -> Limit:
        """A guide that never agrees (nothing is likelier than certain) leaves the model's own text, in order."""
        case = made(block=99, agree="likely", least=1.0)
        return Limit("a guide that never agrees: from left to right", text(case), text(case, Decoding(_LeftToRight())))

    def always() -> Limit:
        """One that always agrees decides everything at once."""
        case = made(block=99, agree="likely", least=0.0)
        return Limit("a guide that always agrees: at once", text(case), text(case, Decoding(Unmask(Select(steps=1)))))

    case = UnmaskingCase(lambda ask: _with_another(ask, decider), Options(block=4, agree="among", k=2, ahead=2))
    return replace(case, neutral=Options(block=None), limits=(never, always))


class _LeftToRight:
    """The likeliest value of the first unknown element."""

    def decide(self, canvas: Canvas, guess: Guess | None, rows: Rows, random: Random) -> Step:
        first = canvas.lengths()[:, None]
        here = (torch.as_tensor(rows.element) == first).long().argmax(1, keepdim=True)
        return Step((Set(rows.dist.mode().gather(1, here), first),))


class _Contributes(Guided):
    """Wrong on purpose: where the guide disagrees, what it would have written stands."""

    def agreed(self, canvas: Canvas, front: Tensor, draft: Tensor, new: Tensor, random: Random) -> Tensor:
        plan = self.guide.plan(canvas)
        assert plan is not None
        written = self.guide.forward(plan, canvas).dist.mode()[:, -1:]
        draft[:, :1] = torch.where(draft[:, :1] >= 0, written, -1)
        return super().agreed(canvas, front, draft, new, random)


def case() -> UnmaskingCase:
    """For the laws: with a guide, but for the neutral setting."""
    return _case()


def mutant() -> UnmaskingCase:
    """The case with that."""
    return _case(_Contributes)
