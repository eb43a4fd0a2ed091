"""What tests of heads share: sources of randomness that return what a test wants, and networks that know the answer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from seriatim.random import VALUE, Forced, Key, numbered


class ForcedCodes:
    """`Forced` for values of several codes (b, E, D): the j-th draw of an element is its code j."""

    def __init__(self, value: Tensor):
        self.depth = {numbered(VALUE, 0, j): Forced(value[..., j]) for j in range(value.shape[-1])}

    def categorical(self, logits: Tensor, key: Key) -> Tensor:
        return self.depth[int(key.draw)].categorical(logits, key)

    @property
    def log_prob(self) -> Tensor:
        return torch.stack([f.log_prob for f in self.depth.values()]).sum(0)


class Prepared:
    """Returns prepared numbers for the n-th draw of a value; 0 where nothing was prepared."""

    def __init__(self, unit: Tensor | None = None, normal: dict[int, Tensor] | None = None):
        self.unit = unit
        self.prepared = {numbered(VALUE, 0, i): x for i, x in (normal or {}).items()}

    def uniform(self, shape, key: Key, device="cpu") -> Tensor:
        assert self.unit is not None
        return self.unit.expand(shape)

    def normal(self, shape, key: Key, device="cpu") -> Tensor:
        x = self.prepared.get(int(key.draw), torch.zeros(()))
        return x.double().expand(shape)


class Oracle(nn.Module):
    """A denoiser that says a function of (value, time), whatever the hidden state; `times` are those it was asked."""

    def __init__(self, says: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.says, self.times = says, []
        self.value = nn.Linear(1, 1).double()  # its number format

    def state(self, h: Tensor) -> Tensor:
        return torch.zeros_like(h[..., :1])

    def clock(self, t: Tensor) -> Tensor:
        return t[..., None]

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        self.times.append(modulation[..., 0])
        return self.says(x, modulation)


@pytest.fixture
def forced_codes() -> type[ForcedCodes]:
    return ForcedCodes


@pytest.fixture
def prepared() -> type[Prepared]:
    return Prepared


@pytest.fixture
def oracle() -> type[Oracle]:
    return Oracle


@pytest.fixture
def impulses() -> Callable[..., tuple[Tensor, Tensor]]:
    """Mean and variance, without chance, of what a sampler that is linear in its noise returns: one row without any
    noise, and one for each draw with that draw alone at 1."""

    def moments(dist: Callable[[int], object], draws: int) -> tuple[Tensor, Tensor]:
        eye = torch.cat([torch.zeros(1, draws), torch.eye(draws)])[..., None, None].double()
        random = Prepared(normal={i: eye[:, i] for i in range(draws)})
        out = dist(draws + 1).sample(random, Key(torch.arange(draws + 1), 0))[:, 0, 0]  # type: ignore[attr-defined]
        return out[0], (out[1:] - out[0]).square().sum()

    return moments
