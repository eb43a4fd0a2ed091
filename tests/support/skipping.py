"""A small next-token model of six layers, layer plans on it, and what decoding under them meets."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from seriatim.decoding.layers import LayerPlan, PromptRouters, Saturation, Staircase
from seriatim.decoding.loop import Decider, Proposer, decode
from seriatim.decoding.sample import SampleAll
from seriatim.decoding.target import Target
from seriatim.laws.case import randomise
from seriatim.random import Keyed, Random
from seriatim.systems.text.next_token import Config, NextToken

torch.set_num_threads(1)
DEPTH, WIDTH, VOCAB, NEW = 6, 16, 5, 12
PROMPTS = [[1, 0, 1], [2], [0, 1, 2, 2, 0], [1, 1]]


def system(depth: int = DEPTH, seed: int = 4) -> NextToken:
    """Weights at random, in float64."""
    made = NextToken(Config(length=64, vocab=VOCAB, width=WIDTH, depth=depth, heads=2), SimpleNamespace(special={}))  # type: ignore[arg-type]
    randomise(made.model, seed=seed)
    return made.eval().requires_grad_(False)


def routers(**options: Any) -> PromptRouters:
    """Of arbitrary weights: the prompts above want different layers."""
    g = torch.Generator().manual_seed(0)
    return PromptRouters(torch.randn(DEPTH, WIDTH, generator=g), torch.randn(DEPTH, generator=g), **options)


# each of them leaves something out within the first tokens
PLANS: dict[str, LayerPlan] = {
    "staircase": Staircase.linear(DEPTH, 2, 8),
    "staircase, shorter prompts": Staircase.linear(5, 2, 8, warmup=2),
    "saturation": Saturation(0.9, run=2, warmup=2),
    "saturation, always": Saturation(-1.0, run=1, bottom=0, top=0, warmup=0),
    "routers": routers(),
    "routers, full prompts": routers(prompt="runs"),
}


class Met:
    """A decider whose laws of the next token are noted: (rows, vocabulary) at each step."""

    def __init__(self, inner: Decider):
        self.inner, self.laws = inner, []
        self.needs = getattr(inner, "needs", frozenset())

    def decide(self, canvas: Any, guess: Any, rows: Any, random: Any) -> Any:
        self.laws.append(rows.dist.log_probs()[:, 0])
        return self.inner.decide(canvas, guess, rows, random)


def written(
    made: NextToken, rows: Sequence[Sequence[int]], layers: LayerPlan | None, *, new: int = NEW, seed: int = 3,
    random: Random | None = None, names: Sequence[int] | None = None, decider: Decider | None = None,
    proposer: Proposer | None = None, chunk: int | None = None, **target: Any,
) -> tuple[list[list[int]], list[Tensor], Target]:  # fmt: skip
    """Texts, the laws that were met, and the target; `chunk`: prefill, so many slots at a time."""
    canvas = made._begun(rows, new)
    if names is not None:
        canvas.row = torch.tensor(names)
    sampled, met = Target(made.model, layers=layers, **target), Met(decider or SampleAll())
    with torch.inference_mode():
        if chunk is not None:
            sampled.prefill(canvas, chunk)
        for _ in decode(sampled, canvas, met, proposer, random or Keyed(seed)):
            pass
    value = canvas.value["token"].tolist()
    return [v[: len(row) + new] for v, row in zip(value, rows, strict=True)], met.laws, sampled


def layers_called(made: NextToken, monkeypatch: Any) -> list[int]:
    """Notes the layers that are computed from now on, one after another."""
    called, layer = [], made.model.backbone._layer

    def spy(i: int, *args: Any) -> Tensor:
        called.append(i)
        return layer(i, *args)

    monkeypatch.setattr(made.model.backbone, "_layer", spy)
    return called
