"""Learn2PD: a learned filter says which guesses are final, and they are decided at once.

A masked model guesses most tokens right long before they are decided. New: two small layers read the confidences of a
block and say which guesses will stand, as they learned from an oracle that knew the outcome; and where the text seems
to end, the rest is cut off, and no forwards go into padding (end-of-text prediction; Bao et al. 2025).

    seriatim train learn2pd --base zoo:text-mdlm --data stdlib --out runs/learn2pd
    seriatim generate zoo:text-mdlm --decoder learn2pd:runs/learn2pd

Departures: places that are decided already count as sure (1), and the filter learns from those only that were not; and
where the filter accepts something, nothing else is decided, so that a filter that is always right is the oracle.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seriatim.canvas import Set
from seriatim.data.base import load_data
from seriatim.decoding.ending import EndOfText
from seriatim.decoding.learned import TRUSTED, Trusted
from seriatim.decoding.policy import OutsideBlock
from seriatim.decoding.sample import Above, Select
from seriatim.decoding.unmask import Unmask
from seriatim.evaluation.pictures import save_curve, save_grid
from seriatim.laws.case import Limit, randomise
from seriatim.laws.unmasking import BLOCK, SAMPLINGS, UnmaskingCase, careless, plain
from seriatim.posttraining.drafting import Base, ready
from seriatim.posttraining.parallel import (
    FILTERING,
    Filter,
    FilterConfig,
    Oracle,
    begun,
    one_by_one,
    reliability,
    replayed,
    written,
)
from seriatim.posttraining.states import windows
from seriatim.systems.claim import Claim, Trial
from seriatim.systems.decoders import Ask, Decoding
from seriatim.systems.draft_parts import draft_part
from seriatim.systems.meta import Meta
from seriatim.systems.system import Sampling
from seriatim.systems.unmasking_trials import TASKS, answered, held_out, most_parallel, problems, taught
from seriatim.tokenizers.text import id_stream
from seriatim.training.run import RunFolder
from seriatim.training.trainer import train

META = Meta(
    key="learn2pd",
    title="Learn2PD",
    family="unmasking",
    modality="text",
    paper="Learning to Parallel: Accelerating Diffusion Large Language Models via Adaptive Parallel Decoding (2025), "
    "arXiv 2509.25188",
    likelihood="relaxed",
    summary="A learned filter over confidences says which guesses are final; what follows the end is cut off.",
)
EXAMPLE = "learn2pd:runs/learn2pd"
Part, Config, RECIPE = Filter, FilterConfig, FILTERING


@dataclass(frozen=True)
class Options:
    """threshold: above which score of the filter a token is decided (1: none is, and it goes one token at a time);
    floor: how sure an end of text must be that is not decided yet, for all behind it to be cut off (0: as published,
    which may cut a long answer; 2: only behind ends that are decided); cut: False: nothing is; cache: as of fast-dllm.
    Neutral: a threshold of 1, without cuts."""

    threshold: float = 0.96
    floor: float = 0.9
    cut: bool = True
    cache: str = "none"


def decoder(ask: Ask) -> Decoding:
    """A trained filter."""
    return filtered(ask, draft_part(ask, Filter)[0])


def filtered(ask: Ask, part: Filter) -> Decoding:
    """By this filter."""
    o = ask.options
    if not 0 <= o.threshold <= 1 or o.floor < 0:
        raise ValueError(f"a threshold lies in 0 to 1, and a floor is not below 0; got {o.threshold} and {o.floor}")
    if o.cache not in ("none", "prefix", "dual"):
        raise ValueError(f"cache is none, prefix or dual, got {o.cache!r}")
    select = Select(commit=TRUSTED, scorer=Trusted(part, part.block, o.threshold))
    way: Any = Unmask(select, ask.stop)
    if o.cut:
        way = EndOfText(way, ask.stop, o.floor)
    if ask.own_blocks:
        return Decoding(way)
    cache = {} if o.cache == "none" else {"policy": OutsideBlock(o.cache == "dual")}
    return Decoding(way, target=cache, block=part.block)


# ---- what there is to see --------------------------------------------------------------------------------------------


def shown(ask: Ask, folder: Path, count: int = 8, window: int = 128) -> dict[str, float]:
    """Draw how sure the filter is, and the model, beside how often their guesses are final; and which forward decided
    each token of a text, by the oracle, the filter, and a threshold of 0.9. Of each, tokens a forward, and the share of
    them that are those that are written one at a time."""
    part, system = draft_part(ask, Filter)[0], ask.system
    window = min(window, system.model.layout.size)
    prompts = held_out(system, count, window)[:, : window // 2]
    new, block = window - window // 2, None if part.own else part.block
    want = one_by_one(system, prompts, new, block)
    _, _, records = replayed(system, prompts, want, part.block, part.own)
    with torch.no_grad():
        score = torch.sigmoid(part(records.sure)).cpu().float()
    tenths: dict[str, tuple[float, ...]] = {}
    for name, values in (("filter", score), ("confidence", records.sure)):
        mean, share = zip(*reliability(values, records), strict=True)
        tenths |= {f"{name}: score": mean, f"{name}: right": share}
    x_label = "tenths of the guesses, from the lowest score to the highest"
    save_curve(tenths, folder / "reliability.png", x_label=x_label, y_label="share")
    ways: dict[str, Any] = {
        "oracle": lambda: Decoding(Oracle(want, part.block), block=block),
        "filter": lambda: filtered(replace(ask, options=Options(cut=False)), part),
        "threshold": lambda: Decoding(Unmask(Select(commit=Above(0.9))), block=block),
    }
    figures, turns = {}, []
    for name, make in ways.items():
        way = make()
        ids, forwards, steps = written(system, begun(system, prompts, new, way.block), way.decider)
        figures[f"{name}_tokens_per_forward"] = len(prompts) * new / int(forwards.sum())
        figures[f"{name}_agreement"] = float((ids == want)[:, -new:].double().mean())
        turns.append(_turns(steps, ids.shape[1])[-new:])
    shade = torch.stack(turns)[:, None, None] / max(float(torch.stack(turns).max()), 1)
    save_grid(1 - 2 * shade, folder / "order.png", columns=1, row_labels=list(ways), upscale=12)
    return figures


def _turns(steps: list[Any], size: int) -> Tensor:
    """Which step decided each element of the first row."""
    turn = torch.zeros(size)
    for n, step in enumerate(steps):
        for edit in step.edits:
            if isinstance(edit, Set) and edit.element is not None:
                turn[edit.element[0][edit.element[0] >= 0]] = n
    return turn


# ---- what it claims --------------------------------------------------------------------------------------------------

PROMPTS, WINDOW = 8, 128  # texts, and how long they are with their prompts
SWEPT = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.96)
Ways = Mapping[str, Callable[[], Decoding]]


def trial(
    ways: Callable[[Any, int, Tensor], Ways], prompts: int = PROMPTS, window: int = WINDOW, block: int = 32
) -> Callable[[Any, int], Mapping[str, Any]]:
    """The best of several settings (`most_parallel`), on held-out texts that the seed draws. ways: the settings, for a
    system, a seed, and prompts."""

    def measure(system: Any, seed: int) -> Mapping[str, Any]:
        given = held_out(system, prompts, window, seed)[:, : window // 2]
        return most_parallel(system, given, window - window // 2, block, ways(system, seed, given))

    return measure


def by_threshold(block: int = 32) -> Callable[[Any, int, Tensor], Ways]:
    """Thresholds on the confidence."""
    return lambda *_: {f"{t:g}": lambda t=t: Decoding(Unmask(Select(commit=Above(t))), block=block) for t in SWEPT}  # type: ignore[misc]


def by_filter(block: int = 32, tokens: int = 8192, steps: int = 600) -> Callable[[Any, int, Tensor], Ways]:
    """Thresholds on the score of a filter, trained on other texts."""

    def ways(system: Any, seed: int, prompts: Tensor) -> Ways:
        base = Base(system)
        torch.manual_seed(seed)
        part, length = Filter(FilterConfig(block), base), 2 * prompts.shape[1]
        texts = load_data("stdlib", "text").train.documents
        read = windows(id_stream(system.tokenizer, texts, system.stop[:1]), length, tokens)
        with torch.inference_mode(False), tempfile.TemporaryDirectory(prefix="seriatim-") as folder:
            recipe = replace(FILTERING, steps=steps, seed=seed)
            train(part.learner(base), part.examples(base, read), recipe, RunFolder(folder), {})
        ready(part, base)

        def way(threshold: float) -> Callable[[], Decoding]:
            options = Options(threshold=threshold, cut=False)
            return lambda: filtered(Ask(system, Sampling(temperature=0), (), None, options), part)

        return {f"{t:g}": way(t) for t in SWEPT}

    return ways


def by_oracle(block: int = 32) -> Callable[[Any, int, Tensor], Ways]:
    """The outcome itself."""

    def ways(system: Any, seed: int, prompts: Tensor) -> Ways:
        answer = one_by_one(system, prompts, prompts.shape[1], block)
        return {"oracle": lambda: Decoding(Oracle(answer, block), block=block)}

    return ways


def by_ends(floor: float | None, count: int = 500) -> Callable[[Any, int], Mapping[str, Any]]:
    """One token at a time, with texts cut behind their ends (None: they are not): what that alone saves, on answers
    that are filled up with ends of text, and by how much it misses their lengths."""

    def measure(system: Any, seed: int) -> Mapping[str, Any]:
        model, task = taught("lists"), TASKS["lists"]
        way: Any = Unmask(Select(steps=model.model.layout.size), model.stop)
        way = way if floor is None else EndOfText(way, model.stop, floor)
        return answered(model, task, problems(task, count, 1000 + seed, test=True), Decoding(way))

    return measure


CLAIM = Claim(
    text="Where at least 0.8 of the tokens are those that are written one at a time, a filter that has learned from an "
    "oracle writes at least as many tokens a forward as a threshold on the confidence, each at its best setting; the "
    "oracle is the bound. What cutting texts behind their ends saves is told apart, on answers of many lengths.",
    paper="LLaDA: 22.58 times as fast as one token a step at a length of 1024, 3 to 4 times at 256; much of the former "
    "is padding that is not written",
    metric="tokens_per_forward",
    arms={
        "filter": Trial("zoo:text-mdlm", trial(by_filter())),
        "threshold": Trial("zoo:text-mdlm", trial(by_threshold())),
        "oracle": Trial("zoo:text-mdlm", trial(by_oracle())),
        "ends kept": Trial("zoo:text-mdlm", by_ends(None)),
        "cut behind ends": Trial("zoo:text-mdlm", by_ends(0.9)),
        "cut without a floor": Trial("zoo:text-mdlm", by_ends(0.0)),
    },
    ours="filter",
    baseline="threshold",
    better="higher",
    other_seeds=(0,),
)


# ---- laws ------------------------------------------------------------------------------------------------------------


def _arbitrary(ask: Ask) -> Decoding:
    """A filter of arbitrary weights; where ends cut, one of the three tokens is an end."""
    base, ask = Base(ask.system), replace(ask, stop=(1,) if ask.options.cut else ())
    part = Filter(FilterConfig(BLOCK, 8), base)
    randomise(part, 3)  # type: ignore[arg-type]
    return filtered(ask, ready(part, base))


def _always() -> Limit:
    """A filter that accepts everything: a step for each block."""
    case, told = UnmaskingCase(_arbitrary, Options(threshold=0.0, cut=False)), []
    for way in (case.decoding(case.systems[0], SAMPLINGS[0]), _whole_blocks(case.systems[0])):
        canvas, steps = case.write(case.systems[0], SAMPLINGS[0], way)
        told.append(torch.tensor([*canvas.value["token"][0].tolist(), len(steps)]))
    return Limit("everything is accepted: a block at each step", told[0], told[1])


def _whole_blocks(system: Any) -> Decoding:
    return replace(plain(system, BLOCK), decider=Unmask(Select(steps=1)))


def case() -> UnmaskingCase:
    """For the laws."""
    neutral = Options(threshold=1.0, cut=False)
    return UnmaskingCase(_arbitrary, Options(threshold=0.5, floor=0.4), neutral=neutral, limits=(_always,))


def mutant() -> UnmaskingCase:
    """Decides whatever, at random."""
    return UnmaskingCase(careless, Options(), neutral=Options(threshold=1.0))
