"""What the laws run on: a tiny instance of a system with randomised weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seriatim.canvas import Canvas
from seriatim.decoding.loop import Decider, Proposer, generate
from seriatim.decoding.sample import SampleAll
from seriatim.decoding.target import Target
from seriatim.embed import TokenEmbed
from seriatim.model import Model
from seriatim.plan import MASK, VALUE, Plan
from seriatim.random import Forced, Random


class Unmasked(TokenEmbed):
    """Wrong on purpose, for mutants of masked systems: the value itself stands where the labels speak of a mask."""

    def forward(self, canvas, plan, guess=None, prefix=None):
        source = torch.where(plan.slots.source == MASK, VALUE, plan.slots.source)
        return super().forward(canvas, replace(plan, slots=replace(plan.slots, source=source)), guess, prefix)


class Limit(NamedTuple):
    """Two results that must agree: a system at a setting, and another composition."""

    name: str
    got: Tensor
    want: Tensor
    tolerance: float = 1e-9


@dataclass
class Case:
    """A tiny model in float64 whose samples can be enumerated.

    vocab: number of values of every element (small); given: how many first elements are given; condition: raw
    conditions of one row; spread: more values of a condition, so that all its parameters are met; decider: how it is
    decoded; limits: checks of law 8; starved: parameters that get no gradient at this size, with reason in the system's
    file; exempt: law number -> reason, for laws 1 and 2 only (their substitutes run); over_ids: ids stand in for
    vectors, whose likelihood is not at hand: the laws hold the system to that of the ids.
    """

    model: Model
    vocab: int
    given: int = 0
    condition: Mapping[str, Tensor] | None = None
    spread: Mapping[str, Tensor] = field(default_factory=dict)
    decider: Callable[[], Decider] = SampleAll
    limits: tuple[Callable[[], Limit], ...] = ()
    starved: tuple[str, ...] = ()
    exempt: Mapping[int, str] = field(default_factory=dict)
    over_ids: bool = False

    def __post_init__(self) -> None:
        if set(self.exempt) - {1, 2}:
            raise ValueError(f"a system may be exempt from laws 1 and 2 only, not {sorted(self.exempt)}")

    def rows(self, n: int) -> Mapping[str, Tensor] | None:
        """The condition for n rows."""
        if self.condition is None:
            return None
        return {k: v.expand(n, *v.shape[1:]) for k, v in self.condition.items()}

    def sample(self, n: int, seed: int = 0) -> Tensor:
        """Random values (n, elements); the given ones are the same in every row."""
        g = torch.Generator().manual_seed(seed)
        x = torch.randint(self.vocab, (n, self.model.layout.size), generator=g)
        x[:, : self.given] = torch.arange(self.given) % self.vocab
        return x

    def canvas(self, x: Tensor, model: Model | None = None) -> Canvas:
        """A finished sample, for teacher forcing."""
        model = model or self.model
        return model.canvas({model.layout.kinds[0]: x}, self.given)

    def blank(self, x: Tensor, row: Tensor | None = None) -> Canvas:
        """A canvas that holds the given elements of x and nothing else."""
        start = x.clone()
        start[:, self.given :] = 0
        return self.model.canvas({self.model.layout.kinds[0]: start}, self.given, row=row)

    def generated(
        self,
        random: Random,
        rows: int,
        decider: Callable[[], Decider] | None = None,
        proposer: Proposer | None = None,
        row: Tensor | None = None,
    ) -> Tensor:
        """Samples (rows, elements)."""
        canvas = self.blank(self.sample(rows), row)
        generate(Target(self.model, self.rows(rows)), canvas, (decider or self.decider)(), proposer, random)
        return self.read(canvas)

    def read(self, canvas: Canvas) -> Tensor:
        """The samples of a finished canvas (rows, elements)."""
        return canvas.value[self.model.layout.kinds[0]]

    def forced(self, x: Tensor) -> Any:
        """Randomness by which decoding meets the same rows whenever it is asked for these samples."""
        return Forced(x)

    def law(self) -> Mapping[tuple[int, ...], float] | None:
        """The exact law of the samples in another way than by decoding, where that is no mean over orders of elements
        that are there from the beginning; else None."""
        return None

    def verifier(self, kind: Callable[[], Decider]) -> Callable[[], Decider]:
        """How drafts are verified; mutants replace it."""
        return kind

    def plan(self, x: Tensor) -> Plan:
        """The packed plan of a sample; for orders without one, the first step of an empty canvas."""
        plan = self.model.factorization.packed(self.canvas(x))
        if plan is None:
            plan = self.model.factorization.step(self.blank(x), None, 0)
        assert plan is not None
        return plan

    def embed(self, plan: Plan, x: Tensor | Canvas) -> Tensor:
        """What stands in the slots of a plan."""
        canvas = x if isinstance(x, Canvas) else self.canvas(x)
        with torch.no_grad():
            return self.model.embed(canvas, plan, None, self.model.encode(self.rows(canvas.batch)).prefix)

    def total(self, x: Tensor) -> Tensor:
        """Log-probability of samples in one pass; where there is none, forced step by step."""
        if not self.exempt.get(1):
            return self.model.log_prob(self.canvas(x), self.rows(len(x)))
        from seriatim.laws.rows import step_rows

        return step_rows(self, x, True)[1]

    def data(self, n: int, generator: torch.Generator) -> Tensor:
        """Samples whose elements are all alike, so that one tells the others."""
        value = torch.randint(self.vocab, (n, 1), generator=generator)
        return value.expand(n, self.model.layout.size).contiguous()

    def learn(self, steps: int = 150, batch: int = 32) -> tuple[float, float]:
        """Train on `data`; the loss of elements that are not decided first, and that of chance, in nats."""
        from seriatim.training.loop import Recipe, fit

        model = copy.deepcopy(self.model).float()
        g = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.copy_(torch.randn(p.shape, generator=g) * (0.3 if p.dim() > 1 else 0.1))

        def draw(n: int, generator: torch.Generator):
            return self.canvas(self.data(n, generator), model), self.rows(n)

        fit(model, draw, Recipe(steps, batch, 1e-2, weight_decay=0.0))
        canvas, condition = draw(256, torch.Generator().manual_seed(1))
        with torch.no_grad():
            losses = model.losses(canvas, condition)
        return float(losses[canvas.rank > 0].mean()), math.log(self.vocab)


def randomise(model: Model, seed: int = 0, std: float = 0.5) -> Model:
    """Every weight drawn anew (zero-initialised gates would pass laws vacuously), in float64 and evaluation mode."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * std)
    return model.double().eval()
