"""What a masked model's confidences say about which of its guesses are final: an oracle, and a filter that learns from
it (Learn2PD, 2025, arXiv 2509.25188).

A text is decided twice: one token at a time, and again by an oracle, which knows the outcome and decides at each step
all tokens whose guess is right already. It needs a fraction of the steps and writes the same text. The filter, two
small layers over the confidences of a block, learns from its records which guesses were right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from seriatim.canvas import Canvas, Set
from seriatim.decoding.filters import Warper
from seriatim.decoding.guess import Guess
from seriatim.decoding.learned import TRUSTED, by_place
from seriatim.decoding.loop import Decider, Step, decode
from seriatim.decoding.sample import Select
from seriatim.decoding.target import Target
from seriatim.decoding.unmask import Unmask, at_work
from seriatim.model import Rows
from seriatim.posttraining.drafting import WEIGHTS, Base, Part
from seriatim.random import Generator, Keyed, Random
from seriatim.training.recipe import Recipe

AT_ONCE = 8  # windows that are decided together
FILTERING = Recipe(600, batch=256, learning_rate=3e-3, weight_decay=0.01)  # seconds


# ---- the oracle ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Records:
    """What steps saw. sure: the confidences of a block (1 where nothing was to be decided); right: which guesses were
    final; asked: which places were to be decided."""

    sure: Float[Tensor, "n B"]
    right: Bool[Tensor, "n B"]
    asked: Bool[Tensor, "n B"]

    def __len__(self) -> int:
        return len(self.sure)

    def take(self, index: Int[Tensor, " m"], generator: torch.Generator | None = None) -> dict[str, Tensor]:
        return {"sure": self.sure[index], "right": self.right[index], "asked": self.asked[index]}

    @staticmethod
    def joined(parts: Sequence[Records]) -> Records:
        """All of them."""
        return Records(*(torch.cat([getattr(p, name) for p in parts]) for name in ("sure", "right", "asked")))


@dataclass
class Oracle:
    """Decide all tokens of the block at work whose guess is that of the `answer` (rows, elements); where none is, give
    the whole block the answer. A decider, of a canvas with the rows of the answer.

    size: places of a block; `records` collects what each step saw of the rows that were at work.
    """

    answer: Int[Tensor, "b E"]
    size: int
    records: list[Records] = field(default_factory=list)

    def decide(self, canvas: Canvas, guess: Guess | None, rows: Rows, random: Random) -> Step:
        element = at_work(canvas, rows)
        step = Select(commit=TRUSTED, scorer=self).decide(canvas, guess, rows._replace(element=element), random)
        (edit,) = step.edits
        assert isinstance(edit, Set) and edit.element is not None
        wrong = (edit.element >= 0) & (edit.value.cpu() != self._of(edit.element))
        element = torch.where(wrong.any(1, keepdim=True), element, edit.element)
        return Step((Set(self._of(element), element),))

    def __call__(
        self, canvas: Canvas, element: Int[Tensor, "b m"], x: Int[Tensor, "b m"], score: Float[Tensor, "b m"]
    ) -> Float[Tensor, "b m"]:
        """As a `Scorer`: what is right comes first, and is trusted."""
        right = (x == self._of(element)) & (element >= 0)
        sure, place = by_place(canvas, element, score, self.size)
        there = torch.where(element >= 0, place, self.size)
        marks = [
            torch.zeros(len(sure), self.size + 1, dtype=torch.bool).scatter(1, there, mark)[:, :-1]
            for mark in (right, element >= 0)
        ]
        live = marks[1].any(1)
        self.records.append(Records(sure[live].float(), marks[0][live], marks[1][live]))
        return torch.where(right, 2 + score, score)

    def _of(self, element: Int[Tensor, "b m"]) -> Int[Tensor, "b m"]:
        return self.answer.gather(1, element.clamp(min=0))


def begun(system: Any, prompts: Int[Tensor, "b p"], new: int, block: Any) -> Canvas:
    """A canvas with prompts of one length and room for `new` tokens, in blocks (`Decoding.block`)."""
    canvas = system.begun(prompts[0].tolist(), new)
    canvas = canvas if block is None else system.blocked(canvas, block)
    canvas = canvas.select(torch.zeros(len(prompts), dtype=torch.long))
    canvas.value["token"][:, : prompts.shape[1]] = prompts
    canvas.row = torch.arange(len(prompts))
    return canvas


def written(
    system: Any, canvas: Canvas, decider: Decider, warp: Warper | None = None, seed: int = 0, **target: Any
) -> tuple[Int[Tensor, "b E"], Int[Tensor, "b"], list[Step]]:
    """Decode to the end: the ids of all rows, by how many forwards each decided something, and the steps. Greedy,
    unless a `warp` is given."""
    steps, forwards = [], torch.zeros(canvas.batch, dtype=torch.long)
    with torch.inference_mode():
        sampled = Target(system.model, warp=Warper(0) if warp is None else warp, **target)
        for step in decode(sampled, canvas, decider, random=Keyed(seed)):
            steps.append(step)
            for edit in step.edits:
                if isinstance(edit, Set) and edit.element is not None:
                    forwards += (edit.element >= 0).any(1)
    return canvas.value["token"].cpu(), forwards, steps


def one_by_one(system: Any, prompts: Int[Tensor, "b p"], new: int, block: Any) -> Int[Tensor, "b E"]:
    """Prompts with what the model writes greedily, one token a step, the surest of a block first."""
    way = Unmask(Select("confidence", system.model.layout.size))
    return written(system, begun(system, prompts, new, block), way)[0]


def replayed(
    system: Any, prompts: Int[Tensor, "b p"], answer: Int[Tensor, "b E"], block: int, own: bool = False
) -> tuple[Int[Tensor, "b E"], Int[Tensor, "b"], Records]:
    """The same texts by the oracle, which knows them: ids, forwards of each row, and the records. own: the model has
    its own blocks, of this size."""
    oracle = Oracle(answer, block)
    canvas = begun(system, prompts, answer.shape[1] - prompts.shape[1], None if own else block)
    ids, forwards, _ = written(system, canvas, oracle)
    return ids, forwards, Records.joined(oracle.records)


# ---- the filter ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FilterConfig:
    """block: places of a block (None: of the model's own blocks, or else 32); hidden: width between the two layers."""

    block: int | None = None
    hidden: int = 32

    def __post_init__(self) -> None:
        if (self.block is not None and self.block < 1) or self.hidden < 1:
            raise ValueError(f"a filter looks at 1 place or more, through a width of 1 or more; got {self}")


class Filter(Part):
    """From the confidences of a block to the logits that each guess is final. For models of tokens in any order."""

    key, Config, free = "learn2pd", FilterConfig, True
    reading: ClassVar[Mapping[str, int]] = MappingProxyType({"tokens": 8192, "window": 128})  # each costs two decodings

    def __init__(self, config: FilterConfig, base: Base):
        super().__init__(config, base)
        own = getattr(base.model.factorization, "size", None)
        if None not in (own, config.block) and own != config.block:
            raise ValueError(f"{base} decides blocks of {own} tokens: leave out --block")
        self.own, self.block = own is not None, own or config.block or 32
        self.layers = nn.Sequential(
            nn.Linear(self.block, config.hidden), nn.ReLU(), nn.Linear(config.hidden, self.block)
        ).to(base.device)

    def forward(self, sure: Float[Tensor, "b B"]) -> Float[Tensor, "b B"]:
        weight = next(self.layers.parameters())
        return self.layers(sure.to(weight.device, weight.dtype))

    def examples(self, base: Base, ids: Int[Tensor, "w n"], tell: Callable[[int, int], None] | None = None) -> Records:
        """Records of the oracle on what the model writes behind the first half of each window."""
        found, done = [], 0
        for part in ids.long().split(AT_ONCE):
            prompts = part[:, : part.shape[1] // 2]
            block = None if self.own else self.block
            answer = one_by_one(base.system, prompts, part.shape[1] - prompts.shape[1], block)
            found.append(replayed(base.system, prompts, answer, self.block, self.own)[2])
            done += len(part)
            if tell is not None:
                tell(done, len(ids))
        return Records.joined(found)

    def learner(self, base: Base) -> FilterLearner:
        return FilterLearner(self, base)


class FilterLearner(nn.Module):
    """A learner (`training.trainer`): a filter on `Records`; the binary cross-entropy of the places that were asked
    about."""

    base: Base

    def __init__(self, part: Filter, base: Base):
        super().__init__()
        self.part = part
        self.__dict__["base"] = base
        self.figures: Mapping[str, float] = {}

    def forward(self, batch: Mapping[str, Tensor], random: Generator, step: int, steps: int) -> tuple[Tensor, Tensor]:
        return self._loss(batch)

    def _loss(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        asked = batch["asked"]
        logits = self.part(batch["sure"])
        losses = F.binary_cross_entropy_with_logits(logits, batch["right"].to(logits), reduction="none")
        return torch.where(asked.to(losses.device), losses, 0).sum(), asked.sum()

    @torch.no_grad()
    def validate(self, examples: Any) -> dict[str, float]:
        """The loss; of what is accepted at 0.96 the share that is right, and of what is right the share accepted."""
        batch = examples.take(torch.arange(len(examples)))
        total, count = self._loss(batch)
        accepted = (torch.sigmoid(self.part(batch["sure"])).cpu() > ACCEPTED) & batch["asked"]
        hits = float((accepted & batch["right"]).sum())
        right = float((batch["right"] & batch["asked"]).sum())
        return {
            "loss": float(total) / int(count), "precision": hits / max(float(accepted.sum()), 1),
            "recall": hits / max(right, 1),
        }  # fmt: skip

    def weights_to_keep(self) -> nn.Module:
        return self.part

    def stored(self, weights: Mapping[str, Tensor]) -> tuple[str, Mapping[str, Tensor]]:
        return WEIGHTS, weights

    def finished(self) -> Any:
        """The base, which is what it was."""
        return self.base.system


ACCEPTED = 0.96  # the threshold of the paper


def reliability(score: Float[Tensor, "n B"], records: Records, parts: int = 10) -> list[tuple[float, float]]:
    """How sure and how often right guesses were: mean score and share, of so many equally large parts of them, from the
    lowest scores to the highest."""
    score, right = score[records.asked], records.right[records.asked]
    order = score.argsort().tensor_split(min(parts, len(score)))
    return [(float(score[part].mean()), float(right[part].double().mean())) for part in order]
