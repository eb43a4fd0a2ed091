"""The parallel decoding curse: systems of text, decoders and tokens a step side by side (a survey, Li et al. 2025).

The survey makes no claim of its own; it says of diffusion language models that quality falls as more tokens are decided
together. Here objectives of equal size, data and training tokens are trained from nothing, next-token prediction among
them, and each writes, answers and fills gaps by every way of decoding that its order allows, at 1 to 16 tokens a step.

A cell of the grid is a system of the registry, a decoder of the registry, and how many tokens a step: nothing else is
known of either. Texts are judged by a next-token model, whose nats alone would praise dull ones; so the entropy of
their tokens is taken off (`excess`). On list tasks the true law itself says what confidence can give: where all places
are equally unsure it picks neighbours, which depend on each other most, and loses more than random order does.
"""

from __future__ import annotations

import copy
import keyword
import math
import random
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from seriatim.data.base import load_data
from seriatim.data.list_tasks import LISTS
from seriatim.decoding.loop import Step
from seriatim.evaluation.cost import parameters
from seriatim.evaluation.metrics import bits_per_byte, distinct
from seriatim.home import HOME
from seriatim.studies import parallelbench as bench
from seriatim.systems.claim import Claim, Trial
from seriatim.systems.decoders import decoder_names, decoder_of, example_of
from seriatim.systems.infill import Gap
from seriatim.systems.meta import Meta
from seriatim.systems.system import Sampling
from seriatim.systems.taxonomy import committed
from seriatim.systems.text_system import TextSystem
from seriatim.systems.trials import held_out, quality

META = Meta(
    key="dlm-survey",
    title="Diffusion language models side by side",
    family="study",
    modality="text",
    paper="A Survey on Diffusion Language Models (2025), arXiv 2508.10875",
    likelihood="none",
    summary="Objectives of equal size and training by decoder and tokens a step: bits, curves, gaps, answers.",
)

TOKENS = (1, 2, 4, 8, 16)  # a step
JUDGE, BASE, LISTED = "zoo:text-base", "zoo:text-mdlm", "zoo:text-lists"
AS_IT_IS = Sampling()  # temperature 1, no filters


# ---- what is compared ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """A decoder by its name in the registry, and changes of the system's config."""

    decoder: str = "own"
    settings: Mapping[str, Any] = field(default_factory=dict)


WAYS: Mapping[str, Callable[[int], Way]] = {  # by tokens a step
    "own": lambda k: Way(),
    "random": lambda k: Way("unmask+rule=random"),
    "confidence": lambda k: Way("unmask+rule=confidence"),
    "left to right": lambda k: Way(f"unmask+rule=random+block={k}"),
    "independent": lambda k: Way("own", {"decode": "independent", "draft": k}),
}


@dataclass(frozen=True)
class Objective:
    """A system with its settings, and the ways it is decoded in, each at so many tokens a step."""

    system: str
    ways: Mapping[str, Sequence[int]]
    settings: Mapping[str, Any] = field(default_factory=dict)


def _blocks(size: int) -> Objective:
    within = tuple(k for k in TOKENS if k <= size)
    return Objective("sdar", dict.fromkeys(("random", "confidence", "left to right"), within), {"block": size})


OBJECTIVES: Mapping[str, Objective] = {
    "next-token": Objective("next-token", {"own": (1,)}),
    "blocks of 1": _blocks(1),
    "blocks of 4": _blocks(4),
    "blocks of 16": _blocks(16),
    "mdlm": Objective("mdlm", dict.fromkeys(("random", "confidence", "left to right"), TOKENS), {"block": None}),
    "any subset": Objective("as-arm", {"own": (1,), "independent": TOKENS}),
    "insertion": Objective("ilm", {"own": (1,)}),
    "edit flows": Objective("edit-flows", {"own": TOKENS}),
}
ON_LISTS = ("next-token", "blocks of 4", "blocks of 16", "mdlm", "insertion")  # the others learn whole texts only

SHAPE: Mapping[str, Any] = {"width": 160, "depth": 4, "heads": 4, "hidden": 448}
LEARNING: Mapping[str, Any] = {"learning_rate": 2e-3, "bf16": True, "validate_every": 1000}


@dataclass(frozen=True)
class Material:
    """What is learned, and for how long: as many tokens by all."""

    data: str
    settings: Mapping[str, Any]
    tokenizer: str | None = None


MATERIALS: Mapping[str, Material] = {
    "text": Material("stdlib", {"length": 128, "batch": 16, "steps": 240}, "zoo:text-bpe"),
    "lists": Material("list-tasks", {"length": 20, "batch": 64, "steps": 600}),
}


def trained(name: str, material: str, seed: int = 0) -> Any:
    """The run of an objective on a material: made, gone on with, or found finished under SERIATIM_HOME."""
    from seriatim.verbs.train import train

    objective, m = OBJECTIVES[name], MATERIALS[material]
    settings = {**SHAPE, **LEARNING, **m.settings, **objective.settings, "seed": seed}
    folder = HOME / "claims" / META.key / "models" / f"{material}-{name.replace(' ', '-')}-{seed}"
    return train(objective.system, m.data, out=folder, tokenizer=m.tokenizer, settings=settings, resume=True)


# ---- one cell --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Written:
    """One text behind a prompt, and what it took: forwards, slots, and tokens that were decided."""

    text: str
    forwards: int
    slots: int
    tokens: int


def write(
    system: TextSystem, prompt: str | Sequence[int], new: int, way: Way, k: int, seed: int = 0,
    sampling: Sampling = AS_IT_IS,
) -> Written:  # fmt: skip
    """Text by any system and a decoder of the registry, `k` tokens a step where both leave it open. Raises ValueError
    for a decoder that does not suit."""
    one = copy.copy(system)
    one.config = replace(system.config, **way.settings)
    sampling = replace(sampling, steps=steps_of(one, prompt, new, way, k, sampling))
    steps: list[Step] = []
    decoding = decoder_of(one, way.decoder, sampling)
    with torch.inference_mode():
        text = "".join(one.stream(prompt, new, sampling, seed, decoding, steps))
    return Written(text, sum(s.forwards for s in steps), sum(s.slots for s in steps), sum(map(committed, steps)))


def steps_of(system: TextSystem, prompt: str | Sequence[int], new: int, way: Way, k: int, sampling: Sampling) -> int:
    """In how many steps `new` tokens are decided, at most `k` at each: in blocks, what the largest takes times their
    number, since a decoder shares its steps evenly among them."""
    block, canvas = decoder_of(system, way.decoder, sampling).block, system.prompted(prompt, new)
    canvas = canvas if block is None else system.blocked(canvas, block)
    sizes = canvas.rank[0][canvas.open[0]].unique(return_counts=True)[1]
    most = int(sizes.max())
    return len(sizes) * bench.steps_of(most, k) if most > 1 else bench.steps_of(new, k)


def means(made: Sequence[Written]) -> dict[str, float]:
    """The cost columns: of a text, and tokens a forward."""
    forwards, tokens = sum(w.forwards for w in made), sum(w.tokens for w in made)
    return {
        "forwards": forwards / len(made), "slots": sum(w.slots for w in made) / len(made),
        "tokens_per_forward": tokens / forwards,
    }  # fmt: skip


def texts(
    system: TextSystem, judge: TextSystem, way: Way, k: int, prompts: Sequence[Sequence[int]], new: int = 64,
    seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Continuations as `judge` finds them: nats a token, their tokens' entropy in bits and distinct trigrams, and the
    first of these less the second (`excess`, in nats): it is low for what is likely and varied."""
    made = [write(system, prompt, new, way, k, 1000 * seed + n) for n, prompt in enumerate(prompts)]
    pairs = [(p, ids) for p, w in zip(prompts, made, strict=True) if (ids := judge.tokenizer.encode(w.text)[:new])]
    nats, entropy = quality([p for p, _ in pairs], [ids for _, ids in pairs], judge) if pairs else (math.nan, 0.0)
    return {
        "nats_per_token": nats, "entropy": entropy, "distinct_3": distinct([ids for _, ids in pairs], 3),
        "excess": nats - entropy * math.log(2), **means(made), "sample": made[0].text,
    }  # fmt: skip


def answered(system: TextSystem, way: Way, k: int, count: int = 10, seed: int = 0) -> dict[str, Any]:
    """Held-out list tasks, so many of each on six names: the share that is answered exactly, and of each task.
    Asked for are as many tokens as an answer has, and its end."""
    made: list[Written] = []
    right: dict[str, float] = {}
    for task in LISTS:
        some = bench.held_out(task, 6, count, seed)
        new = len(some[0].answer(random.Random(0))) + 1
        said = [write(system, " ".join(p.prompt), new, way, k, 1000 * seed + n) for n, p in enumerate(some)]
        right[task] = statistics.fmean(p.right(w.text.split()) for p, w in zip(some, said, strict=True))
        made += said
    return {"exact": statistics.fmean(right.values()), "tasks": right, **means(made)}


# ---- gaps ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Blank:
    """An identifier of held-out code, and the text on both sides; it stands elsewhere in that, too."""

    left: str
    word: str
    right: str


def blanks(count: int = 100, side: int = 120, seed: int = 0) -> list[Blank]:
    """So many, each of another place, drawn evenly from the held-out files; `side`: letters beside it."""
    rng = random.Random(seed)
    found: list[Blank] = []
    files = [f for f in load_data("stdlib", "text").test.documents if len(f) > 4 * side]
    while len(found) < count:
        text = rng.choice(files)
        at = rng.randrange(side + 1, len(text) - 2 * side)
        name = re.compile(r"(?<!\w) ?[A-Za-z_]\w{3,15}(?=[(.\[=)])").search(text, at)
        if name is None or name.end() + side > len(text) or keyword.iskeyword(name[0].strip()):
            continue
        left, right = text[name.start() - side : name.start()], text[name.end() : name.end() + side]
        if re.search(rf"(?<!\w){name[0].strip()}(?!\w)", f"{left}\0{right}"):
            found.append(Blank(left, name[0], right))
    return found


def filled(system: TextSystem, some: Sequence[Blank]) -> dict[str, Any]:
    """The share of blanks that a system fills exactly, greedily: from the text on both sides, told how many tokens are
    missing where it wants to know; where it refuses, as it would not see the right side, from the left alone."""
    greedy, right, sides = Sampling(temperature=0.0), 0, 0
    for blank in some:
        tokens = len(system.tokenizer.encode(blank.word))
        gap = Gap(None if system.fills == "unknown" else tokens)
        try:
            whole = "".join(system.infill((blank.left, gap, blank.right), greedy))
            said, sides = whole.removeprefix(blank.left).removesuffix(blank.right), sides + 1
        except ValueError:
            said = system.write(blank.left, tokens, greedy)
        right += said == blank.word
    return {"infilled": right / len(some), "both_sides": sides / len(some)}


# ---- arms ------------------------------------------------------------------------------------------------------------


def bits(system: TextSystem, documents: Sequence[str]) -> dict[str, Any]:
    """Bits per byte of held-out texts, and whether they are exact or a bound."""
    examples = system.examples(documents)
    nats, ids = system.score(examples)
    kind = "bound" if system.meta.likelihood == "bound" else "exact"
    found = bits_per_byte(nats, ids, system.bytes_in(examples), kind)  # type: ignore[arg-type]
    return {"bits_per_byte": found.value, "likelihood": kind, "bytes": found.count}


def row(name: str, prompts: int = 16, gaps: int = 100) -> Callable[[Any, int], Mapping[str, Any]]:
    """An objective on texts: trained where it is not, then every cell of its row. For a `Trial` of the judge."""

    def measure(judge: Any, seed: int) -> Mapping[str, Any]:
        run = trained(name, "text", seed)
        system = run.system.eval().requires_grad_(False)
        given = held_out(judge, prompts, 48)
        cells = [
            {"way": way, "k": k, **texts(system, judge, WAYS[way](k), k, given, seed=seed)}
            for way, several in OBJECTIVES[name].ways.items()
            for k in several
        ]
        return {
            **bits(system, run.data.test.documents), **filled(system, blanks(gaps)), "cells": cells, **costs(run)
        }  # fmt: skip

    return measure


def list_row(name: str, count: int = 10) -> Callable[[Any, int], Mapping[str, Any]]:
    """An objective on list tasks: trained where it is not, then every cell that an answer of six names leaves."""

    def measure(nothing: Any, seed: int) -> Mapping[str, Any]:
        run = trained(name, "lists", seed)
        return {**list_cells(run.system.eval().requires_grad_(False), name, count, seed), **costs(run)}

    return measure


def of_base(count: int = 10) -> Callable[[Any, int], Mapping[str, Any]]:
    """The same cells as of "mdlm", of a masked model that there is already."""

    def measure(system: Any, seed: int) -> Mapping[str, Any]:
        whole = copy.copy(system)
        whole.config = replace(system.config, **OBJECTIVES["mdlm"].settings)
        return list_cells(whole, "mdlm", count, seed)

    return measure


def list_cells(system: TextSystem, name: str, count: int, seed: int) -> dict[str, Any]:
    """Answers by each way of an objective, up to all of an answer at once."""
    return {
        "cells": [
            {"way": way, "k": k, **answered(system, WAYS[way](k), k, count, seed)}
            for way, several in OBJECTIVES[name].ways.items()
            for k in several
            if k <= 8
        ]
    }


def ideal(tasks: Sequence[str], draws: int = 256) -> Callable[[Any, int], Mapping[str, Any]]:
    """What a model with the true conditionals would answer, by order and tokens a step: nothing is trained."""

    def measure(nothing: Any, seed: int) -> Mapping[str, Any]:
        models = [bench.Ideal(bench.held_out(task, 6 if task in LISTS else 0, 1, seed)[0]) for task in tasks]
        longest, cells = max(m.length for m in models), []
        for way in ("random", "confidence", "left to right"):
            make = bench.FIXED[way.replace(" ", "-")]
            for k in TOKENS:
                if k < 2 * longest:
                    right = [m.accuracy(make(min(k, m.length), m.length), draws=draws, seed=seed) for m in models]
                    steps = sum(bench.steps_of(m.length, k) for m in models)
                    each = sum(m.length for m in models) / steps
                    cells.append({"way": way, "k": k, "exact": statistics.fmean(right), "tokens_per_forward": each})
        return {"cells": cells}

    return measure


def costs(run: Any) -> dict[str, Any]:
    """What a training took, and its curve."""
    seconds = round(sum(h.get("seconds", 0.0) for h in run.history), 3)
    curve = [(h["step"], h["loss"]) for h in run.history]
    return {"parameters": parameters(run.system.model), "train_seconds": seconds, "losses": curve}


def curse(way: str, prompts: int = 24) -> Callable[[Any, int], Mapping[str, Any]]:
    """How much worse a masked model's texts get by tokens a step, in one order: `lost` is the mean excess at several
    tokens a step above that at one (0 where it is below, and nothing is lost); a seed takes other prompts."""

    def measure(system: Any, seed: int) -> Mapping[str, Any]:
        from seriatim.verbs.load import load

        judge: Any = load(JUDGE)
        given = held_out(judge, prompts * (seed + 1), 48)[prompts * seed :]
        cells = []
        for k in TOKENS:
            one = WAYS[way](k)
            whole = replace(one, settings={"block": None, **one.settings})  # the order is free in all of the text
            cells.append({"way": way, "k": k, **texts(system, judge, whole, k, given, seed=seed)})
        return {**fall([c["excess"] for c in cells]), "cells": cells}

    return measure


def fall(excess: Sequence[float]) -> dict[str, Any]:
    """What is lost from the first of these on, and whether each is worse than the one before."""
    rise = statistics.fmean(excess[1:]) - excess[0]
    steady = all(b >= a for a, b in pairwise(excess))
    return {"lost": max(rise, 0.0), "rise": rise, "steady": steady}


def every_decoder(prompts: int = 24) -> Callable[[Any, int], Mapping[str, Any]]:
    """All decoders of the registry for any order that need no part of their own, as they are by default."""

    def measure(system: Any, seed: int) -> Mapping[str, Any]:
        from seriatim.verbs.load import load

        judge: Any = load(JUDGE)
        given = held_out(judge, prompts, 48)
        names = [name for name in decoder_names("unmasking") if ":" not in example_of(name)]
        cells = [{"way": name, "k": 1, **texts(system, judge, Way(name), 1, given, seed=seed)} for name in names]
        return {"cells": cells}

    return measure


CLAIM = Claim(
    text="As tokens a step rise from 1 to 16, what a masked model (zoo:text-mdlm) writes gets worse, and at least "
    "twice as much in random order as with those first that it is surest of: nats a token under zoo:text-base less "
    "the entropy of the tokens, in the mean of 2, 4, 8 and 16 tokens a step above that of one. Beside it the grid: "
    "every objective by decoder and tokens a step, on texts and list tasks.",
    paper="the parallel decoding curse: quality falls sharply as steps get fewer; remasking the least confident helps",
    metric="lost",
    arms={
        "confidence": Trial(BASE, curse("confidence")),
        "random": Trial(BASE, curse("random")),
        "left to right": Trial(BASE, curse("left to right")),
        "every decoder": Trial(BASE, every_decoder()),
        **{f"text, {name}": Trial(JUDGE, row(name)) for name in OBJECTIVES},
        **{f"lists, {name}": Trial(None, list_row(name)) for name in ON_LISTS},
        f"lists, {LISTED}": Trial(LISTED, of_base()),
        "lists, the true law": Trial(None, ideal(LISTS)),
        "lists, the true law of Latin squares": Trial(None, ideal(("latin-square",))),
    },
    ours="confidence",
    baseline="random",
    better="lower",
    margin=2.0,
    seeds=(0, 1, 2),
    other_seeds=(0,),
)


def report(result: Mapping[str, Any], path: str | Path) -> Path:
    """The page of a finished claim: the grid, the curves, the estimates, the taxonomy."""
    from seriatim.evaluation.survey_page import save_survey
    from seriatim.studies.survey_estimates import side_by_side
    from seriatim.systems.taxonomy import taxonomy

    return save_survey(result, taxonomy(), side_by_side(), path)
