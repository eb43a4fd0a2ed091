"""The laws of a decoder: what it writes has the law of plain decoding, whatever is drafted.

A decoder has no model of its own, so the laws run it on a tiny next-token model in float64 whose texts can be
enumerated. Laws about orders and training do not apply.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from seriatim.canvas import Canvas
from seriatim.decoding.draft import NGram
from seriatim.decoding.guess import Guess
from seriatim.decoding.loop import Step, decode
from seriatim.decoding.target import Target
from seriatim.decoding.verify import Round, Verifier
from seriatim.laws.case import Limit, randomise
from seriatim.laws.enumeration import enumerate_rows
from seriatim.laws.laws import LAWS, NotApplicable, require
from seriatim.model import Rows
from seriatim.random import Keyed, Random
from seriatim.systems.decoders import Ask, Decoding
from seriatim.systems.system import Sampling

PROMPT = (1, 0, 1)
SAMPLINGS = (Sampling(), Sampling(temperature=0.6, top_k=2))
GREEDY = Sampling(temperature=0)
SHORT, LONG = 4, 20  # new tokens: of texts that are enumerated, and of those that are compared
WRONG = 0.01  # total variation


@dataclass
class DecoderCase:
    """A decoder at some options, for the laws.

    decoder: as its file defines it (or wrong on purpose); coupled: under keyed noise it writes the very string of plain
    decoding; greedy: it is exact at temperature 0 only, and draws nothing; neutral: options at which a relaxed decoder
    is exact (None: it is lossless as it is); limits: checks of law 8; depth: layers of the model it is tried on; short:
    new tokens of texts that are enumerated (fewer where many are drawn for each).
    """

    decoder: Callable[[Ask], Decoding]
    options: Any
    coupled: bool = True
    greedy: bool = False
    neutral: Any = None
    limits: tuple[Callable[[], Limit], ...] = ()
    depth: int = 2
    short: int = SHORT

    @cached_property
    def system(self) -> Any:
        """The model: 3 tokens, weights drawn at random."""
        from seriatim.systems.text.next_token import Config, NextToken

        system = NextToken(Config(length=32, vocab=3, width=16, depth=self.depth, heads=2), SimpleNamespace(special={}))
        randomise(system.model, seed=4)
        return system.eval().requires_grad_(False)

    def decoding(self, sampling: Sampling, neutral: bool = True) -> Decoding:
        """The decoder afresh; where it is relaxed, at its neutral setting unless that is not wanted."""
        options = self.neutral if neutral and self.neutral is not None else self.options
        return self.decoder(Ask(self.system, sampling, (), None, options))

    def begun(self, rows: Sequence[Sequence[int]], new: int, names: Sequence[int] | None = None) -> Canvas:
        canvas = self.system._begun(rows, new)
        if names is not None:
            canvas.row = torch.tensor(names)
        return canvas

    def target(self, sampling: Sampling, decoding: Decoding, cached: bool = True) -> Target:
        return Target(self.system.model, warp=sampling.warp, **{"cached": cached, **decoding.target})

    def write(
        self, canvas: Canvas, sampling: Sampling, random: Random, decoding: Decoding, cached: bool = True, most: int = 0
    ) -> list[Step]:
        """Decode to the end, or `most` steps."""
        steps, target = [], self.target(sampling, decoding, cached)
        with torch.inference_mode():
            for step in decode(target, canvas, decoding.decider, decoding.proposer, random):
                steps.append(step)
                if len(steps) == most:
                    break
        return steps

    def text(self, sampling: Sampling, seed: int, decoding: Decoding | None = None, cached: bool = True) -> list[int]:
        """What it writes behind the prompt; None: plain decoding."""
        canvas = self.begun([PROMPT], LONG)
        self.write(canvas, sampling, Keyed(seed), decoding or self.plain(), cached)
        return canvas.value["token"][0].tolist()

    @staticmethod
    def plain() -> Decoding:
        from seriatim.decoding.sample import SampleAll

        return Decoding(SampleAll())

    def law(self, sampling: Sampling, make: Callable[[], Decoding]) -> dict[Any, float]:
        """The exact law of the first tokens behind the prompt, over every outcome of every draw."""

        def run(random: Any, rows: int) -> list[tuple[int, ...]]:
            canvas = self.begun([PROMPT] * rows, self.short, range(rows))
            self.write(canvas, sampling, random, make())
            return [tuple(row[len(PROMPT) :]) for row in canvas.value["token"].tolist()]

        return enumerate_rows(run)


def distance(a: dict[Any, float], b: dict[Any, float]) -> float:
    """Total variation between two laws."""
    return sum(abs(a.get(k, 0.0) - b.get(k, 0.0)) for k in {*a, *b}) / 2


def alike(name: str, ours: DecoderCase, theirs: DecoderCase) -> Limit:
    """Two decoders that write the same text by as many forwards, under the same noise."""
    texts = []
    for case in (ours, theirs):
        canvas = case.begun([PROMPT], LONG)
        steps = case.write(canvas, SAMPLINGS[0], Keyed(3), case.decoding(SAMPLINGS[0]))
        texts.append(torch.tensor([len(steps), *canvas.value["token"][0].tolist()]))
    return Limit(name, texts[0], texts[1])


# ---- laws ------------------------------------------------------------------------------------------------------------


def lossless(case: DecoderCase) -> str:
    """The law of plain decoding: exactly, by enumeration; equal strings under keyed noise; equal greedy strings."""
    plain = case.text(GREEDY, 0)
    ours = case.text(GREEDY, 0, case.decoding(GREEDY))
    require(ours == plain, f"the greedy text is {ours}, plain decoding writes {plain}")
    notes = ["greedy texts equal"]
    if case.greedy:
        return "; ".join(notes)
    for sampling in SAMPLINGS:
        exact = case.law(sampling, case.plain)
        found = case.law(sampling, lambda sampling=sampling: case.decoding(sampling))  # type: ignore[misc]
        require(abs(math.fsum(found.values()) - 1) < 1e-9, f"outcomes sum to {math.fsum(found.values()):.9f}")
        gap = distance(found, exact)
        require(gap < 1e-9, f"the law of what is written is {gap:.1e} away from the model's, at {sampling.warp}")
        notes.append(f"enumerated to {gap:.0e}")
    if case.coupled:
        for seed in range(4):
            sampling = SAMPLINGS[seed % 2]
            same = case.text(sampling, seed) == case.text(sampling, seed, case.decoding(sampling))
            require(same, f"under the same noise (seed {seed}) it writes another text than plain decoding")
        notes.append("equal strings under keyed noise")
    if case.neutral is not None:
        drift = distance(case.law(SAMPLINGS[0], lambda: case.decoding(SAMPLINGS[0], False)), exact_law(case))
        notes.append(f"relaxed: {drift:.2g} away at the options of the case, exact at the neutral ones")
    return "; ".join(notes)


def exact_law(case: DecoderCase) -> dict[Any, float]:
    """That of plain decoding."""
    return case.law(SAMPLINGS[0], case.plain)


def invisible_cache(case: DecoderCase) -> str:
    """With and without the exact cache the same text; every row that is met equals a fresh forward's."""
    for sampling in (GREEDY, *([] if case.greedy else SAMPLINGS)):
        cached = case.text(sampling, 1, case.decoding(sampling))
        fresh = case.text(sampling, 1, case.decoding(sampling), cached=False)
        require(cached == fresh, f"with the cache it writes {cached}, without {fresh}")
    met = Recording(case.decoding(SAMPLINGS[0] if not case.greedy else GREEDY))
    canvas = case.begun([PROMPT], LONG)
    case.write(canvas, GREEDY if case.greedy else SAMPLINGS[0], Keyed(2), met.decoding)
    want = torch.log_softmax(case.system.logits(canvas.value["token"]), -1)[0]
    rows = met.rows if not case.greedy else {}
    worst = max((float((row - want[known - 1]).abs().max()) for known, row in rows.items()), default=0.0)
    require(worst < 1e-9, f"behind kept and dropped drafts a row is {worst:.1e} away from a fresh forward's")
    return f"texts equal; {len(rows)} rows fresh to {worst:.0e}"


class Recording:
    """A decoding whose decider notes the law behind the last known token of each step, by how many are known."""

    def __init__(self, decoding: Decoding):
        self.rows: dict[int, Tensor] = {}
        self._inner = decoding.decider
        self.needs: frozenset[str] = getattr(self._inner, "needs", frozenset())
        self.decoding = replace(decoding, decider=self)

    def decide(self, canvas: Canvas, guess: Guess | None, rows: Rows, random: Random) -> Step:
        assert canvas.length is not None
        logits = getattr(rows.dist, "logits", None)
        if logits is not None and canvas.batch == 1:
            self.rows[canvas.length] = torch.log_softmax(logits[0, 0], -1)
        return self._inner.decide(canvas, guess, rows, random)


def company(case: DecoderCase) -> str:
    """A row's text depends neither on batch mates, nor on their lengths, nor on the order of rows."""
    prompts = [[1, 0, 1], [2], [0, 1, 2, 2, 0], [1, 1]]
    sampling = GREEDY if case.greedy else SAMPLINGS[0]

    def texts(order: Sequence[int]) -> list[list[int]]:
        rows = [prompts[i] for i in order]
        canvas = case.begun(rows, 12, order)
        case.write(canvas, sampling, Keyed(5), case.decoding(sampling))
        value = canvas.value["token"].tolist()
        return [v[: len(row) + 12] for v, row in zip(value, rows, strict=True)]

    alone = [texts([i])[0] for i in range(len(prompts))]
    for order in ((0, 1, 2, 3), (3, 1), (2, 0, 1)):
        together = texts(order)
        for i, text in zip(order, together, strict=True):
            require(text == alone[i], f"among rows {order}, row {i} is {text}; alone it is {alone[i]}")
    return "texts of 4 rows of different lengths equal those alone"


def bookkeeping(case: DecoderCase) -> str:
    """What is given stays, every step progresses, and counts fit what was written."""
    sampling = GREEDY if case.greedy else SAMPLINGS[0]
    canvas = case.begun([PROMPT], LONG)
    steps = case.write(canvas, sampling, Keyed(1), case.decoding(sampling, False))
    require(canvas.value["token"][0, : len(PROMPT)].tolist() == list(PROMPT), "a given token changed")
    require(all(step.edits for step in steps), "a step decides nothing")
    forwards, drafted, accepted = (sum(int(getattr(s, k)) for s in steps) for k in ("forwards", "drafted", "accepted"))
    require(0 <= accepted <= drafted, f"{accepted} of {drafted} drafted tokens were accepted")
    require(forwards <= LONG <= accepted + forwards, f"{LONG} tokens by {forwards} forwards, {accepted} were drafted")
    return f"{LONG} tokens by {forwards} forwards; {accepted} of {drafted} drafted tokens stood"


def limits(case: DecoderCase) -> str:
    """At the ends of its options the decoder is another one."""
    return LAWS[8][1](case)  # type: ignore[arg-type]


def interrupted(case: DecoderCase) -> str:
    """Stopped and taken up again by a fresh decoder, the same text."""
    if not case.coupled and not case.greedy:
        raise NotApplicable("drafts begin anew, so other coins are tossed: equal in law, not in its text")
    sampling = GREEDY if case.greedy else SAMPLINGS[0]
    whole = case.text(sampling, 7, case.decoding(sampling))
    for stop in (1, 3):
        canvas = case.begun([PROMPT], LONG)
        case.write(canvas, sampling, Keyed(7), case.decoding(sampling), most=stop)
        case.write(canvas, sampling, Keyed(7), case.decoding(sampling))
        text = canvas.value["token"][0].tolist()
        require(text == whole, f"stopped after {stop} steps and taken up again it writes another text")
    return "stopped = never stopped"


def _not_its_business(case: DecoderCase) -> str:
    raise NotApplicable("a decoder has no order and no weights of its own; it runs on those of a model")


OF_DECODERS = {
    **{number: (name, _not_its_business) for number, (name, _) in LAWS.items()},
    4: (LAWS[4][0], lossless), 5: (LAWS[5][0], invisible_cache), 6: (LAWS[6][0], company),
    8: (LAWS[8][0], limits), 9: (LAWS[9][0], bookkeeping), 11: (LAWS[11][0], interrupted),
}  # fmt: skip


# ---- wrong on purpose ------------------------------------------------------------------------------------------------


class Credulous(Verifier):
    """Accepts the eldest nodes of whatever is drafted."""

    def verify(self, turn: Round, random: Random) -> None:
        for r in turn.alive:
            going = True
            while going:
                below = turn.drafted(r, turn.node[r])
                if below:
                    going = turn.emit(r, turn.value[r][below[0]], below[0])
                else:
                    going = turn.emit(r, int(turn.at([r]).sample(random, turn.key([r]))[0, 0]))


def credulous(ask: Ask) -> Decoding:
    """For mutants: n-grams, believed."""
    return Decoding(Credulous(ask.stop), NGram(4, (1,)))
