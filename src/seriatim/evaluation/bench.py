"""Decoders side by side on the same prompts: what each took, told apart by whether its outputs loop.

Every prompt is given to every decoder in turn, in random order, several times, so that a slow minute of the machine
meets all of them; of the runs of a prompt the median counts. Rates are all tokens over all seconds. An output of few
distinct tokens repeats itself, which is easy to draft: prompts that are answered so are averaged apart.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from seriatim.evaluation.forward_cost import ForwardCost
from seriatim.evaluation.metrics import LOOPING


@dataclass(frozen=True)
class Prompt:
    """What is continued or answered, as ids; group: what kind of task it is."""

    ids: tuple[int, ...]
    group: str


@dataclass(frozen=True)
class Written:
    """What a decoder wrote for a prompt, once.

    ids: the new tokens, an end of text among them; forwards: of the model, one after another; drafted, accepted:
    tokens; seconds: from the prompt to the last token; first: from the prompt to the first token; rows: of each
    forward, the prompt's left out; drafting: seconds that went into drafts, behind the first forward.
    """

    ids: tuple[int, ...]
    forwards: int
    drafted: int
    accepted: int
    seconds: float
    first: float
    rows: tuple[int, ...] = ()
    drafting: float = 0.0

    @property
    def distinct(self) -> float:
        """Share of distinct tokens."""
        return len(set(self.ids)) / len(self.ids)


Arm = Callable[[Prompt], Written]
Runs = list[list[Written]]  # by prompt, then by run


def take_turns(
    arms: Mapping[str, Arm], prompts: Sequence[Prompt], runs: int, seed: int, tell: Callable[[int, int], None],
    begin: Callable[[], None] = lambda: None,
) -> dict[str, Runs]:  # fmt: skip
    """Each prompt by each arm in random order, and all of that `runs` times. tell: called with how many are done, and
    of how many; begin: called before each run, so that no arm profits from what it has seen of the same prompts."""
    order = random.Random(seed)
    written: dict[str, Runs] = {name: [[] for _ in prompts] for name in arms}
    done, total = 0, runs * len(prompts) * len(arms)
    for _ in range(runs):
        begin()
        for n, prompt in enumerate(prompts):
            for name in order.sample(list(arms), len(arms)):
                written[name][n].append(arms[name](prompt))
                done += 1
                tell(done, total)
    return written


def loops(plain: Runs) -> list[bool]:
    """For each prompt, does its plain continuation repeat itself? It decides for all decoders, so that what is compared
    is the same prompts."""
    return [runs[0].distinct < LOOPING for runs in plain]


def figures(ours: Runs, plain: Runs, cost: ForwardCost | None = None) -> dict[str, Any]:
    """What a decoder took for some prompts, beside plain decoding of the same; counts are those of one run.

    seconds: the medians of the prompts, summed; ratio: of the rates, 1 is as fast as plain decoding; ratios: the same
    run by run; ratio_of_mean_rates: by the means over prompts of tokens per second, as Spec-Bench has it (short answers
    weigh as much as long ones); first_token_seconds: median over prompts; decode_ratio: of the rates behind the first
    token, which reading the prompt is no part of (None: nothing is behind it); mean_rows, draft_seconds: of a forward;
    predicted_ratio: what decode_ratio is to be by the cost of forwards of so many rows.
    """
    tokens, forwards = (sum(get(runs[0]) for runs in ours) for get in (_tokens, lambda w: w.forwards))
    drafted, accepted = (sum(get(runs[0]) for runs in ours) for get in (lambda w: w.drafted, lambda w: w.accepted))
    rate, count = tokens / _seconds(ours), len(ours[0])
    return {
        "prompts": len(ours),
        "tokens": tokens,
        "forwards": forwards,
        "seconds": _seconds(ours),
        "tokens_per_second": rate,
        "ratio": rate / (sum(_tokens(runs[0]) for runs in plain) / _seconds(plain)),
        "ratios": [_rate_of_run(ours, n) / _rate_of_run(plain, n) for n in range(count)],
        "ratio_of_mean_rates": statistics.fmean(map(_rate, ours)) / statistics.fmean(map(_rate, plain)),
        "mean_accepted_length": tokens / forwards,
        "drafted": drafted,
        "accepted": accepted,
        "first_token_seconds": statistics.median(statistics.median(w.first for w in runs) for runs in ours),
        "distinct_share": statistics.fmean(runs[0].distinct for runs in ours),
        "decode_ratio": _decode_ratio(ours, plain),
        "mean_rows": sum(sum(runs[0].rows) for runs in ours) / forwards,
        "draft_seconds": sum(statistics.median(w.drafting for w in runs) for runs in ours) / forwards,
        "predicted_ratio": None if cost is None else _predicted(ours, cost),
    }


def _decode_ratio(ours: Runs, plain: Runs) -> float | None:
    """How much faster than plain decoding all but the first token of each prompt came."""
    (a, x), (b, y) = (
        (
            sum(_tokens(runs[0]) - 1 for runs in side),
            sum(statistics.median(w.seconds - w.first for w in runs) for runs in side),
        )
        for side in (ours, plain)
    )
    return (a / x) / (b / y) if a > 0 and b > 0 and x > 0 and y > 0 else None


def _predicted(ours: Runs, cost: ForwardCost) -> float | None:
    """How much faster than plain decoding by tokens, rows and drafts alone: E / (t(N) + draft), each forward with rows
    of its own."""
    seconds = sum(statistics.median(sum(map(cost.at, w.rows)) + w.drafting for w in runs) for runs in ours)
    return sum(_tokens(runs[0]) for runs in ours) * cost.at(1) / seconds if seconds else None


def apart(ours: Runs, plain: Runs, prompts: Sequence[Prompt], cost: ForwardCost | None = None) -> dict[str, Any]:
    """Figures of outputs that do not loop ("varied"; where all loop, of these), those of the others, and what the first
    are made of, group by group."""
    looping = loops(plain)
    kinds = {"varied": [n for n, x in enumerate(looping) if not x], "looping": [n for n, x in enumerate(looping) if x]}
    told = "varied" if kinds["varied"] else "looping"

    def of(chosen: Sequence[int]) -> dict[str, Any] | None:
        return figures([ours[n] for n in chosen], [plain[n] for n in chosen], cost) if chosen else None

    groups = {}
    for group in dict.fromkeys(p.group for p in prompts):
        some = of([n for n in kinds[told] if prompts[n].group == group])
        if some is not None:
            groups[group] = {k: some[k] for k in ("prompts", "tokens_per_second", "ratio", "mean_accepted_length")}
    return {"outputs": told, **(of(kinds[told]) or {}), "looping": of(kinds["looping"]), "groups": groups}


def _tokens(written: Written) -> int:
    return len(written.ids)


def _rate(runs: Sequence[Written]) -> float:
    """Tokens per second of one prompt."""
    return len(runs[0].ids) / statistics.median(w.seconds for w in runs)


def _seconds(written: Runs) -> float:
    return sum(statistics.median(w.seconds for w in runs) for runs in written)


def _rate_of_run(written: Runs, run: int) -> float:
    return sum(len(runs[run].ids) for runs in written) / sum(runs[run].seconds for runs in written)
