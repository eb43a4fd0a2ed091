"""ParallelBench: what it costs to decide several tokens at once, on tasks whose answers are known (2025).

New in it: whatever the model, tokens that are decided together cost at least their total correlation given what is
known, so that a task can be as easy as copying word by word and lost in one step. Each problem of `list_tasks` has a
law, and each way to decode a ceiling: how often a model with the true conditionals of that law ends in a right answer
by it. A trained model is measured beside it, at temperature 1.

A model whose conditionals lean towards one answer can beat the ceilings by always giving that one: the entropy of its
answers to one prompt stands beside that of as many draws from the law. Unlike the paper's prompts these have no
example, a name is a token, and the places to be filled are given, its end, too.
"""

from __future__ import annotations

import math
import random
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from seriatim.data.list_tasks import LENGTHS, LISTS, Problem, Words, asked
from seriatim.decoding.filters import Warper
from seriatim.decoding.loop import Decider, decode
from seriatim.decoding.remask import First, ReMDM, RunningConfidence
from seriatim.decoding.sample import Above, Factor, Remask, SampleAll, Select, schedule
from seriatim.decoding.target import Target
from seriatim.evaluation.ceilings import ceiling, entropy, permuted, total_correlation, uniform
from seriatim.evaluation.decoding_order import decided_at, kendall, spearman, turns_of
from seriatim.laws.oracle import oracle
from seriatim.layout import line
from seriatim.model import Model
from seriatim.random import Generator
from seriatim.systems.claim import Claim, Trial
from seriatim.systems.meta import Meta
from seriatim.systems.text_system import TextSystem, beside

META = Meta(
    key="parallelbench",
    title="ParallelBench",
    family="study",
    modality="text",
    paper="ParallelBench: Understanding the Trade-offs of Parallel Decoding in Diffusion LLMs (2025)",
    likelihood="none",
    summary="Accuracy against tokens a step, on tasks whose answers depend on themselves, beside what is possible.",
)

INDEPENDENT = ("copy", "reverse", "sort", "insert-index", "remove-index", "replace-index")
DEPENDENT = ("shuffle", "insert-random", "remove-random", "replace-random")
LISTABLE = 1000  # answers, of which a law is made; a shuffled list of seven has more

# By name: of a setting and the number of tokens the decider. Settings of the first are tokens a step.
FIXED: dict[str, Callable[[int, int], Decider]] = {
    "random": lambda k, n: Select("random", steps_of(n, k)),
    "confidence": lambda k, n: Select("confidence", steps_of(n, k)),
    "margin": lambda k, n: Select("margin", steps_of(n, k)),
    "entropy": lambda k, n: Select("entropy", steps_of(n, k)),
    "left-to-right": lambda k, n: First(k),
    "remask": lambda k, n: Remask("confidence", steps_of(n, k)),
    "remdm": lambda k, n: ReMDM(steps_of(n, k)),
    "rcr": lambda k, n: RunningConfidence("confidence", steps_of(n, k)),
}
ADAPTIVE: dict[str, Callable[[float, int], Decider]] = {
    "threshold": lambda sure, n: Select("confidence", commit=Above(sure)),
    "factor": lambda factor, n: Select("confidence", commit=Factor(factor)),
}
SETTINGS = {"threshold": (0.5, 0.7, 0.9, 0.97), "factor": (0.25, 0.5, 1.0, 2.0)}


def steps_of(n: int, k: int) -> int:
    """Steps for n tokens, at most k at each."""
    return -(-n // k)


def sizes_of(n: int, k: int) -> tuple[int, ...]:
    """Tokens of each of these steps, as `Select` spreads them."""
    left = (n, *schedule(n, steps_of(n, k), "linear"))
    return tuple(a - b for a, b in pairwise(left))


# ---- one decoding ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Said:
    """Answers to problems of one shape: ids, and the turn that decided each of their tokens."""

    ids: Int[Tensor, "problems tokens"]
    at: Int[Tensor, "problems tokens"]

    @property
    def tokens_per_step(self) -> float:
        """The mean over problems; each is done when its last token is decided for good."""
        turns = turns_of(self.at, torch.ones_like(self.at, dtype=torch.bool))
        return float((self.at.shape[1] / turns.double()).mean())

    @property
    def figures(self) -> dict[str, float | None]:
        orders = {"kendall": kendall(self.at), "spearman": spearman(self.at)}
        means = {name: float(x.nanmean()) for name, x in orders.items()}
        return {"tokens_per_step": self.tokens_per_step} | {k: None if math.isnan(x) else x for k, x in means.items()}


@torch.inference_mode()
def answers(
    system: TextSystem, problems: Sequence[Problem], decider: Decider, seed: int = 0, temperature: float = 1.0
) -> Said:
    """What a system says to problems whose prompts and answers are equally long, by a decider; of a model that writes
    one token after another, whatever the decider, one at a time. Raises ValueError for problems of several shapes."""
    encode = system.tokenizer.encode
    right = [p.answer(random.Random(seed)) for p in problems]  # only their length is looked at
    pairs = [
        (encode(" ".join(p.prompt)), [*encode(" ".join(a)), *system.stop[:1]])
        for p, a in zip(problems, right, strict=True)
    ]
    batch, (start, end) = beside(pairs), (len(pairs[0][0]), len(pairs[0][0]) + len(right[0]))
    if any(len(prompt) != start or len(a) != end - start for (prompt, _), a in zip(pairs, right, strict=True)):
        raise ValueError("problems of several lengths are answered apart: their tokens do not lie in the same places")
    token = batch["token"]
    mine = torch.zeros_like(token, dtype=torch.bool)
    mine[:, start:end] = True
    model = system.model
    if model.factorization.free:
        canvas = model.canvas({"token": token.masked_fill(mine, 0)}, ~mine, layout=line(token.shape[1]))
    else:
        canvas = model.canvas({"token": token[:, :end].masked_fill(mine[:, :end], 0)}, start, layout=line(end))
        decider = SampleAll()
    steps = decode(Target(model, warp=Warper(temperature)), canvas, decider, random=Generator(seed))
    at = decided_at(steps, canvas)
    return Said(canvas.value["token"][:, start:end].clone(), at[:, start:end])


def rights(system: TextSystem, problems: Sequence[Problem], said: Said) -> list[bool]:
    """Which answers are right."""
    texts = (system.tokenizer.decode(ids) for ids in said.ids.tolist())
    return [p.right(text.split()) for p, text in zip(problems, texts, strict=True)]


# ---- what is possible ------------------------------------------------------------------------------------------------


class Ideal:
    """A model with the true conditionals of one problem; names do not matter, so one stands for all of its shape."""

    def __init__(self, problem: Problem):
        listed = problem.answers()
        ids = {x: i for i, x in enumerate(dict.fromkeys(word for answer in listed for word in answer))}
        self.law = uniform(tuple(ids[word] for word in answer) for answer in listed)
        self.model: Model = oracle(self.law, len(ids))  # type: ignore[arg-type]

    @property
    def length(self) -> int:
        return len(next(iter(self.law)))

    @torch.inference_mode()
    def accuracy(self, decider: Decider, temperature: float = 1.0, draws: int = 512, seed: int = 0) -> float:
        """Which share of so many samples by a decider is right."""
        canvas = self.model.blank(draws)
        for _ in decode(Target(self.model, warp=Warper(temperature)), canvas, decider, random=Generator(seed)):
            pass
        return sum(tuple(x) in self.law for x in canvas.value["token"].tolist()) / draws


def possible(problem: Problem, k: int) -> float | None:
    """The ceiling of k tokens a step, which ones at random, exactly; None where that takes too long."""
    n = len(problem.items)
    if problem.task == "shuffle" and math.factorial(n) > LISTABLE:
        return permuted(sizes_of(n, k))  # of n! answers one is no answer here: nothing that could be seen
    law = uniform(problem.answers())
    if len(law) > LISTABLE or len(next(iter(law))) > 8:
        return None
    return ceiling(law, sizes_of(len(next(iter(law))), k))


# ---- the measure -----------------------------------------------------------------------------------------------------


def held_out(task: str, length: int, count: int, seed: int = 0) -> list[Problem]:
    """Problems of one shape that training has not seen."""
    return [asked(f"{seed} {task} {length} {i}", (task,), (length,), test=True)[0] for i in range(count)]


def measure(
    system: TextSystem,
    tasks: Sequence[str] = LISTS,
    lengths: Sequence[int] = LENGTHS,
    decoders: Sequence[str] = (*FIXED, *ADAPTIVE),
    problems: int = 100,
    temperature: float = 1.0,
    draws: int = 512,
    seed: int = 0,
    said: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Accuracy against tokens a step, of each task, length and decoder, beside what is possible. "ceiling" is that of
    steps as large at random places, exact; "ideal" that of the same decoder, of `draws` samples; both None where
    the law is too large. "entropy": of as many answers to one prompt at random places, in nats, by tokens a step,
    beside that of draws from the law ("data"); "order": the mean turn of each token as a share of all turns, one token
    at a time.

    Raises KeyError for a decoder that there is not."""
    out: dict[str, Any] = {}
    for task in tasks:
        for length in lengths if task in LISTS else (0,):
            said(f"{task} {length or ''}".strip())
            some = held_out(task, length, problems, seed)
            out.setdefault(task, {})[str(length)] = _shape(system, some, decoders, temperature, draws, seed)
    return {"system": system.meta.key, "temperature": temperature, "problems": problems, "tasks": out}


def _shape(
    system: TextSystem, problems: Sequence[Problem], decoders: Sequence[str], temperature: float, draws: int, seed: int
) -> dict[str, Any]:
    """The figures of one task and length."""
    listable = problems[0].task != "shuffle" or math.factorial(len(problems[0].items)) <= LISTABLE
    ideal = Ideal(problems[0]) if listable else None
    n = len(problems[0].answer(random.Random(0)))
    several = tuple(k for k in range(1, n + 1) if sizes_of(n, k)[0] == k)  # others are the same steps
    runs, order = [], {}
    for name in decoders if system.model.factorization.free else ("left-to-right",):
        for setting in several if name in FIXED else SETTINGS[name]:
            if not system.model.factorization.free and setting != 1:
                continue
            make = FIXED[name] if name in FIXED else ADAPTIVE[name]
            said = answers(system, problems, make(setting, n), seed, temperature)  # type: ignore[arg-type]
            run: dict[str, Any] = {"decoder": name, "setting": setting, **said.figures}
            run["accuracy"] = statistics.fmean(rights(system, problems, said))
            run["ideal"] = None if ideal is None else ideal.accuracy(make(setting, n), temperature, draws, seed)  # type: ignore[arg-type]
            run["ceiling"] = possible(problems[0], int(setting)) if name == "random" else None
            runs.append(run)
            if setting == 1 or (name == "threshold" and setting == 0.9):
                turns = turns_of(said.at, torch.ones_like(said.at, dtype=torch.bool))[:, None]
                order[name] = (said.at / (turns - 1).clamp(min=1)).mean(0).tolist()
    return {
        "tokens": n, "total_correlation": None if ideal is None else total_correlation(ideal.law), "runs": runs,
        "order": order, "entropy": _entropies(system, problems[0], several, temperature, draws, seed),
    }  # fmt: skip


def _entropies(
    system: TextSystem, problem: Problem, several: Iterable[int], temperature: float, draws: int, seed: int
) -> dict[str, float]:
    """Of as many answers to one prompt, by tokens a step ("data": of draws from the law)."""
    rng, n = random.Random(seed), len(problem.answer(random.Random(0)))
    out = {"data": _spread([problem.answer(rng) for _ in range(draws)])}
    for k in several if system.model.factorization.free else (1,):
        said = answers(system, [problem] * draws, Select("random", steps_of(n, k)), seed, temperature)
        out[str(k)] = _spread([tuple(map(str, x)) for x in said.ids.tolist()])
    return out


def _spread(drawn: Sequence[Words]) -> float:
    return entropy(count / len(drawn) for count in Counter(drawn).values())


# ---- the claim -------------------------------------------------------------------------------------------------------


def kept(tasks: Sequence[str]) -> Callable[[Any, int], Mapping[str, float]]:
    """Which share of the accuracy with one token at a time is left with all tokens in one step, and at a threshold of
    0.9, which takes how many tokens a step: means over tasks and lists of 4 and 6 names."""

    def trial(system: Any, seed: int) -> dict[str, float]:
        ways = {"one": FIXED["random"], "all": FIXED["random"], "sure": ADAPTIVE["threshold"]}
        found: dict[str, list[float]] = {name: [] for name in (*ways, "tokens_per_step")}
        for task in tasks:
            for length in (4, 6):
                problems = held_out(task, length, 100, seed)
                n = len(problems[0].answer(random.Random(0)))
                for name, make in ways.items():
                    said = answers(system, problems, make({"one": 1, "all": n, "sure": 0.9}[name], n), seed)  # type: ignore[arg-type]
                    found[name].append(statistics.fmean(rights(system, problems, said)))
                found["tokens_per_step"].append(said.tokens_per_step)
        means = {name: statistics.fmean(x) for name, x in found.items()}
        return {"kept": means["all"] / max(means["one"], 0.01), **means}

    return trial


MODEL = "zoo:text-lists"
CLAIM = Claim(
    text="Parallel decoding breaks down where answers depend on themselves, and only there: of the accuracy with one "
    "token at a time, at least twice as much is left with all tokens in one step on copying, reversing, sorting and "
    "changes at a place as on shuffling and changes anywhere.",
    paper="parallel decoding degrades sharply on dependent tasks, and no fixed strategy adapts to the difficulty",
    metric="kept",
    better="higher",
    margin=2.0,
    arms={"independent": Trial(MODEL, kept(INDEPENDENT)), "dependent": Trial(MODEL, kept(DEPENDENT))},
    ours="independent",
    baseline="dependent",
)
