"""Estimates of how likely a sample is, as reinforcement of masked generators takes them, beside the truth.

A law is given, and a model that knows it (`laws.oracle`), so that whatever an estimate misses is the estimate's doing:
mean field reads all elements at once, diffu too, with some of the prompt hidden, coupled reads each from one of two
complementary halves, the trajectory reads what every step of decoding saw (`posttraining.policy`).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from seriatim.canvas import Canvas
from seriatim.conditions.condition import Condition
from seriatim.decoding.target import Target
from seriatim.laws.oracle import oracle
from seriatim.objectives.masked import Masked, by_count, showing
from seriatim.posttraining.policy import log_probs
from seriatim.posttraining.reinforce import DRAWING, ESTIMATORS

Law = Mapping[tuple[int, ...], float]
TIES = (0.0, 0.2, 0.4, 0.6, 0.8, 0.95)


class Knowing(Masked):
    """The model of a law, as estimates ask it."""

    def hidden_losses(
        self,
        canvas: Canvas,
        hidden: Bool[Tensor, "b E"],
        condition: Mapping[str, Tensor] | Condition | None = None,
        drop: Bool[Tensor, "b"] | None = None,
        random: Any = None,
    ) -> Float[Tensor, "b E"]:
        """As of all masked models; the true conditionals are those of named elements."""
        shown, target = showing(self, canvas, ~hidden), Target(self, cached=False)
        plan = target.plan(shown)
        out = torch.zeros(hidden.shape, dtype=torch.float64)
        if plan is None:
            return out
        rows = target.forward(plan, shown)
        element = torch.as_tensor(rows.element).expand(canvas.batch, -1)
        row, column = (element >= 0).nonzero(as_tuple=True)
        element = element[row, column]
        value = torch.zeros(rows.dist.logits.shape[:2], dtype=torch.long)
        value[row, column] = canvas.value["token"][row, element]
        return out.index_put((row, element), -rows.dist.log_prob(value)[row, column])


def knowing(law: Law, vocab: int) -> Knowing:
    """The model of a law of ids below `vocab`, in any order."""
    m = oracle(law, vocab)  # type: ignore[arg-type]
    parts = (m.layout, m.factorization, m.embed, m.backbone, m.heads["token"])
    return Knowing(*parts, masking=by_count).eval()  # type: ignore[return-value]


def chain(tie: float, length: int) -> dict[tuple[int, ...], float]:
    """Fair coins, each of which shows what the one before does with probability (1 + tie) / 2: 0 makes them
    independent, 1 all alike."""
    law = {}
    for x in itertools.product((0, 1), repeat=length):
        same = sum(a == b for a, b in itertools.pairwise(x))
        law[x] = 0.5 * ((1 + tie) / 2) ** same * ((1 - tie) / 2) ** (length - 1 - same)
    return {x: p for x, p in law.items() if p > 0}


@dataclass(frozen=True)
class Missed:
    """By how many nats an estimate of a sample's log-probability misses it, in the mean over the law: that of its mean
    over draws (`bias`), and of single ones (`error`)."""

    bias: float
    error: float


@torch.no_grad()
def missed(law: Law, vocab: int, given: int = 0, draws: int = 64, seed: int = 0) -> dict[str, Missed]:
    """How far each estimate of log p(x | the first `given` elements) is from it; the trajectory decides one element
    after another, from left to right."""
    model, ids = knowing(law, vocab), torch.tensor(list(law))
    weight = torch.tensor(list(law.values()), dtype=torch.float64)
    prompts: dict[tuple[int, ...], float] = {}
    for x, p in law.items():
        prompts[x[:given]] = prompts.get(x[:given], 0.0) + p
    truth = (weight / torch.tensor([prompts[x[:given]] for x in law], dtype=torch.float64)).log()
    turn = (torch.arange(ids.shape[1]) - given).clamp(min=-1).expand(ids.shape)
    out = {}
    for name, estimate in ESTIMATORS.items():
        generator = torch.Generator().manual_seed(seed)
        count = draws if name in DRAWING else 1
        said = torch.stack([log_probs(model, ids, estimate(turn, generator)).sum(1) for _ in range(count)])
        gap = said - truth
        out[name] = Missed(*(float((g.abs() * weight).sum()) for g in (gap.mean(0), gap.abs().mean(0))))
    return out


def side_by_side(ties: Sequence[float] = TIES, length: int = 5, draws: int = 64) -> dict[str, list[dict[str, float]]]:
    """Of each estimate, how far it misses chains of coins whose first one is the prompt, from independent ones on."""
    out: dict[str, list[dict[str, float]]] = {}
    for tie in ties:
        for name, one in missed(chain(tie, length), 2, given=1, draws=draws).items():
            out.setdefault(name, []).append({"tie": tie, **asdict(one)})
    return out
