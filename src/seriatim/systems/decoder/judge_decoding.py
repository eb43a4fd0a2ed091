"""Judge decoding: a drafted token also stands if a linear judge on the large model's state finds it right.

Speculative sampling accepts what the large model would have written, and so rejects good tokens in other words, however
strong the draft. New: a linear map on the large model's own deep state of the drafted token, which the verifying
forward computes anyway, says whether the text is right up to it; a token stands where the usual rule or the judge
accepts it (Bachmann et al. 2025). Long drafts pay then. Relaxed on purpose: `delta=1` is exact.

The judge is trained in minutes on answers with marked errors (`posttraining.judge.train_judge`); where no answers are
marked, `examples` makes some of small questions about numbers. It fits the model it was trained for, and judges well
what it has learned to judge: measure the quality of what is written.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from seriatim.data.base import load_data
from seriatim.data.questions import WORDINGS, Question, asked
from seriatim.decoding.draft import DraftModel
from seriatim.decoding.judge import Judged, Watch
from seriatim.decoding.verify import Chain
from seriatim.home import HOME
from seriatim.laws.case import Limit, randomise
from seriatim.laws.decoders import DecoderCase
from seriatim.laws.drafts import another
from seriatim.posttraining.drafting import Base, ready
from seriatim.posttraining.judge import Judge, JudgeConfig, Verdicts, train_judge, verdicts
from seriatim.systems.claim import Claim, Trial
from seriatim.systems.decoders import Ask, Decoding
from seriatim.systems.draft_parts import draft_part
from seriatim.systems.meta import Meta
from seriatim.systems.system import Sampling

META = Meta(
    key="judge-decoding",
    title="Judge Decoding",
    family="decoder",
    modality="text",
    paper="Judge Decoding: Faster Speculative Sampling Requires Going Beyond Model Alignment (2025), arXiv 2501.19309",
    likelihood="relaxed",
    summary="A linear judge on the large model's states lets drafted tokens stand that are right in other words.",
)
EXAMPLE = "judge-decoding:runs/judge+draft=zoo:text-draft"


@dataclass(frozen=True)
class Options:
    """draft: the small model; draft_length: tokens that it drafts; delta: how sure the judge must be that a token is
    good (1: it is never heard, which is exact); translate: a draft of another tokenizer exchanges ids whose texts
    agree."""

    draft: str = ""
    draft_length: int = 16
    delta: float = 0.5
    translate: bool = False


def decoder(ask: Ask) -> Decoding:
    """The judge is the source and the small model an option: `judge-decoding:JUDGE+draft=SMALL`."""
    o = ask.options
    if not o.draft:
        raise ValueError("name a small model of the same vocabulary, as in judge-decoding:JUDGE+draft=zoo:text-draft")
    if ask.source is None:
        raise ValueError("name the folder of a judge, as in judge-decoding:JUDGE+draft=SMALL; `train_judge` makes one")
    small = replace(ask, source=o.draft).draft_model(o.translate)
    return between(ask, small, draft_part(ask, Judge)[0])  # type: ignore[type-var]


def between(ask: Ask, small: Any, judge: Any, verifier: type[Judged] = Judged) -> Decoding:
    """The model that is asked, a small one and a judge. At temperature 0 the draft is the small model's likeliest."""
    o, watch = ask.options, Watch(judge.layer)
    siblings: Any = "top" if ask.sampling.temperature == 0 else "independent"
    proposer = DraftModel(small.target(None, ask.sampling), ask.fits("draft_length", o.draft_length), siblings)
    return Decoding(verifier(judge, watch, o.delta, ask.stop), proposer, {"layers": watch})


# ---- what a judge learns from ----------------------------------------------------------------------------------------


def examples(tokenizer: Any, count: int, seed: int = 0, test: bool = False) -> list[Verdicts]:
    """So many questions, each with its answer in one wording, and in one with an error (`data.questions`)."""
    rng, found = random.Random(f"{seed} judge"), []
    for question in asked(seed, count, test=test):
        found.append(verdicts(tokenizer, question.prompt, question.said(rng.randrange(WORDINGS))))
        said, first, last = question.spoilt(rng.randrange(WORDINGS), rng)
        found.append(verdicts(tokenizer, question.prompt, said, (first, last)))
    return found


def accuracy(
    system: Any, decoding: Callable[[], Any], questions: list[Question], new_tokens: int = 48
) -> dict[str, float]:
    """Questions answered greedily by a decoder: the share that comes to the right number, and tokens a forward."""
    right = tokens = forwards = 0
    for question in questions:
        made = system.generate(question.prompt, decoding(), max_new_tokens=new_tokens, temperature=0.0, stop=["\n"])
        right += question.right(made.text)
        tokens, forwards = tokens + len(made.ids), forwards + made.forwards
    return {"accuracy": right / len(questions), "tokens_per_forward": tokens / forwards}


# ---- what it claims --------------------------------------------------------------------------------------------------


def answering(base: str, wording: int, wrong: float, steps: int) -> Any:
    """A model that answers questions, mostly in one wording: one that there is already, trained further on answers of
    which a share is wrong. Trained once, and kept under SERIATIM_HOME."""
    from seriatim.verbs.load import load
    from seriatim.verbs.train import train

    folder = HOME / "claims" / META.key / f"{base.rpartition(':')[2]}-{wording}-{wrong:g}-{steps}"
    data = load_data("questions", "text", count=40_000, wording=wording, wrong=wrong)
    settings = {"steps": steps, "batch": 8, "learning_rate": 1e-3, "length": 256}
    if not (folder / "finished").is_file():
        train("next-token", data, out=folder, from_=base, resume=True, settings=settings)
        (folder / "finished").touch()
    return load(folder)


TARGET, SMALL = (0, 0.0, 1500), (2, 0.3, 1000)  # wording, share of wrong answers, steps: other words, more errors


def trial(kind: Literal["usual", "judge", "random"], delta: float = 0.5) -> Callable[[Any, int], Mapping[str, Any]]:
    """Held-out questions answered by two such models that prefer other words, the small one being wrong more often:
    accuracy and tokens a forward; `kept` is the latter while at least half of the answers are right, and at most a
    point fewer than by the usual rule; else it is the usual rule's."""

    def measure(system: Any, seed: int) -> Mapping[str, Any]:
        target, small = answering("zoo:text-base", *TARGET), answering("zoo:text-draft", *SMALL)
        judge, learned = train_judge(Base(target), examples(target.tokenizer, 400, seed))
        if kind == "random":
            mixed = torch.randperm(len(judge.weight), generator=torch.Generator().manual_seed(seed))
            judge.weight.copy_(judge.weight[mixed])
        ready(judge, Base(target))
        questions = asked(1000 + seed, 80, test=True)

        def answered(delta: float) -> dict[str, float]:
            ask = Ask(target, Sampling(temperature=0), target.stop, None, Options(delta=delta))
            return accuracy(target, lambda: between(ask, small, judge), questions)

        usual = answered(1.0)
        found = usual if kind == "usual" else answered(delta)
        kept = found if found["accuracy"] >= max(usual["accuracy"] - 0.01, 0.5) else usual
        return {**found, "kept": kept["tokens_per_forward"], **{f"judge_{k}": v for k, v in learned.items()}}

    return measure


CLAIM = Claim(
    text="With a judge that has learned from 400 answers with errors, one and a half times as many tokens a forward as "
    "by the usual rule, at the accuracy of the usual rule.",
    paper="19.7 accepted tokens in place of 6.3 (Llama-3.1, 8B drafts for 405B), quality kept",
    metric="kept",
    arms={
        "usual": Trial("zoo:text-base", trial("usual")),
        "judge": Trial("zoo:text-base", trial("judge")),
        "surer judge": Trial("zoo:text-base", trial("judge", 0.9)),
        "random judge": Trial("zoo:text-base", trial("random")),
    },
    ours="judge",
    baseline="usual",
    better="higher",
    margin=1.5,
)


# ---- laws ------------------------------------------------------------------------------------------------------------


def _arbitrary(ask: Ask, verifier: type[Judged] = Judged) -> Decoding:
    """With a small model of other weights, and a judge of arbitrary ones."""
    base = Base(ask.system)
    judge = Judge(JudgeConfig(), base)
    randomise(judge, 3)  # type: ignore[arg-type]
    return between(ask, another(ask.vocab), ready(judge, base), verifier)


def _unheard() -> Limit:
    """A judge that is never heard."""
    case, sampling = DecoderCase(_arbitrary, Options(draft_length=3, delta=1.0)), Sampling()
    way, same = (case.decoding(sampling) for _ in range(2))
    ours = case.text(sampling, 1, way)
    usual = case.text(sampling, 1, Decoding(Chain(), same.proposer))
    return Limit("without a judge, speculative sampling", torch.tensor(ours), torch.tensor(usual))


def case() -> DecoderCase:
    """For the laws: exact where the judge is not heard."""
    options = Options(draft_length=2, delta=0.5)
    return DecoderCase(_arbitrary, options, coupled=False, neutral=replace(options, delta=1.0), limits=(_unheard,))


class _Reversed(Judged):
    """Wrong on purpose: accepts what the judge is not sure of."""

    def good(self, states):
        return ~super().good(states)


def mutant() -> DecoderCase:
    """The case with that."""
    return replace(case(), decoder=lambda ask: _arbitrary(ask, _Reversed))
