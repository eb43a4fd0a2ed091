"""A model that knows a law: what it reads out are the true conditionals given all that a slot sees.

`tabular` makes up conditionals that belong to no joint law; here the joint is given, so that whatever a decoder loses
is the decoder's doing. It drives the real target, loop and orders, elements among known ones (`AnyOrder`, `Blocks`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from seriatim.backbones.cache import KVCache
from seriatim.canvas import Canvas
from seriatim.decoding.guess import Guess
from seriatim.embed import gather_values
from seriatim.factorization.base import Factorization
from seriatim.factorization.static import AnyOrder
from seriatim.heads.categorical import CategoricalHead
from seriatim.heads.dist import Categorical
from seriatim.layout import line
from seriatim.model import Model
from seriatim.plan import VALUE, Plan, Reads


class Contents(nn.Module):
    """What stands in a slot as one number of a vector: 1 at (element, value), nothing for a mask."""

    kind = "token"

    def __init__(self, elements: int, vocab: int):
        super().__init__()
        self.elements, self.vocab = elements, vocab

    def forward(
        self, canvas: Canvas, plan: Plan, guess: Guess | None = None, prefix: Tensor | None = None
    ) -> Float[Tensor, "b s d"]:
        element = plan.slots.element
        where = element[..., 0] * self.vocab + gather_values(canvas, element, self.kind)[..., 0]
        said = F.one_hot(where.expand(canvas.batch, -1), self.elements * self.vocab).double()
        return said * (plan.slots.source == VALUE)[..., None]


class Sum(nn.Module):
    """What a slot sees, all together."""

    mixers: Mapping[str, str] = {"all": "any"}

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def new_cache(self, batch: int, capacity: int = 256) -> KVCache:
        return KVCache(1, batch, 1, self.width, torch.float64, capacity=32)

    def forward(
        self,
        x: Float[Tensor, "b s d"],
        plan: Plan,
        cache: KVCache | None = None,
        vector: Tensor | None = None,
        memory: Tensor | None = None,
    ) -> Float[Tensor, "b s d"]:
        if cache is not None:
            cache.begin(plan)
        mask = plan.attention("all", cache)
        keys = x if cache is None else cache.append(0, x[:, None], x[:, None])[0][:, 0]
        if mask is None:
            return keys.sum(1, keepdim=True).expand_as(x)
        if isinstance(mask, str):
            return keys.cumsum(1)
        return mask[:, 0].double() @ keys


class Conditionals(CategoricalHead):
    """Logits of each value of the element that is read, among the outcomes that agree with all that is seen. Where
    none does (a decoder has put together what does not go together), all values are equally likely."""

    def __init__(self, outcomes: Int[Tensor, "o E"], weight: Float[Tensor, "o"], vocab: int):
        super().__init__(outcomes.shape[1] * vocab, vocab)
        del self.weight
        self.said = F.one_hot(outcomes, vocab).double()  # (outcomes, elements, values)
        self.chance = weight.double()

    def dist(self, h: Float[Tensor, "b m d"], reads: Reads | None, canvas: Canvas) -> Categorical:
        if reads is None:
            raise TypeError("the true conditionals are those of elements among known ones, in any order or in blocks")
        seen = (h > 0).double()
        said = self.said.flatten(1)
        agrees = seen @ said.T == seen.sum(-1, keepdim=True)  # (b, m, outcomes)
        p = ((agrees * self.chance) @ said).unflatten(-1, self.said.shape[1:])  # of every element: (b, m, E, v)
        mine = reads.element.clamp(min=0).expand(len(h), -1)[..., None, None]
        p = p.gather(2, mine.expand(-1, -1, 1, self.vocab))[:, :, 0]
        return Categorical(torch.where(agrees.any(-1, keepdim=True), p, 1.0).log())


def oracle(law: Mapping[Sequence[int], float], vocab: int, factorization: Factorization | None = None) -> Model:
    """The model of a law: probabilities of sequences of one length, of ids below `vocab`; in any order, or another one
    that reads masks. Raises ValueError for sequences that do not fit."""
    outcomes = torch.tensor(list(law))
    if outcomes.dim() != 2 or not 0 <= int(outcomes.min()) <= int(outcomes.max()) < vocab:
        raise ValueError(f"a law is of sequences of one length, of ids below {vocab}")
    n = outcomes.shape[1]
    head = Conditionals(outcomes, torch.tensor(list(law.values()), dtype=torch.float64), vocab)
    return Model(line(n), factorization or AnyOrder(), Contents(n, vocab), Sum(n * vocab), head).eval()
