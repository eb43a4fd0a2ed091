"""The laws of a decoder of tokens in any order: at its neutral setting it writes what plain unmasking writes, and at
any setting it keeps its books.

Such a decoder has no model of its own, so the laws run it on two tiny ones in float64: one in which everybody sees
everybody, and one of blocks. Laws about orders and training do not apply.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch

from seriatim.canvas import DECIDED, DELETED, GIVEN, Canvas, Set
from seriatim.decoding.guess import Guess
from seriatim.decoding.loop import Step, decode
from seriatim.decoding.sample import Select
from seriatim.decoding.target import Target
from seriatim.decoding.unmask import Unmask
from seriatim.laws.case import Limit, randomise
from seriatim.laws.laws import LAWS, NotApplicable, require
from seriatim.model import Rows
from seriatim.posttraining.parallel import begun
from seriatim.random import Keyed, Random
from seriatim.systems.decoders import Ask, Block, Decoding
from seriatim.systems.system import Sampling

PROMPT = (1, 0, 1)
NEW, BLOCK = 13, 4  # tokens that are written, and of a block of the second model
SAMPLINGS = (Sampling(temperature=0), Sampling(temperature=0.8, top_k=2))


@dataclass
class UnmaskingCase:
    """A decoder at some options, for the laws.

    neutral: options at which it decides one token at a time, by confidence, in blocks of 4 or as long as the model's
    (None: there are none); blocks: it works with models of blocks; redraws: it may take back what it decided; steady:
    it has no memory, so that it can be stopped and taken up again; limits: checks of law 8.
    """

    decoder: Callable[[Ask], Decoding]
    options: Any
    neutral: Any = None
    blocks: bool = True
    redraws: bool = False
    steady: bool = True
    source: str | None = None
    limits: tuple[Callable[[], Limit], ...] = ()
    seed: int = field(default=4, repr=False)

    @cached_property
    def systems(self) -> tuple[Any, ...]:
        """The models: 3 tokens, weights drawn at random."""
        from seriatim.systems.text.mdlm import MDLM
        from seriatim.systems.text.mdlm import Config as Whole
        from seriatim.systems.text.sdar import SDAR
        from seriatim.systems.text.sdar import Config as InBlocks

        tokenizer: Any = SimpleNamespace(special={}, vocab=3)
        shape: dict[str, Any] = {"length": len(PROMPT) + NEW, "vocab": 3, "width": 16, "depth": 2, "heads": 2}
        found = [MDLM(Whole(**shape, block=None), tokenizer)]
        if self.blocks:
            found.append(SDAR(InBlocks(**shape, block=BLOCK), tokenizer))  # type: ignore[arg-type]
        for system in found:
            randomise(system.model, seed=self.seed)
        return tuple(system.eval().requires_grad_(False) for system in found)

    def decoding(self, system: Any, sampling: Sampling, neutral: bool = True) -> Decoding:
        """The decoder afresh, at its neutral setting unless that is not wanted."""
        options = self.neutral if neutral and self.neutral is not None else self.options
        return self.decoder(Ask(system, sampling, (), self.source, options))

    def write(
        self, system: Any, sampling: Sampling, way: Decoding, prompts: Sequence[Sequence[int]] = (PROMPT,),
        names: Sequence[int] = (0,), seed: int = 1, cached: bool = True, most: int = 0, canvas: Canvas | None = None,
    ) -> tuple[Canvas, list[Step]]:  # fmt: skip
        """Decode to the end, or `most` steps; prompts are equally long."""
        if canvas is None:
            canvas = begun(system, torch.tensor(prompts), NEW, way.block)
            canvas.row = torch.tensor(names)
        target = Target(system.model, warp=sampling.warp, **{"cached": cached, **way.target})
        steps: list[Step] = []
        with torch.inference_mode():
            for step in decode(target, canvas, way.decider, way.proposer, Keyed(seed)):
                steps.append(step)
                if len(steps) == most:
                    break
        return canvas, steps

    def text(self, system: Any, sampling: Sampling, way: Decoding, **more: Any) -> list[int]:
        """The only row that is written."""
        return self.write(system, sampling, way, **more)[0].value["token"][0].tolist()


def plain(system: Any, block: Block | None) -> Decoding:
    """One token at a time, the surest first."""
    return Decoding(Unmask(Select("confidence", system.model.layout.size)), block=block)


def neutral(case: UnmaskingCase) -> str:
    """At its neutral setting the text of plain unmasking, under the same noise; elsewhere it may be another."""
    if case.neutral is None:
        raise NotApplicable("it has no setting at which it decides one token at a time by confidence")
    notes = []
    for system in case.systems:
        for seed, sampling in enumerate(SAMPLINGS):
            way = case.decoding(system, sampling)
            ours = case.text(system, sampling, way, seed=seed)
            want = case.text(system, sampling, plain(system, way.block), seed=seed)
            require(ours == want, f"{system.meta.key}: it writes {ours}, plain unmasking {want}")
        way = case.decoding(system, SAMPLINGS[0], False)
        relaxed, steps = case.write(system, SAMPLINGS[0], way)
        want = case.text(system, SAMPLINGS[0], plain(system, None))
        differ = sum(a != b for a, b in zip(relaxed.value["token"][0].tolist(), want, strict=True))
        notes.append(f"{system.meta.key}: {len(steps)} forwards for {NEW} tokens, {differ} of them others")
    return "neutral texts equal; relaxed: " + "; ".join(notes)


def invisible_cache(case: UnmaskingCase) -> str:
    """With and without the exact cache, the same text."""
    texts = 0
    for system in case.systems:
        for sampling in SAMPLINGS:
            if "policy" in case.decoding(system, sampling).target:
                continue
            cached = case.text(system, sampling, case.decoding(system, sampling))
            fresh = case.text(system, sampling, case.decoding(system, sampling), cached=False)
            require(cached == fresh, f"{system.meta.key}: with the cache it writes {cached}, without {fresh}")
            texts += 1
    if not texts:
        raise NotApplicable("its cache is approximate at every setting of the case")
    return f"{texts} texts equal"


def company(case: UnmaskingCase) -> str:
    """A row's text depends neither on batch mates nor on the order of rows."""
    prompts = [[1, 0, 1], [2, 2, 0], [0, 1, 2], [1, 1, 1]]
    for system in case.systems:
        for at in (True, False):

            def texts(order: Sequence[int], system: Any = system, at: bool = at) -> list[list[int]]:
                way = case.decoding(system, SAMPLINGS[1], at)
                rows = [prompts[i] for i in order]
                return case.write(system, SAMPLINGS[1], way, rows, order, 5)[0].value["token"].tolist()

            alone = [texts([i])[0] for i in range(4)]
            for order in ((0, 1, 2, 3), (3, 1)):
                for i, text in zip(order, texts(order), strict=True):
                    require(text == alone[i], f"{system.meta.key}: among {order}, row {i} is {text}; alone {alone[i]}")
    return "texts of 4 rows equal those alone"


def bookkeeping(case: UnmaskingCase) -> str:
    """What is given stays, what is decided stays, and every step decides something."""
    counts = []
    for system in case.systems:
        way = case.decoding(system, SAMPLINGS[1], False)
        watched = Watched(way.decider, case.redraws)
        canvas, steps = case.write(system, SAMPLINGS[1], Decoding(watched, way.proposer, way.target, way.block))
        require(canvas.value["token"][0, : len(PROMPT)].tolist() == list(PROMPT), "a given token changed")
        require(canvas.done, "it ended before everything was decided")
        require(case.redraws or len(steps) <= NEW, f"{len(steps)} forwards for {NEW} tokens")
        counts.append(f"{system.meta.key}: {NEW} tokens by {len(steps)} forwards")
    return "; ".join(counts)


class Watched:
    """A decider whose steps are looked at: each decides something, and (unless it `redraws`) nothing decided before."""

    def __init__(self, inner: Any, redraws: bool):
        self.inner, self.redraws = inner, redraws
        self.needs: frozenset[str] = getattr(inner, "needs", frozenset())

    def decide(self, canvas: Canvas, guess: Guess | None, rows: Rows, random: Random) -> Step:
        step = self.inner.decide(canvas, guess, rows, random)
        require(bool(step.edits), "a step decides nothing")
        known = ((canvas.status == DECIDED) | (canvas.status == GIVEN) | (canvas.status == DELETED)).expand(
            canvas.batch, -1
        )
        for edit in step.edits:
            if isinstance(edit, Set) and edit.element is not None:
                element = edit.element.expand(canvas.batch, -1)
                again = known.gather(1, element.clamp(min=0)) & (element >= 0)
                require(self.redraws or not bool(again.any()), "a step decides anew what was decided")
                require(bool((element >= 0).any()), "a step decides nothing")
        return step


def limits(case: UnmaskingCase) -> str:
    """At the ends of its options the decoder is another one."""
    return LAWS[8][1](case)  # type: ignore[arg-type]


def interrupted(case: UnmaskingCase) -> str:
    """Stopped and taken up again by a fresh decoder, the same text."""
    if not case.steady:
        raise NotApplicable("it remembers what it has seen of a canvas, and begins anew with another")
    for system in case.systems:
        whole = case.text(system, SAMPLINGS[1], case.decoding(system, SAMPLINGS[1]), seed=7)
        for stop in (1, 3):
            way = case.decoding(system, SAMPLINGS[1])
            canvas, _ = case.write(system, SAMPLINGS[1], way, seed=7, most=stop)
            text = case.text(system, SAMPLINGS[1], case.decoding(system, SAMPLINGS[1]), seed=7, canvas=canvas)
            require(text == whole, f"{system.meta.key}: stopped after {stop} steps it writes another text")
    return "stopped = never stopped"


def _not_its_business(case: UnmaskingCase) -> str:
    raise NotApplicable("a decoder has no order and no weights of its own; it runs on those of a model")


OF_UNMASKING = {
    **{number: (name, _not_its_business) for number, (name, _) in LAWS.items()},
    4: (LAWS[4][0], neutral), 5: (LAWS[5][0], invisible_cache), 6: (LAWS[6][0], company),
    8: (LAWS[8][0], limits), 9: (LAWS[9][0], bookkeeping), 11: (LAWS[11][0], interrupted),
}  # fmt: skip


# ---- wrong on purpose ------------------------------------------------------------------------------------------------


def careless(ask: Ask) -> Decoding:
    """For mutants: some tokens at random, whatever the model is sure of."""
    return Decoding(Select("random", 3))
