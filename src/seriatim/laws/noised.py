"""What the laws run on where elements are denoised in place, and a model that knows a law under any noise.

The law of a decoder is computed in another way than by decoding: as a product of matrices over all canvases.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from seriatim.canvas import Canvas, Revise
from seriatim.decoding.denoise import steps_left
from seriatim.decoding.guess import Guess
from seriatim.embed import gather_values
from seriatim.factorization.in_place import InPlace
from seriatim.heads.categorical import CategoricalHead
from seriatim.heads.dist import Categorical
from seriatim.heads.kernels import Kernel
from seriatim.laws.case import Case
from seriatim.laws.oracle import Sum
from seriatim.layout import line
from seriatim.objectives.noised import Noised, NoisedEmbed
from seriatim.plan import MASK, Plan, Reads


def everything(states: int, n: int) -> Int[Tensor, "c n"]:
    """All ways to fill n elements."""
    return torch.tensor(list(itertools.product(range(states), repeat=n)))


def standing(model: Noised, start: Int[Tensor, "E"], given: int, x: Int[Tensor, "c n"], k: int) -> Canvas:
    """Canvases behind the first `given` elements of which x stands at step k."""
    value = torch.cat([start[:given].expand(len(x), -1), torch.zeros_like(x)], 1)
    canvas = model.canvas({"token": value}, given)
    if k < model.kernel.steps:
        element = torch.arange(given, value.shape[1]).expand(len(x), -1)
        canvas.apply([Revise(element, x, torch.full((len(x), 1), k / model.kernel.steps))])
    return canvas


@torch.no_grad()
def transition(
    model: Noised, start: Int[Tensor, "E"], k: int, given: int = 0, condition: Mapping[str, Tensor] | None = None
) -> Float[Tensor, "c c2"]:
    """p(x_{k-1} | x_k) of all elements together, between all canvases."""
    kernel, n = model.kernel, len(start) - given
    now = everything(kernel.states, n)
    canvas = standing(model, start, given, now, k)
    plan = model.factorization.step(canvas, None, 0)
    assert plan is not None
    rows = None if condition is None else {c: v.expand(len(now), *v.shape[1:]) for c, v in condition.items()}
    dist, element, _ = model.dist(model.hidden(plan, canvas, None, model.encode(rows)), plan, canvas)
    mine = torch.as_tensor(element)[0] >= 0
    p, steps = dist.probs()[:, mine], torch.full((len(now),), k)  # type: ignore[attr-defined]
    law = kernel.posterior(now, kernel.mixed(p, steps - 1), steps)
    later = everything(kernel.states, n)
    out = torch.ones(len(now), len(later), dtype=torch.float64)
    for i in range(n):
        out *= law[:, i, later[:, i]]
    return out


def law_of(
    model: Noised, start: Int[Tensor, "E"], given: int = 0, condition: Mapping[str, Tensor] | None = None
) -> dict[tuple[int, ...], float]:
    """The law of what the reverse of a model's kernel writes behind the first `given` elements."""
    kernel, states = model.kernel, everything(model.kernel.states, len(start) - given)
    law = kernel.prior[states].prod(1)
    for k in range(kernel.steps, 0, -1):
        law = law @ transition(model, start, k, given, condition)
    head = tuple(start[:given].tolist())
    return {(*head, *x): float(p) for x, p in zip(states.tolist(), law, strict=True) if max(x) < kernel.vocab}


@dataclass
class NoisedCase(Case):
    """A case of a `Noised` model with few steps. It learns with more of them, and is not told which: weights for that,
    drawn at random as here, drown what stands there (`NoisedEmbed` begins with zeros)."""

    def law(self) -> Mapping[tuple[int, ...], float]:
        assert isinstance(self.model, Noised)
        return law_of(self.model, self.sample(1)[0], self.given, self.condition)

    def learn(self, steps: int = 100, batch: int = 64) -> tuple[float, float]:
        finer = copy.copy(self)
        finer.model = model = copy.deepcopy(self.model)
        assert isinstance(model, Noised) and isinstance(model.embed, NoisedEmbed)
        model.kernel, model.embed.time = replace(model.kernel, steps=8), None  # type: ignore[type-var]
        return Case.learn(finer, steps, batch)


# ---- a model that knows ----------------------------------------------------------------------------------------------


class Noises(nn.Module):
    """What stands in a slot as one number of a vector: 1 at (element, state), nothing for a mask of the beginning."""

    kind = "token"

    def __init__(self, elements: int, states: int):
        super().__init__()
        self.elements, self.states = elements, states

    def forward(
        self, canvas: Canvas, plan: Plan, guess: Guess | None = None, prefix: Tensor | None = None
    ) -> Float[Tensor, "b s d"]:
        element, masked = plan.slots.element, plan.slots.source == MASK
        noise = self.kind in canvas.noise
        where = element[..., 0] * self.states + gather_values(canvas, element, self.kind, noise)[..., 0]
        return F.one_hot(where.expand(canvas.batch, -1), self.elements * self.states).double() * ~masked[..., None]


class Believed(CategoricalHead):
    """The law of x_0 of each element, given what stands in all others: that of the outcomes, each weighed by how likely
    it is to have become what is seen."""

    def __init__(self, outcomes: Int[Tensor, "o E"], weight: Float[Tensor, "o"], kernel: Kernel):
        super().__init__(outcomes.shape[1] * kernel.states, kernel.vocab)
        del self.weight
        self.outcomes, self.chance, self.kernel = outcomes, weight.double(), kernel

    def dist(self, h: Float[Tensor, "b m d"], reads: Reads | None, canvas: Canvas) -> Categorical:
        (b, n), kernel = (len(h), self.outcomes.shape[1]), self.kernel
        seen = h[:, 0].unflatten(-1, (n, kernel.states))
        blank = seen.sum(-1) == 0  # pure noise: whatever stands there tells nothing
        k = steps_left(canvas, kernel.steps)
        upto = torch.stack([kernel.upto(int(i)) for i in k])  # (b, from, to)
        fits = torch.einsum("bns,bvs->bnv", seen, upto[:, : kernel.vocab])
        fits = torch.where(blank[..., None], 1.0, fits)  # of each element: how likely each value is to become that
        each = fits.gather(2, self.outcomes.T.expand(b, -1, -1))  # (b, elements, outcomes)
        others = torch.stack([each[:, [j for j in range(n) if j != i]].prod(1) for i in range(n)], 1)
        said = F.one_hot(self.outcomes, kernel.vocab).double()
        p = torch.einsum("bno,o,onv->bnv", others, self.chance, said)
        return Categorical(torch.where(p.sum(-1, keepdim=True) > 0, p, 1.0).log())  # of what cannot be: whatever


def noised_oracle(law: Mapping[Sequence[int], float], kernel: Kernel) -> Noised:
    """The model of a law: probabilities of sequences of one length, under a kernel."""
    outcomes = torch.tensor(list(law))
    n = outcomes.shape[1]
    head = Believed(outcomes, torch.tensor(list(law.values()), dtype=torch.float64), kernel)
    model = Noised(line(n), InPlace(), Noises(n, kernel.states), Sum(n * kernel.states), head, kernel=kernel)
    return model.eval()
