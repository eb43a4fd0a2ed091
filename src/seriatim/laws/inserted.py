"""What the laws run on where texts grow by insertions: samples are texts of any length, read from a finished canvas."""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from seriatim.canvas import Canvas, Revise, Set
from seriatim.factorization.insertion import Insertion
from seriatim.laws.case import Case
from seriatim.layout import line
from seriatim.plan import Plan
from seriatim.random import Key, mix


@dataclass
class InsertedCase(Case):
    """A case whose samples are texts of 0 to `layout.size` tokens, -1 behind their ends.

    start: the text that decoding begins with."""

    start: tuple[int, ...] = ()

    def blank(self, x: Tensor, row: Tensor | None = None) -> Canvas:
        return self.holding(torch.tensor(self.start, dtype=torch.long).expand(len(x), -1), row)

    def holding(self, x: Tensor, row: Tensor | None = None) -> Canvas:
        """Texts (rows, n) as if inserted behind a gap, which is still open."""
        value = torch.nn.functional.pad(x, (1, 0))
        canvas = self.model.canvas({"token": value}, row=row, layout=line(value.shape[1]))
        return canvas.apply([Set(x, torch.arange(1, value.shape[1]).expand(len(x), -1))])

    def read(self, canvas: Canvas) -> Tensor:
        texts, size = canvas.read("token"), self.model.layout.size
        return torch.stack([torch.nn.functional.pad(t, (0, size - len(t)), value=-1) for t in texts])

    def plan(self, x: Tensor) -> Plan:
        plan = self.model.factorization.step(self.holding(x), None, 0)
        assert plan is not None
        return plan

    def embed(self, plan: Plan, x: Tensor | Canvas) -> Tensor:
        return super().embed(plan, x if isinstance(x, Canvas) else self.holding(x))

    def forced(self, x: Tensor) -> Any:
        return Following(x)

    @abstractmethod
    def law(self) -> Mapping[tuple[int, ...], float]: ...

    @abstractmethod
    def tokens(self, dist: Any) -> Float[Tensor, "b v"]:
        """Log-rates or log-probabilities of inserting each token, wherever."""

    def learn(self, steps: int = 150, batch: int = 32) -> tuple[float, float]:
        """Train on texts whose tokens are all alike; what the last token costs, and chance, in nats."""
        from seriatim.training.loop import Recipe, fit

        trained = copy.copy(self)
        trained.model = model = copy.deepcopy(self.model).float()
        g = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn(p.shape, generator=g) * (0.3 if p.dim() > 1 else 0.1))
        fit(model, lambda n, g: (self.canvas(self.data(n, g), model), None), Recipe(steps, batch, 1e-2, weight_decay=0))
        x = self.data(64, torch.Generator().manual_seed(1))[:, :-1]
        canvas = trained.holding(x)
        gap = torch.zeros(len(x), 1, dtype=torch.long)
        canvas.apply([Revise(gap, gap, torch.full((len(x), 1), 0.1))])  # where there is a time, it is late
        plan = model.factorization.step(canvas, None, 0)
        assert plan is not None
        with torch.no_grad():
            said = self.tokens(model.dist(model.hidden(plan, canvas), plan, canvas)[0]).log_softmax(-1)
        return -float(said.gather(1, x[:, :1]).mean()), math.log(self.vocab)


class ByArrival(Insertion):
    """Wrong on purpose, for mutants: slots stand in the order in which tokens arrived."""

    def step(self, canvas: Canvas, guess: Any, cached: int | Tensor) -> Plan | None:
        place, canvas._place = canvas._place, torch.arange(canvas.layout.size).expand(canvas.batch, -1)
        try:
            return super().step(canvas, guess, cached)
        finally:
            canvas._place = place


class Following:
    """A source of randomness that always takes the same way for a sample: at the n-th draw a choice among those that
    are possible which follows from the sample and n. `met`: what was drawn from; `log_prob`: of the choices."""

    def __init__(self, x: Tensor):
        self.code = mix(x.long() + 1 + 1009 * torch.arange(x.shape[1])).sum(1)
        self.log_prob = torch.zeros(len(x), dtype=torch.float64)
        self.met: dict[int, Tensor] = {}

    def categorical(self, logits: Tensor, key: Key) -> Tensor:
        live = (torch.as_tensor(key.element) >= 0).expand(logits.shape[:2])
        said = torch.log_softmax(logits.double(), -1)
        possible = said > -torch.inf
        draw = mix(self.code[:, None] + len(self.met) * 7919 + torch.arange(logits.shape[1]) * 104729)
        nth = (draw % (1 << 20)) % possible.sum(-1)
        pick = (possible.long().cumsum(-1) == nth[..., None] + 1).long().argmax(-1)
        self.log_prob += said.gather(-1, pick[..., None])[..., 0].masked_fill(~live, 0.0).sum(1)
        self.met[len(self.met)] = torch.where(live[..., None], said, 0.0)
        return pick

    def heads(self, probability: Tensor, key: Key) -> Tensor:
        raise TypeError("deciders of insertions toss no coins")

    def uniform(self, shape: Any, key: Key, device: Any = "cpu") -> Tensor:
        raise TypeError("deciders of insertions draw no numbers")

    def normal(self, shape: Any, key: Key, device: Any = "cpu") -> Tensor:
        raise TypeError("deciders of insertions draw no numbers")
