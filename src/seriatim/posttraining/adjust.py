"""A sampler layer beside a masked model: what its states become when one more token is known (ADJUST, Bansal & Sanghavi
2025, arXiv 2509.22738).

From the states of the last forward, or its own, and what stands in the slots now, one layer in which everybody sees
everybody estimates the states that the model would have; the model's own head reads tokens out of them. It is unrolled:
the same layer after each token. It learns on the model's own ways: canvases on which the model decides a few tokens one
by one, each forward a full one, whose last states are what the unrolled layer is to come to.

The published ways are whole texts that the model wrote. Here a way begins on a text of the data with so much of a block
shown, and takes a few steps from there, so that each costs a few forwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from seriatim.backbones.norm import rms_norm
from seriatim.canvas import Canvas, Set
from seriatim.decoding.adjust import described
from seriatim.decoding.sample import Rule, Select
from seriatim.decoding.target import Target
from seriatim.decoding.unmask import Unmask, at_work
from seriatim.factorization.static import AnyOrder
from seriatim.initial import drawn
from seriatim.layout import line
from seriatim.objectives.masked import fewest
from seriatim.plan import Plan
from seriatim.posttraining.drafting import Base, DraftLearner, Part
from seriatim.posttraining.layers import llama_layer
from seriatim.random import Generator

EPS = 1e-6


@dataclass(frozen=True)
class AdjustConfig:
    """unroll: after how many tokens the layer learns to refresh the states, at most (decoding takes one more token a
    forward); rule: which token the model decides first on its ways; feature: what the distance to its states counts in
    the loss; hidden, heads: of the layer, where they are not the model's."""

    unroll: int = 3
    rule: Rule = "entropy"
    feature: float = 0.1
    hidden: int | None = None
    heads: int | None = None

    def __post_init__(self) -> None:
        Select(self.rule)  # refuses what is no rule
        if self.unroll < 1:
            raise ValueError(f"a layer is unrolled at least once, got {self.unroll}")

    @property
    def lengths(self) -> Float[Tensor, " unroll"]:
        """How probable it is that training unrolls the layer 1, 2, ... times: nearly uniform, a softmax of 1, 1/2, 1/4,
        ... as in the released code, and not these numbers themselves."""
        return torch.softmax(0.5 ** torch.arange(self.unroll, dtype=torch.float64), 0)


class Adjust(Part):
    """h + norm(layer(W [norm(e); norm(h)])). At first nothing changes: the gain of the last norm is zero, so that
    tokens are those of one forward, independent of each other."""

    key, Config, free = "adjust", AdjustConfig, True
    reading: ClassVar[Mapping[str, int]] = MappingProxyType({"window": 96})
    config: AdjustConfig

    def __init__(self, config: AdjustConfig, base: Base):
        super().__init__(config, base)
        if type(base.model.factorization) is not AnyOrder:
            raise ValueError(f"{base}: a sampler layer is beside a model in which everybody sees everybody (mdlm)")
        d, device = base.width, base.device
        self.token_gain = nn.Parameter(torch.ones(d, device=device))
        self.state_gain = nn.Parameter(torch.ones(d, device=device))
        self.gain = nn.Parameter(torch.zeros(d, device=device))
        self.fuse = nn.Parameter(torch.cat([drawn(d, d, std=0.5 * d**-0.5), torch.eye(d)], 1).to(device))
        self.layer = llama_layer(base, config.heads, hidden=config.hidden)

    def forward(self, e: Float[Tensor, "b E d"], h: Float[Tensor, "b E d"], plan: Plan) -> Float[Tensor, "b E d"]:
        """The states now, from what stands in the slots now (as the base embeds it) and the states before."""
        pair = torch.cat([rms_norm(e, self.token_gain, EPS), rms_norm(h, self.state_gain, EPS)], -1)
        return h + rms_norm(self.layer(F.linear(pair, self.fuse), plan).to(h.dtype), self.gain, EPS)

    def learner(self, base: Base) -> AdjustLearner:
        return AdjustLearner(self, base)

    def loss(self, base: Base, ids: Int[Tensor, "b n"], random: Generator) -> tuple[Tensor, Tensor, dict[str, float]]:
        """The divergence from what the base says after a few more tokens to what is read out of the unrolled layer, and
        (`feature`) the smooth L1 distance of the states, averaged over dimensions; over the elements that are decided
        next. Only the last unroll counts. `marginal`: the divergence without the layer."""
        count = 1 + int(torch.multinomial(self.config.lengths, 1, generator=random.generator))
        way = walked(base, begun(base, ids, count + 1, random), count, self.config.rule, random)
        h = way.state[0].to(self.gain.dtype)
        for e in way.vectors:
            h = self(e, h, way.plan)
        own, first, last = (x[way.next] for x in (h, way.state[0], way.state[-1]))
        said = _log_softmax(base, last)
        kl, before = ((said.exp() * (said - _log_softmax(base, x))).sum(-1) for x in (own, first))
        far = F.smooth_l1_loss(own.float(), last.float(), reduction="none").mean(-1)
        figures = {"kl": kl.mean(), "marginal": before.mean(), "feature": far.mean()}
        total = (kl + self.config.feature * far).sum()
        return total, way.next.sum(), {name: float(x.detach()) for name, x in figures.items()}


def _log_softmax(base: Base, h: Float[Tensor, "m d"]) -> Float[Tensor, "m v"]:
    x = base.logits(h)
    return torch.log_softmax(x if x.dtype == torch.float64 else x.float(), -1)


@dataclass(frozen=True)
class Way:
    """Some steps of a model, a token each. state: of each element, before the first step and after each; vectors: what
    stands in the slots after each; plan: of the last forward; next: the elements that may be decided next."""

    state: list[Float[Tensor, "b E d"]]
    vectors: list[Float[Tensor, "b E d"]]
    plan: Plan
    next: Bool[Tensor, "b E"]


@torch.no_grad()
def walked(base: Base, canvas: Canvas, count: int, rule: Rule, random: Generator) -> Way:
    """So many steps from a canvas, which follows."""
    target, one, rows = Target(base.model, cached=False), Unmask(Select(rule, canvas.layout.size)), cast(Any, None)
    state, vectors = [], []
    for turn in range(count + 1):
        if turn:
            canvas.apply(one.decide(canvas, None, rows, random).edits)
        plan: Any = target.plan(canvas)
        rows = target.forward(plan, canvas)
        state.append(described(rows.hidden, base.model))
        vectors.append(base.model.vectors(plan, canvas))
    element = at_work(canvas, rows)
    return Way(state, vectors[1:], plan, element.to(base.device) >= 0)


def begun(base: Base, ids: Int[Tensor, "b n"], left: int, random: Generator) -> Canvas:
    """Texts on the way: all before a place is given, of the block behind it any number of elements is known, and the
    rest is not, at least `left` elements. The place is the same in all rows. Raises ValueError where windows are too
    short for that."""
    (b, n), g = ids.shape, random.generator
    if n < left:
        raise ValueError(f"windows of {n} tokens leave no {left} to decide: give a longer --window")
    start = int(torch.randint(n - left + 1, (), generator=g))
    block = getattr(base.system.config, "block", None) or n
    canvas = base.system.blocked(base.model.canvas({"token": ids}, start, layout=line(n)), block)
    most = min(block - 1, n - start - left)
    count = torch.randint(most + 1, (b,), generator=g)
    shown = fewest(canvas.rank == 0, count, torch.rand(b, n, generator=g))
    return canvas.apply([Set(ids, torch.where(shown, torch.arange(n), -1))])


class AdjustLearner(DraftLearner):
    """The layer beside its frozen base. Batches hold "token"."""

    def __init__(self, part: Adjust, base: Base):
        super().__init__(part, base)  # type: ignore[arg-type]
        base.model.requires_grad_(False)

    def _loss(self, batch: Mapping[str, Tensor], random: Generator) -> tuple[Tensor, Tensor, dict[str, float]]:
        ids = batch["token"]
        self.base.model.to(ids.device)
        return self.part.loss(self.base, ids, random)  # type: ignore[call-arg, arg-type]
