"""What the tests of decoders share: proposers around proposers, random transformers, plain strings to compare with."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from seriatim.backbones.rope import RoPE
from seriatim.backbones.transformer import Transformer, TransformerConfig
from seriatim.canvas import Canvas
from seriatim.decoding.guess import Guess
from seriatim.decoding.loop import Proposer, Step, generate
from seriatim.decoding.sample import SampleAll
from seriatim.decoding.target import Target
from seriatim.embed import TokenEmbed
from seriatim.factorization.line import Line
from seriatim.heads.categorical import CategoricalHead
from seriatim.heads.dist import Categorical
from seriatim.laws.case import randomise
from seriatim.layout import line
from seriatim.model import Model, Rows
from seriatim.random import Key, Keyed, Random

torch.set_num_threads(1)


class Once:
    """Drafts in the first round only: a round that is exact after every history needs no other."""

    def __init__(self, proposer: Proposer):
        self.proposer, self.turn = proposer, 0

    def propose(self, canvas: Canvas, target: Target, random: Random) -> Guess | None:
        self.turn += 1
        return self.proposer.propose(canvas, target, random) if self.turn == 1 else None

    def observe(self, canvas: Canvas, rows: Rows, step: Step) -> None:
        self.proposer.observe(canvas, rows, step)


class Altered:
    """Hands on another proposer's drafts, changed."""

    def __init__(self, proposer: Proposer, change: Callable[[Guess], Guess]):
        self.proposer, self.change = proposer, change

    def propose(self, canvas: Canvas, target: Target, random: Random) -> Guess | None:
        guess = self.proposer.propose(canvas, target, random)
        return None if guess is None else self.change(guess)

    def observe(self, canvas: Canvas, rows: Rows, step: Step) -> None:
        self.proposer.observe(canvas, rows, step)


class Fixed:
    """The same draft whenever there is room for it."""

    def __init__(self, value: list[int], parent: tuple[int, ...] | None = None, q: Categorical | None = None):
        self.value, self.parent, self.q = value, parent, q

    def propose(self, canvas: Canvas, target: Target, random: Random) -> Guess | None:
        guess = Guess(torch.tensor([self.value]).expand(canvas.batch, -1), self.parent, self.q)
        assert canvas.length is not None
        return guess if canvas.layout.size - canvas.length > max(guess.depths()) else None

    def observe(self, canvas: Canvas, rows: Rows, step: Step) -> None:
        """Learns nothing."""


class Accountant(Keyed):
    """Keyed noise that refuses to give the same noise twice. (Coins behind a row's first tail are not looked at, but
    counted too.)"""

    def __init__(self, seed: int = 0):
        super().__init__(seed)
        self.used: set[tuple[int, int, int]] = set()

    def _unit(self, shape, key: Key, device):
        b, n = shape[:2]
        element = torch.arange(key.element, key.element + n) if isinstance(key.element, int) else key.element
        element, draw = element.expand(b, n), torch.as_tensor(key.draw).expand(b, n)
        for row, es, ds in zip(key.row.tolist(), element.tolist(), draw.tolist(), strict=True):
            for e, d in zip(es, ds, strict=True):
                if e >= 0:
                    assert (row, e, d) not in self.used, f"draw {d} of element {e} in row {row} is used twice"
                    self.used.add((row, e, d))
        return super()._unit(shape, key, device)


@pytest.fixture
def once() -> type[Once]:
    return Once


@pytest.fixture
def altered() -> type[Altered]:
    return Altered


@pytest.fixture
def fixed() -> type[Fixed]:
    return Fixed


@pytest.fixture
def accountant() -> type[Accountant]:
    return Accountant


@pytest.fixture(scope="session")
def transformer() -> Callable[..., Model]:
    """A random transformer over a line, in float64."""

    def build(length: int = 40, vocab: int = 7, seed: int = 0, std: float = 0.35, width: int = 16) -> Model:
        backbone = Transformer(TransformerConfig(width, 2, 2, rope=RoPE()))
        model = Model(line(length), Line(prefix=1), TokenEmbed(vocab, width), backbone, CategoricalHead(width, vocab))
        return randomise(model, seed, std)

    return build


@pytest.fixture(scope="session")
def perturbed() -> Callable[[Model, float], Model]:
    """A model near another: a draft that is often right."""
    import copy

    def build(model: Model, std: float) -> Model:
        near = copy.deepcopy(model)
        g = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for p in near.parameters():
                p.add_(std * torch.randn(p.shape, generator=g, dtype=p.dtype))
        return near

    return build


@pytest.fixture(scope="session")
def plain() -> Callable[..., Tensor]:
    """The strings of plain sampling."""

    def run(target: Target, batch: int, random: Random) -> Tensor:
        return generate(target, target.model.blank(batch), SampleAll(), random=random).value["token"]

    return run
