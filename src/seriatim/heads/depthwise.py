"""Several codes an element, drawn one after another by a small causal transformer over depth.

Residual-quantization levels, parallel codebooks, the dimensions of a quantized latent: values are (b, n, D) ids. The
head holds a line of D codes of its own (RQ-Transformer, Lee et al. 2022, arXiv 2203.01941, section 3.2.2): its first
slot carries the hidden state, slot j the codes above j, and slot j reads out code j. The order over depth is the
project's own `Line`: training in one pass and drawing code by code follow from it.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from seriatim.backbones.transformer import Transformer, TransformerConfig
from seriatim.canvas import Canvas, Set
from seriatim.factorization.line import Line
from seriatim.heads.dist import Categorical, FromStates, drawn
from seriatim.layout import line
from seriatim.plan import Plan, Reads
from seriatim.random import Key, Random

Feed = Literal["sum", "last"]


class Depthwise(FromStates):
    """The joint distribution of D codes an element. The j-th draw of an element is its code j. Branches are mixed, and
    filters applied, at every depth."""

    __slots__ = ()

    def sample(self, random: Random, key: Key) -> Int[Tensor, "b m D"]:
        head: DepthwiseHead = self.head
        k, b, m, _ = self.states.shape
        blank = torch.zeros(b * m, head.depth, dtype=torch.long, device=self.states.device)
        canvas = Canvas(head.line, {"code": blank})
        cache = head.backbone.new_cache(k * b * m, head.depth)
        prefix, vector = head.condition(self.states)
        while (plan := head.order.step(canvas, None, cache.length)) is not None:
            depth, codes = cache.columns, canvas.value["code"].view(b, m, head.depth)
            x = head.feed(prefix, codes, slice(depth, depth + plan.size))
            h = head.backbone(x.flatten(0, 2), plan, cache, vector)
            rule = self._rule(head.logits(h.view(k, b, m, *h.shape[1:]), slice(depth, depth + plan.size))[..., 0, :])
            code = rule.sample(random, drawn(key, depth))
            canvas.apply([Set(code.reshape(b * m, 1))])
            cache.commit(plan.size, plan)
        return canvas.value["code"].view(b, m, head.depth)

    def log_prob(self, x: Int[Tensor, "b m D"]) -> Float[Tensor, "b m"]:
        """Log-probability of all D codes together, teacher-forced in one pass; nats."""
        return self.log_probs(x).sum(-1)

    def log_probs(self, x: Int[Tensor, "b m D"]) -> Float[Tensor, "b m D"]:
        """Log-probability of each code given the codes above it; nats."""
        head: DepthwiseHead = self.head
        k, b, m, _ = self.states.shape
        if tuple(x.shape) != (b, m, head.depth):
            raise ValueError(f"values are ({b}, {m}, {head.depth}) codes, got {tuple(x.shape)}")
        prefix, vector = head.condition(self.states)
        fed = head.feed(prefix, x.to(prefix.device), slice(0, head.depth))
        h = head.backbone(fed.flatten(0, 2), head.plan, None, vector)
        logits = head.logits(h.view(k, b, m, head.depth, -1), slice(0, head.depth))
        return self._rule(logits).log_probs().gather(-1, x.to(h.device)[..., None])[..., 0]

    def _rule(self, logits: Float[Tensor, "k *rest v"]) -> Categorical:
        """The law of one code, or of several: branches mixed, temperature and filters applied."""
        dist = Categorical(self.combine(logits))
        return dist if self.warper is None else self.warper(dist)


class DepthwiseHead(nn.Module):
    """D codes of `vocab` values each, from a hidden state of `width`.

    `config` sizes the transformer over depth. `feed` is what slot j > 0 carries: "sum" of the vectors of all codes
    above it (residual quantization: the partial reconstruction), or the "last" one only. The hidden state stands in the
    first slot; with `config.vector` it also drives adaptive layer norm at every depth. Each depth has an embedding
    table and an output matrix of its own.
    """

    exact = True
    continuous = False

    def __init__(self, width: int, vocab: int, depth: int, config: TransformerConfig, feed: Feed = "sum"):
        super().__init__()
        if vocab < 1 or depth < 1:
            raise ValueError(f"an element has at least 1 code of at least 1 value, got {depth} of {vocab}")
        if feed not in ("sum", "last"):
            raise ValueError(f"feed is 'sum' or 'last', not {feed!r}")
        if config.memory is not None or config.kinds != ("all",):
            raise ValueError("the transformer over depth has one kind of layer and attends to no memory")
        self.width, self.vocab, self.depth, self.feeds, self.value_shape = width, vocab, depth, feed, (depth,)
        self.backbone = Transformer(config)
        self.state = nn.Linear(width, config.width)
        self.vector = None if config.vector is None else nn.Linear(width, config.vector)
        self.place = nn.Parameter(torch.randn(depth, config.width) * 0.02)
        above = torch.randn(depth - 1, vocab, config.width) * 0.02  # the last code is fed to nobody
        self.table = nn.Parameter(above) if depth > 1 else None
        self.weight = nn.Parameter(torch.randn(depth, vocab, config.width) * 0.02)
        self.order, self.line = Line(prefix=1), line(depth, "code")
        self.plan: Plan = self.order.packed(Canvas(self.line, {"code": torch.zeros(1, depth, dtype=torch.long)}))

    def dist(self, h: Float[Tensor, "b m d"], reads: Reads | None, canvas: Canvas) -> Depthwise:
        return Depthwise(self, h[None])

    def loss(
        self,
        h: Float[Tensor, "b m d"],
        reads: Reads | None,
        value: Int[Tensor, "b m D"],
        random: Random | None = None,
        key: Key | None = None,
    ) -> Float[Tensor, "b m"]:
        """Cross-entropy of all D codes together (their sum) in nats; involves no randomness."""
        return -Depthwise(self, h[None]).log_prob(value)

    # ---- the line of codes -------------------------------------------------------------------------------------------

    def condition(self, states: Float[Tensor, "k b m d"]) -> tuple[Float[Tensor, "k b m w"], Tensor | None]:
        """The hidden state as the first slot's content, and as a vector for adaptive layer norm, one a row."""
        return self.state(states), None if self.vector is None else self.vector(states).flatten(0, 2)

    def feed(
        self, prefix: Float[Tensor, "k b m w"], codes: Int[Tensor, "b m D"], slots: slice
    ) -> Float[Tensor, "k b m s w"]:
        """What slots of the line carry; they look at codes above their own only."""
        parts = [prefix[..., None, :]] if slots.start == 0 else []
        if slots.stop > 1:
            assert self.table is not None
            first = 0 if self.feeds == "sum" else max(slots.start - 1, 0)
            level = torch.arange(first, slots.stop - 1, device=codes.device)
            above = self.table[level, codes[..., first : slots.stop - 1]]
            if self.feeds == "sum":
                above = above.cumsum(-2)[..., max(slots.start - 1, 0) :, :]
            parts.append(above.expand(prefix.shape[0], -1, -1, -1, -1))
        return torch.cat(parts, -2) + self.place[slots]

    def logits(self, h: Float[Tensor, "*rest s w"], slots: slice) -> Float[Tensor, "*rest s v"]:
        """Each slot through the matrix of its depth."""
        weight = self.weight[slots]
        if weight.shape[0] == 1:
            return F.linear(h, weight[0])
        return torch.einsum("...sw,svw->...sv", h, weight)
