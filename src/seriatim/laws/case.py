"""What the laws run on: a tiny instance of a system with randomised weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from seriatim.decoding.loop import Decider
from seriatim.decoding.sample import SampleAll
from seriatim.model import Model


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
    conditions of one row; decider: how it is decoded; limits: checks of law 8; exempt: law number -> reason, for laws 1
    and 2 only.
    """

    model: Model
    vocab: int
    given: int = 0
    condition: Mapping[str, Tensor] | None = None
    decider: Callable[[], Decider] = SampleAll
    limits: tuple[Callable[[], Limit], ...] = ()
    exempt: Mapping[int, str] = field(default_factory=dict)

    def rows(self, n: int) -> Mapping[str, Tensor] | None:
        """The condition for n rows."""
        if self.condition is None:
            return None
        return {k: v.expand(n, *v.shape[1:]) for k, v in self.condition.items()}

    def sample(self, n: int, seed: int = 0) -> Tensor:
        """Random values (n, elements)."""
        g = torch.Generator().manual_seed(seed)
        return torch.randint(self.vocab, (n, self.model.layout.size), generator=g)


def randomise(model: Model, seed: int = 0, std: float = 0.5) -> Model:
    """Every weight drawn anew (zero-initialised gates would pass laws vacuously), in float64 and evaluation mode."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * std)
    return model.double().eval()
