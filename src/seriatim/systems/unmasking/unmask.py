"""Unmasking: some of the unknown tokens at each forward, those first that the model is surest of (LLaDA).

What a masked model's decoders have in common: a forward reads every unknown token, a rule ranks them, and so many of
the best are decided for good, block after block. How many: an even share of the steps, all above a threshold, as many
as the likeliest values are sure to go together (factor), or as many as their entropies allow (budget). With one token
at a time it is what the faster decoders are measured against (Nie et al. 2025).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from seriatim.decoding.ancestral import Drawn
from seriatim.decoding.sample import Above, Budget, Commit, Factor, Rule, Schedule, Select, check_threshold
from seriatim.decoding.unmask import Unmask
from seriatim.laws.unmasking import UnmaskingCase, careless
from seriatim.systems.decoders import Ask, Decoding
from seriatim.systems.meta import Meta

META = Meta(
    key="unmask",
    title="Unmasking",
    family="unmasking",
    modality="text",
    paper="Large Language Diffusion Models (2025), arXiv 2502.09992",
    likelihood="relaxed",
    summary="Some unknown tokens at each forward: by steps, threshold, factor or entropy budget.",
)


@dataclass(frozen=True)
class Options:
    """rule: which tokens first (random, confidence, margin, entropy); block: tokens that are decided together (None: as
    the model does). How many at once: all above a `threshold`, a `factor` or a `budget` of nats (rule entropy); none of
    them: the steps that are asked for, by the `schedule` (linear, cosine, quadratic, powers), as many at each as its
    mean says, or (`counts`: "drawn") as the reverse process draws."""

    rule: str = "confidence"
    block: int | None = None
    threshold: float | None = None
    factor: float | None = None
    budget: float | None = None
    schedule: str = "linear"
    counts: str = "mean"


def decoder(ask: Ask) -> Decoding:
    """Rank, and decide the best."""
    ask.no_source()
    o = ask.options
    if o.counts not in ("mean", "drawn"):
        raise ValueError(f"counts are mean or drawn, not {o.counts!r}")
    kind = Drawn if o.counts == "drawn" else Select
    return Decoding(Unmask(selected(ask, o.rule, commit_of(o), o.schedule, kind), ask.stop), block=o.block)


def selected(
    ask: Ask, rule: Rule, commit: Commit | None, schedule: Schedule = "linear", kind: type[Select] = Select
) -> Select:
    """The rule, with the steps that are asked for (none: one token at a time)."""
    return kind(rule, ask.sampling.steps or ask.system.model.layout.size, schedule, commit)


def commit_of(options: Options) -> Commit | None:
    """How many at once, by these options. Raises ValueError where they are several, or none that can be."""
    given = {k: v for k in ("threshold", "factor", "budget") if (v := getattr(options, k, None)) is not None}
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are different ways to decide several tokens at once: give one of them")
    for name, value in given.items():
        if name == "threshold":
            check_threshold(value, options.rule)
        elif not value > 0:
            raise ValueError(f"a {name} is above 0; got {value}")
    ways: dict[str, Callable[[float], Commit]] = {"threshold": Above, "factor": Factor, "budget": Budget}
    return next((ways[name](value) for name, value in given.items()), None)


def case() -> UnmaskingCase:
    """For the laws."""
    return UnmaskingCase(decoder, Options(threshold=0.4), neutral=Options())


def mutant() -> UnmaskingCase:
    """Decides whatever, at random."""
    return UnmaskingCase(careless, Options(), neutral=Options())
