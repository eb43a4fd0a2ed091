"""BiLD, the big little decoder: a small model writes the easy tokens, and a large one steps in for the hard ones.

The small model writes greedily until it is unsure of its next token (*fallback*) or has written ten. Then the large
model reads what was written in one forward, goes back to the first token whose loss exceeds a threshold and puts its
own there (*rollback*), or adds its own at the end (Kim et al. 2023). Relaxed: tokens stand that the large model would
not have written; `rollback=0` is exact. A small model that is trained on what the large one writes (*prediction
alignment*) moves the whole trade of quality for speed:

    seriatim train next-token --from SMALL --teacher LARGE --data TEXTS --out runs/aligned
    seriatim generate LARGE --decoder bild:runs/aligned

Departures from the released code, which `released=true` undoes: the small model writes the first token; the large model
writes one token after it went back, not two; it goes back to the first token that is too unlikely and is not its
likeliest, where the released code spares the whole draft if the first that is too unlikely is its likeliest; and it
reads how the small model ends a text, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from seriatim.decoding.bild import Confident, ReleasedConfident, ReleasedRollback, Rollback
from seriatim.evaluation.metrics import LOOPING
from seriatim.home import HOME
from seriatim.laws.case import Limit
from seriatim.laws.decoders import GREEDY, DecoderCase, credulous
from seriatim.laws.drafts import another
from seriatim.systems.claim import Claim, Trial
from seriatim.systems.decoders import Ask, Decoding
from seriatim.systems.language_model import LanguageModel
from seriatim.systems.meta import Meta
from seriatim.systems.system import Sampling
from seriatim.systems.trials import held_out

META = Meta(
    key="bild",
    title="Big Little Decoder",
    family="decoder",
    modality="text",
    paper="Speculative Decoding with Big Little Decoder (2023), arXiv 2302.07863",
    likelihood="relaxed",
    summary="A small model writes while it is sure; the large one takes back what it finds too unlikely.",
)
EXAMPLE = "bild:zoo:text-draft"


@dataclass(frozen=True)
class Options:
    """draft_length: most tokens that the small model writes before the large one reads them; fallback: it hands over
    where its likeliest token is less probable than this (0: never, above 1: always); rollback: the largest loss of a
    token in nats that the large model lets stand (0: exact; large: everything); released: as the released code does;
    translate: a small model of another tokenizer exchanges ids whose texts agree."""

    draft_length: int = 10
    fallback: float = 0.6
    rollback: float = 5.0
    released: bool = False
    translate: bool = False


def decoder(ask: Ask) -> Decoding:
    """The small model is the source: `bild:SMALL`."""
    return between(ask, ask.draft_model(ask.options.translate))


def between(ask: Ask, small: LanguageModel) -> Decoding:
    """The model that is asked and a small one."""
    o, s = ask.options, ask.sampling
    sure = Sampling(
        repetition_penalty=s.repetition_penalty, presence_penalty=s.presence_penalty,
        frequency_penalty=s.frequency_penalty, suppress_tokens=s.suppress_tokens,
        begin_suppress_tokens=s.begin_suppress_tokens,
    )  # fmt: skip
    proposer, decider = (ReleasedConfident, ReleasedRollback) if o.released else (Confident, Rollback)
    length = ask.fits("draft_length", o.draft_length)
    return Decoding(decider(o.rollback, ask.stop), proposer(small.target(None, sure), length, o.fallback))


# ---- what it claims --------------------------------------------------------------------------------------------------


PENALTY = 1.2


def trial(decoder: str, prompts: int = 12, new_tokens: int = 128) -> Callable[[Any, int], Mapping[str, Any]]:
    """Greedy texts behind held-out prompts, others for each seed: how many tokens a forward of the large model gives,
    and nats a token that it finds in them. Repetition is penalised, or most texts of a small model would go round in
    circles; those that do are easy to draft, and counted apart. Raises ValueError where all do."""

    def measure(system: Any, seed: int) -> Mapping[str, Any]:
        counts = {False: [0, 0, 0.0], True: [0, 0, 0.0]}
        for prompt in held_out(system, prompts * (seed + 1))[-prompts:]:
            made = system.generate(
                prompt, decoder, max_new_tokens=new_tokens, temperature=0.0, repetition_penalty=PENALTY, logprobs=True
            )
            own = counts[len(set(made.ids)) < LOOPING * len(made.ids)]
            for i, more in enumerate((len(made.ids), made.forwards, -sum(made.logprobs))):
                own[i] += more
        (tokens, forwards, nats), (looping, looping_forwards, _) = counts[False], counts[True]
        if not tokens:
            raise ValueError(f"all {prompts} texts repeat themselves: ask for more prompts, or penalise it more")
        return {
            "tokens_per_forward": tokens / forwards, "nats_per_token": nats / tokens, "tokens": tokens,
            "looping_tokens_per_forward": looping / looping_forwards if looping_forwards else None,
            "looping_tokens": looping,
        }  # fmt: skip

    return measure


ALIGNING = {"steps": 400, "batch": 16, "learning_rate": 5e-4, "prompts": 2000}


def aligned(base: str, teacher: str) -> Path:
    """A small model of the zoo, trained on what a large one writes: once, and kept under SERIATIM_HOME."""
    from seriatim.verbs.train import train

    folder = HOME / "claims" / META.key / f"{base.rpartition(':')[2]}-{teacher.rpartition(':')[2]}"
    if not (folder / "finished").is_file():
        settings = {**ALIGNING, "teacher": teacher}
        train("next-token", "stdlib", from_=base, out=folder, resume=True, settings=settings)
        (folder / "finished").touch()
    return folder


def _by_aligned(system: Any, seed: int) -> Mapping[str, Any]:
    return trial(f"bild:{aligned('zoo:text-draft', 'zoo:text-base')}")(system, seed)


CLAIM = Claim(
    text="A large model that lets likely tokens stand writes a tenth more tokens a forward than one that accepts only "
    "its own, with the same small model, which hands over where it is unsure.",
    paper="up to 2.12 times as fast as the large model alone (T5 on a T4), within about one point of quality",
    metric="tokens_per_forward",
    arms={
        "tolerant": Trial("zoo:text-base", trial("bild:zoo:text-draft")),
        "strict": Trial("zoo:text-base", trial("bild:zoo:text-draft+rollback=2.0")),
        "exact": Trial("zoo:text-base", trial("bild:zoo:text-draft+rollback=0.0")),
        "tolerant, aligned": Trial("zoo:text-base", _by_aligned),
        "never unsure": Trial("zoo:text-base", trial("bild:zoo:text-draft+fallback=0.0")),
        "never unsure, exact": Trial("zoo:text-base", trial("bild:zoo:text-draft+fallback=0.0+rollback=0.0")),
    },
    ours="tolerant",
    baseline="exact",
    better="higher",
    margin=1.1,
)


# ---- laws ------------------------------------------------------------------------------------------------------------


def _with_another(ask: Ask) -> Decoding:
    """With a small model of other weights."""
    return between(ask, another(ask.vocab))


def _large_alone() -> Limit:
    """A small model that is never sure."""
    case = DecoderCase(_with_another, Options(fallback=1.01))
    ours, plain = case.text(GREEDY, 0, case.decoding(GREEDY, False)), case.text(GREEDY, 0)
    return Limit("with a small model that is never sure, the large one alone", torch.tensor(ours), torch.tensor(plain))


def case() -> DecoderCase:
    """For the laws: exact where nothing is tolerated."""
    options = Options(draft_length=3, fallback=0.4, rollback=1.0)
    return DecoderCase(_with_another, options, neutral=replace(options, rollback=0.0), limits=(_large_alone,))


def mutant() -> DecoderCase:
    """Accepts whatever is drafted."""
    return DecoderCase(credulous, Options())
